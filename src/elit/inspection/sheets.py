"""Sheets of an inspection: where Read looks and the loss is, samples, what latents contribute."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from elit._tables import with_error
from elit.inspection.inspector import (
    Inspector,
    Maps,
    Worth,
    in_raster_order,
    squares_of_tokens,
    token_grid,
)
from elit.inspection.left_out import PARTS
from elit.inspection.numbers import mean_over_levels
from elit.inspection.subject import to_pictures
from elit.interface.budget import format_budget
from elit.interface.grid import TokenGrid
from elit.pipelines.base import ElasticPipeline
from elit.viz.charts import Chart, Line, picture
from elit.viz.heatmaps import Column, map_sheet, overlay
from elit.viz.sheet import enlargement, film_strip, save_image, stack, titled

_FRAMES = 4  # of a clip
_LATENTS = 8  # columns of the sheet of latents: the first half of them and the last half
_LONGEST = 14  # letters of a row's caption
NEARLY = 0.01  # of the loss, that tells nearly all from all


def save_sheets(
    folder: Path,
    pipeline: ElasticPipeline,
    inspector: Inspector,
    maps: Sequence[Maps],
    worths: Sequence[Worth],
    samples: dict[int, Tensor],
    names: Sequence[str],
) -> list[Path]:
    """Write inspect.png, latents.png, budgets.png and worth.png; give their paths."""
    sheets = Sheets(pipeline, inspector, len(next(iter(samples.values()))), names)
    pictures = {
        "inspect.png": sheets.of_maps(maps),
        "latents.png": sheets.of_latents(maps),
        "budgets.png": sheets.of_samples(samples),
        "worth.png": sheets.of_worths(worths),
    }
    written = []
    for name, sheet in pictures.items():
        if sheet is not None:
            save_image(sheet, folder / name)
            written.append(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier call
    return written


class Sheets:
    """Draws the first images of an inspection; the last row is a mean over all of them."""

    def __init__(
        self,
        pipeline: ElasticPipeline,
        inspector: Inspector,
        shown: int,
        names: Sequence[str],
    ):
        self.pipeline, self.inspector, self.shown = pipeline, inspector, shown
        self.model, self.grid = inspector.model, inspector.grid
        self.cell = 256 if pipeline.draws_clips else 112  # pixels; a strip of frames is wide
        self.captions = [name[:_LONGEST] for name in names[:shown]]
        images = inspector.subject.images
        self.rows = [*self.captions, f"mean of {len(images)}"]
        chosen = self.pictures(images[:shown])
        one_by_one = (self.pictures(image[None])[0] for image in images)
        mean = np.mean([np.asarray(picture) for picture in one_by_one], 0)
        self.images = [*chosen, Image.fromarray(mean.round().astype(np.uint8))]

    def pictures(self, samples: Tensor) -> list[Image.Image]:
        """Of samples (B, C, *space); clips become strips."""
        drawn = to_pictures(self.pipeline, samples)
        if self.pipeline.draws_clips:
            drawn = [film_strip(frames, _FRAMES) for frames in drawn]
        return [image.convert("RGB") for image in drawn]

    def flat(self, maps: Tensor, grid: TokenGrid) -> np.ndarray:
        """Maps (..., G, P) as pictures (..., h, w); those of a clip's frames side by side."""
        values = in_raster_order(maps, grid).numpy()
        if len(grid.size) == 3:
            frames = values.shape[-3]
            count = min(_FRAMES, frames)
            at = [round(i * (frames - 1) / max(1, count - 1)) for i in range(count)]
            values = np.concatenate([values[..., t, :, :] for t in at], axis=-1)
        return values

    def with_mean(self, maps: Tensor) -> np.ndarray:
        """The shown maps of (N, G, P), and the mean of all."""
        return self.flat(torch.cat((maps[: self.shown], maps.mean(0, keepdim=True))), self.grid)

    def of_maps(self, maps: Sequence[Maps]) -> Image.Image:
        """Image, loss, attention and difference, a block for each noise level.

        The middle level has the shown images and the mean, the others the mean alone.
        """
        blocks, levels = [], list(dict.fromkeys(one.sigma for one in maps))
        for sigma in levels:
            here = [one for one in maps if one.sigma == sigma]
            loss = here[0].mean("loss")
            assert loss is not None
            columns = [
                Column("image", self.images),
                Column(f"loss at budget {self.budget(here[0])}", maps=self.with_mean(loss)),
            ]
            for one in here:
                if (attention := one.mean("attention")) is None:
                    continue
                title = f"attention at budget {self.budget(one)}"
                column = Column(title, maps=self.with_mean(attention))
                columns.append(column)
                if one is here[0] and column.maps is not None and column.scale:
                    factor = enlargement(self.images[0].size, self.cell)
                    size = self.images[0].width * factor, self.images[0].height * factor
                    large = [image.resize(size, Image.Resampling.NEAREST) for image in self.images]
                    pairs = zip(large, column.maps, strict=True)
                    over = [overlay(image, values, column.scale) for image, values in pairs]
                    columns.append(Column("the same over the image", over))
            for one in here:
                if (difference := one.mean("difference")) is not None:
                    title = f"velocity at budget {self.budget(one)} less that at 1, squared"
                    columns.append(Column(title, maps=self.with_mean(difference)))
            rows = self.rows
            if sigma != levels[len(levels) // 2]:
                rows, columns = rows[-1:], [self.of_the_mean(column) for column in columns]
            blocks.append(map_sheet(columns, rows, self.cell, f"noise level {sigma:g}"))
        title = "Where the loss is and where Read looks, token by token: bright is high; the scale "
        return titled(stack(blocks), f"{title}of a column is below it, < and > mark a few beyond.")

    @staticmethod
    def of_the_mean(column: Column) -> Column:
        """The last row of a column."""
        if column.maps is None:
            return Column(column.title, column.images[-1:])
        return Column(column.title, maps=column.maps[-1:])

    def of_latents(self, maps: Sequence[Maps]) -> Image.Image | None:
        """What the first and the last latents read at the middle noise level and most latents."""
        looked = [one for one in maps if one.latents is not None]
        if not looked:
            return None
        most = max(one.num_latents for one in looked)
        alike = [one for one in looked if one.num_latents == most]
        one = alike[len(alike) // 2]
        assert one.latents is not None and one.shown is not None  # noqa: PT018
        half = _LATENTS // (4 if self.pipeline.draws_clips else 2)
        chosen = [i for i in range(most) if i < half or i >= most - half]
        values = [
            self.flat(torch.cat((one.shown[:, i], one.latents[i][None])), self.grid) for i in chosen
        ]
        high = max(float(v.max()) for v in values)
        columns = [Column("image", self.images)]
        columns += [
            Column(f"latent {i + 1}", maps=v, scale=(0.0, high))
            for i, v in zip(chosen, values, strict=True)
        ]
        title = f"What each latent reads at budget {self.budget(one)}, noise level {one.sigma:g}."
        return map_sheet(columns, self.rows, self.cell, title)

    def of_samples(self, samples: dict[int, Tensor]) -> Image.Image:
        """Samples of the same noise, and where they depart from those at full budget."""
        full = samples[self.model.max_latents]
        columns = [Column("data", self.images[:-1])]
        for n, drawn in samples.items():
            title = f"sample at budget {format_budget(self.model.budget_of(n))}"
            columns.append(Column(title, self.pictures(drawn)))
        for n, drawn in samples.items():
            if n < self.model.max_latents:
                grid = token_grid(self.model, drawn)
                values = self.flat(squares_of_tokens(drawn - full, grid, self.model), grid)
                budget = format_budget(self.model.budget_of(n))
                title = f"sample at budget {budget} less that at 1, squared"
                columns.append(Column(title, maps=values))
        title = "Samples of the same noise at each budget, and where they differ from full budget."
        return map_sheet(columns, self.captions, self.cell, title)

    def of_worths(self, worths: Sequence[Worth]) -> Image.Image:
        """Loss over the number of first latents, what leaving out each one costs, and the loss
        without the core.
        """
        loss = "squared error of the velocity"
        error = "; error bars: one standard error over images"

        def line(x: Iterable[float], losses: Iterable[Tensor], label: str = "") -> Line:
            own = list(losses)
            means = [float(v.mean()) for v in own]
            errors = [float(v.std() / len(v) ** 0.5) if len(v) > 1 else 0.0 for v in own]
            return Line(list(x), means, label, error=errors)

        def bars(title: str, x: str, y: str, losses: Mapping[str, Tensor]) -> Chart:
            drawn = line(range(len(losses)), losses.values())
            return Chart(title, x + error, y, [drawn], "bars", list(losses), zero=True)

        curves = [line(w.first, w.first.values(), f"noise level {w.sigma:g}") for w in worths]
        title, x = "loss with the first latents of each group alone", f"first latents{error}"
        charts = [Chart(title, x, f"{loss} (log scale)", curves, log_y=True, labels="right")]
        mean = mean_over_levels(worths)
        full = mean.first[self.model.max_latents]
        if mean.without:
            title = "rise of the loss without one latent, mean over the noise levels"
            rises = {str(i + 1): losses - full for i, losses in mean.without.items()}
            charts.append(bars(title, "latent that is left out", f"rise of the {loss}", rises))
        title = "loss at full budget and without the core, mean over the noise levels"
        names = "nothing", "the core", "Read, core and Write"
        without = dict(
            zip(names, [full, *(mean.without_part[part] for part in PARTS)], strict=True)
        )
        charts.append(bars(title, "what is left out", loss, without))
        return picture(charts, sentence=told_of_worth(mean))

    def budget(self, one: Maps) -> str:
        """Budget of maps in words."""
        return format_budget(self.model.budget_of(one.num_latents))


def told_of_worth(mean: Worth) -> str:
    """How many latents bring nearly all, the costliest one, and the core, in a sentence."""
    losses = {n: float(own.mean()) for n, own in mean.first.items()}
    most, full = max(losses), losses[max(losses)]
    enough = min(n for n, loss in losses.items() if loss <= full * (1 + NEARLY))
    texts = [f"The first {enough} of {most} latents bring the loss within {NEARLY:.0%} of all"]
    if mean.without:
        rises = {i: own - mean.first[most] for i, own in mean.without.items()}
        number = max(rises, key=lambda i: float(rises[i].mean()))
        rise = rises[number]
        error = float(rise.std() / len(rise) ** 0.5) if len(rise) > 1 else None
        cost, spread = with_error(float(rise.mean()), error)
        cost = cost.lstrip("+") + ("" if error is None else f" ± {spread}")
        texts.append(f"leaving one out adds at most {cost}, latent {number + 1}")
    core = float(mean.without_part[PARTS[0]].mean()) / full - 1
    texts.append(f"leaving out the core adds {core:.0%}")
    return "; ".join(texts) + "."
