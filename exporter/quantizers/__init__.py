"""Quantization of a model folder: schemes, the plan of every tensor, and the methods."""
