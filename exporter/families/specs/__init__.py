"""Parts of models as small records: their sizes, and every tensor with its shape and role."""
