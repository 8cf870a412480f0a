"""The captured graph: how it is captured, helpers for torch.fx, and what is known of it (regions, variants)."""
