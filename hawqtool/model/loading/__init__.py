"""What transformers does while it loads a model, as far as packed layers are concerned."""
