"""What a finished run says of itself, from its report alone."""
