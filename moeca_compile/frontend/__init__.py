"""The `torch.compile` backend: it finds the calling handle, prepares the model, and reports graph breaks."""
