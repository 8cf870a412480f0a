"""The `moeca::` operators: native torch first, kernels registered beside it."""
