"""Metrics: pure functions on NumPy arrays and strings."""
