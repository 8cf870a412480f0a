"""Variant -> ONNX graphs over one file of weights."""
