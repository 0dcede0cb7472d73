"""Torch classes for models that transformers has none for. For the build side."""
