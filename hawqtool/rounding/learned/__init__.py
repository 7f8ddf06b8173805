"""Rounding that is learned by gradients: one block at a time, or all of them against the model's output."""
