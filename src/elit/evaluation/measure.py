"""Scores of drawn samples: their features against those of real images."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from tqdm import tqdm

from elit.evaluation.frechet import Moments, bias_warning, frechet_distance, frechet_error
from elit.evaluation.parts import Parts
from elit.evaluation.reference import Reference, Statistics, evenly
from elit.evaluation.scores import clip_score, inception_score, kernel_distance, precision_recall
from elit.networks.feature_network import FeatureNetwork

logger = logging.getLogger(__name__)

SLOW = 5000  # samples from which scoring takes long enough for a bar
MOST_COMPARED = 50_000  # samples of which precision and recall are taken
# What a Frechet distance on a network's output is called; of any other network, "fd".
FRECHET = {
    "inception.pool": "fid",
    "inception.spatial": "sfid",
    "dinov2.pool": "fdd",
    "i3d.pool": "fvd",
}


COMPARED = ("precision", "recall", "density", "coverage", "kid")


@dataclass
class Scores:
    """Scores of one operating point."""

    values: dict[str, float] = field(default_factory=dict)  # by name
    of: dict[str, str] = field(default_factory=dict)  # the network behind each
    # standard deviations, where a score is a mean over parts of the samples; standard errors of
    # Frechet distances
    deviations: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # what makes them less than they seem

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

    def warn(self, message: str | None) -> None:
        """Take note of a warning, and tell it."""
        if message and message not in self.warnings:
            self.warnings.append(message)
            logger.warning("%s", message)


def scores_of(network: FeatureNetwork, output: str) -> tuple[str, ...]:
    """Names of the scores that an output of a network may give."""
    if network.takes == "texts":
        return ("clip",)
    if output == "logits":
        return ("is", "accuracy") if network.name == "classifier" else ("is",)
    frechet = FRECHET.get(f"{network.name}.{output}", "fd")
    compared = output != "spatial" and network.takes == "images"
    return (frechet, *COMPARED) if compared else (frechet,)


def possible_scores(networks: Sequence[FeatureNetwork]) -> list[str]:
    """Names of the scores that networks may give, each once."""
    pairs = ((network, output) for network in networks for output in network.outputs)
    return list(dict.fromkeys(name for pair in pairs for name in scores_of(*pair)))


def measure(
    parts: Parts,
    networks: Sequence[FeatureNetwork],
    reference: Reference,
    labelled: bool = True,
    progress: bool = False,
) -> Scores:
    """Compute all scores that the networks' outputs of drawn samples allow.

    A score that several networks could give, such as precision, is the first one's. `labelled` are
    samples of classes, which the built-in classifier can tell.
    """
    scores = Scores()
    pairs = [(network, output) for network in networks for output in network.outputs]
    hidden = not progress or parts.count < SLOW
    for network, output in tqdm(pairs, desc="scoring", unit="output", disable=hidden, leave=False):
        key = f"{network.name}.{output}"
        if network.takes == "texts":
            texts = parts.whole(f"{network.name}.text")
            scores.add("clip", clip_score(parts.whole(key), texts), network)
        elif output == "logits":
            _classes(parts, parts.whole(key), network, labelled, scores)
        elif key in reference:
            real = reference[key]
            name = FRECHET.get(key, "fd")
            value, error = _frechet(parts, key, real, scores)
            scores.add(name, value, network, error)
            if set(COMPARED) & set(scores_of(network, output)) and real.features is not None:
                _compare(parts.whole(key), real.features, network, scores)
        else:
            scores.warn(f"the reference has no statistics of {key}: no score of it")
    return scores


def _classes(
    parts: Parts, logits: Tensor, network: FeatureNetwork, labelled: bool, scores: Scores
) -> None:
    """Inception Score and, of the built-in classifier, the share of samples that it tells."""
    score, deviation = inception_score(logits)
    scores.add("is", score, network, deviation)
    if network.name == "classifier" and labelled:
        labels = parts.whole("labels")
        labels = labels.repeat_interleave(len(logits) // len(labels))  # each frame of a clip
        right = logits.argmax(1) == labels
        scores.add("accuracy", right.float().mean().item(), network)


def _frechet(parts: Parts, key: str, real: Statistics, scores: Scores) -> tuple[float, float]:
    """Distance and standard error."""
    moments = Moments()
    for features in parts.read(key):
        moments.update(features)
    width = len(moments.mean)
    scores.warn(bias_warning(moments.count, width, f"generated samples ({key})"))
    if real.count is not None:
        scores.warn(bias_warning(real.count, width, f"real samples ({key})"))
    both = moments.mean, moments.covariance, real.mean, real.covariance
    return frechet_distance(*both), frechet_error(parts.read(key), *both)


def _compare(features: Tensor, real: Tensor, network: FeatureNetwork, scores: Scores) -> None:
    """Precision, recall, density, coverage and KID, where there are enough samples."""
    drawn = features[evenly(len(features), MOST_COMPARED)]
    if min(len(drawn), len(real)) <= 3:
        scores.warn("precision, recall and KID need more than 3 samples; left out")
        return
    if network.device.type == "cuda":  # which has float64 too
        drawn, real = drawn.to(network.device), real.to(network.device)
    for name, share in precision_recall(real, drawn)._asdict().items():
        scores.add(name, share, network)
    value, deviation = kernel_distance(real, drawn)
    scores.add("kid", value, network, deviation)
