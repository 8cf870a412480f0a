"""What `torch.compile` calls: whose call it is, the first call, graph breaks, and the ways in."""
