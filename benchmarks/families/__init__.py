"""`python -m benchmarks.vocab` makes docs/results/vocab.md."""
