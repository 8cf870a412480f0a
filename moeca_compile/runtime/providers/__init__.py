"""The runtimes that a session can use. No torch."""
