"""The signed directory that a hospital runs: layout, manifest, signature, check."""
