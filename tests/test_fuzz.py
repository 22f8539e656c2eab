"""Random wrong configs, manifests, pipelines, checkpoints and sweeps: right, or one line.

A case that failed once is kept below by what it holds. ELIT_FUZZ is the number of cases of each
area in the slow test.
"""

import json
import math
import os
import random
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fuzzing import VALUES, damage_file, damage_tensors, run_cases, write_tree
from prepared_data import write_prepared
from runs import tiny_config
from sweeps import sweep_report

from elit._plain import fits_type
from elit.caching.configs import TeaCacheConfig
from elit.cli.config import config_fields
from elit.cli.main import main
from elit.data.manifest import MANIFEST
from elit.data.prepared import Prepared
from elit.flow.schedulers import make_scheduler
from elit.models.dit import DiT
from elit.pipelines.elit_pipeline import ElitPipeline
from elit.pipelines.load import load_pipeline
from elit.pipelines.operating_points import OperatingPoints
from elit.training.loop import train

MANY = int(os.environ.get("ELIT_FUZZ", "2000"))


def told(error: Exception | str, *names: str | None) -> str | None:
    """What is wrong with a message: it is one line and has one of the names."""
    text = str(error)
    if "\n" in text or len(text) > 1500:
        return f"not one line: {text[:300]!r}"
    if names and not any(name in text for name in names if name):
        return f"names none of {names}: {text}"
    return None


# ---- configs ----

FIELDS = {field.key: field for field in config_fields()}
OVERRIDES = (
    "depth", "head", "tail", "hidden_size", "num_heads", "group", "min_latents", "patch_size",
    "sample_size", "num_classes", "mlp_ratio", "rope_theta", "no_such",
)  # fmt: skip
OPTIONS = {
    "digits": ("no_such",),
    "shapes": ("count", "size"),
    "captioned-shapes": ("count", "size"),
    "moving-shapes": ("count", "size", "frames"),
    "prepared": ("path", "resolution", "damaged", "verify", "vae", "window"),
    "tensors": ("path",),
    "fashion-mnist": ("path",),
}
WORDS = {"num_heads": "heads", "hidden_size": "width", "patch_size": "patches"}
PRESETS = (
    "elit-dit-tiny/2",
    "dit-tiny/4",
    "elit-uvit-tiny/2",
    "elit-hdit-tiny/2",
    "elit-sit-tiny/2",
)


def random_value(draw: random.Random, key: str) -> Any:
    hint = FIELDS[key].hint if key in FIELDS else None
    if draw.random() < 0.35 and typing.get_origin(hint) is typing.Literal:
        return draw.choice(typing.get_args(hint))
    if draw.random() < 0.2 and key in FIELDS:
        return FIELDS[key].default
    if draw.random() < 0.1:
        return draw.choice((draw.randrange(-3, 200), draw.random(), 10.0 ** draw.randrange(-9, 40)))
    return draw.choice(VALUES)


def config_case(draw: random.Random, folder: Path, capsys: Any) -> str | None:
    values: dict[str, Any] = {"output_dir": str(folder / "run")}
    for _ in range(draw.choice((1, 1, 2, 3))):
        kind = draw.random()
        if kind < 0.6:
            key = draw.choice(sorted(FIELDS))
            values[key] = random_value(draw, key)
        elif kind < 0.85:
            values["model.preset"] = draw.choice(PRESETS)
            key = draw.choice(OVERRIDES)
            values[f"model.overrides.{key}"] = random_value(draw, key)
        else:
            values["data.name"] = name = draw.choice(sorted(OPTIONS))
            key = draw.choice(OPTIONS[name])
            values[f"data.options.{key}"] = draw.choice(VALUES)
    by_flag = draw.random() < 0.4
    words = ["train", "--dry-run"]
    if by_flag:
        for key, value in values.items():
            text = value if isinstance(value, str) else json.dumps(value)
            words += [f"--{key}={text}"]
    else:
        tree: dict[str, Any] = {}
        for key, value in values.items():
            *sections, name = key.split(".")
            at = tree
            for section in sections:
                at = at.setdefault(section, {}) if isinstance(at, dict) else {}
            if isinstance(at, dict):
                at[name] = value
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(tree))
        words.insert(1, str(file))
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    if code == 2:
        lines = [line for line in err.splitlines() if line.startswith("elit: error: ")]
        names = [name for key in values for name in (*key.split("."), WORDS.get(key[16:]))]
        names += ["input of size", "grid of"]  # of data.options
        return told(err.strip(), *names) if len(lines) == 1 else f"{len(lines)} errors: {err}"
    if code != 0:
        return f"exit {code}: {err[:300]}"
    found = yaml.safe_load(out)
    for key, field in FIELDS.items():
        value = found
        for part in key.split("."):
            value = value[part]
        given = values.get(key, value)
        if not fits_type(value, field.hint):
            return f"{key} became {value!r}"
        if field.is_mapping or value == given or str(value) == str(given):
            continue
        forms = (value, json.dumps(value))
        same = _as_number(given) == value or json.dumps(given) in forms
        if not (same or (isinstance(given, str) and yaml.safe_load(given) == value)):
            return f"{key} became {value!r} of {given!r}"
    return None


def _as_number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


# ---- prepared folders ----

KINDS: list[dict[str, Any]] = [
    {"kind": "images", "scale": 1, "channels": 3},
    {"flips": True, "validation": 6},
    {"kind": "latents", "sizes": ((32, 32), (16, 64)), "captions": True},
    {"captions": True, "texts": {"encoder_hidden_states": (3, 8), "encoder_mask": (3,)}},
]


def make_prepared(folder: Path) -> list[Path]:
    for number, kind in enumerate(KINDS):
        write_prepared(folder / str(number), (6, 4), **kind)
    return [folder / str(number) for number in range(len(KINDS))]


def whole_set(data: Prepared) -> list[dict[str, Any]]:
    """All samples as training sees them, checked for what a model takes."""
    found = []
    assert data.buckets
    for bucket in data.buckets:
        for start, count in bucket.runs.tolist():
            for offset in bucket.offsets:
                batch = data.batch(range(start + offset, start + offset + count))
                x = data.on_device(batch["images"])
                assert x.isfinite().all()
                assert data.seen_shape(batch["images"]) == bucket.shape == tuple(x.shape[1:])
                assert all(type(n) is int for n in bucket.shape)
                if data.class_names:
                    labels = batch["class_labels"]
                    assert labels.dtype == torch.int64
                    assert {*labels.tolist()} <= {*range(len(data.class_names))}
                if data.has_captions:
                    assert all(isinstance(text, str) for text in batch["captions"])
                found.append(batch)
    assert sum(len(batch["images"]) for batch in found) == len(data)
    assert all(isinstance(name, str) for name in data.class_names)
    assert len(set(data.class_names)) == len(data.class_names)
    if (vae := data.autoencoder) is not None:
        assert vae.name == str(vae.name)
        assert vae.class_name == str(vae.class_name)
        assert all(len(n) in (1, data.image_shape[0]) for n in (vae.scale, vae.shift))
        assert 0 not in vae.scale
    assert isinstance(data.text_encoder, str | None)
    assert isinstance(data.manifest.max_text_length, int | None)
    assert {type(data.has_captions), type(data.manifest.flips)} == {bool}
    return found


def manifest_case(draw: random.Random, folder: Path, bases: list[Path]) -> str | None:
    base = draw.choice(bases)
    copy = folder / "prepared"
    shutil.copytree(base, copy)
    tree = json.loads((copy / MANIFEST).read_text())
    if draw.random() < 0.15:
        file = draw.choice(sorted(copy.glob("*.safetensors")))
        draw.choice((damage_file, damage_tensors))(draw, file)
    else:
        write_tree(draw, copy / MANIFEST, tree)
    try:
        for split in ("train", "validation"):
            whole_set(Prepared(split, copy))
    except (ValueError, OSError) as error:
        return told(error, str(copy), "data.options")
    except AssertionError as error:
        return f"taken, but wrong: {str(error)[:300]}"
    return None


# ---- pipelines ----


def make_pipelines(folder: Path) -> list[Path]:
    torch.manual_seed(0)
    scheduler = make_scheduler("euler")
    for number, group in enumerate(((4, 4), None)):
        split = {} if group is None else {"head": 1, "tail": 1}
        model = DiT(sample_size=8, in_channels=1, patch_size=2, hidden_size=8, num_heads=2, depth=3,
                    num_classes=3, group=None if group is None else (2, 2), **split)  # fmt: skip
        ElitPipeline(model, scheduler).save_pretrained(folder / str(number))
    return [folder / "0", folder / "1"]


def pipeline_case(draw: random.Random, folder: Path, bases: list[Path]) -> str | None:
    copy = folder / "pipeline"
    shutil.copytree(draw.choice(bases), copy)
    file = draw.choice([path for path in sorted(copy.rglob("*")) if path.is_file()])
    names = []
    if file.suffix == ".json":
        names = write_tree(draw, file, json.loads(file.read_text()))
    else:
        draw.choice((damage_file, damage_tensors))(draw, file)
    try:
        pipe = load_pipeline(copy)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        image = pipe([0], num_inference_steps=2, generator=generator, output_type="pt").images
    except (ValueError, OSError) as error:
        return told(error, str(copy), *names, "samples are no longer finite")
    if image.shape != (1, pipe.transformer.in_channels, *pipe.transformer.sample_size):
        return f"draws {tuple(image.shape)}"
    return None if image.isfinite().all() else "draws what is not finite"


# ---- checkpoints ----


def make_run(folder: Path, steps: int = 2) -> Path:
    overrides = {"depth": 3, "hidden_size": 8, "num_heads": 2}
    train(tiny_config(folder, steps=steps, model_overrides=overrides), progress=False)
    return folder


def weights_of(run: Path) -> bytes:
    (file,) = (run / "transformer").glob("*.safetensors")
    return file.read_bytes()


def checkpoint_case(draw: random.Random, folder: Path, base: Path) -> str | None:
    """What it goes on to is what it would have been, or the checkpoint is refused."""
    copy = folder / "run"
    shutil.copytree(base, copy)
    (checkpoint,) = (copy / "checkpoints").iterdir()
    files = sorted(checkpoint.iterdir())
    file = draw.choice([*files, *[path for path in files if path.suffix == ".json"] * 2])
    if file.suffix == ".json":
        write_tree(draw, file, json.loads(file.read_text()))
    else:
        draw.choice((damage_file, damage_tensors))(draw, file)
    try:
        make_run(copy, 3)
    except (ValueError, OSError) as error:
        return told(error, str(copy))
    return None if weights_of(copy) == weights_of(base.with_name("three")) else "resumed otherwise"


# ---- sweeps and calibrations ----


def sweep_case(draw: random.Random, folder: Path, capsys: Any) -> str | None:
    file = folder / "sweep.json"
    small = sweep_report(budgets=(0.25, 1), steps=(5, 20))
    names = write_tree(draw, file, small)
    if not file.exists():
        return None
    try:
        if draw.random() < 0.3 and file.is_file():
            other = folder / "other.json"
            other.write_text(json.dumps(sweep_report(seed=1, budgets=(0.25, 1), steps=(5, 20))))
            capsys.readouterr()
            code = main(["compare", str(file), str(other), "--out", str(folder / "c.html")])
            err = capsys.readouterr().err.strip()
            if code == 2:
                return told(err, str(folder), *names, "differ")
            return f"exit {code}" if code else None
        points = OperatingPoints.load(file)
    except (ValueError, OSError) as error:
        return told(error, str(file))
    for measured in points.points:
        point = measured.point
        assert math.isfinite(measured.score)
        assert 0 < measured.flops < math.inf
        assert 0 < point.budget <= 1
        assert type(point.steps) is int
        point.make_guidance()
        str(point)
    costs = [(measured.flops,) for measured in points.points]
    chosen = points.choose(points.points, costs, [math.inf])
    assert chosen is not None
    return None


def calibration_case(draw: random.Random, folder: Path) -> str | None:
    file = folder / "teacache.json"
    config = TeaCacheConfig(0.1, (1.0, 2.0, 0.5), (0.1, 0.9), 20, "attn")
    write_tree(draw, file, config.to_dict())
    try:
        found = TeaCacheConfig.load(file)
    except (ValueError, OSError) as error:
        return told(error, str(file))
    assert isinstance(found.probe, str | None)
    assert found.output_change(0.3) >= 0
    return None


AREAS = ("configs", "manifests", "pipelines", "checkpoints", "sweeps", "calibrations")


def fuzz(area: str, seeds: range, folder: Path, capsys: Any) -> list[str]:
    if area == "configs":
        return run_cases(lambda draw, place: config_case(draw, place, capsys), seeds, folder)
    if area == "manifests":
        bases = make_prepared(folder / "bases")
        return run_cases(lambda draw, place: manifest_case(draw, place, bases), seeds, folder)
    if area == "pipelines":
        bases = make_pipelines(folder / "bases")
        return run_cases(lambda draw, place: pipeline_case(draw, place, bases), seeds, folder)
    if area == "checkpoints":
        base = make_run(folder / "base")
        shutil.copytree(base, folder / "three")
        train(
            tiny_config(
                folder / "three",
                steps=3,
                model_overrides={"depth": 3, "hidden_size": 8, "num_heads": 2},
            ),
            progress=False,
        )
        return run_cases(lambda draw, place: checkpoint_case(draw, place, base), seeds, folder)
    if area == "sweeps":
        return run_cases(lambda draw, place: sweep_case(draw, place, capsys), seeds, folder)
    return run_cases(lambda draw, place: calibration_case(draw, place), seeds, folder)


@pytest.mark.parametrize("area", AREAS)
def test_a_few(area: str, tmp_path: Path, capsys: Any) -> None:
    wrong = fuzz(area, range(50), tmp_path, capsys)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_many(area: str, tmp_path: Path, capsys: Any) -> None:
    wrong = fuzz(area, range(1000, 1000 + MANY), tmp_path, capsys)
    assert not wrong, "\n".join(wrong)
