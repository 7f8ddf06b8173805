"""What a model reads of a row: tokens, images, sounds, or two of them together."""
