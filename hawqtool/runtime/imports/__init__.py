"""How the slow libraries are imported, above all where there is a GPU."""
