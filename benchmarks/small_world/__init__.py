"""`python -m benchmarks.small_world` makes docs/results/small_world.md."""
