"""The judge of a tokenizer: what it gives back of real clips, beside older ways to say as much."""
