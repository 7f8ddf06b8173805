"""Parts of ``scripts/sensitivity_study.py``."""
