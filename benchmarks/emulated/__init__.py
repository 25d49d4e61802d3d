"""`python -m benchmarks.emulated`."""
