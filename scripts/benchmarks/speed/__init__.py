"""Parts of `benchmark.py`: checkpoints of known shapes, the machine's rates, floors, stages."""
