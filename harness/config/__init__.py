"""The configuration of a run: schema, composition and checks."""
