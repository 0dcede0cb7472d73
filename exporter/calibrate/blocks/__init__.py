"""A decoder's blocks in torch float32, one file per kind."""
