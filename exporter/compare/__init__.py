"""What the candidate says, how fast and how large it is, beside the reference."""
