"""Load an artifact and caption images."""
