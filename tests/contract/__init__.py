"""Contract tests: one interface, every implementation or an independent reference."""
