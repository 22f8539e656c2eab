"""How a model is spread over the processes: a copy in each (DDP), or shards (FSDP2, HSDP)."""

import contextlib
import copy
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from elit.training.config import LoopConfig
from elit.training.distributed import World


class Parallel:
    """A model on the devices of all processes.

    Attributes:
        model: with its parameters on this process's device, whole or its shards.
        module: what to call in training.
        is_sharded: whether all processes must call it together, in validation and sampling too.

    Args:
        model: on the CPU.
        config: of the loop, with `parallel` and `shard_size`.
        world: the processes.
        some_unused: whether parameters may get no gradient in a step.
    """

    def __init__(self, model: Any, config: LoopConfig, world: World, some_unused: bool = False):
        self.world = world
        self.is_sharded = world.size > 1 and config.parallel != "ddp"
        # What an export fills: diffusers saves no shards.
        self._whole = _on_meta(model) if self.is_sharded and world.is_main else None
        self.model = self.module = place(model, config, world)
        if world.size > 1 and not self.is_sharded:
            self.module = DistributedDataParallel(
                model, gradient_as_bucket_view=True, find_unused_parameters=some_unused
            )

    def gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over the processes with the last micro-batch only."""
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def whole_model(self) -> Any:
        """The model with all of its weights, on the main process; all must call this together."""
        if not self.is_sharded:
            return self.model
        weights = {}
        for name, tensor in self.model.state_dict().items():
            full = whole(tensor)
            if self.world.is_main:
                weights[name] = full.cpu()
        model = copy.deepcopy(self._whole)  # of the caller: its memory goes back after the export
        if model is not None:
            model.load_state_dict(weights, assign=True)
        return model

    def close(self) -> None:
        """Let go of what the process group must outlive."""
        self.module = self.model


def place(model: Any, config: LoopConfig, world: World) -> Any:
    """A model on this process's device, or its shards there."""
    if world.size == 1 or config.parallel == "ddp":
        return model.to(world.device)
    mesh = device_mesh(config, world)
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)
    if config.precision != "fp32":  # gathered in 16 bits: half the traffic; autocast does the rest
        precision = MixedPrecisionPolicy(
            param_dtype=half_dtype(config.precision),
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
    blocks = set(getattr(model, "_repeated_blocks", None) or [])
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=precision)
    # The root too: what it kept whole after a forward would be stale once the weights change.
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    return model


def device_mesh(config: LoopConfig, world: World) -> DeviceMesh:
    """The processes in one row (FSDP), or in rows that each hold a copy in shards (HSDP)."""
    kind = world.device.type
    if config.parallel == "fsdp":
        return init_device_mesh(kind, (world.size,))
    share = shard_size(config, world.size)
    return init_device_mesh(
        kind, (world.size // share, share), mesh_dim_names=("replicate", "shard")
    )


def shard_size(config: LoopConfig, processes: int) -> int:
    """How many processes share one copy under HSDP, or a ValueError if the processes don't divide.

    By default those of one machine.
    """
    share = config.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if processes % share:
        raise ValueError(
            f"train.shard_size={share} does not divide {processes} processes; "
            f"give a divisor of {processes}"
        )
    return share


def check_parallel(config: LoopConfig, processes: int) -> None:
    """Raise a ValueError for settings that don't fit the number of processes."""
    if config.parallel == "hsdp":
        shard_size(config, processes)


def half_dtype(precision: str) -> torch.dtype:
    """The type of a config's precision of 16 bits."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, in full; all processes must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _on_meta(model: Any) -> Any:
    """A copy of a model whose parameters hold no numbers."""
    memo = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)
