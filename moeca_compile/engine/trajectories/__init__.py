"""A trajectory: where it begins and ends, and whose calls are its own."""
