"""A finished run judged with the limits of one that was accepted."""
