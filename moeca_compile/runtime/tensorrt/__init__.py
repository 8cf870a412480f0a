"""Engines that TensorRT or TensorRT-RTX made of a bundle's variants: found, opened and run. No torch.

Both libraries have the same interface; where they differ, `library.py` and `lowering/tensorrt/build.py` say so. What
runs an engine was tried with one that plays TensorRT's part on the host, not on a GPU.
"""
