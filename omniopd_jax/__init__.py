"""OmniOPD in JAX: logit-free on-policy distillation from a teacher that only speaks text (arXiv 2606.01476)."""

__version__ = "0.1.0"
