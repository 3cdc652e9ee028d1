"""QLoRA for consumer GPUs."""
