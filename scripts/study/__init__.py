"""Parts of ``scripts/sensitivity_study.py``, some of which ``scripts/ablation.py`` uses too."""
