"""Quantized checkpoints as other tools write and read them: GPTQ, AWQ, bitsandbytes."""
