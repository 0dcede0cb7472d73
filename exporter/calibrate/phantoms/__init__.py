"""Phantoms: procedurally drawn grayscale pictures with captions and facts. Drawings, not medicine.

Everything follows from text keys (set, patient, image); nothing needs torch or a network.
"""
