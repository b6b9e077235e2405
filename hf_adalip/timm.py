"""Importing this registers the optimizers with timm: `train.py --device-modules hf_adalip.timm`."""

from .integrations.timm import register

register()
