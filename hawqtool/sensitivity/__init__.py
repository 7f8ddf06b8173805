"""How much the loss of the model reacts to rounding each layer."""
