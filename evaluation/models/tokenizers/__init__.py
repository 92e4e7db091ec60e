"""Evaluation of a tokenizer: reconstructions of real clips, compared with conventional codecs."""
