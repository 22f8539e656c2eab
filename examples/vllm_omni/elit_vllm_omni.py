"""A plugin for vLLM-Omni: runs of elit as pipelines whose batches mix budgets."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image
from torch import Tensor, nn
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.models.interface import SupportsComponentDiscovery
from vllm_omni.diffusion.registry import register_diffusion_model
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

from elit import Guidance
from elit.pipelines.arguments import read_guidance
from elit.pipelines.load import load_pipeline

PIPELINES = ("ElitPipeline", "ElitTextPipeline")  # as a run's model_index.json names them
SHARED = ("guidance", "guide_budget")  # beside steps, scale and size, which the engine compares
EXTRA_ARGS = {"budget", "class_label", *SHARED}
UNUSED = ("true_cfg_scale", "sigmas", "latents", "strength", "lora_request")


def register() -> None:
    """Tell the engine of both pipelines; it calls this in each of its processes."""
    for name in PIPELINES:
        register_diffusion_model(
            name, __name__, "ElitOmniPipeline", "check_requests", "images_of_tensors"
        )


def text_of(request: OmniDiffusionRequest, key: str = "prompt") -> str:
    """A text of a request, whose prompt is one or a dict of several."""
    prompt = {"prompt": request.prompt} if isinstance(request.prompt, str) else request.prompt
    return prompt.get(key) or ""


def label_of(request: OmniDiffusionRequest) -> Any:
    """The class label of a request: an extra argument, or its prompt as a number."""
    text = text_of(request).strip()
    return request.sampling_params.extra_args.get(
        "class_label", int(text) if text.isdigit() else text
    )


def guidance_of(request: OmniDiffusionRequest) -> Guidance | None:
    """The guidance that a request asks for; the engine fills in a scale of 1 where it gave none."""
    sampling, (name, guide_budget) = request.sampling_params, shared(request)
    scale = sampling.guidance_scale if sampling.guidance_scale_provided else None
    return read_guidance(name, scale, guide_budget)


def shared(request: OmniDiffusionRequest) -> tuple:
    """What requests of a batch must agree in and the engine doesn't know."""
    return tuple(request.sampling_params.extra_args.get(name) for name in SHARED)


def check_requests(od_config: OmniDiffusionConfig) -> Callable:
    """What the engine does with each request before it waits for a batch."""
    num_classes = od_config.tf_model_config.get("num_classes")

    def check(request: OmniDiffusionRequest) -> OmniDiffusionRequest:
        """Refuse a wrong request alone, not with its batch, and say what a batch must share."""
        if request.is_dummy_run():
            return request
        sampling, label, guidance = request.sampling_params, label_of(request), guidance_of(request)
        unknown = sorted(set(sampling.extra_args) - EXTRA_ARGS)
        unknown += [name for name in UNUSED if getattr(sampling, name) is not None]
        if unknown:
            raise ValueError(f"{unknown} have no effect; extra arguments are {sorted(EXTRA_ARGS)}")
        budget = sampling.extra_args.get("budget", 1.0)
        if not (type(budget) in (int, float) and 0 < budget <= 1):
            raise ValueError(f"budget {budget!r:.60} is not in (0, 1]; 0.25 keeps a quarter")
        if num_classes is not None and not (type(label) is int and 0 <= label < num_classes):
            raise ValueError(
                f"class label {label!r:.60} is none of 0..{num_classes - 1}; give it as the prompt "
                f"or as the extra argument class_label"
            )
        if text_of(request, "negative_prompt") and not (guidance and guidance.drop_label):
            raise ValueError(f"negative_prompt has no effect with guidance={guidance}; use 'cfg'")
        request.batch_compatibility_key = shared(request)
        return request

    return check


def images_of_tensors(_od_config: OmniDiffusionConfig) -> Callable[[Tensor], list[Image]]:
    """What the engine does with each request's part of what was drawn."""
    return lambda x: VaeImageProcessor(do_normalize=False).postprocess(x.cpu().float())


class ElitOmniPipeline(nn.Module, SupportsComponentDiscovery):
    """A run of elit, as the engine's workers hold it: one device, no parallel parts."""

    supports_request_batch = True
    _dit_modules = ["transformer"]
    _encoder_modules: list[str] = []
    _vae_modules = ["vae"]

    def __init__(self, *, od_config: OmniDiffusionConfig):
        super().__init__()
        self.device = get_local_device()
        self.pipeline = load_pipeline(od_config.model, dtype=od_config.dtype).to(self.device)
        if self.pipeline.draws_clips:
            raise ValueError(f"{od_config.model} draws clips; this plugin serves images alone")
        self.pipeline.set_progress_bar_config(disable=True)
        self.transformer, self.vae = self.pipeline.transformer, self.pipeline.vae

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Names of all weights: they came with the pipeline, and the engine streams none."""
        del weights
        return {name for name, _ in self.named_parameters()}

    @torch.inference_mode()
    def forward(self, batch: DiffusionRequestBatch) -> list[DiffusionOutput]:
        """Draw all requests in one call, each at its own budget."""
        requests, first = batch.requests, batch.requests[0].sampling_params
        warm, each = batch.is_dummy_run(), first.num_outputs_per_prompt
        if self.pipeline.draws == "classes":
            call: dict = {"class_labels": [0 if warm else label_of(r) for r in requests]}
        else:
            call = {"prompt": [text_of(r) for r in requests]}
            negative = [text_of(r, "negative_prompt") for r in requests]
            call |= {"negative_prompt": negative} if any(negative) else {}
        if not warm:  # which asks for a text and a size of its own
            budgets = [r.sampling_params.extra_args.get("budget", 1.0) for r in requests]
            call |= {
                "budget": [budget for budget in budgets for _ in range(each)],
                "generator": [g for r in requests for g in generators_of(r)],
                "guidance": guidance_of(requests[0]),
                "height": first.height,
                "width": first.width,
                "num_images_per_prompt": each,
            }
        steps = first.num_inference_steps
        images = self.pipeline(**call, num_inference_steps=steps, output_type="pt").images
        return [DiffusionOutput(output=part) for part in images.chunk(len(requests))]


def generators_of(request: OmniDiffusionRequest) -> list[torch.Generator]:
    """A generator for each image: of seed, seed + 1, ..., or those that the request brought."""
    sampling = request.sampling_params
    if sampling.seed is not None:
        seeds = range(sampling.seed, sampling.seed + sampling.num_outputs_per_prompt)
        return [torch.Generator().manual_seed(seed) for seed in seeds]
    given = sampling.generator
    return given if isinstance(given, list) else [given] * sampling.num_outputs_per_prompt
