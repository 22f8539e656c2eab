"""AdamW, alone or beside Muon, with what surrounds it: schedule, clipping, fp16, the average."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from elit.training.config import OptimizerConfig, TrainConfig
from elit.training.distributed import World, whole
from elit.training.finetune import parameter_groups
from elit.training.muon import Muon, hidden_matrices

LEAST_SCALE = 1.0  # of the loss: if gradients overflow even there, the run has diverged


def learning_rate(options: OptimizerConfig, steps: int, step: int) -> float:
    """Warm-up, then constant or cosine: a function of the step."""
    factor = min(1.0, (step + 1) / max(1, options.warmup_steps))
    if options.schedule == "cosine" and step >= options.warmup_steps:
        length = max(1, steps - options.warmup_steps - 1)
        done = min(1.0, (step - options.warmup_steps) / length)
        cosine = (1 + math.cos(math.pi * done)) / 2
        factor = options.final_lr + (1 - options.final_lr) * cosine
    return options.lr * factor


class Optimizer:
    """AdamW over the parameters that have gradients, or Muon over the matrices among them.

    Attributes:
        parts: PyTorch's optimisers, each of parameters of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        world: World,
        projector: nn.Module | None = None,
    ):
        self.config, options, device = config, config.optimizer, world.device
        self.trained = [p for p in model.parameters() if p.requires_grad]
        beside = [] if projector is None else [*projector.parameters()]
        self.clipped = [*self.trained, *beside]
        matrices = hidden_matrices(model) if options.name == "muon" else {}
        groups = parameter_groups(model, config.retrofit)
        rate: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
        others = _among(groups, lambda p: p not in matrices)
        others += [{"params": beside, "scale": 1.0}] if beside else []
        fused = device.type in ("cpu", "cuda")
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, betas=options.betas, fused=fused, **rate)
        ]
        if options.name == "muon":
            self.parts.append(Muon(_among(groups, matrices.__contains__), matrices, world, **rate))
        is_scaled = config.train.precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=is_scaled)

    @property
    def lr(self) -> float:
        """Learning rate of this step."""
        return self.parts[0].param_groups[0]["lr"]

    def set_learning_rate(self, step: int) -> None:
        """Set the rate of a step."""
        rate = learning_rate(self.config.optimizer, self.config.train.steps, step)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * group["scale"]

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients."""
        self.scaler.scale(loss).backward()

    def clip(self) -> Tensor:
        """Scale gradients down to the largest norm that is allowed; their norm before, ()."""
        if self.scaler.is_enabled():
            for part in self.parts:
                self.scaler.unscale_(part)
        return whole(nn.utils.clip_grad_norm_(self.clipped, self.config.optimizer.clip))

    def may_skip(self) -> bool:
        """Whether gradients that overflow are to be expected, as a lower scale may mend them."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > LEAST_SCALE

    def step(self, skip: bool = False) -> None:
        """Change the weights, or leave them and lower the scale of the loss."""
        for part in self.parts:
            if not skip:
                part.step()
            part.zero_grad(set_to_none=True)
        if not self.scaler.is_enabled():
            return
        if not skip:
            self.scaler.update()
            return
        # Told, not asked: each process has looked at its own shards only.
        self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())
        self.scaler.load_state_dict({**self.scaler.state_dict(), "_growth_tracker": 0})

    def state(self) -> dict[str, Any]:
        """What is no tensor, and what the learning rate follows from."""
        schedule = {"steps": self.config.train.steps, "optimizer": asdict(self.config.optimizer)}
        return {"scaler": self.scaler.state_dict(), **schedule}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        if self.scaler.is_enabled() and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])


def _among(
    groups: list[dict[str, Any]], belongs: Callable[[nn.Parameter], bool]
) -> list[dict[str, Any]]:
    """The groups with those parameters alone that belong."""
    some = [{**group, "params": list(filter(belongs, group["params"]))} for group in groups]
    return [group for group in some if group["params"]]


class Average(EMAModel):
    """Exponential moving average of the trained parameters; its decay is ramped up from 0."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.parameters = list(parameters)
        super().__init__(self.parameters, decay=decay, foreach=True)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold their averages, and the averages the parameters."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange both, a tensor at a time: a whole copy may not fit."""
        for weight, average in zip(self.parameters, self.shadow_params, strict=True):
            online = weight.detach().clone()
            weight.copy_(average)
            average.copy_(online)
