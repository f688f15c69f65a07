"""Evaluate routers on actors, through lm-eval."""
