"""Sizes for plans: a model's matrices and sequences from published facts alone."""
