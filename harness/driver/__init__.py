"""The stages of a run, carried out by its driver process."""
