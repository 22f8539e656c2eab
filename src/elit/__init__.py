"""Elastic diffusion transformers: one checkpoint, any compute budget.

Names are imported when they are first used, so that `import elit` costs nothing.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elit.caching.calibration import calibrate_cache
    from elit.caching.configs import TeaCacheConfig
    from elit.caching.hooks import disable_step_cache, enable_step_cache
    from elit.choosing.choose import choose
    from elit.data import load_dataset
    from elit.flow.guidance import CFG, AutoGuidance, CheapCFG, Guidance
    from elit.flow.objective import SigmaDensity, flow_matching_loss
    from elit.flow.schedulers import (
        FlowMatchEulerMaruyamaScheduler,
        FlowMatchUniformEulerScheduler,
        FlowMatchUniformHeunScheduler,
        make_scheduler,
    )
    from elit.inspection.report import inspect_pipeline
    from elit.inspection.subject import choose_subject
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
    from elit.retrofit.elastic import elasticize, unelasticize
    from elit.retrofit.files import load_elastic, load_interface, save_interface
    from elit.retrofit.guider import ElasticGuidance
    from elit.retrofit.layout import Layout, PerToken
    from elit.scheduling.schedule import load_schedule
    from elit.training.config import TrainConfig
    from elit.training.python import finetune, train

try:
    __version__ = version("elit-diffusion")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

_NAMES = {
    "elit.caching.calibration": "calibrate_cache",
    "elit.caching.configs": "TeaCacheConfig",
    "elit.caching.hooks": "disable_step_cache enable_step_cache",
    "elit.choosing.choose": "choose",
    "elit.flow.guidance": "AutoGuidance CFG CheapCFG Guidance",
    "elit.flow.schedulers": "FlowMatchEulerMaruyamaScheduler FlowMatchUniformEulerScheduler "
    "FlowMatchUniformHeunScheduler make_scheduler",
    "elit.interface.budget": "TailDropping resolve_budget",
    "elit.interop.official": "from_official_checkpoint",
    "elit.models.dit": "DiT",
    "elit.models.hdit": "HDiT",
    "elit.models.mmdit": "MMDiT",
    "elit.models.presets": "create_model",
    "elit.models.sit": "SiT",
    "elit.models.uvit": "UViT",
    "elit.pipelines.elit_pipeline": "ElitPipeline",
    "elit.pipelines.load": "load_pipeline",
    "elit.pipelines.text_pipeline": "ElitTextPipeline",
    "elit.retrofit.elastic": "elasticize unelasticize",
    "elit.retrofit.files": "load_elastic load_interface save_interface",
    "elit.retrofit.guider": "ElasticGuidance",
    "elit.retrofit.layout": "Layout PerToken",
    "elit.scheduling.schedule": "load_schedule",
    "elit.data": "load_dataset",
    "elit.inspection.subject": "choose_subject",
    "elit.inspection.report": "inspect_pipeline",
    "elit.training.python": "finetune train",
    "elit.training.config": "TrainConfig",
    "elit.flow.objective": "SigmaDensity flow_matching_loss",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'elit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
