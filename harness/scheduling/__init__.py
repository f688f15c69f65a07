"""Calls on reused Ray actors, and the cluster that they run on."""
