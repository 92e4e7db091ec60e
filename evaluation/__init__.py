"""The evaluation: sees videos and prompts, never models. ``python -m evaluation --help``."""

from sora_lightning.torchvision_guard import make_torchvision_importable

# torchmetrics, which the metrics build on, imports torchvision wherever it is installed.
make_torchvision_importable()
