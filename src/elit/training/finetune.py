"""Fine-tuning of a retrofit: the pretrained model made elastic, and the original as its teacher.

Of diffusers' transformers those that predict the velocity, noise - data, as ours do; they differ in
the scale of time and in how VAE latents are packed into tokens.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from einops import rearrange
from torch import Tensor, nn

from elit._choices import nearest
from elit._extras import missing
from elit._hub import not_fetched
from elit._random import generator
from elit.data import ImageDataset
from elit.flow.schedulers import shift_of
from elit.flow.shift import Shift
from elit.models.base import FEW_STEPS
from elit.pipelines.folder import INDEX, OURS, may_be_on_hub, read_config, read_index
from elit.pipelines.load import load_pipeline
from elit.retrofit.elastic import PREFIX, elasticize
from elit.retrofit.files import load_elastic, save_interface
from elit.retrofit.known import FLOW_TRANSFORMERS, is_foreign
from elit.training.conditioning import STATES, Arguments, StoredTextConditioning
from elit.training.config import RetrofitConfig, TextConfig, TrainConfig

GUIDANCE = 3.5  # that guidance-distilled models are told
_SPLIT = ("head", "tail", "group")
LORA = "retrofit"  # name of peft's adapter


def build_retrofit(
    config: TrainConfig, dataset: ImageDataset, make_base: Callable[..., Any] | None = None
) -> tuple[Any, Any]:
    """The elastic model of a config, and its teacher: the original, in an interface of its own.

    At full budget a lossless interface changes nothing, and it shows the tokens after the core.
    Where the original's parameters are not trained, both are one model.
    """
    options = config.retrofit
    if make_base is None:
        model = load_base(str(options.base), config.objective.shift)
    else:
        model = make_base(config, dataset, {})
    if few := model.config.get(FEW_STEPS):
        raise ValueError(
            f"retrofit.base={options.base} draws in {few} steps, which a retrofit would unlearn; "
            f"elasticize the model that it is of, then learn the few steps by few_steps.base"
        )
    check_data(model, dataset, config)
    split = {name: getattr(options, name) for name in _SPLIT}
    lossless = options.init == "identity"
    rank = options.rank if options.train == "adapters" else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, "weights").initial_seed())
        teacher = None
        needs_copy = not (lossless and options.train in ("adapters", "interface"))
        try:
            if options.is_taught and needs_copy:
                teacher = elasticize(copy.deepcopy(model), **split).requires_grad_(False)
            elasticize(model, **split, init=options.init, rank=rank)
        except ValueError as error:
            names = ", ".join(f"retrofit.{name}={value}" for name, value in split.items())
            raise ValueError(f"{names}: {error}") from error
        if options.start is not None:
            load_start(model, options)
        choose_parameters(model, options)
    if config.latents.min is not None:
        model.set_min_latents(config.latents.min)
    return model, (teacher or model) if options.is_taught else None


def load_start(model: Any, options: RetrofitConfig) -> None:
    """Give an elastic model the weights that an earlier fine-tuning of its base has left."""
    folder = Path(str(options.start))
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    begun = load_elastic(folder)
    there, here = (dict(m.elastic_settings.to_config(), min_latents=None) for m in (begun, model))
    state = model.state_dict()
    differing = [f"{key} {there[key]}" for key in here if there[key] != here[key]]
    if differing or begun.state_dict().keys() != state.keys():
        raise ValueError(
            f"retrofit.start={options.start} is of another retrofit"
            f" ({', '.join(differing) or 'of another model'}); give its settings and its base"
        )
    is_trained = options.train not in ("adapters", "interface")
    for name, value in begun.state_dict().items():
        if not is_trained and not name.startswith(f"{PREFIX}.") and not value.equal(state[name]):
            raise ValueError(
                f"retrofit.start={options.start} has changed its base, which retrofit.train="
                f"{options.train} leaves alone; use all or lora, or give it as retrofit.base"
            )
    model.load_state_dict(begun.state_dict())


def fetch_base(base: str) -> str:
    """The folder of a base; of a name on the hub, what is fetched of its transformer alone."""
    if Path(base).exists() or not may_be_on_hub(base):
        return base
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = [INDEX, "config.json", "transformer/*"]
    try:
        return snapshot_download(base, allow_patterns=patterns)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(not_fetched(f"retrofit.base={base}", error)) from error


def load_base(base: str, shift: Shift = 1.0) -> Any:
    """The transformer of a pipeline, in a folder or on the hub; of ours, if it has that shift."""
    folder = Path(fetch_base(base))
    is_pipeline = (folder / INDEX).exists()
    is_ours = is_pipeline and read_index(folder).get("_class_name") in OURS
    if is_ours or not (is_pipeline or (folder / "config.json").exists()):
        pipeline = load_pipeline(base)  # or the error of what is no folder of either
        check_same_shift(pipeline.scheduler, shift, base)
        return pipeline.transformer
    folder = folder / "transformer" if is_pipeline else folder
    name = str(read_config(folder / "config.json").get("_class_name"))
    check_kind(name, str(folder))
    return getattr(diffusers, name).from_pretrained(folder)


def check_same_shift(scheduler: Any, shift: Shift, where: str) -> None:
    """Raise a ValueError unless a pipeline of ours draws with the shift that is trained with."""
    if (trained := shift_of(scheduler)) != shift:
        raise ValueError(
            f"objective.shift={shift}, but {where} draws with shift {trained}; set "
            f"objective.shift={trained}"
        )


def check_kind(name: str, where: str) -> None:
    """Raise a ValueError unless a transformer of diffusers' predicts a velocity as ours do."""
    if name not in FLOW_TRANSFORMERS:
        near = None if hasattr(diffusers, name) else nearest(name, FLOW_TRANSFORMERS)
        raise ValueError(
            f"{where} holds a {name}, which elit finetune can't train"
            + (f" (did you mean {near}?)" if near else "")
            + f"; it trains plain DiTs and SiTs of elit's and {', '.join(FLOW_TRANSFORMERS)}; for "
            f"others write the loop as examples/elasticize_sd3.py does"
        )


def check_data(model: Any, dataset: ImageDataset, config: TrainConfig) -> None:
    """Raise a ValueError if the base draws other things than the data set has."""
    channels, *size = dataset.image_shape
    name, base = config.data.name, config.retrofit.base
    theirs = is_foreign(model)
    fits = dataset.for_diffusers or bool(dataset.encodings) if theirs else not dataset.for_diffusers
    if not fits:
        raise ValueError(
            f"{base} holds a {type(model).__name__}, which the data set {name!r} doesn't suit: "
            f"diffusers' transformers take data.name=tensors, or prepared with encoded texts, ours "
            f"the others"
        )
    if theirs:
        return
    if (model.in_channels, list(model.sample_size)) != (channels, size):
        raise ValueError(
            f"{base} draws {model.in_channels} channels of {list(model.sample_size)}, but the data "
            f"set {name!r} has {channels} of {size}; use the data that it was trained on"
        )
    if not model.takes_text and model.config.num_classes != dataset.num_classes:
        raise ValueError(
            f"{base} knows {model.config.num_classes} classes, but the data set {name!r} has "
            f"{dataset.num_classes}; use the data that it was trained on, or labels of its classes "
            f"in a data set with as many names as `classes`"
        )


def check_tensors(config: TrainConfig, dataset: ImageDataset, model: Any) -> None:
    """Raise a ValueError if a diffusers transformer doesn't take a data set's tensors."""
    if config.text != TextConfig():
        raise ValueError(
            f"text.* have no effect on data.name={config.data.name}, which are encoded already"
        )
    conditioning = TensorConditioning(model, torch.device("cpu"), dataset)
    firsts = [int(bucket.runs[0, 0]) for bucket in dataset.buckets or ()] or [0]
    for first in firsts:
        batch = dataset.batch([first])
        try:
            with torch.no_grad():
                x, sigma = dataset.on_device(batch["images"]).to(model.dtype), torch.ones(1)
                conditioning.velocity(model, x, sigma, conditioning(batch), {"num_latents": 1})
        except (RuntimeError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            data = config.data.options.get("path", "the data set")
            raise ValueError(
                f"{data} doesn't fit {config.retrofit.base}: {reason}; "
                f"it has {', '.join(['latents', *sorted(dataset.encodings)])}, which are to be "
                f"arguments of the transformer's forward"
            ) from error


def choose_parameters(model: Any, options: RetrofitConfig) -> None:
    """Leave gradients to what is to be trained; add peft's LoRA where that is wanted."""
    if options.train == "all":
        return
    model.requires_grad_(False)
    if options.train == "lora":
        add_lora(model, options.rank)
    for name, parameter in model.named_parameters():
        if name.startswith(f"{PREFIX}.") or "lora_" in name:
            parameter.requires_grad_(True)


def add_lora(model: Any, rank: int) -> None:
    """peft's LoRA on the linear layers of the blocks."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            missing("retrofit.train=lora needs peft", "lora", "use adapters")
        ) from error
    lists = model._elit_session.layout.blocks
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(tuple(f"{part}." for part in lists))
    ]
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), model, LORA
    )


def without_lora(model: Any) -> Any:
    """The model to save: a copy with LoRA merged into its weights, or the model itself."""
    if not any("lora_" in name for name, _ in model.named_parameters()):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(model)
    for name, module in list(merged.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(merged.get_submodule(parent), child, module.get_base_layer())
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged


def parameter_groups(model: nn.Module, options: RetrofitConfig) -> list[dict[str, Any]]:
    """The optimiser's groups: what is new, and what was there, at a rate of its own."""
    new: list[nn.Parameter] = []
    old: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_old = options.base is not None and not name.startswith(f"{PREFIX}.")
            (old if is_old and "lora_" not in name else new).append(parameter)
    groups = [{"params": new, "scale": 1.0}, {"params": old, "scale": options.base_lr}]
    return [group for group in groups if group["params"]]


class Distillation:
    """What the student of a retrofit is compared with: the data, and the original.

    loss = (1 - distill) |v - (noise - data)|^2 + distill |v - v0|^2 + features |h - h0|^2 / var h0

    v is the student's velocity, v0 the original's, h and h0 are their tokens after the core.
    """

    def __init__(self, student: Any, teacher: Any, options: RetrofitConfig, conditioning: Any):
        self.teacher, self.options, self.conditioning = teacher, options, conditioning
        for model in (student, teacher):
            model._elit_session.keeps_written = True

    @torch.no_grad()
    def targets(
        self, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The original's velocity (B, ...) and tokens after the core (B, N, D)."""
        latents = {"num_latents": self.teacher.max_latents}
        velocity = self.conditioning.velocity(self.teacher, x, sigma, condition, latents)
        return velocity, self.teacher._elit_session.written

    def loss(
        self, error: Tensor, student: Any, velocity0: Tensor, tokens0: Tensor, velocity: Tensor
    ) -> Tensor:
        """Loss per sample (B,).

        Args:
            error: (B,), flow-matching loss.
            student: the model that has just been called.
            velocity0: (B, ...), the original's.
            tokens0: (B, N, D), the original's after the core.
            velocity: (B, ...), the student's.
        """
        loss = torch.lerp(error, _squared_error(velocity, velocity0), self.options.distill)
        if self.options.features:
            features = _squared_error(student._elit_session.written, tokens0)
            loss = loss + self.options.features * features / tokens0.float().var()
        return loss


def _squared_error(student: Tensor, original: Tensor) -> Tensor:
    """Means over everything but the batch, (B,) float32."""
    return (student.float() - original.float()).square().flatten(1).mean(1)


class TensorConditioning(StoredTextConditioning):
    """Conditions that come with the data, and the calls of a diffusers transformer."""

    draws = False  # the stock pipeline does

    def __init__(
        self, model: Any, device: torch.device, dataset: ImageDataset, keeps_base: bool = True
    ):
        super().__init__(model, device, dataset)
        self.keeps_base = keeps_base
        self._ids: dict[tuple[int, int], Tensor] = {}
        base = next(k.__name__ for k in type(model).__mro__ if k.__name__ in FLOW_TRANSFORMERS)
        self.time_scale, self.packing = FLOW_TRANSFORMERS[base]

    def velocity(
        self, model: Any, x: Tensor, sigma: Tensor, condition: Arguments, latents: Mapping[str, Any]
    ) -> Tensor:
        """Velocity (B, C, ...) of noisy VAE latents x (B, C, ...) at noise levels (B,)."""
        given: Arguments = {"hidden_states": x, **condition, **latents, "return_dict": False}
        given["timestep"] = sigma * self.time_scale
        if self.packing is None:
            return model(**given)[0]
        height, width = x.shape[2] // 2, x.shape[3] // 2
        given["hidden_states"] = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        if self.packing == "qwen":
            given["img_shapes"] = [[(1, height, width)]] * len(x)
        else:
            given |= self._flux_arguments(x, condition[STATES], height, width)
        tokens = model(**given)[0]
        return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height, w=width, p=2, q=2)

    def _flux_arguments(self, x: Tensor, text: Tensor, height: int, width: int) -> Arguments:
        if (height, width) not in self._ids:  # kept: their grid is looked up by the tensor
            ids = torch.zeros(height, width, 3, device=x.device)
            ids[..., 1] += torch.arange(height, device=x.device)[:, None]
            ids[..., 2] += torch.arange(width, device=x.device)
            self._ids[height, width] = ids.flatten(0, 1)
        given: Arguments = {
            "img_ids": self._ids[height, width],
            "txt_ids": torch.zeros(text.shape[1], 3, device=x.device),
        }
        if self.model.config.guidance_embeds:
            given["guidance"] = torch.full((len(x),), GUIDANCE, device=x.device)
        return given

    def export(self, model: Any, folder: Path) -> None:
        """Write the transformer whole, and its interface alone where the base is as it was."""
        model.save_pretrained(folder / "transformer")
        if self.keeps_base:
            save_interface(model, folder / "interface.safetensors")
