"""How large a study is: all its numbers, in one table."""

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Size:
    """A model's size and how long its plain form trains."""

    name: str  # in tables and file names
    hidden_size: int  # D
    num_heads: int  # of attention
    depth: int  # blocks in all
    head: int  # blocks before Read
    tail: int  # blocks after Write
    steps: int  # of the plain model; the others take as many as cost the same
    lr: float  # learning rate, of all forms alike


@dataclass(frozen=True)
class Scale:
    """A study: what is trained, how long, how often, and how it is measured."""

    name: str  # of the scale
    sizes: tuple[Size, ...]  # of models; the first of all claims, the others of (a) and (b), loss
    seeds: int  # trainings of each model of claims (a) to (e) and (g)
    few_seeds: int  # trainings of each model of claims (f), (h) and (i)
    spread_steps: int  # training steps of each model of claim (f), plain or not
    images: int  # held-out pictures whose loss is measured, at most
    samples: int = 0  # drawn at each point of claims (a), (b), (d) and (e); 0 leaves them out
    sampling_steps: int = 20  # Euler steps, but for claim (e)
    guidance_scales: tuple[float, ...] = (1.5, 2.5, 4.0)  # of claim (d)
    equal_steps: tuple[int, ...] = (4, 8, 16)  # of claim (e), at full budget; others cost as much
    draw_budgets: tuple[float, ...] = (1.0, 1 / 2, 1 / 4, 1 / 16)  # of claim (e)
    inspected: int = 64  # pictures of claim (g)
    sigmas: tuple[float, ...] = (0.3, 0.5, 0.7)  # noise levels of claim (g)
    random_sets: int = 8  # sets of random latents of claim (c), at each budget, of each seed
    tokens: int = 8  # along each side of a picture
    group: int = 4  # tokens along each side of a group
    batch_size: int = 32  # samples of a training step
    warmup_steps: int = 40  # of training
    ema: float = 0.99  # decay of the averaged weights
    validations: int = 20  # points of a curve of loss over training
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of training
    device: str = "cpu"  # of training and of drawing
    workers: int | None = None  # processes by default; None is one for each core

    def settings(self) -> dict[str, Any]:
        """What all results of a folder must agree on; more seeds may be added later."""
        left_out = ("seeds", "few_seeds", "workers")
        return {key: value for key, value in asdict(self).items() if key not in left_out}


# Learning rates are tuned on both sides alike. Two cores: tiny 15 minutes, small 50.
SCALES = {
    "tiny": Scale(
        "tiny", (Size("64x6", 64, 2, 6, 1, 1, steps=300, lr=1e-2),),
        seeds=3, few_seeds=2, spread_steps=80, images=1000, inspected=32, validations=10,
    ),
    "small": Scale(
        "small",
        (Size("64x6", 64, 2, 6, 1, 1, steps=600, lr=1.5e-2),
         Size("128x10", 128, 4, 10, 2, 2, steps=500, lr=1.2e-2)),
        seeds=3, few_seeds=2, spread_steps=150, images=2000, samples=1000,
        guidance_scales=(1.5, 3.0), random_sets=2, validations=12,
    ),
    "base": Scale(
        "base",
        (Size("256x12", 256, 4, 12, 1, 1, steps=8000, lr=1e-3),),
        seeds=3, few_seeds=3, spread_steps=3000, images=5000, samples=5000, sampling_steps=40,
        equal_steps=(5, 10, 20, 40), batch_size=128, warmup_steps=400, ema=0.999,
        precision="bf16", device="cuda", workers=1,
    ),
}  # fmt: skip
PAPER = "paper"  # too large to be trained here: its commands are printed
CONFIGS = tuple(
    f"imagenet-{side}/{name}"
    for side in (256, 512)
    for name in ("dit", "elit-dit", "elit-dit-mb", "uvit", "elit-uvit", "elit-uvit-mb")
)


def paper_runs(gpus: int = 8) -> list[dict[str, Any]]:
    """The command of each of the paper's own runs, with what it costs."""
    from elit.training.config_files import load_config
    from elit.training.estimate import estimate

    start = f"torchrun --nproc-per-node {gpus} -m elit train"
    return [
        {"command": f"{start} {name}", **estimate(load_config(name, {}), gpus)} for name in CONFIGS
    ]
