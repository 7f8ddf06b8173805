"""GGUF as output: a template of llama.cpp's converter gives all but the quantized tensors."""
