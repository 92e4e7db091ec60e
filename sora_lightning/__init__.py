"""Sora Lightning: trains and evaluates Sora-type text-to-video models on PyTorch Lightning."""

from importlib.metadata import version

from sora_lightning.torchvision_guard import make_torchvision_importable

make_torchvision_importable()


def __getattr__(name: str) -> str:
    if name == "__version__":  # looked up late: --help needs no metadata
        return version("sora-lightning")
    raise AttributeError(name)
