"""Pure tensor mathematics: scales, compensation, codes."""
