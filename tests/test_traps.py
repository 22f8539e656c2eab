"""What a newcomer runs into: each is refused in words that say what to do."""

import threading

import pytest
import torch

import elit
from elit.cli.main import main
from elit.flow.objective import flow_matching_loss


def test_images_of_0_to_255_are_no_data():
    noise, sigma = torch.randn(2, 1, 4, 4), torch.rand(2)
    with pytest.raises(ValueError, match=r"data of up to 255; .* x / 127\.5 - 1"):
        flow_matching_loss(lambda x, _: x, torch.full_like(noise, 255), noise, sigma)
    flow_matching_loss(lambda x, _: x, torch.full_like(noise, 50), noise, sigma)


def test_a_group_that_does_not_divide_the_model_s_grid():
    model = elit.create_model("dit-tiny/2")
    with pytest.raises(ValueError, match="8x8 tokens cannot be cut into groups of 3x3"):
        elit.elasticize(model, head=1, tail=1, group=3)
    assert not model.is_elastic
    elit.elasticize(model, head=1, tail=1, group=2)


def test_forwards_refuse_labels_and_noise_levels_that_are_none():
    model, x = elit.create_model("elit-dit-tiny/2"), torch.randn(1, 1, 16, 16)
    with pytest.raises(ValueError, match="timestep 500 is outside 0"):
        model(x, 500.0, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"class label 99 is outside 0 \.\.\. 10"):
        model(x, 0.5, torch.tensor([99]))


def test_our_models_say_where_a_budget_goes():
    model = elit.create_model("elit-dit-tiny/2")
    with pytest.raises(
        ValueError, match=r"takes budget='1/4' in its call, .*resolve_budget\('1/4'"
    ):
        model.set_budget("1/4")
    plain = elit.elasticize(elit.create_model("dit-tiny/2"), 1, 1, 4)
    plain.set_budget("1/4", guide="25%")  # has one


@pytest.mark.parametrize("flags", [[], ["--output_dir", "runs/x"], ["--seed", "3"]])
def test_no_training_without_being_asked(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *flags]) == 2
    assert "no CONFIG is given" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_threads_on_one_pipeline_draw_what_each_draws_alone():
    pipe = elit.ElitPipeline(elit.create_model("elit-dit-tiny/2"), elit.make_scheduler("euler"))
    pipe.set_progress_bar_config(disable=True)

    def draw(budget):
        return pipe([3], budget, 3, seed=1, output_type="pt").images

    budgets, drawn = (1, "1/4", "1/16"), {}
    alone = {budget: draw(budget) for budget in budgets}
    threads = [threading.Thread(target=lambda b=b: drawn.update({b: draw(b)})) for b in budgets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[budget], drawn[budget]) for budget in budgets)
