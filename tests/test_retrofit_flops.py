"""What a retrofit costs at each budget, against the original on a smaller image."""

from typing import Any

import pytest
from retrofit_models import FOREIGN, HEAD, TAIL, inputs, make
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from elit import elasticize
from elit.retrofit.known import find_layout

SCALED = ("qwen", "flux", "sd3", "dit", "pixart", "wan", "ours")


def block_flops(model: Any, blocks: list[nn.Module], given: dict[str, Any], **kwargs: Any) -> list:
    """Cost of each block and, last, of the whole forward."""
    names = {id(module): name for name, module in model.named_modules()}
    with FlopCounterMode(model, display=False, depth=None) as counter:
        model(**given, **kwargs)
    counts = {
        name.partition(".")[2]: sum(c.values()) for name, c in counter.get_flop_counts().items()
    }
    return [counts[names[id(block)]] for block in blocks] + [counter.get_total_flops()]


def quarter(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Inputs of half the height and half the width: a quarter of the tokens."""
    hidden_states = given["hidden_states"]
    if name == "qwen":
        small = {"hidden_states": hidden_states[:, :8], "img_shapes": [[(1, 4, 2)]] * 2}
    elif name == "flux":
        ids = given["img_ids"].view(8, 4, 3)[:4, :2].flatten(0, 1)
        small = {"hidden_states": hidden_states[:, :8], "img_ids": ids}
    else:
        height, width = hidden_states.shape[-2:]
        small = {"hidden_states": hidden_states[..., : height // 2, : width // 2]}
    return given | small


@pytest.mark.parametrize("name", SCALED)
def test_the_core_costs_what_its_latents_cost(name: str) -> None:
    """At a quarter of the latents a core block costs what it costs on a quarter of the image."""
    model, given = make(name).requires_grad_(False), inputs(name)
    blocks = find_layout(model).find_blocks(model)
    *full, whole = block_flops(model, blocks, given)
    *small, _ = block_flops(model, blocks, quarter(name, given))
    elasticize(model, HEAD, TAIL, FOREIGN[name].group).requires_grad_(False)
    *at_quarter, total = block_flops(model, blocks, given, num_latents=4)
    core = slice(HEAD, len(blocks) - TAIL)
    # Read belongs to the core's first block, and Write to its last one.
    assert at_quarter[core][1:-1] == small[core][1:-1]
    assert at_quarter[:HEAD] == full[:HEAD]
    assert at_quarter[-TAIL:] == full[-TAIL:]
    assert whole > total
    *_, elastic_whole = block_flops(model, blocks, given, num_latents=16)
    assert elastic_whole == whole  # nothing is added at full budget
    one, two, most = (block_flops(model, blocks, given, num_latents=n)[-1] for n in (1, 2, 15))
    assert one < two < total < most


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_adapters_cost_their_rank_below_full_budget(name: str) -> None:
    counts = []
    for rank in (0, 2):
        model, given = make(name).requires_grad_(False), inputs(name)
        elasticize(model, HEAD, TAIL, FOREIGN[name].group, rank=rank).requires_grad_(False)
        counts.append([block_flops(model, [], given, num_latents=n)[-1] for n in (16, 4)])
    assert counts[0][0] == counts[1][0]
    assert counts[0][1] < counts[1][1] < 1.5 * counts[0][1]
