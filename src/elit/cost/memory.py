"""Memory of a training step: what autograd keeps of a forward, counted without running it.

PyTorch's fake tensors have shapes, types and storages, but no memory; autograd saves them as it
saves real ones. `tests/test_estimate.py` compares the two.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from elit.models.elastic import ElasticMixin

_FP32 = 4  # bytes: weights, gradients, moments and averages stay in float32 under autocast
_HALF = 2


@dataclass(frozen=True)
class SavedBytes:
    """What a forward leaves for its backward, without the parameters.

    Attributes:
        whole: as it is.
        checkpointed: with the blocks recomputed: what enters them, what lies between them, and
            the most that one of them keeps while it is computed again.
    """

    whole: int
    checkpointed: int


def count_saved(
    model: nn.Module, blocks: Iterable[nn.Module], forward: Callable[[], Tensor]
) -> SavedBytes:
    """Run a forward and sum up the storages that its graph holds, each once.

    Args:
        model: whose parameters don't count: they are there anyway.
        blocks: of it, that gradient checkpointing would recompute.
        forward: calls the model, with real or fake tensors; gives what is to be differentiated.
    """
    own = {_key(p) for p in model.parameters()}
    kept: dict[int | None, dict[Any, Tensor]] = {None: {}}  # by block; None is between blocks
    entering: dict[Any, Tensor] = {}
    inside: list[int | None] = [None]

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in own:
            kept[inside[-1]][_key(tensor)] = tensor  # held, so that no other takes its place
        return tensor

    def enter(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        entering.update((_key(x), x) for x in given)
        inside.append(id(block))
        kept.setdefault(id(block), {})

    def leave(*_: Any) -> None:
        inside.pop()

    with ExitStack() as stack:
        for block in blocks:
            hooks = (
                block.register_forward_pre_hook(enter, with_kwargs=True),
                block.register_forward_hook(leave),
            )
            for hook in hooks:
                stack.callback(hook.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x))
        result = forward()
    everything = {key: x for tensors in kept.values() for key, x in tensors.items()}
    outside = kept.pop(None) | entering
    inner = (_size(x for key, x in held.items() if key not in outside) for held in kept.values())
    saved = SavedBytes(_size(everything.values()), _size(outside.values()) + max(inner, default=0))
    del result  # the graph has to live until here
    return saved


def _key(tensor: Tensor) -> Any:
    return tensor.untyped_storage()._cdata


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors)


def state_bytes(
    model: Any, shared: int, with_teacher: bool = False, lighter: int = 0
) -> tuple[float, float]:
    """Bytes of a GPU that are taken all the time, and those that FSDP gathers for a while.

    Args:
        model: best on the meta device.
        shared: GPUs that share one copy of weights, gradients, moments and averages.
        with_teacher: whether the original of a retrofit is there too.
        lighter: parameters of which the optimiser keeps one moment, not two.
    """
    count = sum(p.numel() for p in model.parameters())
    copies = 6 if with_teacher else 5  # weights, gradients, two moments, averages
    state = _FP32 * (copies * count - lighter)
    if shared == 1:
        return state, 0
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    rest = count - sum(in_blocks)
    # This block's weights and the next one's in 16 bits, one's gradients in 32, and the rest.
    gathered = max(in_blocks) * (2 * _HALF + _FP32) + rest * (_HALF + _FP32)
    return state / shared, gathered


def saved_bytes(
    model_class: type[ElasticMixin],
    config: Mapping[str, Any],
    batch_size: int,
    num_latents: int | None = None,
    precision: str = "bf16",
    device: str = "cuda",
    half_weights: bool = False,
) -> SavedBytes:
    """Count what a forward of a model of ours keeps, without memory.

    Args:
        model_class: of the model.
        config: its arguments.
        batch_size: samples of the forward.
        num_latents: latents kept per group; None is all.
        precision: "fp32", or "bf16" or "fp16" for autocast.
        device: whose rules of autocast and kernels to follow, "cuda" or "cpu".
        half_weights: whether the weights are there in 16 bits, as FSDP gathers them; else autocast
            makes copies of them, which the graph holds.
    """
    with FakeTensorMode():
        model: Any = model_class.from_config(dict(config))
        if half_weights:
            _halve(model)
        sample = torch.zeros(batch_size, model.in_channels, *model.sample_size)
        condition = model.example_condition(batch_size)
        if num_latents is not None:
            condition["num_latents"] = num_latents

        def forward() -> Tensor:
            with autocast_as_on(device, precision):
                return model(sample, torch.zeros(batch_size), **condition).sample

        return count_saved(model, model.blocks, forward)


def _halve(model: nn.Module) -> None:
    """Parameters in 16 bits; `Module.to` can't swap fake ones."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().to(torch.bfloat16)))


@contextmanager
def autocast_as_on(device: str, precision: str) -> Iterator[None]:
    """Autocast on the CPU, with the types and the norm that CUDA would take if that is asked."""
    with ExitStack() as stack:
        if precision != "fp32":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        if device == "cuda":
            stack.enter_context(_CudaNorms(precision != "fp32"))
        yield


class _CudaNorms(TorchFunctionMode):
    """Norms as on CUDA: in float32 under autocast, and RMS norm as one kernel, not four."""

    def __init__(self, autocast: bool):
        super().__init__()
        self.autocast = autocast

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace `layer_norm` and `rms_norm`."""
        kwargs = kwargs or {}
        if func not in (F.layer_norm, F.rms_norm):
            return func(*args, **kwargs)
        x, shape = args  # as `torch.nn.functional` hands them on
        if self.autocast:
            x = x.float()
            kwargs = {k: v.float() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        if func is F.layer_norm:
            return func(x, shape, **kwargs)
        weight, eps = kwargs["weight"], kwargs["eps"]
        return torch.ops.aten._fused_rms_norm(x, list(shape), weight, eps)[0]
