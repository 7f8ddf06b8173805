"""hawqtool: measure, allocate, round, verify: mixed-precision quantization of transformer checkpoints."""

__version__ = "0.1.0"
