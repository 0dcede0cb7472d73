"""Unit tests of exporter.adapters."""
