"""The method: LoRA experts, their gates, and routers over pools of them (no Ray, no Hydra)."""
