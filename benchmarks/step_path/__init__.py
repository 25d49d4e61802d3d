"""`python -m benchmarks.step_path` counts what a reader meets of one training step; docs/architecture.md has the
figures."""
