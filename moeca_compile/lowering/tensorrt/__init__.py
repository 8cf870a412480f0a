"""A bundle's variants -> engines of TensorRT or TensorRT-RTX. No torch."""
