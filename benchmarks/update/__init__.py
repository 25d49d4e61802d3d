"""`python -m benchmarks.update` makes docs/results/update.md."""
