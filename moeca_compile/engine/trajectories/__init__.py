"""Trajectories: where each begins and ends, and which calls belong to it."""
