"""Evaluation of a tokenizer: what it gives back of real clips, beside older ways to code them."""
