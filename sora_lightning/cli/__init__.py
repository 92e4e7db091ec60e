"""Implementation of the commands that `sora_lightning/__main__.py` lists: training, sampling and
error messages."""
