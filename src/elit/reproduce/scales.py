"""How large a study is: all its numbers, in one table."""

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Size:
    """A model's size and how long its plain form trains.

    Attributes:
        name: in tables and file names.
        hidden_size: D.
        num_heads: of attention.
        depth: blocks in all.
        head: blocks before Read.
        tail: blocks after Write.
        steps: of the plain model; the others take as many as cost the same.
        lr: learning rate, of all forms alike.
    """

    name: str
    hidden_size: int
    num_heads: int
    depth: int
    head: int
    tail: int
    steps: int
    lr: float


@dataclass(frozen=True)
class Scale:
    """A study: what is trained, how long, how often, and how it is measured.

    Attributes:
        name: of the scale.
        sizes: of models; the first is that of all claims, the others are for (a) and (b), loss.
        seeds: trainings of each model of claims (a) to (e) and (g).
        few_seeds: trainings of each model of claims (f), (h) and (i).
        spread_steps: training steps of each model of claim (f), plain or not.
        images: held-out pictures whose loss is measured, at most.
        samples: drawn at each point of claims (a), (b), (d) and (e); 0 leaves them out.
        sampling_steps: Euler steps, but for claim (e).
        guidance_scales: of claim (d).
        equal_steps: claim (e): what so many steps at full budget cost, at several budgets.
        draw_budgets: of claim (e).
        inspected: pictures of claim (g).
        sigmas: noise levels of claim (g).
        random_sets: sets of random latents of claim (c), at each budget, of each seed.
        tokens: along each side of a picture.
        group: tokens along each side of a group.
        batch_size: samples of a training step.
        warmup_steps: of training.
        ema: decay of the averaged weights.
        validations: points of a curve of loss over training.
        precision: of training.
        device: of training and of drawing.
        workers: processes by default; None is one for each core.
    """

    name: str
    sizes: tuple[Size, ...]
    seeds: int
    few_seeds: int
    spread_steps: int
    images: int
    samples: int = 0
    sampling_steps: int = 20
    guidance_scales: tuple[float, ...] = (1.5, 2.5, 4.0)
    equal_steps: tuple[int, ...] = (4, 8, 16)
    draw_budgets: tuple[float, ...] = (1.0, 1 / 2, 1 / 4, 1 / 16)
    inspected: int = 64
    sigmas: tuple[float, ...] = (0.3, 0.5, 0.7)
    random_sets: int = 8
    tokens: int = 8
    group: int = 4
    batch_size: int = 32
    warmup_steps: int = 40
    ema: float = 0.99
    validations: int = 20
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "cpu"
    workers: int | None = None

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
        (
            Size("64x6", 64, 2, 6, 1, 1, steps=600, lr=1.5e-2),
            Size("128x10", 128, 4, 10, 2, 2, steps=500, lr=1.2e-2),
        ),
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
