"""Mergeable rotations: which tensors read and write the residual stream, and the checkpoint in another basis of it."""
