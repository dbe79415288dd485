"""Which channels of a model depend on which, and their removal."""
