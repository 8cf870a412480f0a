"""What `moeca drift` shows of a model's regions, tokens, expert branches and experts.

Experimental: it serves the study of expert branches. No compile and no calibration needs it, and what it prints may
change.
"""
