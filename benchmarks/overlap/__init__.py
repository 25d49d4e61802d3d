"""`python -m benchmarks.overlap` makes docs/results/overlap.md."""
