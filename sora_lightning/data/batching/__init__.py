"""Sizes, the order of batches, and the datasets that serve them."""
