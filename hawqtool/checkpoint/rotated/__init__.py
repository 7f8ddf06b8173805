"""Rotated weights: a checkpoint in another basis of the residual stream, computed as it is read."""
