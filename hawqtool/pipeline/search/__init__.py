"""Which of the tried plans is shipped."""
