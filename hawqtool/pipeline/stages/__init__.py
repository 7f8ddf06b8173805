"""One module per box of the data flow."""
