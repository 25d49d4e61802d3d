"""`python -m benchmarks.sampling` makes docs/results/sampling.md."""
