"""Rounding on the grids of GGUF's blocks: scales in two levels, float offsets, tables of values."""
