"""What the other commands do, a file each."""
