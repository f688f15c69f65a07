"""Chaos: a run whose processes are killed again and again ends as one that is left alone."""
