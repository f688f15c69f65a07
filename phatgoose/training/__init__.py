"""Train an expert: LoRA factors on a task, then a gate per adapted linear."""
