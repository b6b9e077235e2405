"""Trainer, accelerate and timm."""
