"""Writing and verifying packed checkpoints."""
