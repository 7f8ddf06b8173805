"""Perplexity and divergence from the original model."""
