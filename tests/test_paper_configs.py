"""The paper's runs as configs: they load, cost what the paper says, and go on in two stages."""

import shlex
from pathlib import Path

import pytest
import torch
from prepared_data import write_prepared
from retrofit_models import make
from test_finetune_foreign import write_data

from elit import load_elastic
from elit.cli.main import main
from elit.cost.flops import cost_of, mean_flops
from elit.training.build import build_model, tail_dropping
from elit.training.config import TrainConfig
from elit.training.config_files import built_in_configs, load_config
from elit.training.estimate import ExpectedData
from elit.training.preflight import check_config

# FID, FDD, IS, TFLOPs of a training step; PAPER.md.
FIGURES = {
    256: {
        "dit": ("13.0", "346.3", "66.2", 182),
        "elit-dit": ("8.2", "200.2", "93.0", 188),
        "elit-dit-mb": ("7.8", "203.7", "99.0", 190),
        "uvit": ("8.3", "220.2", "84.4", 196),
        "elit-uvit": ("7.5", "203.8", "95.2", 202),
        "elit-uvit-mb": ("7.1", "203.2", "100.3", 204),
        "hdit": ("12.8", "361.6", "68.7", 182),
        "elit-hdit": ("9.4", "272.2", "89.5", 188),
        "elit-hdit-mb": ("9.4", "271.8", "92.3", 191),
    },
    512: {
        "dit": ("18.8", "339.2", "53.0", 806),
        "elit-dit": ("11.1", "175.6", "80.0", 831),
        "elit-dit-mb": ("10.1", "164.1", "88.8", 804),
        "uvit": ("11.6", "202.7", "72.5", 861),
        "elit-uvit": ("8.9", "155.3", "85.8", 886),
        "elit-uvit-mb": ("7.7", "135.8", "98.0", 858),
        "hdit": ("13.0", "260.3", "69.4", 776),
        "elit-hdit": ("10.1", "164.1", "88.8", 801),
        "elit-hdit-mb": ("9.6", "171.2", "94.7", 791),
    },
}
RUNS = [(side, name) for side, runs in FIGURES.items() for name in runs]
OTHERS = [
    "imagenet-256/large-scale",
    "imagenet-512/large-scale",
    "kinetics-700/dit",
    "kinetics-700/elit-dit",
    "qwen-image/512",
    "qwen-image/1024",
]
LATER = {"imagenet-256/elit-dit-mb-2026": "imagenet-256/elit-dit-mb"}
# Read and Write make no dropped latents, and HDiT's outer levels are ours: docs/flops.md.
TOLERANCE = {"dit": 0.015, "uvit": 0.015, "hdit": 0.026}


def step_tflops(config: TrainConfig) -> float:
    with torch.device("meta"):
        data = ExpectedData(config.model.preset, config.data.options["resolution"])
        model = build_model(config, data).requires_grad_(False)
    flops = mean_flops(cost_of(model), tail_dropping(config, model), config.latents.draws)
    return 3 * config.data.batch_size * flops / 1e12


def test_these_are_all() -> None:
    known = {name for name in built_in_configs() if "/" in name}
    assert known == {f"imagenet-{side}/{name}" for side, name in RUNS} | {*OTHERS, *LATER}


@pytest.mark.parametrize(("name", "base"), LATER.items())
def test_a_later_recipe_differs_in_what_it_says(name: str, base: str) -> None:
    later, before = (load_config(of, {}).to_dict() for of in (name, base))
    assert later.pop("output_dir") == f"runs/{name}"
    del before["output_dir"]
    assert later.pop("optimizer") == before.pop("optimizer") | {"name": "muon"}
    aligned = {"weight": 0.5, "kind": "irepa", "encoder": "prepared"}
    assert later.pop("alignment") == before.pop("alignment") | aligned
    assert later == before


@pytest.mark.parametrize("name", [*(f"imagenet-{s}/{n}" for s, n in RUNS), *OTHERS])
def test_hyper_parameters_are_the_papers(name: str) -> None:
    config = load_config(name, {})
    assert config.output_dir == f"runs/{name}"
    objective, optimizer = config.objective, config.optimizer
    assert (objective.density, objective.logit_mean, objective.logit_std) == ("logit_normal", 0, 1)
    assert objective.label_dropout == 0.1
    assert (optimizer.lr, optimizer.warmup_steps, optimizer.clip) == (1e-4, 10_000, 1.0)
    assert (optimizer.ema, optimizer.schedule) == (0.9999, "constant")
    assert (config.latents.order, config.latents.draws, config.sample.steps) == ("first", 1, 40)
    steps = {"imagenet": 500_000, "kinetics": 200_000, "qwen": 60_000}[name.partition("-")[0]]
    assert config.train.steps == steps
    assert config.train.precision == "bf16"
    assert config.data.batch_size == (384 if name.endswith("-mb") else 256)


@pytest.mark.parametrize(("side", "name"), RUNS)
def test_the_budgets_and_what_to_expect(side: int, name: str) -> None:
    config = load_config(f"imagenet-{side}/{name}", {})
    backbone = name.removeprefix("elit-").removesuffix("-mb")
    elastic = "elit-" if name.startswith("elit-") else ""
    assert config.model.preset == f"{elastic}{backbone}-xl/2"
    full, low = {256: (16, 1), 512: (64, 4)}[side]
    budgets = (low, full) if name.endswith("-mb") else (full, full) if elastic else (None, None)
    assert (config.latents.min, config.latents.max) == budgets
    top = built_in_configs()[f"imagenet-{side}/{name}"].read_text().partition("\nbase:")[0]
    fid, fdd, score, tflops = FIGURES[side][name]
    assert f"FID {fid}, FDD {fdd}, IS {score}, {tflops} TFLOPs a step" in top.replace("\n# ", " ")
    assert step_tflops(config) == pytest.approx(tflops, rel=TOLERANCE[backbone])


@pytest.mark.parametrize("side", [256, 512])
def test_the_large_scale_recipe_costs_what_the_plain_model_costs(side: int) -> None:
    config = load_config(f"imagenet-{side}/large-scale", {})
    assert config.latents.min == config.latents.max == {256: 16, 512: 64}[side] // 4
    assert step_tflops(config) == pytest.approx(FIGURES[side]["dit"][3], rel=0.01)


@pytest.mark.parametrize(
    ("name", "size", "channels", "classes"),
    [
        ("imagenet-256/elit-dit-mb", (256, 256), 4, 1000),
        ("imagenet-512/large-scale", (512, 512), 4, 1000),
        ("kinetics-700/elit-dit", (64, 256, 256), 16, 700),
    ],
)
def test_a_run_passes_its_check(
    name: str, size: tuple[int, ...], channels: int, classes: int, tmp_path: Path
) -> None:
    """With a prepared folder of a few samples, whose latents are an eighth of the size."""
    words = list(map(str, range(classes)))
    data = tmp_path / "data"
    write_prepared(data, (2, 2), "latents", [size], 8, channels, classes=words, validation=1)
    # As many as there are, and no autoencoder to draw with.
    here = {"data.options.path": str(data), "data.batch_size": "4", "train.sample_every": "0"}
    check_config(load_config(name, here))
    with pytest.raises(ValueError, match="1024"):
        check_config(load_config(name, here | {"data.options.resolution": "1024"}))


# ---- the retrofit in two stages ----


def test_stage_two_starts_from_stage_one(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "qwen"
    make("qwen").save_pretrained(folder / "base")
    write_data("qwen", folder)
    # The sizes of a tiny one; what is learned and from what is as in the configs.
    tiny = shlex.split(
        f"--retrofit.base {folder}/base --retrofit.head 2 --retrofit.tail 1 --retrofit.group [4,4] "
        f"--data.name tensors --data.batch_size 4 --data.num_workers 0 --latents.min 1 "
        f"--latents.max 16 --train.parallel ddp --train.precision fp32 --train.steps 1 "
        f"--train.validate_every 0 --data.options '{{path: {folder}/data.safetensors}}'"
    )
    first = ["train", "qwen-image/512", *tiny]
    assert main([*first, "--output_dir", f"{folder}/one"]) == 0, capsys.readouterr().err
    second = ["train", "qwen-image/1024", *tiny]
    start = ["--retrofit.start", f"{folder}/one", "--optimizer.lr", "1e-12"]
    assert main([*second, *start, "--output_dir", f"{folder}/two"]) == 0, capsys.readouterr().err
    one, two = (load_elastic(folder / n / "transformer").state_dict() for n in ("one", "two"))
    base = make("qwen").state_dict()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value)
    assert any(not torch.equal(one[name], value) for name, value in base.items())
    capsys.readouterr()
    for flags, message in (
        (["--retrofit.head", "1"], "is of another retrofit (head 2)"),
        (["--retrofit.base_lr", "1", "--retrofit.train", "interface"], "has changed its base"),
        (["--retrofit.start", f"{folder}/none"], "none"),
    ):
        code = main([*second, *start, *flags, "--output_dir", f"{folder}/three"])
        assert (code, message in capsys.readouterr().err) == (2, True), message
