"""Quantized weights stay quantized in a graph: what they are, the forms that runtimes have, the pass."""
