"""Quantized originals: checkpoints published in 8 or 4 bits, seen as the 16-bit model that they stand for."""
