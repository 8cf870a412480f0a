"""The torch executor: programs of a captured graph, the state of trajectories, and one step of them."""
