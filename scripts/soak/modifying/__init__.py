"""Parts of modifications.py: the kinds of change, and the forging of records."""
