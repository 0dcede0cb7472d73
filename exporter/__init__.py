"""medexport: merge, quantize, export, compare and package medical vision-language models."""

__version__ = "0.1.0"
