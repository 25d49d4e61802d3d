"""What a run reads: prompts for training and evaluation, and whole benchmarks."""
