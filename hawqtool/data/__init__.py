"""Calibration and evaluation rows."""
