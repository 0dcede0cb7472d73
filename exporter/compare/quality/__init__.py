"""Measures of what a caption says: words, clinical facts, distributions."""
