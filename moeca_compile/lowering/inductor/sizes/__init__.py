"""One compiled program for all sizes of an image or a prompt."""
