"""Configs of diffusers' kind."""

from typing import Any

from diffusers.configuration_utils import FrozenDict


def leave_out_defaults(part: Any, **defaults: Any) -> None:
    """Drop settings at their defaults from a config: it is then as before there were such."""
    config = part.config.items()
    kept = {key: x for key, x in config if key not in defaults or x != defaults[key]}
    part._internal_dict = FrozenDict(kept)
