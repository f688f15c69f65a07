"""Train experts on actors."""
