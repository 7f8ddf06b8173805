"""Reading checkpoints and walking models block by block."""
