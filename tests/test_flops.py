"""FLOPs: the closed form of the paper, the budgets of a report, and what no formula knows."""

import pytest

from elit.cost.flops import cost_of, flops_report, forward_flops, on_meta
from elit.models.dit import DiT
from elit.models.presets import preset_config
from elit.reproduce.spread import SpreadDiT


def paper_block(tokens: int, width: int) -> int:
    return 24 * tokens * width**2 + 4 * tokens**2 * width + 12 * width**2


@pytest.mark.parametrize("num_latents", [1, 5, 16])
def test_an_elastic_model_costs_what_the_closed_form_says(num_latents: int) -> None:
    config = preset_config("elit-dit-b/2", 256)
    width, tokens, groups = config["hidden_size"], 256, 16
    kept = groups * num_latents
    expected = 6 * paper_block(tokens, width) + 6 * paper_block(kept, width)
    expected += 4 * tokens * width * 16 + 6 * width**2 + 512 * width
    expected += 2 * num_latents * width**2 + 4 * tokens * width**2  # Read: queries once, context
    expected += 2 * kept * width**2 + 4 * kept * width**2  # output and MLP of the latents
    expected += 2 * tokens * width**2 + 4 * kept * width**2  # Write: queries, context
    expected += 2 * tokens * width**2 + 4 * tokens * width**2  # output and MLP of the tokens
    expected += 2 * 4 * kept * 16 * width  # both attentions, within groups of 16
    expected += 2 * 6 * width**2  # both modulations
    assert forward_flops(on_meta(DiT, config), num_latents) == expected


def test_a_class_of_another_forward_is_counted() -> None:
    """Its formula is not known, though it is derived from one whose is."""
    model = on_meta(SpreadDiT, preset_config("elit-dit-tiny/2", 16))
    assert cost_of(model).parameters == cost_of(on_meta(DiT, dict(model.config))).parameters
    assert forward_flops(model, 3) > 3.5 * forward_flops(on_meta(DiT, dict(model.config)), 3)


def test_what_was_counted_is_not_mistaken_for_another_model() -> None:
    """Same class and same parameters: the first one has two blocks more in its core."""
    ends = {"depth": 6, "head": 1, "tail": 1}, {"depth": 6, "head": 2, "tail": 2}
    models = [on_meta(DiT, preset_config("elit-dit-tiny/2", 16, end)) for end in ends]
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]
    few, many = (forward_flops(model, 1) for model in models)
    assert few < many
    assert [forward_flops(model, 1) for model in models] == [few, many]
    assert forward_flops(models[0], 2) > few
    assert forward_flops(models[0], 1, (16, 32)) > few


def test_a_group_of_one_token_has_one_budget() -> None:
    model = on_meta(DiT, preset_config("elit-dit-tiny/2", 16, {"group": 1}))
    report = flops_report(cost_of(model), "x", 16)
    assert [(row["budget"], row["num_latents"]) for row in report["rows"]] == [(1.0, 1)]


def test_rows_show_the_budgets_that_run() -> None:
    model = on_meta(DiT, preset_config("elit-dit-tiny/2", 16))
    report = flops_report(cost_of(model), "x", 16, budgets=[1, 0.3, 0.31, 0.01])
    assert [(row["budget"], row["num_latents"]) for row in report["rows"]] == [
        (1.0, 16), (5 / 16, 5), (1 / 16, 1)]  # fmt: skip
