"""Tables kept between calls: they say what a first call says, and nobody else meets them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from elit import create_model
from elit.layers.tables import kept

SMALL = {"hidden_size": 32, "num_heads": 2, "depth": 3}


def small(family: str = "elit-dit", **changes):
    torch.manual_seed(0)
    model = create_model(f"{family}-tiny/2", **SMALL, **changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def velocity(model, *size: int, n: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, model.in_channels, *size, generator=generator).to(model.dtype)
    return model(x, 0.5, torch.tensor([1]), num_latents=n).sample


def test_a_table_is_made_once_for_each_of_its_arguments() -> None:
    made = []

    @kept
    def table(n: int, device: torch.device) -> torch.Tensor:
        made.append(n)
        return torch.arange(n, device=device)

    cpu = torch.device("cpu")
    with torch.inference_mode():
        first = table(3, cpu)
    assert table(3, cpu) is first
    assert not first.is_inference()
    assert len(table(4, cpu)) == 4
    assert made == [3, 4]
    with FakeTensorMode():
        assert type(table(3, cpu)) is not torch.Tensor
    assert table(3, cpu) is first
    assert torch.compile(lambda x: x + table(3, cpu), fullgraph=True, backend="eager")(first).any()
    assert made[2] == 3  # in both it was made anew
    assert table(3, cpu) is first


@pytest.mark.parametrize("family", ["elit-dit", "elit-hdit", "elit-sit"])
def test_what_was_kept_is_of_this_size_budget_dtype_and_wavelength(family: str) -> None:
    calls = [((16, 16), 4), ((16, 16), 1), ((16, 32), 4), ((32, 16), 4)]
    alone = {}
    for size, n in calls:
        _forget()
        alone[size, n] = velocity(small(family), *size, n=n)
    model = small(family)
    for size, n in [*calls, *calls]:
        assert torch.equal(velocity(model, *size, n=n), alone[size, n])
    coarse = velocity(model.to(torch.bfloat16), 16, 16)
    assert coarse.dtype == torch.bfloat16
    assert torch.equal(velocity(small(family), 16, 16), alone[(16, 16), 4])
    if family != "elit-sit":
        other = velocity(small(family, rope_theta=10.0), 16, 16)
        assert not torch.allclose(other, alone[(16, 16), 4])


@pytest.mark.parametrize("family", ["elit-dit", "elit-hdit", "elit-sit"])
def test_training_learns_from_tables_that_sampling_made(family: str) -> None:
    gradients = []
    for samples_first in (False, True):
        _forget()
        model = small(family)
        if samples_first:
            with torch.inference_mode():
                velocity(model, 16, 16)
        velocity(model, 16, 16).square().mean().backward()
        gradients.append(model.patch_embed.weight.grad)
    assert torch.equal(*gradients)


def test_a_model_on_the_meta_device_and_one_on_the_cpu_have_their_own() -> None:
    model = small()
    expected = velocity(model, 16, 16)
    with torch.device("meta"):
        empty = create_model("elit-dit-tiny/2", **SMALL)
    assert empty(torch.empty(1, 1, 16, 16, device="meta"), 0.5).sample.is_meta
    assert torch.equal(velocity(model, 16, 16), expected)


def _forget() -> None:
    """Forget all tables of our models."""
    from elit.models import elastic, hdit, sit

    for table in (elastic._rotary, hdit._neighborhood, sit._positions):
        table.cache_clear()
