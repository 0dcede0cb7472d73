"""Families that caption: one file each, found by its place here."""
