"""`python -m benchmarks.continuation_modes` makes docs/results/continuation_modes.md."""
