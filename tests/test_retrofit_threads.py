"""Elastic transformers that threads call at once: they wait, and give what each gives alone."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from retrofit_models import FOREIGN, make
from stock_pipelines import build, run

from elit import _locks, elasticize


def elastic(name: str = "sd3") -> Any:
    return elasticize(make(name), 1, 1, 4).eval()


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What calls give that run in a thread each."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(60) for future in [pool.submit(call) for call in calls]]


def test_forwards_of_one_model() -> None:
    model = elastic()
    inputs = FOREIGN["sd3"].inputs(2)

    @torch.no_grad()
    def call(num_latents: int) -> torch.Tensor:
        return torch.stack([model(**inputs, num_latents=num_latents)[0] for _ in range(8)])

    alone = [call(n) for n in (1, 4, 16)]
    both = at_once(*(lambda n=n: call(n) for n in (1, 4, 16)))
    assert all(map(torch.equal, alone, both))


@pytest.mark.parametrize("shared", [True, False])
def test_pipelines_at_a_budget(shared: bool) -> None:
    """Blocks of `at_budget` wait for each other, in one pipeline and in two of one model."""
    pipes = [build("sd3", elastic())]
    pipes.append(pipes[0] if shared else StableDiffusion3Pipeline(**pipes[0].components))
    pipes[1].set_progress_bar_config(disable=True)

    def draw(pipe: Any, budget: float, guide: float | None) -> torch.Tensor:
        with pipe.transformer.at_budget(budget, guide):
            return run(pipe, "sd3", steps=4)

    jobs = [(pipes[0], 1.0, None), (pipes[1], 0.25, None), (pipes[1], 0.5, 0.25)]
    alone = [draw(*job) for job in jobs]
    both = at_once(*(lambda job=job: draw(*job) for job in jobs))
    assert all(map(torch.equal, alone, both))
    assert not torch.equal(alone[0], alone[1])


def test_a_call_waits_for_a_block_and_says_so_after_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_locks, "PATIENCE", 0.05)
    model, inputs = elastic(), FOREIGN["sd3"].inputs(2)
    with torch.no_grad():
        wanted = model(**inputs)[0]
    done, found = Event(), []

    def call() -> None:
        with torch.no_grad():
            found.append(model(**inputs)[0])
        done.set()

    with model.at_budget(0.25):
        thread = Thread(target=call)
        thread.start()
        assert not done.wait(0.3)
    thread.join(60)
    assert torch.equal(found[0], wanted)
    assert "for another one that uses the ElasticSD3Transformer2DModel" in caplog.text


def test_copies_wait_for_no_other() -> None:
    model, inputs = elastic(), FOREIGN["sd3"].inputs(2)
    with model.at_budget(0.25):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            (found,) = at_once(lambda: copied(**inputs)[0])
            assert torch.equal(found, model(**inputs)[0])


def test_a_model_computed_again_by_the_backward_pass_of_another_thread() -> None:
    """As on a GPU, where backward has a thread of its own."""
    model, inputs = elastic().train(), FOREIGN["sd3"].inputs(2)
    weight = model.proj_out.weight
    with model.at_budget(0.25):
        out = torch.utils.checkpoint.checkpoint(lambda: model(**inputs)[0], use_reentrant=False)
        at_once(out.square().mean().backward)
    found, weight.grad = weight.grad, None
    model(**inputs, num_latents=4)[0].square().mean().backward()
    assert torch.equal(found, weight.grad)
