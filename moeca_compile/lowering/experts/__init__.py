"""`moeca::experts` in ONNX, in the form that a target runs best: one file a form, the choice, the rewriting."""
