"""Elastic diffusion transformers: one checkpoint, any compute budget.

Names are imported when they are first used, so that `import elit` costs nothing.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elit.caching.calibration import calibrate_cache
    from elit.caching.configs import TeaCacheConfig
    from elit.caching.mixin import disable_step_cache, enable_step_cache
    from elit.choosing.choose import choose
    from elit.flow.guidance import CFG, AutoGuidance, CheapCFG, Guidance
    from elit.flow.schedulers import (
        FlowMatchEulerMaruyamaScheduler,
        FlowMatchUniformEulerScheduler,
        FlowMatchUniformHeunScheduler,
        make_scheduler,
    )
    from elit.interface.budget import TailDropping, resolve_budget
    from elit.interop.official import from_official_checkpoint
    from elit.models.dit import DiT
    from elit.models.hdit import HDiT
    from elit.models.mmdit import MMDiT
    from elit.models.presets import create_model
    from elit.models.sit import SiT
    from elit.models.uvit import UViT
    from elit.pipelines.elit_pipeline import ElitPipeline
    from elit.pipelines.load import load_pipeline
    from elit.pipelines.text_pipeline import ElitTextPipeline
    from elit.retrofit.elasticize import elasticize, unelasticize
    from elit.retrofit.files import load_elastic, load_interface, save_interface
    from elit.retrofit.guider import ElasticGuidance
    from elit.retrofit.layout import Layout, PerToken

try:
    __version__ = version("elit-diffusion")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

_HOME = {
    "AutoGuidance": "elit.flow.guidance",
    "CFG": "elit.flow.guidance",
    "CheapCFG": "elit.flow.guidance",
    "DiT": "elit.models.dit",
    "ElasticGuidance": "elit.retrofit.guider",
    "HDiT": "elit.models.hdit",
    "ElitPipeline": "elit.pipelines.elit_pipeline",
    "ElitTextPipeline": "elit.pipelines.text_pipeline",
    "FlowMatchEulerMaruyamaScheduler": "elit.flow.schedulers",
    "FlowMatchUniformEulerScheduler": "elit.flow.schedulers",
    "FlowMatchUniformHeunScheduler": "elit.flow.schedulers",
    "Guidance": "elit.flow.guidance",
    "Layout": "elit.retrofit.layout",
    "MMDiT": "elit.models.mmdit",
    "PerToken": "elit.retrofit.layout",
    "SiT": "elit.models.sit",
    "TailDropping": "elit.interface.budget",
    "TeaCacheConfig": "elit.caching.configs",
    "UViT": "elit.models.uvit",
    "calibrate_cache": "elit.caching.calibration",
    "choose": "elit.choosing.choose",
    "create_model": "elit.models.presets",
    "disable_step_cache": "elit.caching.mixin",
    "elasticize": "elit.retrofit.elasticize",
    "enable_step_cache": "elit.caching.mixin",
    "from_official_checkpoint": "elit.interop.official",
    "load_elastic": "elit.retrofit.files",
    "load_interface": "elit.retrofit.files",
    "load_pipeline": "elit.pipelines.load",
    "make_scheduler": "elit.flow.schedulers",
    "resolve_budget": "elit.interface.budget",
    "save_interface": "elit.retrofit.files",
    "unelasticize": "elit.retrofit.elasticize",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'elit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
