"""Run a base with a pool and a router: scores, generation, and where tokens go."""
