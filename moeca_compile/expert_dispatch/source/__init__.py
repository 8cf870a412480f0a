"""Methods as source: read, made straight, and given back as functions."""
