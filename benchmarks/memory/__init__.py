"""`python -m benchmarks.memory` makes docs/results/memory.md."""
