"""Fine-tuning of a retrofit: the pretrained model made elastic, and the original as its teacher."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elit._extras import missing
from elit.data import ImageDataset
from elit.pipelines.folder import OURS, read_config
from elit.pipelines.load import load_pipeline
from elit.retrofit.elastic import PREFIX
from elit.retrofit.elasticize import elasticize
from elit.retrofit.files import load_elastic
from elit.training.config import RetrofitConfig, TrainConfig
from elit.training.foreign import fetch_base, is_foreign, load_transformer
from elit.training.randomness import generator

LORA = "retrofit"  # name of peft's adapter


def build_retrofit(config: TrainConfig, dataset: ImageDataset) -> tuple[Any, Any]:
    """The elastic model of a config, and its teacher: the original, in an interface of its own.

    At full budget a lossless interface changes nothing, and it shows the tokens after the core.
    Where the original's parameters are not trained, both are one model.
    """
    options = config.retrofit
    model = load_base(str(options.base))
    check_data(model, dataset, config)
    split = options.head, options.tail, options.group
    lossless = options.init == "identity"
    rank = options.rank if options.train == "adapters" else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, "weights").initial_seed())
        teacher, is_taught = None, options.distill > 0 or options.features > 0
        if is_taught and not (lossless and options.train in ("adapters", "interface")):
            teacher = elasticize(copy.deepcopy(model), *split).requires_grad_(False)
        elasticize(model, *split, init=options.init, rank=rank)
        if options.start is not None:
            load_start(model, options)
        choose_parameters(model, options)
    if config.latents.min is not None:
        model.set_min_latents(config.latents.min)
    return model, (teacher or model) if is_taught else None


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


def load_base(base: str) -> Any:
    """The transformer of a pipeline of ours, or of diffusers', in a folder or on the hub."""
    folder = fetch_base(base)
    index = Path(folder, "model_index.json")
    if index.exists():
        theirs = read_config(index).get("_class_name") not in OURS
    else:
        theirs = Path(folder, "config.json").exists()
    return load_transformer(folder) if theirs else load_pipeline(base).transformer


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
            f"{dataset.num_classes}"
        )


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
    lists = model._elit_session.layout.block_names()
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


def _squared_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Means over everything but the batch, (B,) float32."""
    return (found.float() - wanted.float()).square().flatten(1).mean(1)
