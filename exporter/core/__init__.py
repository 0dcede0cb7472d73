"""Artifacts, digests, tensors, errors and progress; imports nothing else of ours."""
