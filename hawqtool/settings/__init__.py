"""Settings of a run: what each says of itself, its type and default, and the rules of single values."""
