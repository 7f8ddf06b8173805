"""Parts of serve.py: what runs inside the engine's process, and models without weights."""
