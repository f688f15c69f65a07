"""The stages of a run, as its driver process carries them out."""
