"""What `scripts/benchmark.py` is made of: checkpoints of known shapes, the machine's rates, floors, stages."""
