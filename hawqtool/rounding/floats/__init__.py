"""Rounding to small floats: values of codes, scales as they are stored, inputs as engines round them."""
