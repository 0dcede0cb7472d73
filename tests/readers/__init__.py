"""Programs that know nothing of this package read its exported model folder."""
