"""Scripts that make the shipped data: the phantoms and the demo model."""
