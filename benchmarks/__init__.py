"""Measurements of cost: one module each, run with `python -m benchmarks.<name>`."""
