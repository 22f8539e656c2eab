"""Statistics of real images by each network: made once, kept, and shared by all evaluations."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from elit._files import cache_folder, digest_of, save_tensors, write_json
from elit._process import Process
from elit.evaluation.frechet import Moments
from elit.evaluation.images import Images
from elit.evaluation.parts import Parts, batches, part_size
from elit.networks.feature_network import FeatureNetwork

logger = logging.getLogger(__name__)

MANIFOLD = 10_000  # images whose features are kept for precision, recall and KID, as ADM's batch
_UNRANKED = ("spatial",)  # outputs that no score needs beyond mean and covariance


@dataclass(frozen=True)
class Statistics:
    """Statistics of one output of one network."""

    mean: Tensor  # (d,) float64
    covariance: Tensor  # (d, d) float64
    # (m, d) of at most MANIFOLD images, evenly chosen; None where only the others are known
    features: Tensor | None
    count: int | None  # images behind mean and covariance; None if the file doesn't say


Reference = Mapping[str, Statistics]
"""By "network.output"."""


def image_features(network: FeatureNetwork, images: Tensor) -> dict[str, Tensor]:
    """A network's features of pictures (n, C, H, W) or clips (n, C, T, H, W), uint8.

    A network of images sees each frame of a clip: rows are then n * T, clip by clip.
    """
    if network.takes == "clips":
        if images.ndim != 5:
            raise ValueError(f"{network.name} takes clips, but these are images")
    elif images.ndim == 5:
        images = images.transpose(1, 2).flatten(0, 1)  # (n * T, C, H, W)
    return {f"{network.name}.{k}": x.float().cpu() for k, x in network.features(images).items()}


def evenly(count: int, most: int) -> Tensor:
    """Choose at most so many of `count` numbers, evenly."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def make_reference(
    images: Images,
    networks: Sequence[FeatureNetwork],
    process: Process,
    batch_size: int = 32,
    progress: bool = True,
    home: Path | None = None,
) -> Reference | None:
    """Statistics of real images by all networks, in the first process; all processes call this.

    They are kept in `home`, by default in the cache.
    """
    reference: dict[str, Statistics] = {}
    if images.count == 1:
        raise ValueError(f"{images.name} holds one image; a reference needs two or more")
    for network in networks:
        if network.takes == "texts":
            continue  # it compares samples with their texts
        own = (images.statistics or {}).items()
        given = {name: pair for name, pair in own if name.startswith(f"{network.name}.")}
        for name, (mean, _) in given.items():
            width = {"inception.pool": 2048, "inception.spatial": 2023}[name]
            if len(mean) != width:
                raise ValueError(
                    f"{images.name} holds statistics of {len(mean)} features, but {name} has "
                    f"{width}: they are of another network"
                )
        if images.count:
            reference |= _of_network(images, network, process, batch_size, progress, home) or {}
        elif not given:
            raise ValueError(
                f"{images.name} holds statistics of {', '.join(images.statistics or {})} and no "
                f"images: {network.name} needs images; give a folder, a data set or an .npz with "
                f"arr_0"
            )
        for output, (mean, covariance) in given.items():
            features = reference[output].features if output in reference else None
            reference[output] = Statistics(mean, covariance, features, None)
    return reference if process.rank == 0 else None


def _of_network(
    images: Images,
    network: FeatureNetwork,
    process: Process,
    batch_size: int,
    progress: bool,
    home: Path | None,
) -> dict[str, Statistics] | None:
    about = {
        "images": images.name,
        "digest": images.digest,
        "count": images.count,
        "shape": list(images.shape),
        "network": network.name,
        "weights": network.checksum,
        "preprocessing": network.preprocessing,
    }
    key = digest_of({name: value for name, value in about.items() if name != "images"})
    folder = (home or cache_folder() / "references") / key
    file = folder / "statistics.safetensors"
    if file.exists() and process.rank == 0:
        try:
            with safe_open(file, framework="pt"):
                pass  # it compares the length with the header
        except (SafetensorError, OSError):
            logger.warning("%s is damaged; it is made anew", file)
            file.unlink(missing_ok=True)
    parts = Parts(folder / "parts", images.count, part_size(images.count, batch_size))
    if not file.exists():

        def make(samples: range) -> dict[str, Tensor]:
            pictures = map(images.read, batches(samples, batch_size))
            features = [image_features(network, some) for some in pictures]
            return {name: torch.cat([one[name] for one in features]) for name in features[0]}

        with tqdm(
            total=parts.todo(), desc=f"reference by {network.name}", unit="image",
            disable=not progress or process.rank > 0,
        ) as bar:  # fmt: skip
            parts.make(make, process, bar, done=file.exists)
            if process.rank > 0:
                return None
            parts.wait(bar, done=file.exists)
        # Another job may have been quicker, and then its parts go while these are read.
        try:
            if not file.exists():
                tensors = _reduce(parts, network)
                write_json(folder / "about.json", about)
                save_tensors(file, tensors)
        except ValueError:
            if not file.exists():
                raise
    if process.rank > 0:
        return None
    parts.remove()  # also of one that was killed here
    tensors = load_file(file)
    return {
        name: Statistics(
            tensors[f"{name}/mean"], tensors[f"{name}/covariance"],
            tensors.get(f"{name}/features"), int(tensors[f"{name}/count"]),
        )
        for name in sorted({name.partition("/")[0] for name in tensors})
    }  # fmt: skip


def _reduce(parts: Parts, network: FeatureNetwork) -> dict[str, Tensor]:
    """Mean, covariance, count and chosen features of each output of a network."""
    tensors: dict[str, Tensor] = {}
    for name in (f"{network.name}.{output}" for output in network.outputs):
        moments, chosen_rows, first = Moments(), [], 0
        rows = sum(len(x) for x in parts.read(name))
        chosen = evenly(rows, MANIFOLD)
        for features in parts.read(name):
            moments.update(features)
            inside = chosen[(chosen >= first) & (chosen < first + len(features))]
            chosen_rows.append(features[inside - first])
            first += len(features)
        tensors[f"{name}/mean"], tensors[f"{name}/covariance"] = moments.mean, moments.covariance
        tensors[f"{name}/count"] = torch.tensor(moments.count)
        if name.rpartition(".")[2] not in _UNRANKED:
            tensors[f"{name}/features"] = torch.cat(chosen_rows)
    return tensors
