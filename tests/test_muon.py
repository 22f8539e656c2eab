"""Muon for the matrices of the blocks: which they are, its step, the same run however shared."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from retrofit_models import elastic
from runs import CPU, assert_same_run, metrics, run_ranks, tiny_config
from safetensors.torch import load_file
from torch import nn

from elit._plain import from_plain
from elit.training.checkpoint import checkpoint_steps
from elit.training.config import RetrofitConfig, TrainConfig
from elit.training.estimate import estimate, match_flops
from elit.training.loop import train
from elit.training.muon import Muon, hidden_matrices, newton_schulz, step_flops
from elit.training.run import Run

STEPS = 6


def muon_config(folder: Path, steps: int = STEPS, **changes) -> TrainConfig:
    changes = {
        "data_batch_size": 8,
        "optimizer_name": "muon",
        "optimizer_weight_decay": 0.1,
    } | changes
    return tiny_config(folder, steps, **changes)


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("muon") / "alone"
    train(muon_config(folder), progress=False)
    return folder


def test_matrices_in_the_blocks_are_muons_and_the_rest_adamws(tmp_path) -> None:
    run = Run(muon_config(tmp_path), CPU)
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    adamw, muon = (
        {names[p] for group in part.param_groups for p in group["params"]}
        for part in run.optimizer.parts
    )
    attention = {"attention.to_q.weight", "attention.to_kv.weight", "attention.to_out.weight"}
    of_layer = {"mlp.0.weight", "mlp.2.weight", "attention.to_out.weight"}
    blocks = {f"blocks.{i}.{n}" for i in range(3) for n in of_layer | {"attention.to_qkv.weight"}}
    exchange = {f"{part}.{n}" for part in ("read", "write") for n in of_layer | attention}
    assert muon == blocks | exchange
    assert adamw == {*names.values()} - muon
    stacked = hidden_matrices(run.model)
    counts = {names[matrix]: count for matrix, count in stacked.items()}
    assert counts["blocks.0.attention.to_qkv.weight"] == 3
    assert counts["read.attention.to_kv.weight"] == 2
    assert counts["blocks.0.mlp.0.weight"] == 1
    run.close()


@pytest.mark.parametrize("shape", [(24, 24), (3, 40, 16), (16, 40)])
def test_newton_schulz_makes_singular_values_alike(shape) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = newton_schulz(x, (3.4445, -4.775, 2.0315), 5)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(left.mT @ made @ right.mT, _diagonal(left.mT @ made @ right.mT))
    values = torch.linalg.svdvals(made)
    assert 0.2 < values.min() < values.max() < 1.3


def _diagonal(x: torch.Tensor) -> torch.Tensor:
    return torch.diag_embed(x.diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)])
def test_a_whole_matrix_steps_as_pytorchs_muon_does(shape) -> None:
    draw = torch.Generator().manual_seed(1)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    rate = {"lr": 0.1, "weight_decay": 0.2}
    muons = (
        Muon([{"params": [ours]}], {ours: 1}, CPU, **rate),
        torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **rate),
    )
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape, generator=draw)
        for muon in muons:
            muon.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)  # theirs is in bfloat16
    assert (ours - 1).abs().mean() > 0.05


def test_stacked_projections_step_as_if_they_were_apart() -> None:
    parts = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(2))
    whole, *apart = (nn.Parameter(torch.zeros(n, 8)) for n in (24, 8, 8, 8))
    stacked = {whole: 3} | dict.fromkeys(apart, 1)
    muon = Muon([{"params": [whole, *apart]}], stacked, CPU, 0.1, 0.0)
    whole.grad = parts.flatten(0, 1)
    for matrix, part in zip(apart, parts, strict=True):
        matrix.grad = part
    muon.step()
    torch.testing.assert_close(whole, torch.cat(list(apart)))


def test_muon_learns_and_resumes_to_the_same_bits(alone, tmp_path) -> None:
    for steps in (4, STEPS):
        train(muon_config(tmp_path / "halves", steps), progress=False)
    assert_same_run(alone, tmp_path / "halves", STEPS)
    adamw = train(muon_config(tmp_path / "adamw", optimizer_name="adamw"), progress=False)
    assert [line["loss"] for line in metrics(alone)] != [
        line["loss"] for line in metrics(adamw.folder)
    ]
    with pytest.raises(ValueError, match=r"optimizer.name: muon there, adamw now"):
        train(muon_config(alone, optimizer_name="adamw"), progress=False)


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (1, {"train_accumulation": 2}),
        (2, {"train_parallel": "fsdp"}),
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(4, {"train_parallel": "fsdp"}, marks=pytest.mark.slow),
        pytest.param(4, {"train_parallel": "hsdp", "train_shard_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_is_the_same_run(alone, tmp_path, processes, changes) -> None:
    config = muon_config(tmp_path / "run", **changes)
    run_ranks(config, processes) if processes > 1 else train(config, progress=False)
    weights, others = exported(alone), exported(tmp_path / "run")
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=1e-5, msg=name)
    last = checkpoint_steps(tmp_path / "run/checkpoints")[-2]
    assert last == 4
    losses = [[line["loss"] for line in metrics(f)] for f in (alone, tmp_path / "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_muon_under_fp16_keeps_its_scale_and_skips(tmp_path) -> None:
    run = Run(muon_config(tmp_path, train_precision="fp16"), CPU)
    before = [p.detach().clone() for p in run.trained]
    run.optimizer.backward(sum((p * torch.inf).sum() for p in run.trained))
    assert not run.optimizer.clip().isfinite()
    run.optimizer.step(skip=True)
    assert all(torch.equal(p, old) for p, old in zip(run.trained, before, strict=True))
    run.optimizer.backward(sum((p * 2**-10).sum() for p in run.trained))
    norm = run.optimizer.clip()
    assert norm == pytest.approx(2**-10 * sum(p.numel() for p in run.trained) ** 0.5, rel=1e-3)
    run.close()


def test_a_plan_counts_one_moment_and_the_work_of_muon(tmp_path) -> None:
    adamw, muon = (
        estimate(muon_config(tmp_path, optimizer_name=name), gpus=1) for name in ("adamw", "muon")
    )
    run = Run(muon_config(tmp_path), CPU)
    matrices = hidden_matrices(run.model)
    lighter = 4 * sum(map(nn.Parameter.numel, matrices)) / 1e9
    assert adamw["state_gb"] - muon["state_gb"] == pytest.approx(lighter)
    added = step_flops(run.model) / 1e12
    assert muon["step_tflops"] - adamw["step_tflops"] == pytest.approx(added)
    other = muon_config(tmp_path, 1000, optimizer_name="adamw")
    matched = match_flops(muon_config(tmp_path), other).train.steps
    assert matched == round(1000 * adamw["step_tflops"] / muon["step_tflops"]) < 1000
    square = 5 * (4 + 2) * 32**3  # 5 steps of three products
    assert step_flops(run.model.blocks[0].attention) == 0  # it is in no block
    wide = 2 * 5 * (4 * 32 * 32 * 128 + 2 * 32**3)
    block, exchange = 4 * square + wide, 6 * square
    assert step_flops(run.model) == 3 * block + 2 * exchange
    run.close()


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("qwen", "transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.img_mod.1"),
        ("flux", "single_transformer_blocks.0.proj_mlp", "transformer_blocks.0.norm1.linear"),
        ("sd3", "transformer_blocks.0.ff.net.2", "norm_out.linear"),
        ("wan", "elit.write.mlp.0", "condition_embedder.time_proj"),
        ("ours", "elit.read.attention.to_kv", "elit.read.modulation.linear"),
    ],
)
def test_of_a_retrofit_blocks_and_interface_are_muons_but_no_modulation_or_adapter(
    name, inside, outside
) -> None:
    model = elastic(name)
    matrices = hidden_matrices(model)
    assert model.get_submodule(inside).weight in matrices
    assert model.get_submodule(outside).weight not in matrices
    assert not any(p in matrices for n, p in model.named_parameters() if ".adapters." in n)


def test_the_rate_of_a_base_is_its_own_with_muon_too(tmp_path) -> None:
    train(tiny_config(tmp_path / "base", 1, model_preset="dit-tiny/2"), progress=False)
    retrofit = RetrofitConfig(
        str(tmp_path / "base"), head=1, tail=1, train="all", base_lr=0.1, distill=0, features=0
    )
    values = muon_config(tmp_path / "run", 2).to_dict() | {
        "model": {},
        "retrofit": asdict(retrofit),
    }
    config = from_plain(TrainConfig, values)
    run = Run(config, CPU)
    run.optimizer.set_learning_rate(10)
    rates = {
        name: group["lr"]
        for name, parameter in run.model.named_parameters()
        for part in run.optimizer.parts
        for group in part.param_groups
        if any(parameter is p for p in group["params"])
    }
    run.close()
    assert rates["elit.read.mlp.0.weight"] == rates["elit.read.mlp.0.bias"] == 1e-3
    assert rates["blocks.0.mlp.0.weight"] == rates["blocks.0.mlp.0.bias"] == pytest.approx(1e-4)
    assert train(config, progress=False).finished


@pytest.mark.slow
def test_all_of_a_recipe_together_is_the_same_run_on_shards_and_resumes(tmp_path) -> None:
    recipe = {
        "objective_shift": 0.5, "objective_prediction_type": "sample", "alignment_weight": 0.5,
        "alignment_kind": "irepa", "alignment_encoder": "classifier",
    }  # fmt: skip
    for name in ("one", "halves"):
        for steps in (STEPS,) if name == "one" else (4, STEPS):
            train(muon_config(tmp_path / name, steps, **recipe), progress=False)
    assert_same_run(tmp_path / "one", tmp_path / "halves", STEPS)
    run_ranks(muon_config(tmp_path / "shards", train_parallel="fsdp", **recipe), 2)
    weights, others = exported(tmp_path / "one"), exported(tmp_path / "shards")
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=1e-5, msg=name)
