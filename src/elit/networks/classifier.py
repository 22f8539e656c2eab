"""A classifier fitted on real images, to tell how many generated ones show the right class.

The kernel machine is scikit-learn's; the network is ours, since only it also gives features.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from elit._files import cache_folder, digest_of, save_tensors
from elit.data import ImageDataset

Predict = Callable[[torch.Tensor], torch.Tensor]  # images (B, C, H, W) -> labels (B,)

_MAX_IMAGES = 6000  # of the data set: more cost time and add nothing
_MAX_SIDE = 32  # the network looks at larger images at this size
_STEPS = 160  # of the network's training
_RECIPE = 1  # of the network and its training: a change of either makes another one


class Classifier:
    """Tells the class of images of one shape; made by `fit_classifier`."""

    def __init__(self, image_shape: tuple[int, ...], predict: Predict) -> None:
        self.image_shape = image_shape
        self._predict = predict

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Return int64 labels (B,) of images (B, C, H, W); values outside [-1, 1] are clipped."""
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: this classifier was fitted on "
                f"(B, {', '.join(map(str, self.image_shape))}); generate or resize the images to "
                f"that"
            )
        if not images.is_floating_point():
            raise ValueError(f"images of {images.dtype}: use floating point values in [-1, 1]")
        if not images.isfinite().all():
            raise ValueError("images contain NaN or infinity: the model that made them diverged")
        if len(images) == 0:
            return torch.empty(0, dtype=torch.int64)
        clipped = images.detach().to("cpu", torch.float32).clamp(-1, 1)
        # In small batches, so that memory does not grow with the number of images.
        return torch.cat([self._predict(part) for part in clipped.split(500)])

    def accuracy(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Return the share of images whose predicted class is their label, in [0, 1]."""
        predicted = self.predict(images)
        if labels.shape != predicted.shape or len(labels) == 0:
            raise ValueError(
                f"{tuple(labels.shape)} labels for {tuple(images.shape)} images: "
                "use one label per image and at least one image"
            )
        return (predicted == labels.cpu()).float().mean().item()


def fit_classifier(train_dataset: ImageDataset, seed: int = 0) -> Classifier:
    """Fit a classifier on a training split, within seconds on a CPU.

    Where all objects stand alike (`aligned`), comparing pixels with a kernel machine is quickest
    and best; objects in free places need a convolutional network. Both also learn mildly blurred
    and noisy copies, since a generated image may be either and still be right.
    """
    if len(train_dataset.image_shape) != 3:
        raise ValueError(f"a classifier takes images; {train_dataset!r} has clips")
    if train_dataset.aligned:
        from sklearn.svm import SVC

        images, labels = _images_of(train_dataset)
        with _seeded(seed):
            seen = torch.cat([images, _degrade(images)]).flatten(1)
        machine = SVC(C=3.0).fit(seen.numpy(), labels.repeat(2).numpy())

        def predict(part: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(machine.predict(part.flatten(1).numpy())).long()

    else:
        network = fit_network(train_dataset, seed)
        predict = torch.no_grad()(lambda part: network(_shrink(part)).argmax(dim=1))
    return Classifier(train_dataset.image_shape, predict)


def fit_network(train_dataset: ImageDataset, seed: int = 0, keep: bool = False) -> nn.Sequential:
    """Fit a convolutional network on a training split, within seconds on a CPU.

    Its last layer gives logits of images (B, C, H, W) in [-1, 1], which `ClassifierFeatures` makes
    small. All processes of a machine get the same weights; to `keep` them in the cache, and take
    them from there, makes them those of other machines too, which would round otherwise.
    """
    images, labels = _images_of(train_dataset)
    if images.ndim == 5:  # of clips, the middle frames
        images = images[:, :, images.shape[2] // 2]
    aligned = train_dataset.aligned
    with _seeded(seed):
        network = _network(images.shape[1], int(labels.max()) + 1, aligned)
        if not keep:
            return _fit_network(network, images, labels)
        seen = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        key = digest_of([_RECIPE, seen, seed, aligned, sorted(network.state_dict())])
        file = cache_folder() / "classifiers" / f"{key}.safetensors"
        try:
            weights = load_file(file)
        except (FileNotFoundError, SafetensorError):  # none yet, or damaged
            weights = _fit_network(network, images, labels).state_dict()
            save_tensors(file, weights)
        network.load_state_dict(weights)
        return network.eval().requires_grad_(False)


class ClassifierFeatures(nn.Module):
    """A network of `fit_network` that gives its last layer's input and its logits."""

    outputs = ("pool", "logits")

    def __init__(self, network: nn.Sequential):
        super().__init__()
        self.body, self.head = network[:-1], network[-1]

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Look at images (B, C, H, W) in [-1, 1]; pool (B, d), logits (B, classes)."""
        pool = self.body(_shrink(images))
        return {"pool": pool, "logits": self.head(pool)}


def untrained_network(train_dataset: ImageDataset, seed: int = 0) -> nn.Sequential:
    """The network of `fit_network` before it is fitted: it knows no label."""
    with _seeded(seed):
        channels, classes = train_dataset.image_shape[0], train_dataset.num_classes
        return _network(channels, classes, train_dataset.aligned)


def spatial_part(network: nn.Sequential) -> nn.Sequential:
    """The stages of a network of `fit_network`: images (B, C, H, W) to maps (B, d, h, w)."""
    stages = itertools.takewhile(lambda part: not isinstance(part, nn.AdaptiveAvgPool2d), network)
    return nn.Sequential(_Shrink(), *stages)


class _Shrink(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return _shrink(images)


def _images_of(train_dataset: ImageDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Images to fit on, (N, C, H, W), and their labels (N,)."""
    # Spread over the set: it may be sorted by class.
    count = min(len(train_dataset), _MAX_IMAGES)
    chosen = torch.linspace(0, len(train_dataset) - 1, count).round().long()
    batch = train_dataset.batch(chosen.tolist())
    return train_dataset.on_device(batch["images"]), batch["class_labels"]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Gradients and random numbers of a fit, in one thread: more of them would sum otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _fit_network(
    network: nn.Sequential, images: torch.Tensor, labels: torch.Tensor
) -> nn.Sequential:
    images = _shrink(images)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=_STEPS)
    for _ in range(_STEPS):
        rows = torch.randint(len(images), (64,))
        seen = _degrade(images[rows]).contiguous(memory_format=torch.channels_last)  # faster
        scores = network(seen)
        loss = F.cross_entropy(scores, labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


def _network(channels: int, num_classes: int, aligned: bool) -> nn.Sequential:
    width = 12

    def stage(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    pool: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]  # wherever the object is
    if aligned:  # it counts where a stroke is
        linear = nn.Linear(4 * 4 * width, 4 * width)
        norm = nn.BatchNorm1d(4 * width)
        pool = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), linear, norm, nn.ReLU()]
    return nn.Sequential(
        *stage(channels, width, 5, 2),
        *stage(width, 2 * width, 3, 1),
        *stage(2 * width, 4 * width, 3, 2),
        *stage(4 * width, 4 * width, 3, 1),
        *pool,
        nn.Linear(4 * width, num_classes),
    )


def _shrink(images: torch.Tensor) -> torch.Tensor:
    height, width = images.shape[-2:]
    if max(height, width) <= _MAX_SIDE:
        return images
    scale = _MAX_SIDE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def _degrade(images: torch.Tensor) -> torch.Tensor:
    """Blur each image by up to two pixels and add noise of up to 0.2, at random."""
    half = F.avg_pool2d(images, 2, ceil_mode=True)
    soft = F.interpolate(half, size=images.shape[-2:], mode="bilinear")
    blurred = torch.lerp(images, soft, 0.8 * torch.rand(len(images), 1, 1, 1))
    return blurred + 0.2 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)
