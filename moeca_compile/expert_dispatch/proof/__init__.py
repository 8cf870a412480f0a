"""What a module's experts compute, and the proof that a rewritten dispatch computes the same."""
