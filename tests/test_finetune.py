"""Fine-tuning of retrofits: what is trained, what is lost, the teacher, resuming, mistakes."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CPU, assert_same_run, tiny_config

from elit import ElitPipeline, TailDropping, elasticize
from elit.cli.main import main
from elit.data import load_dataset
from elit.training.build import build_parts
from elit.training.config import RetrofitConfig, TrainConfig
from elit.training.loop import train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line; gives its exit code, stdout and stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(words))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain DiT of five blocks that has seen a few digits."""
    folder = tmp_path_factory.mktemp("base")
    overrides = {"hidden_size": 32, "num_heads": 2, "depth": 5}
    config = tiny_config(folder, steps=8, model_preset="dit-tiny/2", model_overrides=overrides)
    train(config, progress=False)
    return folder


def finetune_config(base: Path, folder: Path, steps: int = 4, **retrofit: Any) -> TrainConfig:
    config = tiny_config(folder, steps)
    config.model = type(config.model)()
    config.optimizer.lr = 1e-2
    options = {"base": str(base), "head": 2, "tail": 2} | retrofit
    if options.get("train", "adapters") in ("adapters", "lora"):
        options = {"rank": 2} | options
    config.retrofit = RetrofitConfig(**options)
    config.__post_init__()
    return config


def outputs(pipeline: Any, budgets: Sequence[float]) -> list[torch.Tensor]:
    """Images of the same noise at several budgets."""
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return [
        pipeline([3, 7], budget=b, num_inference_steps=2, noise=noise, output_type="pt").images
        for b in budgets
    ]


@pytest.mark.parametrize("kind", ["adapters", "interface", "lora", "all"])
def test_what_is_trained(kind: str, base: Path, tmp_path: Path) -> None:
    """Frozen weights stay bit for bit; a frozen base draws as before at full budget."""
    config = finetune_config(base, tmp_path / kind, train=kind)
    train(config, progress=False)
    before, after = (ElitPipeline.from_pretrained(folder) for folder in (base, tmp_path / kind))
    old, new = before.transformer.state_dict(), after.transformer.state_dict()
    assert {name for name in new if not name.startswith("elit.")} == old.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert bool(changed) == (kind in ("lora", "all"))
    if kind == "lora":
        assert all(name.startswith("blocks.") and "weight" in name for name in changed)
    (wanted,) = outputs(before, [1])
    full, low = outputs(after, [1, 1 / 16])
    assert low.isfinite().all()
    assert torch.allclose(full, wanted, atol=1e-5) == (kind in ("adapters", "interface"))
    started = elasticize(before.transformer, 2, 2, 4)
    untrained = {k: v for k, v in started.state_dict().items() if k.startswith("elit.")}
    assert any(not torch.equal(untrained[k], new[k]) for k in untrained if k in new)


def test_a_base_that_has_changed_is_noticed(base: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(base, tmp_path / "base")
    train(finetune_config(copied, tmp_path / "run", 1), progress=False)
    pipeline = ElitPipeline.from_pretrained(copied)
    with torch.no_grad():
        pipeline.transformer.blocks[1].mlp[0].weight[-1, -1] += 1  # one number of all
    pipeline.save_pretrained(copied)
    with pytest.raises(ValueError, match="was trained on another base"):
        train(finetune_config(copied, tmp_path / "run", 2), progress=False)


@pytest.mark.parametrize("kind", ["adapters", "lora", pytest.param("all", marks=pytest.mark.slow)])
def test_resume_is_bit_equal(kind: str, base: Path, tmp_path: Path) -> None:
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        for steps in stops:
            train(finetune_config(base, tmp_path / name, steps, train=kind), progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 4)


def test_checkpoints_leave_out_what_is_frozen(base: Path, tmp_path: Path) -> None:
    sizes = {}
    for kind in ("adapters", "all"):
        train(finetune_config(base, tmp_path / kind, 2, train=kind), progress=False)
        files = (tmp_path / kind / "checkpoints" / "step-00000002").glob("*.safetensors")
        sizes[kind] = sum(file.stat().st_size for file in files)
    assert sizes["adapters"] < 0.6 * sizes["all"]


def test_the_teacher_is_the_original(base: Path, tmp_path: Path) -> None:
    """Its velocity, for a student that starts as it and for one that doesn't; once in memory."""
    original = ElitPipeline.from_pretrained(base).transformer
    x, sigma = torch.randn(2, 1, 16, 16), torch.tensor([0.3, 0.8])
    labels = {"class_labels": torch.tensor([1, 2])}
    wanted = original(x, sigma, **labels).sample
    shared = {}
    for init, kind in (("identity", "adapters"), ("identity", "all"), ("learned", "all")):
        config = finetune_config(base, tmp_path, init=init, train=kind)
        model, _, distillation, _ = build_parts(config, load_dataset("digits"), CPU)
        velocity, tokens = distillation.targets(x, sigma, labels)
        torch.testing.assert_close(velocity, wanted, rtol=1e-4, atol=1e-5)
        assert tokens.shape == (2, 64, 32)
        shared[init, kind] = distillation.teacher is model
    assert list(shared.values()) == [True, False, False]


def test_loss_is_what_it_says(base: Path, tmp_path: Path) -> None:
    """At full budget the student is its teacher: only the data's share of the loss is left."""
    config = finetune_config(base, tmp_path, distill=0.25, features=2.0)
    model, _, distillation, _ = build_parts(config, load_dataset("digits"), CPU)
    x, sigma = torch.randn(3, 1, 16, 16), torch.rand(3)
    labels = {"class_labels": torch.tensor([1, 2, 3])}
    error = torch.tensor([1.0, 2.0, 3.0])
    targets = distillation.targets(x, sigma, labels)
    velocity = model(x, sigma, **labels).sample
    loss = distillation.loss(error, model, *targets, velocity)
    torch.testing.assert_close(loss, 0.75 * error, rtol=1e-5, atol=1e-6)
    off = distillation.loss(error, model, *targets, velocity + 2)
    torch.testing.assert_close(off, 0.75 * error + 0.25 * 4, rtol=1e-5, atol=1e-5)


def test_strata() -> None:
    """Every part of a step draws from its own part of the range, and together they cover it."""
    dropping, generator = TailDropping(1, 15, 16), torch.Generator().manual_seed(0)
    drawn = torch.tensor([dropping.draw_strata(4, generator) for _ in range(400)])
    for column, (low, high) in enumerate([(1, 1), (2, 3), (4, 7), (8, 15)]):
        assert (drawn[:, column].min(), drawn[:, column].max()) == (low, high)
    assert set(drawn.flatten().tolist()) == set(range(1, 16))
    assert TailDropping(3, 3, 16).draw_strata(4, generator) == [3, 3, 3, 3]


def test_command(run: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`elit finetune BASE`: the base's data, a run that goes on, samples, counts."""
    monkeypatch.chdir(tmp_path)
    flags = "--output_dir run --train.steps 2 --train.validate_every 2 --train.sample_every 0"
    code, out, err = run("finetune", str(base), *flags.split())
    assert (code, err.count("Traceback")) == (0, 0)
    assert "sample:  elit sample run --budget 1 0.25" in out
    code, out, _ = run("finetune", str(base), *flags.split(), "--dry-run", "--json")
    settings = json.loads(out)
    assert settings["retrofit"]["base"] == str(base)
    assert settings["seed"] == 3  # the base's
    code, out, _ = run("flops", "run", "--json")
    costs = [row["gflops"] for row in json.loads(out)["rows"]]
    code, out, _ = run("flops", str(base), "--json")
    assert costs[0] == json.loads(out)["rows"][0]["gflops"]  # full budget costs what it did
    assert costs[1:] == sorted(costs[1:], reverse=True)  # adapters cost much at this width
    line = "sample run --labels 3 --budget 1 0.25 --steps 1 --out pictures"
    assert run(*line.split())[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--retrofit.head 3",
            "retrofit.head=3, retrofit.tail=2, retrofit.group=[4, 4]: head=3 and",
        ),
        ("--retrofit.group [3,3]", "8x8 tokens cannot be cut into groups of 3x3"),
        ("--retrofit.trian all", "did you mean --retrofit.train"),
        ("--retrofit.train adapter", "did you mean 'adapters'"),
        ("--retrofit.init learned", "use train=all, lora or interface"),
        ("--data.name shapes", "use the data that it was trained on"),
        ("--retrofit.distill 1.5", "give a number in [0, 1]"),
        ("--latents.draws 0", "at least 1"),
        ("--latents.draws 17", "shares a micro-batch of 16 samples"),
        ("--latents.min 16", "leaves nothing to train"),
        ("--retrofit.train all --retrofit.rank 3", "rank has no effect"),
        ("--retrofit.base_lr 0.5", "base_lr has no effect"),
        ("--model.preset dit-b/2", "unknown flag --model.preset"),
        ("--text.max_length 4", "text.* have no effect"),
    ],
)
def test_mistakes(
    run: Any, flags: str, message: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run("finetune", str(base), *flags.split())
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_mistakes_of_bases(
    run: Any, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = finetune_config(base, tmp_path / "done", 1)
    done.latents.min = 4
    train(done, progress=False)
    assert ElitPipeline.from_pretrained(tmp_path / "done").transformer.min_latents == 4
    for line, message in (
        ("finetune nothing", "there is no folder nothing"),
        ("finetune .", "is not a pipeline"),
        ("train digits --retrofit.head 3", "no effect without retrofit.base"),
        ("finetune done --output_dir again", "is elastic already"),
        (f"finetune {base} --output_dir done --retrofit.rank 4", "holds another run"),
    ):
        code, _, err = run(*line.split())
        assert (code, message in err) == (2, True), err
