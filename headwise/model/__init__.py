"""Model: a checkpoint as attention layers that can be read, gated, watched and edited."""
