"""Scores of drawn samples: their features against those of real images."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from elit.evaluation.frechet import Moments, bias_warning, frechet_distance
from elit.evaluation.networks import FeatureNetwork
from elit.evaluation.parts import Parts
from elit.evaluation.reference import Reference, Statistics, evenly
from elit.evaluation.scores import (
    clip_score,
    inception_score,
    kernel_distance,
    precision_recall,
)

logger = logging.getLogger(__name__)

MOST_COMPARED = 50_000  # samples of which precision and recall are taken
# What a Frechet distance on a network's output is called; of any other network, "fd".
FRECHET = {
    "inception.pool": "fid",
    "inception.spatial": "sfid",
    "dinov2.pool": "fdd",
    "i3d.pool": "fvd",
}


@dataclass
class Scores:
    """Scores of one operating point.

    Attributes:
        values: by name.
        of: the network behind each.
        deviations: standard deviations, where a score is a mean over parts of the samples.
        count: samples.
    """

    values: dict[str, float] = field(default_factory=dict)
    of: dict[str, str] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(
        self, name: str, value: float, network: FeatureNetwork, deviation: float | None = None
    ) -> None:
        """Take a score, unless an earlier network gave it."""
        if name in self.values:
            return
        if not math.isfinite(value):
            raise ValueError(f"{name} of these samples is {value}; look at the images")
        self.values[name], self.of[name] = value, network.name
        if deviation is not None:
            self.deviations[name] = deviation


def measure(
    parts: Parts, networks: Sequence[FeatureNetwork], reference: Reference, labelled: bool = True
) -> Scores:
    """All scores that the networks' outputs allow.

    A score that several networks could give, such as precision, is the first one's.

    Args:
        parts: what `Drawing.draw` gave of all samples.
        networks: that saw them.
        reference: statistics of real images by the same networks.
        labelled: whether samples were drawn of classes, which the built-in classifier can tell.
    """
    scores = Scores(count=parts.count)
    for network in networks:
        if network.takes == "texts":
            images, texts = (parts.whole(f"{network.name}.{x}") for x in ("pool", "text"))
            scores.add("clip", clip_score(images, texts), network)
            continue
        for output in network.outputs:
            key = f"{network.name}.{output}"
            if output == "logits":
                logits = parts.whole(key)
                score, deviation = inception_score(logits)
                scores.add("is", score, network, deviation)
                if network.name == "classifier" and labelled:
                    right = logits.argmax(1) == parts.whole("labels")
                    scores.add("accuracy", right.float().mean().item(), network)
                continue
            if key not in reference:
                logger.warning("no statistics of %s in the reference: no score of it", key)
                continue
            real = reference[key]
            scores.add(FRECHET.get(key, "fd"), _frechet(parts, key, real), network)
            if output != "spatial" and network.takes == "images" and real.features is not None:
                _compare(parts.whole(key), real.features, network, scores)
    return scores


def _frechet(parts: Parts, key: str, real: Statistics) -> float:
    moments = Moments()
    for features in parts.read(key):
        moments.update(features)
    if len(real.mean) != len(moments.mean):
        raise ValueError(
            f"{key} has {len(moments.mean)} features, the reference {len(real.mean)}: they are of "
            f"different networks"
        )
    message = bias_warning(moments.count, len(moments.mean), key)
    if message:
        logger.warning("%s", message)
    return frechet_distance(moments.mean, moments.covariance, real.mean, real.covariance)


def _compare(features: Tensor, real: Tensor, network: FeatureNetwork, scores: Scores) -> None:
    """Precision, recall, density, coverage and KID, where there are enough samples."""
    drawn = features[evenly(len(features), MOST_COMPARED)]
    if min(len(drawn), len(real)) <= 3:
        logger.warning("precision, recall and KID need more than 3 samples; left out")
        return
    found = precision_recall(real, drawn)
    for name in ("precision", "recall", "density", "coverage"):
        scores.add(name, getattr(found, name), network)
    value, deviation = kernel_distance(real, drawn)
    scores.add("kid", value, network, deviation)
