"""Other weights for a bundle: how its constants are made of the model's parameters. No torch."""
