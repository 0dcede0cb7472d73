"""Families of other tasks: one file each, found by its place here."""
