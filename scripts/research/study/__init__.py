"""Parts of ``scripts/research/sensitivity_study.py``, some of which ``scripts/research/ablation.py`` uses too."""
