"""Tests of medexport."""
