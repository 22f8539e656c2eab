"""What an evaluation compares by default, or by name: real images, feature networks, texts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elit._choices import check_choice
from elit.data import load_dataset
from elit.evaluation.images import Images, has_splits, open_images
from elit.evaluation.reference import evenly
from elit.networks import NETWORKS
from elit.networks.feature_network import FeatureNetwork, load_network
from elit.pipelines.base import ElasticPipeline

LARGE = 64  # pixels of a side from which the usual networks see something
Data = tuple[str, Mapping[str, Any]]
"""Name and options of a data set."""


def open_reference(
    pipeline: ElasticPipeline,
    name: str | None = None,
    split: str | None = None,
    fit_to: Sequence[int] | None = None,
    trained_on: Data | None = None,
) -> Images:
    """The real images that a pipeline's samples are compared with.

    Args:
        pipeline: whose autoencoder decodes what is stored as latents.
        name: folder of pictures, data set, output of `prepare` or .npz file; by default what the
            model was trained on.
        split: "train" or "validation", of a data set.
        fit_to: (H, W) that the pictures of a folder are scaled and cut to.
        trained_on: the data of the model's training.
    """
    options: Mapping[str, Any] | None = None
    if name is None:
        if trained_on is None:
            raise ValueError(
                "the run's folder doesn't say what it was trained on; give real images with "
                "--reference"
            )
        name, options = trained_on
        if name == "prepared":
            name, options = str(options["path"]), None
        elif name == "tensors":
            raise ValueError("--reference: a run on tensors has no images; give some")
    is_folder = options is None and Path(name).is_dir()
    if fit_to is not None and (not is_folder or (Path(name) / "manifest.json").exists()):
        raise ValueError(f"--fit is of a folder of pictures; {name} is none")
    if split is not None and options is None and not has_splits(name):
        raise ValueError(f"--split is of a data set; {name} has none, leave it out")
    size = None if fit_to is None else (fit_to[0], fit_to[1])
    return open_images(name, split or "train", size, pipeline.vae, options)


def network_names(pipeline: ElasticPipeline, names: Sequence[str] | None) -> list[str]:
    """The networks of these names, each once, or those that fit the size of the images."""
    if names is None:
        if min(pipeline.pixel_size()[-2:]) < LARGE:
            return ["classifier"]
        return ["inception", "dinov2", *(["i3d"] if pipeline.draws_clips else [])]
    names = list(dict.fromkeys(names))
    files = [Path(name).name for name in names]
    if twice := {name for name in files if files.count(name) > 1}:
        raise ValueError(f"--network: two files are named {twice.pop()}; rename one")
    for name in names:
        if name in NETWORKS or not Path(name).exists():
            check_choice(name, NETWORKS, "network")
    return names


def open_networks(
    pipeline: ElasticPipeline,
    names: Sequence[str] | None = None,
    weights: Mapping[str, str] | None = None,
    trained_on: Data | None = None,
) -> list[FeatureNetwork]:
    """The networks by whose features samples are compared, on the pipeline's device.

    Args:
        pipeline: that draws the samples.
        names: of NETWORKS, or TorchScript files; by default those that fit the images' size.
        weights: file, folder or hub name of a network's weights, by its name.
        trained_on: the data of the model's training, which the classifier is fitted on.
    """
    weights, names = weights or {}, network_names(pipeline, names)
    if unused := weights.keys() - set(names):
        raise ValueError(f"--weights of {', '.join(unused)} have no effect; add it to --network")
    if "classifier" in names and trained_on is None:
        raise ValueError(
            "--network classifier is fitted on the data that RUN was trained on, which its folder "
            "doesn't tell; give another network"
        )
    device, networks = pipeline.transformer.device, []
    for name in names:
        dataset = None
        if name == "classifier" and trained_on is not None:
            dataset = load_dataset(trained_on[0], "train", **trained_on[1])
        networks.append(
            load_network(name, weights=weights.get(name), device=device, dataset=dataset)
        )
    return networks


def choose_texts(
    pipeline: ElasticPipeline, images: Images, count: int, file: str | None = None
) -> tuple[str, ...]:
    """Texts to draw: the lines of a file, or `count` captions of the real images.

    Of a model that draws classes there are none.
    """
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts: {file} is no text in UTF-8 ({error})") from error
        texts = tuple(line.strip() for line in lines if line.strip())
        if not texts:
            raise ValueError(f"--prompts: {file} has no line with a text")
        return texts
    if not pipeline.transformer.takes_text:
        return ()
    if images.captions is None:
        raise ValueError("this model draws texts, and the reference has none; give --prompts FILE")
    return tuple(images.captions(evenly(images.count, count).tolist()))
