"""Fuzzing of hawqtool's parsers: what is fuzzed, with which inputs, under which limits."""
