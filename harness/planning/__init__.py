"""Decide what a run does before anything is written or any actor starts."""
