"""`python -m benchmarks.equal_cost` makes docs/results/equal_cost.md."""
