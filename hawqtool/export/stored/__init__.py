"""Stored tensors of what is quantized, by format."""
