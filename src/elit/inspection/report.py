"""An inspection from beginning to end: look, write the sheets and maps, and tell all numbers."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tqdm import tqdm

from elit._files import output_folder, write_file, write_json
from elit._tables import format_table, with_error
from elit.inspection.correlation import NUM_SHUFFLES
from elit.inspection.inspector import (
    Inspector,
    Maps,
    Subject,
    draw_at_budgets,
    in_raster_order,
)
from elit.inspection.numbers import (
    mean_over_levels,
    numbers_of_core,
    numbers_of_maps,
    numbers_of_worth,
)
from elit.inspection.sheets import save_sheets
from elit.inspection.subject import SHOWN
from elit.interface.budget import format_budget
from elit.pipelines.base import ElasticPipeline


def inspect_pipeline(
    pipeline: ElasticPipeline,
    subject: Subject,
    names: Sequence[str],
    folder: str | os.PathLike,
    sigmas: Sequence[float] = (0.25, 0.5, 0.75),
    budgets: Sequence[float] = (1.0, 0.25),
    steps: int = 20,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Look into a pipeline's model; write inspect.json, maps.safetensors and the sheets.

    Args:
        pipeline: of an elastic model, on its device.
        subject: what is looked at, by `choose_subject`.
        names: of the subject's images.
        folder: to write into.
        sigmas: noise levels.
        budgets: fractions of the latents to look at.
        steps: of the samples that are compared.
        about: settings to put into the report in front of ours.

    Returns:
        What inspect.json holds, in plain types.
    """
    folder = output_folder(os.fspath(folder), "folder")
    inspector, model = Inspector(pipeline.transformer, subject), pipeline.transformer
    kept = sorted({model.resolve_budget(b) for b in budgets}, reverse=True)
    shown = min(SHOWN, len(subject.images))
    maps, worths = [], []
    levels = list(dict.fromkeys(sigmas))
    for sigma in tqdm(levels, desc="noise levels", leave=False):
        maps += inspector.maps(sigma, kept, shown)
        worths.append(inspector.worth(sigma))
    drawn = list(dict.fromkeys([model.max_latents, *kept]))
    samples = draw_at_budgets(pipeline, subject, drawn, steps, shown)
    sheets = save_sheets(folder, pipeline, inspector, maps, worths, samples, names)
    save_maps(folder / "maps.safetensors", inspector, maps)
    report = {
        "settings": {
            **(about or {}),
            "model": type(model).__name__,
            "max_latents": model.max_latents,
            "tokens": list(inspector.grid.size),
            "group": list(inspector.grid.group),
            "images": len(subject.images),
            "names": list(names),
            "draws": subject.draws,
            "steps": steps,
            "seed": subject.seed,
            "shuffles": NUM_SHUFFLES,
        },
        "maps": [numbers_of_maps(m, model.budget_of(m.num_latents), subject.seed) for m in maps],
        "latents": numbers_of_worth(worths),
        "latents_mean": numbers_of_worth([mean_over_levels(worths)]),
        "core": [numbers_of_core(worth) for worth in worths],
        "core_mean": numbers_of_core(mean_over_levels(worths)),
        "out": str(folder),
        "sheets": [str(path) for path in sheets],
    }
    write_json(folder / "inspect.json", report)
    return report


def save_maps(path: Path, inspector: Inspector, maps: Sequence[Maps]) -> None:
    """All maps as they lie on the image, (N, *tokens), and the latents' means, (n, *tokens)."""
    tensors = {}
    for one in maps:
        place = f"sigma-{one.sigma:g}.latents-{one.num_latents}"
        for name in ("loss", "attention", "difference"):
            if (value := one.mean(name)) is not None:
                tensors[f"{place}.{name}"] = in_raster_order(value, inspector.grid).contiguous()
        if one.latents is not None:
            value = in_raster_order(one.latents, inspector.grid)
            tensors[f"{place}.by_latent"] = value.contiguous()
    write_file(path, lambda aside: save_file(tensors, aside))


def report_text(report: Mapping[str, Any]) -> str:
    """Two tables, the maps and the latents, and what the core as a whole contributes."""
    header = ["noise level", "budget", "loss", "attention~loss", "shuffled", "p", "other noise",
              "shuffled", "p", "in groups", "p", "by position"]  # fmt: skip
    rows = []
    for one in report["maps"]:
        cells = [f"{one['sigma']:g}", format_budget(one["budget"]), f"{one['loss']:.4f}"]
        found = (one["attention_loss"] or {}).get("spearman", {})
        inside = (one["attention_loss"] or {}).get("spearman_in_groups", {})
        for numbers, names in (
            (found, ("value", "shuffled", "p")),
            (found.get("other_noise", {}), ("value", "shuffled", "p")),
            (inside.get("other_noise", {}), ("value", "p")),
        ):
            cells += [_cell(numbers.get(n), sign="" if n == "p" else "+") for n in names]
        share = one["position_share"]["attention"]
        rows.append([*cells, "-" if share is None else f"{share:.0%}"])
    explained = (
        f"Spearman's correlation over the tokens, mean of {report['settings']['images']} images\n"
        f"shuffled: the attention on one image with the loss on another; p: shuffles as far off\n"
        f"other noise: the maps have seen different noise; in groups: the same in groups alone\n"
        f"by position: share of the attention's variance that its mean map explains"
    )
    of_maps = format_table(header, rows)
    lines: dict[int, list[str]] = {}
    for one in report["latents_mean"]["first"]:
        lines[one["num_latents"]] = [f"{one['loss']:.4f}", "-", "-"]
    for one in report["latents_mean"]["without"]:
        line = lines.setdefault(one["latent"] + 1, ["-", "-", "-"])
        line[1:] = with_error(one["cost"], one["cost_error"])
    header = ["n", "loss of the first n latents", "leaving out latent n adds", "+-"]
    of_latents = format_table(header, [(n, *line) for n, line in sorted(lines.items())])
    core, sheets = words_on_core(report["core_mean"]), "\n".join(report["sheets"])
    return "\n\n".join((of_maps, explained, of_latents, core, sheets))


def words_on_core(core: dict[str, Any]) -> str:
    """What the core as a whole contributes, in two lines; in one with a single latent a group."""
    loss, alone, whole = (core[name] for name in ("loss", "without_core", "without_interface"))
    shares = [_cell(part["share"], ".1%") for part in (alone, whole)]
    spreads = [core[name] for name in ("latent_spread_read", "latent_spread")]
    worth = (
        f"at full budget the loss is {loss:.4f}; with latents that go from Read straight to Write "
        f"{alone['loss']:.4f} ({shares[0]}); without Read, core and Write "
        f"{whole['loss']:.4f} ({shares[1]})"
    )
    if spreads == [None, None]:
        return worth
    read, after = (_cell(spread, ".1%", "") for spread in spreads)
    return (
        f"{worth}\n{read} of the latents' variance lies within a group after Read, {after} after "
        f"the core (0% would mean copies of one another, 100% independent latents)"
    )


def _cell(value: float | None, form: str = ".3f", sign: str = "+") -> str:
    return "-" if value is None else f"{value:{sign}{form}}"
