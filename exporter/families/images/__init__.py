"""Image preparation without torch: sizes, tiles, crops, pixels."""
