"""One process or several under `torchrun`: what they say to each other, and how they share a model.

Each holds a copy (DDP), or shards of one (FSDP2, HSDP).
"""

import contextlib
import copy
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from elit._devices import pick_device
from elit.training.config import LoopConfig

# A process that waits longer for another one gives up: something hangs. Writing a checkpoint may
# take longer, on a slow disk.
PATIENCE, WRITING_PATIENCE = timedelta(minutes=10), timedelta(hours=1)


class ProcessLostError(RuntimeError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether any process raised it."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value = value / self.size
        return value

    def gather(self, value: int) -> list[int]:
        """The value of every process, by rank."""
        return self.gather_rows(torch.tensor([value])).tolist()

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows (n, ...) of all processes, (processes * n, ...) by rank; n is one for all."""
        if self.size == 1:
            return rows
        mine = rows.to(self.device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return torch.cat(parts).to(rows.device)

    def send(self, tensor: Tensor, rank: int) -> None:
        """Fill a tensor on all processes with what one of them has."""
        if self.size > 1:
            dist.broadcast(tensor, rank)

    def barrier(self, group: dist.ProcessGroup | None = None) -> None:
        """Wait for all processes, for as long as a group's patience lasts."""
        if self.size > 1:
            dist.barrier(group)

    def new_cpu_group(self) -> dist.ProcessGroup | None:
        """A group of all processes for tensors on the CPU, with an order of messages of its own."""
        return dist.new_group(backend="gloo", timeout=WRITING_PATIENCE) if self.size > 1 else None


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute on `count` CPU threads; None leaves their number as it is."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def matrix_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Let products of fp32 matrices round to TF32 on a GPU, or not; elsewhere leave them alone."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def distributed_world(device: str) -> Iterator[World]:
    """Join the other processes that `torchrun` started, if it did, and leave them at the end."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    picked = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if size == 1:
        yield World(0, 1, picked)
        return
    if picked.type not in ("cpu", "cuda") or device.startswith("cuda:"):
        raise ValueError(
            f"{size} processes cannot share the device {device!r}; "
            f"use cuda, where each process takes a GPU of its own, or cpu"
        )
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    dist.init_process_group("nccl" if picked.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield World(rank, size, picked)
    except RuntimeError as error:
        if not is_of_connection(error):
            raise
        raise ProcessLostError(
            f"process {rank} of {size} lost another one, which was killed, failed (it says why) or "
            f"hangs; all stop, and the same command goes on at the last checkpoint "
            f"({' '.join(str(error).split())[:160]})"
        ) from error
    finally:
        dist.destroy_process_group()


def is_of_connection(error: RuntimeError) -> bool:
    """Whether an error is of messages between processes; gloo's are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class Parallel:
    """A model on the devices of all processes.

    Attributes:
        model: with its parameters on this process's device, whole or its shards.
        module: what to call in training.
        is_sharded: whether all processes must call it together, in validation and sampling too.
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
    share = shard_size(config, world.size)
    # The processes in one row (FSDP), or in rows that each hold a copy in shards (HSDP).
    sizes, names = (world.size // share, share), ("replicate", "shard")
    rows = 1 if config.parallel == "fsdp" else 0
    mesh = init_device_mesh(world.device.type, sizes[rows:], mesh_dim_names=names[rows:])
    types = {}
    if config.precision != "fp32":  # gathered in 16 bits: half the traffic; autocast does the rest
        types = {"param_dtype": half_dtype(config.precision), "reduce_dtype": torch.float32}
    policy = MixedPrecisionPolicy(**types, cast_forward_inputs=False)
    blocks = set(getattr(model, "_repeated_blocks", None) or [])
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    # The root too: what it kept whole after a forward would be stale once the weights change.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model


def shard_size(config: LoopConfig, processes: int, of_machine: int | None = None) -> int:
    """How many processes share one copy, under HSDP by default those of one machine.

    Raises:
        ValueError: if the processes can't be divided so.
    """
    if config.parallel != "hsdp":
        return processes if config.parallel == "fsdp" else 1
    of_machine = of_machine or int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    share = config.shard_size or of_machine
    if processes % share:
        raise ValueError(
            f"train.shard_size={share} does not divide {processes} processes; "
            f"give a divisor of {processes}"
        )
    return share


def half_dtype(precision: str) -> torch.dtype:
    """The type of a config's precision of 16 bits."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, in full; all processes must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all have in full, shared out as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _on_meta(model: Any) -> Any:
    """A copy of a model whose parameters hold no numbers."""
    memo = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)
