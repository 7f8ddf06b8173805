"""Checkpoint folders: headers, tensors, where they come from, what is fused."""
