"""Sora Lightning: trains and judges Sora-type text-to-video models on PyTorch Lightning."""

from sora_lightning.torchvision_guard import make_torchvision_importable

make_torchvision_importable()
