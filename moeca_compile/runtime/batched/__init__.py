"""Many denoising loops that share calls of a model, each at a step of its own."""
