"""Measurements: each script says what it shows; figures are ratios taken side by side, or tables made from result
lines."""
