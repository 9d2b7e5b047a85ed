"""Compose the shipped config in a test, as the command line does."""

from __future__ import annotations

from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cdpo import train  # noqa: F401  # train registers the resolvers
from cdpo.config import read as config  # noqa: F401  # train registers the resolvers


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        node = compose("config", overrides=list(overrides))
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]
