"""The command line below its table of verbs (`sora_lightning/__main__.py`): training, sampling, and
plain errors."""
