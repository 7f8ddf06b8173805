"""What a checkpoint is, original or quantized, without running it."""
