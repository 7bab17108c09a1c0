"""A against B: what `jaxrlhf evaluate` does."""
