"""Compiled column loops and scale searches, and the choice between them."""
