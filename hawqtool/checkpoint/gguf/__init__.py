"""GGUF, the file of llama.cpp: headers, and the block formats in which it stores weights."""
