"""Architecture families: one file each. Importable without torch."""
