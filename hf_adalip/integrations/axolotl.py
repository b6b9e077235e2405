"""Axolotl: `plugins: [hf_adalip.integrations.axolotl.AdaLipPlugin]` in its configuration."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from .trainer import attach_if_ours, register


class AdaLipPlugin(BasePlugin):  # type: ignore[misc]
    """Makes every name of the registry an `optimizer:` of Axolotl, and calls `attach`.

    Learning rate, weight decay, betas and epsilon are Axolotl's; the rest goes to `optim_args`:

        plugins: [hf_adalip.integrations.axolotl.AdaLipPlugin]
        optimizer: adamlip
        optim_args: {gamma: 0.9, scale_bounds: "0.1:10"}
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Axolotl calls it with the configuration, before that is validated."""
        register()

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Axolotl calls it before it trains."""
        attach_if_ours(trainer)
