"""What the core is worth: models without it, how much latents differ, and a core that is dead."""

import copy

import pytest
import retrofit_models
import torch
from helpers import ELASTIC, make_inputs, randomise, tiny_dit, tiny_elastic
from runs import CPU
from torch import Tensor, nn

from elit import elasticize
from elit.data import load_dataset
from elit.flow.objective import flow_matching_loss
from elit.inspection.left_out import (
    has_original_core,
    latent_moments,
    latent_spread,
    leave_out,
    watch_latents,
)
from elit.interface.initial import open_gates
from elit.models.dit import DiT
from elit.training.watch import InterfaceWatch, watch_interface


def shut(module: nn.Module) -> None:
    """Make blocks hand on what they get: all gates zero, long skips not listened to."""
    for name, linear in module.named_modules():
        if name.endswith("modulation.linear"):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        if name.endswith("skip"):
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)


# ---- models without a core ----


@pytest.mark.parametrize("name", ELASTIC)
@torch.no_grad()
def test_left_out_blocks_are_blocks_that_do_nothing(name: str) -> None:
    model = ELASTIC[name]()
    inputs, (head, core, _) = make_inputs(model), model.split
    few = max(1, model.max_latents // 4)
    before = [model(*inputs, num_latents=n).sample for n in (model.max_latents, few)]
    weights = list(model.state_dict())
    idle = copy.deepcopy(model)
    shut(idle.blocks[head : head + core])
    without = []
    for part in ("core", "interface"):
        with leave_out(model, part):
            without += [model(*inputs, num_latents=n).sample for n in (model.max_latents, few)]
    wanted = [idle(*inputs, num_latents=n).sample for n in (model.max_latents, few)]
    for found, expected, full in zip(without[:2], wanted, before, strict=True):
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, full, atol=1e-3)
    if name != "sit":  # whose Write has no gate
        shut(idle.write)
        torch.testing.assert_close(without[2], idle(*inputs).sample)
    assert torch.equal(without[2], without[3])  # whatever the budget is
    assert not torch.allclose(without[2], without[0], atol=1e-3)
    after = [model(*inputs, num_latents=n).sample for n in (model.max_latents, few)]
    assert all(map(torch.equal, before, after))
    assert list(model.state_dict()) == weights


def test_a_model_is_whole_again_after_an_error() -> None:
    model = tiny_elastic()
    blocks, read = list(model.blocks), model.read
    with pytest.raises(RuntimeError, match="mine"), leave_out(model, "interface"):
        raise RuntimeError("mine")
    assert list(model.blocks) == blocks
    assert model.read is read
    with (
        pytest.raises(ValueError, match="plain model: it has no core"),
        leave_out(tiny_dit(), "core"),
    ):
        pass
    with pytest.raises(ValueError, match="part 'read' is unknown"), leave_out(model, "read"):
        pass


@pytest.mark.parametrize("name", retrofit_models.some(("qwen", "flux", "sd3", "dit", "ours")))
@torch.no_grad()
def test_a_retrofit_without_its_core_is_the_original_without_these_blocks(name: str) -> None:
    model = retrofit_models.make(name)
    inputs = retrofit_models.inputs(name)
    cut = copy.deepcopy(model)
    elasticize(model, head=1, tail=1, group=(2, 2))
    before = model(**inputs, return_dict=False)[0]
    layout = model._elit_session.layout
    inner = {id(block) for block in layout.find_blocks(cut)[1:-1]}
    names = (layout.blocks,) if isinstance(layout.blocks, str) else layout.blocks
    for blocks in map(cut.get_submodule, names):
        for index in reversed(range(len(blocks))):
            if id(blocks[index]) in inner:
                del blocks[index]
    wanted = cut(**inputs, return_dict=False)[0]
    for part in ("core", "interface"):
        with leave_out(model, part):
            found = model(**inputs, return_dict=False)[0]
            model(**inputs, num_latents=2)
        torch.testing.assert_close(found, wanted)
        assert not torch.allclose(found, before)
    assert torch.equal(model(**inputs, return_dict=False)[0], before)


@torch.no_grad()
def test_the_write_of_a_learned_retrofit_is_left_out() -> None:
    model = elasticize(tiny_dit(patch_size=1), head=1, tail=1, group=(4, 4), init="learned")
    inputs = make_inputs(model)
    assert not has_original_core(model)
    open_gates(model.elit.write.modulation, 0)
    with leave_out(model, "interface"):
        found = model(*inputs).sample
    torch.testing.assert_close(found, model(*inputs).sample)
    randomise(model.elit)
    with leave_out(model, "interface"):
        torch.testing.assert_close(model(*inputs).sample, found)
    assert not torch.allclose(model(*inputs).sample, found)


# ---- how much latents differ ----


def spread(latents: Tensor, num_groups: int) -> float | None:
    return latent_spread(latent_moments(latents, num_groups))


def test_spread_of_copies_of_independent_and_of_opposite_latents() -> None:
    signs = torch.cartesian_prod(torch.tensor([-1.0, 1]), torch.tensor([-1.0, 1]))  # (4, 2)
    a, b = torch.randn(8), torch.randn(8)
    own = torch.randn(2, 8)  # learned vectors: they don't count
    first, second = signs[:, :1] * a, signs[:, 1:] * b  # (4, 8): independent
    for pair, wanted in (((first, first), 0), ((first, second), 1), ((first, -first), 2)):
        latents = torch.stack(pair, 1) + own  # (B, n, D)
        assert spread(latents, 1) == pytest.approx(wanted, abs=1e-4)
        assert spread(latents.view(2, 4, 8), 2) == pytest.approx(wanted, abs=1e-4)  # as groups
    many, common = torch.randn(64, 16 * 4, 32), torch.randn(64, 16, 32).repeat_interleave(4, 1)
    assert spread(many, 16) == pytest.approx(1, abs=0.02)
    assert spread(many + 3 * common, 16) == pytest.approx(0.1, abs=0.01)  # 1 / (1 + 9)


def test_spread_adds_up_over_calls_and_is_undefined_where_nothing_varies() -> None:
    latents = torch.randn(8, 12, 16)
    parts = sum(latent_moments(part, 3) for part in latents.split(3))
    assert latent_spread(parts) == pytest.approx(spread(latents, 3), rel=1e-4)
    assert latent_spread(parts / 7) == pytest.approx(spread(latents, 3), rel=1e-4)
    assert spread(latents, 12) is None  # one latent in each group
    assert spread(torch.randn(1, 4, 16).expand(8, -1, -1), 1) is None
    assert spread(torch.zeros(8, 4, 16), 1) is None


@pytest.mark.parametrize("name", ELASTIC)
@torch.no_grad()
def test_latents_are_seen_on_their_way_into_the_core_and_out_of_it(name: str) -> None:
    model, seen = ELASTIC[name](), []
    inputs = make_inputs(model)
    with watch_latents(model, lambda *found: seen.append(found)):
        model(*inputs)
        with leave_out(model, "core"):
            model(*inputs)
    assert [where for where, _, _ in seen] == ["read", "core"] * 2
    assert torch.equal(seen[0][1], seen[2][1])
    assert torch.equal(seen[2][1], seen[3][1])  # straight through
    groups = seen[0][2]
    assert seen[0][1].shape[1] == groups * model.max_latents
    assert {number for _, _, number in seen} == {groups}


# ---- a core that is dead ----


def start(model: DiT, std: float, gate: float) -> DiT:
    """Read and Write that start their vectors with this spread, and Read with this gate."""
    vectors = (model.read.latents, model.read.latent_index, model.read.token_place)
    with torch.no_grad():
        for vector in (*vectors, model.write.token_place):
            vector.normal_(std=std)
        model.read.modulation.linear.bias.zero_().view(3, -1)[2] = gate
    open_gates(model.write.modulation, 0)  # as the thresholds were measured
    return model


def trained(std: float, gate: float, steps: int = 60) -> dict[str, float]:
    """What is seen at full budget in a small model after some steps on digits."""
    torch.manual_seed(0)
    model = start(
        DiT(sample_size=16, in_channels=1, patch_size=2, hidden_size=32, num_heads=2, depth=4,
            num_classes=10, group=4, head=1, tail=1), std, gate,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = load_dataset("digits", "train")

    def loss(rows: list[int], num_latents: int) -> Tensor:
        batch = data.batch(rows)
        noise, sigma = torch.randn_like(batch["images"]), torch.rand(len(rows))

        def velocity(x: Tensor, level: Tensor) -> Tensor:
            return model(x, level, batch["class_labels"], num_latents=num_latents).sample

        return flow_matching_loss(velocity, batch["images"], noise, sigma).mean()

    for _ in range(steps):
        rows = torch.randint(len(data), (16,)).tolist()
        optimizer.zero_grad()
        loss(rows, int(torch.randint(1, 17, ()))).backward()
        optimizer.step()
    with torch.no_grad(), watch_interface(model) as probe:
        loss(list(range(0, 640, 10)), 16)
    return probe.values(CPU)[16]


@pytest.mark.slow  # 10 s
def test_a_dead_core_is_told_from_one_that_learns() -> None:
    dead, healthy = trained(std=0.02, gate=0), trained(std=1, gate=1)
    losses = [0.2758, 0.2759, 0.2759, 0.2763, 0.2764]
    assert dead["latent_spread"] < 0.1
    assert healthy["latent_spread"] > 0.25
    watch = InterfaceWatch()
    assert watch.update({16: dead}, losses) == {}  # as it may be at the start
    told = watch.update({16: dead}, losses)
    assert list(told) == ["copies"]
    assert "differs by 0.22% between the budgets" in told["copies"]
    assert "begin again with a lower optimizer.lr" in told["copies"]
    for _ in range(2):
        assert watch.update({16: healthy}, losses) == {}


# Loss by latents kept, and spread after the core, of 600 steps on Fashion-MNIST.
SEEN = {
    "as built": ([0.2759, 0.2760, 0.2761, 0.2764, 0.2766], 0.092, True),
    "as built, early": ([0.3501, 0.3501, 0.3500, 0.3501, 0.3501], 0.001, True),
    "started apart": ([0.2558, 0.2554, 0.2576, 0.2591, 0.2984], 0.593, False),
    "started apart, early": ([0.4824, 0.4821, 0.4821, 0.4837, 0.4911], 0.314, False),
    "as built, one budget": ([0.3653], 0.450, False),
    "started apart, one budget": ([0.3590], 0.552, False),
    "large budgets alone": ([0.2399, 0.2398], 0.593, False),
}


@pytest.mark.parametrize("name", SEEN)
def test_copies_are_told_and_healthy_models_are_not(name: str) -> None:
    losses, spread_of_core, is_dead = SEEN[name]
    watch, seen = InterfaceWatch(), {16: {"latent_spread": spread_of_core}, 1: {}}
    told = [watch.update(seen, losses, {"core": 0.5, "interface": 1.0}) for _ in range(3)]
    assert [list(messages) for messages in told] == [[], *[["copies"] if is_dead else []] * 2]


def test_an_interface_that_is_worth_nothing_is_told_once_the_loss_has_settled() -> None:
    def told(losses: list[float], rise: float) -> list[list[str]]:
        watch = InterfaceWatch()
        return [list(watch.update({}, [x, 1.1 * x], {"interface": rise})) for x in losses]

    assert told([0.9, 0.6, 0.5, 0.4], 0.001) == [[]] * 4  # early on: it still falls
    assert told([0.5, 0.49, 0.485, 0.3], 0.001) == [[], [], ["unused"], []]
    assert told([0.5, 0.49, 0.485], 0.1) == [[]] * 3
    assert told([0.5, 0.49, 0.485], float("inf")) == [[]] * 3
    watch = InterfaceWatch()
    for _ in range(3):
        messages = watch.update({}, [0.5, 0.6], {"core": -0.001, "interface": 0.002})
    assert (
        "without Read, core and Write the validation loss is only 0.2% higher" in messages["unused"]
    )
    for _ in range(3):
        assert watch.update({}, [0.5, 0.6]) == {}  # not measured, as of a plain model
