"""Diffusers' flow-matching transformers in our training loop: how each is called.

All predict the velocity, noise - data, as ours do; they differ in the scale of time and in how the
VAE latents are packed into tokens.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from einops import rearrange
from torch import Tensor

from elit._choices import nearest
from elit._hub import not_fetched
from elit.data import ImageDataset
from elit.pipelines.folder import may_be_on_hub, read_config

Arguments = dict[str, Any]

# Class: scale of its timestep, and how (B, C, h, w) becomes tokens: None is left to the model.
FLOW_TRANSFORMERS = {
    "SD3Transformer2DModel": (1000.0, None),
    "WanTransformer3DModel": (1000.0, None),
    "CogView4Transformer2DModel": (1000.0, None),
    "FluxTransformer2DModel": (1.0, "flux"),
    "QwenImageTransformer2DModel": (1.0, "qwen"),
}
GUIDANCE = 3.5  # that guidance-distilled models are told


def is_foreign(model: Any) -> bool:
    """Whether a model is one of diffusers', also after it was made elastic."""
    return any(kind.__name__ in FLOW_TRANSFORMERS for kind in type(model).__mro__)


def fetch_base(base: str) -> str:
    """The folder of a base; of a name on the hub, what is fetched of its transformer alone."""
    if Path(base).exists() or not may_be_on_hub(base):
        return base
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["model_index.json", "config.json", "transformer/*"]
    try:
        return snapshot_download(base, allow_patterns=wanted)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(not_fetched(f"retrofit.base={base}", error)) from error


def load_transformer(base: str) -> Any:
    """The transformer of a diffusers pipeline's folder, or of a transformer's own folder."""
    folder = Path(base, "transformer") if Path(base, "model_index.json").exists() else Path(base)
    name = str(read_config(folder / "config.json").get("_class_name"))
    if name not in FLOW_TRANSFORMERS:
        near = None if hasattr(diffusers, name) else nearest(name, FLOW_TRANSFORMERS)
        raise ValueError(
            f"{folder} holds a {name}, which elit finetune can't train"
            + (f" (did you mean {near}?)" if near else "")
            + f"; it trains plain DiTs and SiTs of elit's and {', '.join(FLOW_TRANSFORMERS)}; for "
            f"others write the loop as examples/elasticize_sd3.py does"
        )
    return getattr(diffusers, name).from_pretrained(folder)


def stored_texts(
    batch: Mapping[str, Any],
    names: Sequence[str],
    null: Mapping[str, Tensor],
    device: torch.device,
    dropped: Tensor | None,
) -> dict[str, Tensor]:
    """Encoded texts of a batch on a device, in float32; of dropped samples those of the null."""
    condition = {name: batch[name].to(device, non_blocking=True) for name in names}
    for name, value in condition.items():
        if value.is_floating_point():
            value = value.float()
        if dropped is not None and name in null:
            keep = (~dropped).view(-1, *(1,) * (value.ndim - 1))
            value = torch.where(keep, value, null[name].to(device, value.dtype))
        condition[name] = value
    return condition


class TensorConditioning:
    """Conditions that come with the data, and the calls of a diffusers transformer."""

    draws = False  # the stock pipeline does

    def __init__(
        self, model: Any, dataset: ImageDataset, device: torch.device, keeps_base: bool = True
    ):
        self.model, self.device = model, device
        self.reads, self.null = dataset.encodings, dataset.null
        self.keeps_base = keeps_base
        self._ids: dict[tuple[int, int], Tensor] = {}
        base = next(k.__name__ for k in type(model).__mro__ if k.__name__ in FLOW_TRANSFORMERS)
        self.time_scale, self.packing = FLOW_TRANSFORMERS[base]

    def __call__(
        self, batch: Mapping[str, Any], dropped: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The model's arguments of a batch; of a dropped sample those of the empty text."""
        return stored_texts(batch, self.reads, self.null, self.device, dropped)

    def velocity(
        self,
        model: Any,
        x: Tensor,
        sigma: Tensor,
        condition: Mapping[str, Any],
        latents: Mapping[str, Any],
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
            given |= self._flux_arguments(x, condition["encoder_hidden_states"], height, width)
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
            from elit.retrofit.files import save_interface

            save_interface(model, folder / "interface.safetensors")
