"""How the slow libraries are imported where there is a GPU."""
