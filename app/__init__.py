"""Bouquet: federated LoRA fine-tuning of Stable Diffusion, without moving a single image."""
