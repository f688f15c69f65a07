"""Decide what a run does, from what is prepared, before any actor starts."""
