"""Profiles of models and targets: data files with a schema."""
