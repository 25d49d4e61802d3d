"""`python -m benchmarks.grading` makes docs/results/grading.md."""
