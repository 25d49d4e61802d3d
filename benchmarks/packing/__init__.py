"""`python -m benchmarks.packing` makes docs/results/packing.md."""
