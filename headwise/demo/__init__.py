"""What ``headwise demo`` runs: a small model with two outputs, its training, and the recipe to copy."""
