"""Numbers -> Schedule. No torch.fx here: what a graph costs and how it errs arrives as plain numbers."""
