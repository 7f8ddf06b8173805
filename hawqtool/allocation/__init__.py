"""Which width each unit gets under a budget."""
