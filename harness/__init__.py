"""A distributed benchmark: train pools of experts and evaluate every router over them."""
