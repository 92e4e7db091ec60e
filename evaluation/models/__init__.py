"""Sampling and evaluation of models: the only folder that imports them."""
