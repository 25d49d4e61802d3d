"""`python -m benchmarks.methods` makes docs/results/methods.md."""
