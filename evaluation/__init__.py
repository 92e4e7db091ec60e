"""Evaluation of videos against prompts and real clips. See ``python -m evaluation --help``.

Only ``evaluation.models`` loads models.
"""

from sora_lightning.torchvision_guard import make_torchvision_importable

# torchmetrics, which the metrics build on, imports torchvision wherever it is installed.
make_torchvision_importable()
