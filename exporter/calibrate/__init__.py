"""Calibration sets: read, check, batches, activation statistics."""
