"""Compare runs whose processes are killed repeatedly with an undisturbed run."""
