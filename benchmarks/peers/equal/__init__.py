"""Peers at as many evaluations of the network as our schedules make, on the held-out digits of `benchmarks.fitted`."""
