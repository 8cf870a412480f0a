"""Rotary embeddings as ONNX's operator: which elements of values are equal, what is one by proof, the pass."""
