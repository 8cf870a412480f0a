"""The torch executor: programs of captured graphs, the state of trajectories, and the run of one step."""
