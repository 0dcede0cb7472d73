"""Image sets in the layouts in which public data sets are published, one file each."""
