"""What a run is: its job, menu, files, identity and memory."""
