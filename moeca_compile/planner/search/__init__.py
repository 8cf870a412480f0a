"""The search over plans. The costs and errors of a graph arrive as plain numbers: nothing here imports torch.fx."""
