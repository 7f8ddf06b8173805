"""One block of the model in memory at a time."""
