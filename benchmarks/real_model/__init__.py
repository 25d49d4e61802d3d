"""`python -m benchmarks.real_model` makes docs/results/real_model.md."""
