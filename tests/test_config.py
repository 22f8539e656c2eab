"""The config of a training run: where values come from, which are refused, how it is printed."""

import dataclasses
import json
import re

import pytest
import yaml
from idx_files import idx_folder

from elit._plain import describe_type, fits_type
from elit.cli.main import main
from elit.training.config import (
    AlignmentConfig,
    DataConfig,
    LoopConfig,
    TextConfig,
    TrainConfig,
)
from elit.training.config_files import (
    Field,
    built_in_configs,
    config_fields,
    find_config,
    load_config,
)
from elit.training.preflight import check_config


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "x.yaml"
        path.write_bytes(text.encode("latin-1"))
        return str(path)

    return write


# ---- where values come from ----


def test_defaults_yield_to_the_file_and_the_file_to_the_command_line(yaml_file) -> None:
    assert load_config(None, {}) == load_config(yaml_file("# none\n"), {}) == TrainConfig()
    path = yaml_file("train: {steps: 7, log_every: 3}\nseed: 5\noptimizer: {lr: 8e-3}\n")
    config = load_config(path, {"train.steps": "9", "data.options.count": "500"})
    assert config.train.steps == 9  # command line
    assert config.train.log_every == 3  # file
    assert config.seed == 5
    assert config.optimizer.lr == 8e-3  # YAML 1.1 alone takes 8e-3 for text
    assert config.train.accumulation == LoopConfig.accumulation  # default
    assert config.data.options == {"count": 500}


def test_paths_in_a_config_are_as_a_shell_reads_them(yaml_file, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    file = yaml_file(
        "output_dir: ~/runs/a\ndata: {name: prepared, options: {path: $DATA/set, vae: ~/vae}}\n"
        "text: {encoder: $DATA/clip}\nretrofit: {base: ~/base, start: $DATA/start}\n"
    )
    config = load_config("~/x.yaml" if file else None, {})
    assert config.output_dir == f"{tmp_path}/runs/a"
    assert config.data.options == {"path": f"{tmp_path}/data/set", "vae": f"{tmp_path}/vae"}
    assert config.text.encoder == f"{tmp_path}/data/clip"
    starts = config.retrofit.base, config.retrofit.start
    assert starts == (f"{tmp_path}/base", f"{tmp_path}/data/start")
    assert load_config(None, {"output_dir": "~/b"}).output_dir == f"{tmp_path}/b"
    with pytest.raises(ValueError, match=r"\$NO_SUCH/x: the variable \$NO_SUCH is not set"):
        load_config(None, {"output_dir": "$NO_SUCH/x"})


def test_a_run_s_config_finds_its_data_from_anywhere(tmp_path, monkeypatch) -> None:
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    config = TrainConfig("runs/a", data=DataConfig("prepared", {"path": "set"}))
    assert config.from_anywhere().data.options == {"path": str(tmp_path / "set")}
    assert config.from_anywhere().output_dir == "runs/a"
    assert config.data.options == {"path": "set"}


def test_words_of_encoders_are_no_folders(tmp_path, monkeypatch) -> None:
    """As the docs have a folder `prepared`: the run's own config still means the word."""
    monkeypatch.chdir(tmp_path)
    for word in ("words", "prepared", "classifier"):
        (tmp_path / word).mkdir()
        config = TrainConfig(text=TextConfig(word), alignment=AlignmentConfig(0.5, encoder=word))
        kept = config.from_anywhere()
        assert (kept.text.encoder, kept.alignment.encoder) == (word, word)


def test_types_are_kept(yaml_file) -> None:
    path = yaml_file("data: {options: {count: 5}}\nmodel: {overrides: {head: 2}}\ntrain:\n")
    values = {
        "data.options.size": "16",
        "model.overrides.group": "[2, 4]",
        "optimizer.betas": "[0.8, 0.9]",
        "sample.budgets": "[1, 0.25]",
        "train.compile": "true",
        "train.threads": "null",
    }
    config = load_config(path, values)
    assert config.data.options == {"count": 5, "size": 16}  # added to, not replaced
    assert config.model.overrides == {"head": 2, "group": [2, 4]}
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.sample.budgets == [1.0, 0.25]
    assert config.train.compile is True
    assert config.train.threads is None
    assert load_config(path, {"data.options": "{}"}).data.options == {}  # cleared as a whole


def test_built_in_configs_are_found_by_name_and_hold_water(tmp_path) -> None:
    clothes = {"data.options.path": str(idx_folder(tmp_path))}  # which no config can know
    assert set(built_in_configs()) >= {"digits", "shapes"}
    # Files that only serve as a base are none of their own.
    assert not any("_" in name.rpartition("/")[2][:1] for name in built_in_configs())
    for name, path in built_in_configs().items():
        assert find_config(name) == path
        config = load_config(name, clothes if name == "fashion-mnist" else {})
        if config.data.name != "prepared":  # those: test_paper_configs.py
            check_config(config)
        assert config.output_dir == f"runs/{name}"


# ---- base ----


def test_a_file_stands_on_its_base_and_that_on_its_own(tmp_path, monkeypatch) -> None:
    (tmp_path / "low.yaml").write_text("seed: 1\ntrain: {steps: 5, log_every: 2}\n")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "mid.yaml").write_text("base: ../low.yaml\ntrain: {steps: 6}\n")
    (tmp_path / "in" / "high.yaml").write_text("base: mid.yaml\nseed: 2\n")
    config = load_config(str(tmp_path / "in" / "high.yaml"), {"train.validate_every": "3"})
    loop = config.train
    assert (config.seed, loop.steps, loop.log_every, loop.validate_every) == (2, 6, 2, 3)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "built").write_text("base: digits\nseed: 4")  # which may be a built-in config
    config = load_config("built", {})
    assert (config.seed, config.output_dir) == (4, "runs/digits")
    (tmp_path / "digits").write_text("seed: 77")
    assert load_config("digits", {}).seed == 77  # a file beats a built-in of its name


# ---- what is printed ----


@pytest.mark.parametrize("as_json", [False, True])
def test_dry_run_prints_a_config_that_loads_to_the_same(
    tmp_path, capsys, monkeypatch, as_json
) -> None:
    changes = ["--optimizer.lr", "3e-05", "--data.options.count", "500", "--latents.max", "8"]
    line = ["train", "shapes", *changes, "--dry-run", *(["--json"] if as_json else [])]
    monkeypatch.chdir(tmp_path)
    assert main(line) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert list(tmp_path.iterdir()) == []  # it does nothing else
    values = json.loads(printed.out) if as_json else yaml.safe_load(printed.out)
    assert values["data"]["options"] == {"count": 500}
    (tmp_path / "again.yaml").write_text(printed.out)  # JSON is YAML
    again = load_config(str(tmp_path / "again.yaml"), {})
    typed = dict(zip((flag[2:] for flag in changes[::2]), changes[1::2], strict=True))
    assert again == load_config("shapes", typed)


def test_every_field_is_described_and_has_a_type_in_words() -> None:
    for field in config_fields():
        assert isinstance(field, Field)
        assert len(field.about) > 3, field.key
        assert not re.search(r"[<\[]class|typing|\|", describe_type(field.hint)), field.key
    assert {f.key: f.default for f in config_fields()}["train.steps"] == 500_000


def test_fields_are_the_leaves_of_the_tree() -> None:
    def leaves(value, prefix=""):
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            if dataclasses.is_dataclass(inner):
                yield from leaves(inner, f"{prefix}{field.name}.")
            else:
                yield f"{prefix}{field.name}"

    assert [field.key for field in config_fields()] == list(leaves(TrainConfig()))


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (3, int, True),
        (3, float, True),
        (3.5, int, False),
        (True, int, False),
        (True, bool, True),
        ("x", int | None, False),
        (None, int | None, True),
        ([1, 2], list[int], True),
        ([1, "x"], list[int], False),
        (4, int | list[int], True),
    ],
)
def test_fits_type(value, hint, fits) -> None:
    assert fits_type(value, hint) is fits


# ---- what is refused: YAML ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {step: 7}", r"x.yaml: unknown key train.step: did you mean train.steps\?"),
        ("model: {presett: x}", r"unknown key model.presett: did you mean model.preset\?"),
        ("optimiser: {lr: 1}", r"unknown key optimiser: did you mean optimizer\?"),
        ("batch_size: 3", r"unknown key batch_size: did you mean data.batch_size\?"),
        ("learning_rate: 3", r"unknown key learning_rate: did you mean optimizer.lr\?"),
        ("objective: {qqq: 3}", r"unknown key objective.qqq: use one of objective.density, "),
        ("train: {steps: many}", r"x.yaml: train.steps is 'many'; give a whole number"),
        ("train: {steps: 1.5}", r"train.steps is 1.5; give a whole number"),
        ("train: {compile: perhaps}", r"train.compile is 'perhaps'; give true or false"),
        ("train: {precision: fp8}", r"'fp8' of .*train.precision: use one of 'fp32', 'bf16'"),
        ("optimizer: {betas: 0.9}", r"optimizer.betas is 0.9; give 2 numbers, such as \[0.9"),
        ("sample: {budgets: [1, x]}", r"sample.budgets is \[1(.0)?, 'x'\]: budget 'x' is outside"),
        ("data: {options: 3}", r"data.options is 3; give keys with values"),
        ("train: 5", r"train is 5, but it is a section; write keys under it, such as train.steps"),
        ("- 1\n- 2", r"x.yaml holds \[1, 2\] where a config is expected"),
        ("just text", r"holds 'just text' where a config is expected"),
        ("a: [1", r"x.yaml is not YAML: "),
        ("a:\n\t- b", r"x.yaml is not YAML: "),
        ("3: 4", r"unknown key 3"),
        ("\xff\xfe\x00\x01", r"x.yaml is not YAML"),
        ("train: {steps: 10}\nseed: 1\nseed: 2", "key seed is given twice; remove one"),
        ("train: {steps: 10, steps: 20}", "key steps is given twice"),
        ("train: {steps: 010}", "x.yaml.*010 is no plain number; write it in decimals"),
        ("train:\n  steps: 1:30", "1:30 is no plain number"),
        ("optimizer: {lr: 1:30.5}", "1:30.5 is no plain number"),
        ("data: {options: {1: 2}}", r"x.yaml: data.options is \{1: 2\}; give keys with values"),
        ("a: &a [*a]", "x.yaml is not YAML: .*recursive"),
        ("seed: 2020-13-45", "x.yaml.*is not YAML: month must be in 1..12"),
        ("base: x.yaml", r"can't be its own base: .*x.yaml -> .*x.yaml; remove one `base`"),
        ("base: y.yaml", r"can't be its own base: .*x.yaml -> .*y.yaml -> .*x.yaml"),
        ("base: none.yaml", r"x.yaml: base none.yaml is neither a file nor one of the built-in"),
        ("base: digist", r"neither a file .*: did you mean digits\?"),
        ("base:", r"x.yaml: base is None; give one file, relative to this one"),
        ("base: [a, b]", r"base is \['a', 'b'\]; give one file"),
        ("bsae: y.yaml", r"x.yaml: unknown key bsae: did you mean base\?"),
        ("base: typo.yaml", r"typo.yaml: train.steps is 'many'; give a whole number"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_key(yaml_file, tmp_path, text, message) -> None:
    (tmp_path / "y.yaml").write_text("base: x.yaml")
    (tmp_path / "typo.yaml").write_text("train: {steps: many}")
    with pytest.raises(ValueError, match=message):
        load_config(yaml_file(text), {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "digist",
            r"one of the built-in ones: did you mean digits\? They are captioned-shapes, digits, "
            r"fashion-mnist, finetune, moving-shapes, own-images, shapes, "
            r".*imagenet-256/{dit,elit-dit,.*",
        ),
        ("configs/shape.yaml", r"configs/shape.yaml is neither .* did you mean shapes\?"),
        (
            "qqqqqqqqqq",
            r"is neither a file nor one of the built-in captioned-shapes, digits, fashion-mnist, "
            r"finetune, moving-shapes, own-images, shapes, [^;]*$",
        ),
        ("imagenet256/elit-dit-mb", r"did you mean imagenet-256/elit-dit-mb\?"),
        ("elit-dit-mb", r"did you mean imagenet-256/elit-dit-mb\?"),
        ("configs/imagenet-512/elit-uvit.yml", r"did you mean imagenet-512/elit-uvit\?"),
        (".", r"config \. is a folder; give the YAML file in it"),
    ],
)
def test_a_config_that_is_not_there(name, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        find_config(name)


# ---- what is refused: the command line, before anything is written ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.step", "4"], r"unknown flag --train.step: did you mean --train.steps\?"),
        (["--trian.steps=4"], r"unknown flag --trian.steps: did you mean --train.steps\?"),
        (["--data.option.count", "4"], r"unknown flag --data.option.count: did you mean"),
        (["--train.steps", "many"], r"--train.steps is 'many'; give a whole number"),
        (["--train.steps"], r"--train.steps: expected one argument"),
        (["--train.steps", "0"], r"train.steps=0 is not allowed; give a number of at least 1"),
        (["--train.precision", "fp8"], r"unknown value 'fp8' of --train.precision: use one of"),
        (["--train.threads", "x"], r"--train.threads is 'x'; give a whole number, or null"),
        (["--model.preset", "elit-dit-tny/2"], r"unknown preset.*did you mean 'elit-dit-tiny/2'"),
        (["--model.overrides.depth", "0"], r"depth=0 is not allowed; give a positive integer"),
        (["--model.overrides.patch_size", "0"], r"patch_size=0 does not fit"),
        (
            ["--latents.min", "2", "--model.overrides.min_latents", "2"],
            r"are the same thing; give one of them",
        ),
        (["--train.threads", "0"], r"train.threads=0 is not allowed; give a number from 1 to"),
        (["--optimizer.betas", "[0.9, 1]"], r"optimizer.betas=\(0.9, 1.0\) is not allowed"),
        (
            ["--optimizer.schedule", "constant", "--optimizer.final_lr", "0.1"],
            r"final_lr=0.1 has no effect on a constant schedule",
        ),
        (["--objective.label_dropout", "0"], r"set sample.guidance_scale=1, or label_dropout"),
        (["--model.overrides.mlp_ratio", "-1"], r"mlp_ratio=-1 is not allowed with hidden_size"),
        (["--model.overrides.rope_theta", "0"], r"rope_theta=0 is not allowed; give a number"),
        (["--train.device", "meta"], r"device 'meta' is not usable"),
        (["--model.overrides.hiden_size", "8"], r"'hiden_size' of model.overrides.*'hidden_size'"),
        (["--model.overrides.hidden_size", "x"], r"overrides.hidden_size is 'x'; give a whole num"),
        (["--model.overrides.group", "[3, 3]"], r"4x4 tokens cannot be cut into groups of 3x3"),
        (["--model.overrides.head", "9"], r"leave no core"),
        (["--data.name", "digit"], r"unknown data set 'digit'.*did you mean 'digits'\?"),
        (["--data.options.count", "5"], r"option 'count' of data set 'digits': no option"),
        (
            ["--data.batch_size", "33", "--train.accumulation", "2"],
            r"33 cannot be cut into 2 equal",
        ),
        (["--objective.density", "unifrom"], r"did you mean 'uniform'\?"),
        (["--objective.logit_std", "0"], r"objective.logit_std=0.0 is not allowed"),
        (["--latents.min", "9", "--latents.max", "4"], r"cannot keep 9..4 latents"),
        (["--model.preset", "dit-tiny/2", "--latents.max", "4"], r"no effect on the plain model"),
        (["--sample.budgets", "[1, 2]"], r"budget 2.0 is outside \(0, 1\]"),
        (["--train.device", "tpu"], r"device 'tpu' is not usable"),
        (["--output_dir", "{file}/x"], r"cannot write into .*file is not a folder; .*--output_dir"),
        (["more"], r"unexpected argument 'more'"),
        (
            ["--train.parallel", "fsdp", "--train.shard_size", "2"],
            r"shard_size=2 has no effect on train\.parallel=fsdp",
        ),
        (["--output_dir", ""], "output_dir is empty"),
    ],
)
def test_a_mistake_stops_a_run_before_it_begins(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    flags = [flag.replace("{file}", str(tmp_path / "file")) for flag in flags]
    assert main(["train", "digits", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("elit: error: ")
    assert printed.err.count("\n") == 1
    assert re.search(message, printed.err), printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("frames", [8, 16])
def test_clips_as_long_as_they_are_wide(frames: int) -> None:
    overrides = {"data.options.frames": str(frames), "data.options.size": str(frames)}
    check_config(load_config("moving-shapes", overrides))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("keys", "values", "words"),
    [
        ("seed", (-1, 2**63), r"a number from 0 to 2\^63 - 1"),
        ("data.batch_size latents.draws retrofit.rank train.steps train.accumulation "
         "train.keep_checkpoints sample.steps sample.columns",
         (0, 2**31), "a number of at least 1, at most 2147483647"),
        ("data.num_workers optimizer.warmup_steps train.log_every train.validate_every "
         "train.sample_every train.checkpoint_every optimizer.weight_decay "
         "optimizer.final_lr retrofit.features alignment.weight sample.guidance_scale",
         (-1, 2**31, NAN), "a number of at least 0, at most 2147483647"),
        ("optimizer.lr optimizer.clip objective.logit_std retrofit.base_lr",
         (0.0, NAN, INF), "a number above 0"),
        ("objective.label_dropout optimizer.ema", (-0.1, 1.0), r"a number in \[0, 1\)"),
        ("optimizer.betas", ((0.9, 1.0), (-0.1, 0.9)), r"numbers in \[0, 1\)"),
        ("retrofit.distill", (-0.1, 1.1), r"a number in \[0, 1\]"),
        ("text.max_length train.shard_size alignment.depth",
         (0, 2**31), "a number of at least 1, at most 2147483647, or null"),
        ("train.threads", (0, 1025), "a number from 1 to 1024, or null"),
        ("train.peak_tflops", (0.0, INF), "a number above 0, or null"),
        ("train.wandb", ("", " "), "a project's name, or null"),
        ("objective.density latents.order retrofit.init retrofit.train optimizer.schedule "
         "train.precision train.parallel alignment.where alignment.kind", ("x",), None),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(keys, values, words) -> None:
    for key in keys.split():
        for value in values:
            message = (
                rf"^{key}=.* is not allowed; give {words}$" if words else rf"unknown {key} 'x'"
            )
            with pytest.raises(ValueError, match=message):
                changed(key, value)


def changed(key: str, value: object) -> TrainConfig:
    section, _, name = key.rpartition(".")
    if not section:
        return TrainConfig(**{name: value})
    default = getattr(TrainConfig(), section)
    return TrainConfig(**{section: dataclasses.replace(default, **{name: value})})
