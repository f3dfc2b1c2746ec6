"""Calibration: data -> numbers."""
