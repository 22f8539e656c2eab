"""What a velocity loses below full budget along the noise levels, on held-out data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from elit.flow.guidance import Condition, Latents, Velocity
from elit.flow.objective import interpolate
from elit.inspection.inspector import Subject
from elit.pipelines.base import ElasticPipeline


@dataclass(frozen=True)
class Errors:
    """Mean products of errors, per element of a velocity, and standard errors of the squares.

    At each noise level there are E = 2 K + 1 errors: of the guided prediction at each of K numbers
    of latents, of the guide (null label) likewise, then what the label makes at full budget.
    """

    gram: Tensor  # (N * E, N * E), also across levels: the noise is the same at all
    standard_errors: Tensor  # (N, E), over the images


@torch.no_grad()
def measure_errors(
    predict: Velocity,
    null_of: Callable[[Condition], Condition],
    subject: Subject,
    levels: Sequence[float],
    latents: Sequence[int],
    device: torch.device,
    progress: bool = False,
) -> Errors:
    """Errors against full budget at each noise level and number of latents.

    Args:
        predict: the model, any: (samples, sigma, condition, num_latents) -> velocities; None
            latents are all.
        null_of: the guide's condition, of a condition.
        subject: held-out data, and noise.
        levels: N noise levels.
        latents: K numbers of latents below full budget.
        device: of the model.
        progress: whether to show a bar.
    """
    count = len(levels) * (2 * len(latents) + 1)
    gram = torch.zeros(count, count)
    squares = torch.zeros(len(subject.images), count)
    samples = len(subject.images) * subject.draws
    forwards = -(-samples // subject.batch_size) * len(levels)
    with tqdm(total=forwards, desc="velocity errors", disable=not progress) as bar:
        for batch in subject.batches(device, subject.draws):
            found = []
            for sigma in levels:
                level = torch.full((len(batch.rows),), sigma, device=device)
                x = interpolate(batch.images, batch.noise, level)
                both = batch.condition, null_of(batch.condition)
                full = [predict(x, sigma, condition, None).float() for condition in both]
                for condition, best in zip(both, full, strict=True):
                    found += [predict(x, sigma, condition, n).float() - best for n in latents]
                found.append(full[0] - full[1])
                bar.update()
            errors = torch.stack(found).flatten(2)  # (N * E, B, D)
            gram += (errors.flatten(1) @ errors.flatten(1).T).cpu() / (samples * errors.shape[2])
            squares.index_add_(0, batch.rows, errors.square().mean(2).T.cpu() / subject.draws)
    spread = squares.std(0) / len(squares) ** 0.5
    return Errors(gram, spread.unflatten(0, (len(levels), -1)))


def measure_pipeline(
    pipeline: ElasticPipeline,
    subject: Subject,
    levels: Sequence[float],
    latents: Sequence[int],
    progress: bool = False,
) -> Errors:
    """`measure_errors` of a pipeline's model."""
    model = pipeline.transformer.eval()

    def predict(x: Tensor, sigma: float, condition: Condition, num_latents: Latents) -> Tensor:
        level = torch.full((len(x),), sigma, device=x.device)
        kept = model.max_latents if num_latents is None else num_latents
        return model(
            x.to(model.dtype), level, **condition, num_latents=kept, return_dict=False
        )[0]  # fmt: skip

    def null_of(condition: Condition) -> Condition:
        if "class_labels" in condition:
            return {"class_labels": torch.full_like(condition["class_labels"], pipeline.null_label)}
        return {name: _like(empty[name], given) for name, given in condition.items()}

    empty = {} if "class_labels" in subject.condition else pipeline.encode_prompt([""])[1]
    return measure_errors(predict, null_of, subject, levels, latents, model.device, progress)


def _like(one: Tensor, given: Tensor) -> Tensor:
    """A text's encoding (1, ...) for each row of others (B, ...), which may be longer: padded."""
    result = torch.zeros_like(given)
    result[(slice(None), *(slice(n) for n in one.shape[1:]))] = one.to(given)
    return result


def power_spectrum(images: Tensor, rings: int = 64) -> list[float]:
    """Mean power of the frequencies of images (N, C, *space), in rings from 0 to the highest.

    White noise of variance 1 has power 1 in each; a ring without a frequency has its inner one's.
    The radius of a ring is the largest of a frequency's shares of its axes' highest ones.
    """
    axes = tuple(range(2, images.ndim))
    power = torch.fft.fftn(images.float(), dim=axes, norm="ortho").abs().square().mean((0, 1))
    radius = torch.zeros(power.shape)
    for axis, size in enumerate(power.shape):
        share = torch.fft.fftfreq(size).abs() * 2
        shape = [-1 if a == axis else 1 for a in range(power.ndim)]
        radius = torch.maximum(radius, share.view(shape))
    ring = (radius * rings).long().clamp(max=rings - 1).flatten()
    sums = torch.zeros(rings).index_add_(0, ring, power.flatten())
    counts = torch.zeros(rings).index_add_(0, ring, torch.ones(power.numel()))
    result: list[float] = []
    for total, number in zip(sums.tolist(), counts.tolist(), strict=True):
        result.append(total / number if number else result[-1])
    return result
