"""LoRA adapters: read without trust, merge tensor by tensor, prove that the merge is right."""
