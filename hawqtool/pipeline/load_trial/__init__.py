"""Whether transformers loads what was written: a child process does it and makes one forward pass."""
