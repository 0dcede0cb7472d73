"""Layouts of tensor names and configs that checkpoints were published in."""
