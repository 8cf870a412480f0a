"""Prints and draws what the other rooms found or did."""
