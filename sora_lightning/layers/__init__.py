"""Layers that tokenizers, denoisers and conditioners share."""
