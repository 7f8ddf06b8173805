"""The process that a run lives in: memory settings, standard output, timing, determinism, saved parts, narration."""
