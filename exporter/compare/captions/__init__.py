"""Caption metrics: one file per metric, one row in `table.py`."""
