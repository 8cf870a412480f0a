"""`moeca_compile.BatchedModel`: many denoising loops that share calls of a compiled model."""
