"""A real language model and a real server on two CPU cores: what `make real` and `make test-real` run."""
