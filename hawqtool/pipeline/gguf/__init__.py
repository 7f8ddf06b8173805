"""GGUF as the result of a run: units of llama.cpp's tensors, block types, one file."""
