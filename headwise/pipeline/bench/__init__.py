"""Things timed against each other: here, on a board, and by what a GPU could reach at best."""
