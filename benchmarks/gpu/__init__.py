"""`python -m benchmarks.gpu` makes docs/results/gpu.md."""
