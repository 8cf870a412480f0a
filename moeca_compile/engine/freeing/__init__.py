"""Weights that only prologues read: out of the device's memory once their values are computed."""
