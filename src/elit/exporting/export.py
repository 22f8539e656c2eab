"""A pipeline's transformer as a file, with a manifest that tells all else that drawing needs."""

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from elit import __version__
from elit._devices import synchronize
from elit._files import json_text, replace_files, sha256_of
from elit.exporting.formats import SUFFIXES, open_exported, write_program
from elit.interface.budget import default_budgets
from elit.pipelines.autoencoder import decoding_in_words, scale_and_shift
from elit.retrofit.elastic import ElasticTransformer

logger = logging.getLogger(__name__)

BATCHES = (1, 2, 5)  # that a file is checked at
ROUNDS = 3  # that times are medians of
CONVENTION = (
    "sigma 1 is noise, 0 is data; velocity = noise - data; "
    "a step of Euler's is samples + (next sigma - sigma) * velocity"
)


class VelocityOf(nn.Module):
    """A model as the function that is exported: tensors in, the velocity out.

    How many latents are kept is the length of an input, `latent_indices`: so it may differ from
    call to call of one file.

    Attributes:
        shapes: of the inputs by name, in order; a word is an axis that may have any length.
    """

    def __init__(self, model: Any, size: Sequence[int]):
        super().__init__()
        self.model, self.size = model, tuple(size)
        self.grid = model.geometry.grid(self.size)  # or a ValueError
        self.shapes: dict[str, tuple[int | str, ...]] = {
            "samples": ("batch", model.in_channels, *size), "sigma": ("batch",)
        }  # fmt: skip
        for name, value in self.condition(1).items():
            in_time = ("words",) if name.startswith("encoder_") else ()
            self.shapes[name] = ("batch", *in_time, *value.shape[1 + len(in_time) :])
        if model.is_elastic:
            self.shapes["latent_indices"] = ("latents",)

    def forward(self, samples: Tensor, sigma: Tensor, *rest: Tensor) -> Tensor:
        """Velocities (B, C, *space)."""
        given = dict(zip(list(self.shapes)[2:], rest, strict=True))
        if (kept := given.get("latent_indices")) is not None:
            given["num_latents"] = cast(Any, kept.shape[0])
        return self.model(samples, sigma, **given, return_dict=False)[0]

    def condition(self, batch: int) -> dict[str, Tensor]:
        """What to draw, for an example; of texts, with a mask that shows all."""
        found: dict[str, Tensor] = self.model.example_condition(batch)
        if (text := found.pop("encoder_hidden_states", None)) is not None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool)
            found = {"encoder_hidden_states": text, "encoder_attention_mask": mask} | found
        return found

    def example(self, batch: int, num_latents: int | None) -> list[Tensor]:
        """Inputs in order, of a batch and a number of latents."""
        generator = torch.Generator().manual_seed(0)
        samples = torch.randn(batch, self.model.in_channels, *self.size, generator=generator)
        sigma = torch.rand(batch, generator=generator)
        inputs = [samples.to(self.model.dtype), sigma, *self.condition(batch).values()]
        if num_latents is not None:
            inputs.append(torch.arange(num_latents))
        return [value.to(self.model.device) for value in inputs]

    def program(self) -> ExportedProgram:
        """The function, traced by torch.export for all lengths of its axes."""
        words = self.model.config.max_text_length if self.model.takes_text else 0
        dims = {"batch": Dim("batch", min=1)}
        for name, most in {"latents": self.model.max_latents, "words": words}.items():
            if most > 1:  # else it can have but one length, or is not there
                dims[name] = Dim(name, min=1, max=most)
        axes = tuple(
            {i: dims[axis] for i, axis in enumerate(shape) if axis in dims}
            for shape in self.shapes.values()
        )
        example = self.example(
            2, self.model.max_latents or None
        )  # a batch of 1 would be a constant
        with torch.no_grad():
            return torch.export.export(
                self, tuple(example), dynamic_shapes=(*axes[:2], axes[2:]), strict=False
            )


def export(
    pipeline: Any, form: str, folder: Path, size: Sequence[int] | None = None,
    steps: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `transformer.*` and its manifest, `transformer.*.json`, and return the manifest.

    The file is run beside the model first, at five budgets and three batch sizes.

    Args:
        pipeline: one of ours.
        form: one of SUFFIXES, its format.
        folder: to write into, over what is there.
        size: of the transformer's input; by default what the model was made for.
        steps: of which the manifest has the noise levels; None is the pipeline's `default_steps`.

    Raises:
        ValueError: for a model that was made elastic, and if the file gives other velocities than
            the model; then nothing is written.
    """
    model, file = pipeline.transformer.eval(), f"transformer{SUFFIXES[form]}"
    if isinstance(model, ElasticTransformer):
        raise ValueError(
            "a model that was made elastic places its latents by their number, which is free in a "
            "file; export a model that was trained with a latent interface, or the base"
        )
    velocity = VelocityOf(model, size or model.sample_size)
    logger.info("tracing the model")
    program = velocity.program()
    found: dict[str, Any] = {}

    def write(aside: Path) -> None:
        aside.mkdir(parents=True)
        logger.info("writing %s; a large model takes minutes", file)
        write_program(form, program, list(velocity.shapes), aside / file)
        found.update(_manifest(pipeline, velocity, form, steps), file=file)
        found["bytes"] = sum(path.stat().st_size for path in aside.iterdir())
        found["sha256"] = sha256_of(aside / file)
        logger.info("comparing it with the model")
        run = open_exported(form, list(velocity.shapes), aside / file)
        found["checks"] = compare(velocity, run)
        (aside / f"{file}.json").write_text(json_text(found), encoding="utf-8")

    folder.mkdir(parents=True, exist_ok=True)
    replace_files(folder, write)
    return found


@torch.no_grad()
def compare(velocity: VelocityOf, run: Callable[..., Tensor]) -> list[dict[str, Any]]:
    """A row for each of five budgets and three batch sizes: differences and times.

    `difference` is the largest, over the largest velocity; times are milliseconds of a call.

    Raises:
        ValueError: if a difference is more than rounding explains.
    """
    model = velocity.model
    most = model.max_latents
    kept = sorted({max(1, round(most / 2**i)) for i in range(5)}) if most else [None]
    allowed = 1e-4 if model.dtype == torch.float32 else 0.05
    rows = []
    for batch in BATCHES:
        for num_latents in kept:
            given = velocity.example(batch, num_latents)
            (wanted, eager_ms), (got, ms) = _timed(velocity, given), _timed(run, given)
            # 1e-6: a model that was never trained says 0
            difference = (got.cpu() - wanted.cpu()).abs().max() / wanted.abs().max().clamp(1e-6)
            row = {
                "batch": batch, "num_latents": num_latents, "budget": model.budget_of(num_latents),
                "difference": float(difference), "eager_ms": eager_ms, "ms": ms,
            }  # fmt: skip
            if not row["difference"] <= allowed:
                raise ValueError(
                    f"the file is off by {difference:.2g} of the largest velocity at batch {batch} "
                    f"and num_latents {num_latents}, where {allowed:g} is allowed; take another "
                    f"format, or fp32"
                )
            rows.append(row)
    return rows


def _timed(function: Callable[..., Tensor], given: Sequence[Tensor]) -> tuple[Tensor, float]:
    """What a function gives, and the median of its milliseconds behind a first call."""
    result, times = function(*given), []
    for _ in range(ROUNDS):
        synchronize(result.device)
        start = time.perf_counter()
        result = function(*given)
        synchronize(result.device)
        times.append(1000 * (time.perf_counter() - start))
    return result, statistics.median(times)


def _manifest(pipeline: Any, velocity: VelocityOf, form: str, steps: int | None) -> dict[str, Any]:
    """What a program must know to draw with the file, in plain types."""
    model, vae = pipeline.transformer, pipeline.vae
    config = model.config
    levels = pipeline.start(steps, "cpu", size=velocity.size)
    example = velocity.example(1, model.max_latents or None)
    inputs = [
        {"name": name, "shape": list(shape), "dtype": str(value.dtype).removeprefix("torch.")}
        for (name, shape), value in zip(velocity.shapes.items(), example, strict=True)
    ]
    decoding: dict[str, Any] = {"pixels": "samples are pixels in [-1, 1]"}
    if vae is not None:
        scale, shift = scale_and_shift(vae)
        how = f"the autoencoder is not in the file; {decoding_in_words(vae)}"
        decoding = {"class": type(vae).__name__, "scale": scale, "shift": shift, "how": how}
    text = ("max_text_length", "vocab_size", "text_dim", "pooled_dim")
    budgets = default_budgets(model.min_latents, model.max_latents) if model.is_elastic else []
    return {
        "format": form,
        "made_by": {"elit": __version__, "torch": torch.__version__},
        "device": model.device.type,
        "model": type(model).__name__,
        "config": {key: value for key, value in config.items() if not key.startswith("_")},
        "inputs": inputs,
        "max_latents": model.max_latents,
        "min_latents": model.min_latents,
        "num_latents": {f"{budget:g}": model.resolve_budget(budget) for budget in budgets},
        "convention": CONVENTION,
        "levels": [*dict.fromkeys(levels), 0.0],  # Heun visits each twice
        "null_label": None if model.takes_text else config.num_classes,
        "text": {key: config[key] for key in text} if model.takes_text else None,
        "decoding": decoding,
    }
