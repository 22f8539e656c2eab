"""elit serve: what it refuses, which budget it chooses, and a real server that answers."""

import asyncio
import base64
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from helpers import randomise, tiny_dit, tiny_elastic
from PIL import Image
from serving import FACTS, WAY, Server, small_run

from elit import ElitPipeline, ElitTextPipeline, create_model
from elit.flow.schedulers import FlowMatchUniformEulerScheduler, make_scheduler
from elit.pipelines.budgets import draw_batch
from elit.serving.control import HEADROOM, Control, Picture, Prices, Way, batches
from elit.serving.dispatcher import MOST_TRIES, Dispatcher
from elit.serving.facts import RefusedError
from elit.serving.metrics import Metrics
from elit.serving.requests import FIELDS, MAX_BODY, parse
from elit.serving.settings import Settings
from elit.serving.worker import Worker, draw_mixed, find_facts

# ---- control ----

# A forward of a picture with n of 16 latents takes n ms, the rest of a batch 4 ms; batches of 4.
CALLS = {n: (n / 1000, 4 * n / 1000) for n in (1, 4, 16)}
LADDER = [16, 8, 4, 1]


def prices(**changes) -> Prices:
    return Prices(**{"calls": CALLS, "fixed": (0.004, 0.004), "most": 4} | changes)


def pictures(count: int, latents: int = 16, way: Way = WAY, arrived: float = 0.0) -> list[Picture]:
    return [Picture(0, i, way, latents, arrived=arrived) for i in range(count)]


@pytest.mark.parametrize(("way", "latents", "seconds"), [
    (Way(1), [16], 0.020),
    (Way(10), [16], 0.164),
    (Way(10), [16, 16, 16], 0.484),
    (Way(10), [10], 0.104),  # between 4 and 16
    (Way(10), [16, 1, 16], 0.334),  # mixed
    (Way(10, "cfg", 2.0), [16], 0.324),
    (Way(10, "ccfg", 2.0, 1), [16, 16], 0.344),
    (Way(10, "ccfg", 2.0, 4), [4], 0.084),  # as cfg
    (Way(10, "ag", 2.0, 4), [4], 0.044),  # no guide at its own budget
])  # fmt: skip
def test_a_batch_has_the_price_of_its_forwards(way, latents, seconds) -> None:
    assert prices().of_batch(way, latents) == pytest.approx(seconds)
    assert prices(calls_per_step=2.0, fixed=(0, 0)).of_batch(way, latents) == pytest.approx(
        2 * (seconds - 0.004)
    )


def test_prices_follow_what_batches_take_but_no_single_one() -> None:
    known = prices()
    for _ in range(40):
        predicted = known.of_batch(WAY, [16])
        known.learn(predicted, 3 * 0.164)
    assert known.of_batch(WAY, [16]) == pytest.approx(3 * 0.164, rel=0.01)
    known.learn(known.of_batch(WAY, [16]), 1000.0)
    assert known.of_batch(WAY, [16]) < 1.4 * 3 * 0.164
    known.learn(1.0, 0.0)
    assert known.factor > 0


def test_batches_are_of_one_way_and_begin_with_the_oldest() -> None:
    other = Way(5)
    a, b = pictures(5), pictures(2, way=other)
    waiting = [a[0], b[0], *a[1:], b[1]]
    assert batches(waiting, 4) == [a[:4], b, a[4:]]
    assert batches([], 4) == []


@pytest.mark.parametrize(("waiting", "now", "target", "latents"), [
    (pictures(4), 0, None, 16),  # no target
    (pictures(1), 0, 1.0, 16),
    (pictures(4), 0, 1.0, 16),  # 0.64 s
    (pictures(8), 0, 1.0, 8),  # 1.29 s at 16, 0.65 at 8
    (pictures(16), 0, 1.0, 4),
    (pictures(4, arrived=-0.3), 0, 1.0, 8),  # it has waited
    (pictures(60), 0, 1.0, 1),
    (pictures(1, arrived=-9.0), 0, 1.0, 1),  # late anyway: those behind it matter
    (pictures(1), 0.7, 1.0, 8),  # the worker is busy
    (pictures(4, latents=4), 0, 1.0, 16),  # asked for less themselves
])  # fmt: skip
def test_the_highest_budget_in_time_is_chosen(waiting, now, target, latents) -> None:
    control = Control(LADDER, prices(), target)
    assert control.cap(waiting, [now]) == latents
    if target is not None:  # and the next one up would not be in time
        higher = [n for n in LADDER if n > latents]
        for cap in higher:
            ends = control.ends(waiting, cap, [now]).values()
            assert max(ends) - waiting[0].arrived > HEADROOM * target


def test_random_queues_against_a_plain_reading_of_the_rule() -> None:
    draw = random.Random(0)
    for _ in range(200):
        ways = [WAY, Way(draw.randint(1, 20)), Way(10, "ag", 2.0, 4), Way(10, "ccfg", 2.0, 1)]
        waiting = [
            Picture(0, i, draw.choice(ways), draw.choice(LADDER[:3]), arrived=draw.uniform(-1, 0))
            for i in range(draw.randint(1, 30))
        ]
        waiting.sort(key=lambda picture: picture.arrived)
        free, target = [draw.uniform(0, 0.3) for _ in range(draw.randint(1, 3))], draw.uniform(0, 5)
        control = Control(LADDER, prices(), target)

        def in_time(cap, control=control, waiting=waiting, free=free, target=target) -> bool:
            at = sorted(free)
            for batch in batches(waiting, 4):
                kept = [max(1, min(p.latents, max(cap, p.way.least(1)))) for p in batch]
                end = at.pop(0) + control.prices.of_batch(batch[0].way, kept)
                at = sorted([*at, end])
                if any(end - p.arrived > HEADROOM * target for p in batch):
                    return False
            return True

        holding = [cap for cap in LADDER if in_time(cap)]
        assert control.cap(waiting, free) == max(holding, default=LADDER[-1])


def test_no_picture_is_drawn_below_its_guide_or_above_its_budget() -> None:
    for cap, (guidance, guide) in itertools.product(LADDER, (("ag", 4), ("ccfg", 4))):
        one = pictures(1, latents=8, way=Way(10, guidance, 2.0, guide))[0]
        assert (4 + (guidance == "ag")) <= one.latents_under(cap, 1) <= 8
    assert pictures(1, latents=8)[0].latents_under(1, 1) == 1
    assert pictures(1, latents=0)[0].latents_under(0, 0) == 0  # a plain model


def test_what_is_late_at_the_lowest_budget_is_known_beforehand() -> None:
    control = Control(LADDER, prices(), 0.1)
    assert control.seconds_too_late(pictures(4), pictures(4), [0.0]) == pytest.approx(-0.012)
    assert control.seconds_too_late(pictures(8), pictures(4), [0.0]) == pytest.approx(0.032)
    assert Control(LADDER, prices(), None).seconds_too_late(pictures(99), pictures(4), [0.0]) == 0


# ---- what is refused ----


def ask(**fields) -> list[Picture]:
    return parse(json.dumps({"class_label": 3} | fields).encode(), FACTS)


@pytest.mark.parametrize(("fields", "param", "words"), [
    ({"budgt": 1}, None, "unknown field 'budgt': did you mean budget?"),
    ({"xyz": 1}, None, "unknown field 'xyz': the fields are model, prompt,"),
    ({"model": "gpt"}, "model", "model 'gpt' is not served here; use 'tiny'"),
    ({"class_label": 10}, "class_label", "give a class from 0 to 9"),
    ({"class_label": -1}, "class_label", "give a class"),
    ({"class_label": 1.0}, "class_label", "give a class"),
    ({"class_label": True}, "class_label", "give a class"),
    ({"class_label": [1]}, "class_label", "give a class"),
    ({"class_label": 10**400}, "class_label", "give a class"),
    ({"class_label": None}, "class_label", "needs a class_label, a class from 0 to 9"),
    ({"prompt": "3"}, "prompt", "give either prompt or class_label"),
    ({"class_label": None, "prompt": "a dog"}, "prompt", "draws no texts; give a class from 0"),
    ({"class_label": None, "prompt": "\u0663"}, "prompt", "draws no texts"),
    ({"class_label": None, "prompt": "11"}, "prompt", "give a class from 0 to 9"),
    ({"class_label": None, "prompt": 3}, "prompt", "give a text of valid Unicode"),
    ({"negative_prompt": "a"}, "negative_prompt", "draws classes, not texts"),
    ({"n": 0}, "n", "give a whole number from 1 to 4"),
    ({"n": 5}, "n", "from 1 to 4"),
    ({"n": "2"}, "n", "from 1 to 4"),
    ({"size": "8x8"}, "size", "draws '32x16' alone, width and height"),
    ({"size": 16}, "size", "draws '32x16'"),
    ({"response_format": "url"}, "response_format", "use 'b64_json'"),
    ({"budget": 0}, "budget", "budget 0 is outside (0, 1]"),
    ({"budget": 1.5}, "budget", "is outside (0, 1]"),
    ({"budget": "a quarter"}, "budget", "give one such as 0.25, 1/4 or 25%"),
    ({"budget": float("nan")}, "budget", "budget nan is outside (0, 1]"),
    ({"budget": 0.01}, "budget", "the lowest here is 1/8"),
    ({"steps": 0}, "steps", "from 1 to 250"),
    ({"steps": 251}, "steps", "from 1 to 250"),
    ({"guidance": "cgf"}, "guidance", "did you mean 'cfg'?"),
    ({"guidance": ["cfg"]}, "guidance", "unknown guidance"),
    ({"guidance_scale": 3}, "guidance_scale", "without guidance it has no effect"),
    ({"guidance": "cfg", "guidance_scale": 1}, "guidance_scale", "there is no guidance"),
    ({"guidance": "cfg", "guidance_scale": -3}, "guidance_scale", "give a number above 0"),
    ({"guidance": "cfg", "guidance_scale": 1e9}, "guidance_scale", "at most 100"),
    ({"guidance": "cfg", "guide_budget": 0.5}, "guide_budget", "'ag' and 'ccfg' alone"),
    ({"guidance": "ag", "guide_budget": 1}, "guidance", "the guide has budget 1"),
    ({"guidance": "ccfg", "guide_budget": 0.5, "budget": 0.25}, "budget", "the guide has budget"),
    ({"seed": -1}, "seed", "give a whole number from 0"),
    ({"seed": 2**63 - 1, "n": 2}, "seed", "give a whole number from 0"),
    ({"seed": 1.5}, "seed", "give a whole number"),
    ({"max_ms": 0}, "max_ms", "give a number above 0"),
    ({"max_ms": 5, "budget": 1}, "budget", "max_ms chooses it"),
    ({"max_gflops": 5, "guidance": "cfg"}, "guidance", "max_gflops chooses it"),
    ({"max_gflops": 0.1}, "max_gflops", "cheapest point of the sweep takes 1 gflops"),
    ({"max_gflops": 5, "max_ms": 0.1}, "max_gflops", "takes 1 gflops and 10 ms"),
    ({"max_gflops": 5, "steps": 7}, "steps", "the sweep has points of 10, 20 steps"),
])  # fmt: skip
def test_a_wrong_field_is_refused_in_one_line(fields, param, words) -> None:
    with pytest.raises(RefusedError) as refused:
        ask(**fields)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300
    assert refused.value.param == param
    assert refused.value.status == (404 if param == "model" else 400)
    error = refused.value.to_dict()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"3", b'"a"', b"null", b"\xff\xfe", b'{"class_label": 1', b"[" * 30000,
    b'{"class_label": ' + b"1" * 5000 + b"}", b"\x00", b"n=1&class_label=2",
])  # fmt: skip
def test_a_body_that_is_no_object_is_refused(body) -> None:
    with pytest.raises(RefusedError, match=r"^the body is no JSON") as refused:
        parse(body, FACTS)
    assert refused.value.code == "invalid_json"


def test_a_lone_surrogate_is_no_text() -> None:
    with pytest.raises(RefusedError, match="valid Unicode"):
        parse(b'{"prompt": "\\ud800"}', FACTS)


@pytest.mark.parametrize(("fields", "way", "latents"), [
    ({}, WAY, 16),
    ({"budget": None, "size": "32x16", "model": "tiny"}, WAY, 16),
    ({"budget": 0.25}, WAY, 4),
    ({"steps": 3}, Way(3), 16),
    ({"guidance": "cfg"}, Way(10, "cfg", 2.0), 16),
    ({"guidance": "ccfg", "guidance_scale": 3}, Way(10, "ccfg", 3.0, 1), 16),
    ({"guidance": "ag", "guide_budget": 0.25}, Way(10, "ag", 2.0, 4), 16),
    ({"max_gflops": 100}, Way(20), 16),  # the best
    ({"max_gflops": 7}, Way(10), 8),
    ({"max_gflops": 100, "steps": 10}, Way(10, "ccfg", 3.0, 1), 16),
    ({"max_ms": 25}, Way(10), 8),
    ({"max_ms": 25, "max_gflops": 2}, Way(10), 4),
])  # fmt: skip
def test_fields_say_how_pictures_are_drawn(fields, way, latents) -> None:
    (one,) = ask(**fields)
    assert (one.way, one.latents, one.what) == (way, latents, 3)


def test_seeds_count_up_and_without_one_differ() -> None:
    assert [p.seed for p in ask(n=3, seed=7)] == [7, 8, 9]
    assert ask()[0].seed != ask()[0].seed
    (one,) = parse(b'{"prompt": "7"}', FACTS)  # as OpenAI's clients must
    assert one.what == 7


# ---- the queue ----


class FakeWorkers:
    """Keeps what is sent; answers when told. The clock goes by hand."""

    def __init__(self, target: float | None = None, most_waiting: int = 100):
        self.sent: list[tuple] = []
        self.now = 0.0
        self.queue = Dispatcher(
            lambda *batch: self.sent.append(batch), target, most_waiting, Metrics(),
            clock=lambda: self.now,
        )  # fmt: skip

    def answer(self, index: int = 0) -> None:
        number, asked, latents = self.sent.pop(index)
        drawn = [{"budget": n / 16, "gflops": 1.0, "seed": p.seed}
                 for p, n in zip(asked, latents, strict=True)]  # fmt: skip
        self.queue.answer(number, drawn)


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_before_a_worker_is_there_requests_are_told_to_wait() -> None:
    with pytest.raises(RefusedError, match="being loaded") as refused:
        FakeWorkers().queue.known()
    assert (refused.value.status, refused.value.retry_after) == (503, 5)


def test_what_waits_is_drawn_together_and_each_gets_its_own() -> None:
    async def go() -> None:
        workers = FakeWorkers()
        workers.queue.hello(0, FACTS)
        asked = [asyncio.ensure_future(workers.queue.draw([p])) for p in pictures(6)]
        await _settle()
        assert [len(batch[1]) for batch in workers.sent] == [4]  # one worker, batches of 4
        workers.now = 0.5
        workers.answer()
        await _settle()
        assert [len(batch[1]) for batch in workers.sent] == [2]
        workers.answer()
        drawn = [one for (one,) in await asyncio.gather(*asked)]
        assert [one["seed"] for one in drawn] == list(range(6))
        assert {one["ms"] for one in drawn} == {500.0}
        text = workers.queue.metrics.text().decode()
        assert 'elit_pictures_total{budget="1"} 6.0' in text
        assert "elit_waiting_pictures 0.0" in text
        assert "elit_running_pictures 0.0" in text

    asyncio.run(go())


def test_budgets_fall_while_many_wait_and_rise_again() -> None:
    async def go() -> None:
        workers = FakeWorkers(target=0.42)
        workers.queue.hello(0, FACTS)
        asked = [asyncio.ensure_future(workers.queue.draw([p])) for p in pictures(8)]
        ran = []
        while not all(future.done() for future in asked):
            await _settle()
            if workers.sent:
                ran.append(workers.sent[0][2])
                workers.now += 0.1
                workers.answer()
        alone = asyncio.ensure_future(workers.queue.draw(pictures(1)))
        while not workers.sent:  # a free worker waits a little for more
            await asyncio.sleep(0.001)
        assert ran[0] == [4, 4, 4, 4]
        assert workers.sent[0][2] == [16]
        workers.answer()
        await alone

    asyncio.run(go())


def test_what_would_be_late_is_refused_and_says_when_to_come_again() -> None:
    async def go() -> None:
        workers = FakeWorkers(target=0.1)
        workers.queue.hello(0, FACTS)
        accepted, refused = [], []
        for one in pictures(40):
            task = asyncio.ensure_future(workers.queue.draw([one]))
            await asyncio.sleep(0)
            (refused if task.done() else accepted).append(task)
        assert refused
        error = [task.exception() for task in refused][-1]
        assert (error.status, error.code, error.retry_after) == (429, "overloaded", 1)
        assert "even at the lowest budget" in str(error)
        while not all(task.done() for task in accepted):
            await _settle()
            if workers.sent:
                workers.answer()
        assert f"elit_shed_pictures_total {len(refused)}.0" in workers.queue.metrics.text().decode()

    asyncio.run(go())


def test_a_server_without_work_refuses_nothing() -> None:
    """Nor can times that were once learned too long keep it from drawing, and learning again."""

    async def go() -> None:
        workers = FakeWorkers(target=0.1, most_waiting=1)
        workers.queue.hello(0, FACTS)
        prices = workers.queue._control.prices
        prices.factor = 100.0
        for _ in range(40):
            asked = asyncio.ensure_future(workers.queue.draw(pictures(2)))
            while not workers.sent:
                await asyncio.sleep(0.001)
            assert not asked.done()
            workers.now += 0.03
            workers.answer()
            assert len(await asked) == 2
        assert prices.factor < 10

    asyncio.run(go())


def test_a_full_queue_refuses() -> None:
    async def go() -> None:
        workers = FakeWorkers(most_waiting=3)
        workers.queue.hello(0, FACTS)
        first = asyncio.ensure_future(workers.queue.draw(pictures(3)))
        await asyncio.sleep(0)
        with pytest.raises(
            RefusedError, match=r"^3 pictures in the queue already; ask again in"
        ) as full:
            await workers.queue.draw(pictures(1))
        assert full.value.status == 429
        await _settle()
        workers.answer()
        assert len(await first) == 3

    asyncio.run(go())


def test_a_client_that_leaves_takes_its_pictures_along() -> None:
    async def go() -> None:
        workers = FakeWorkers()
        workers.queue.hello(0, FACTS)
        begun = asyncio.ensure_future(workers.queue.draw(pictures(4)))
        await _settle()
        waits = asyncio.ensure_future(workers.queue.draw(pictures(4)))
        await _settle()
        for task in (begun, waits):
            task.cancel()
        await _settle()
        workers.answer()  # nobody wants it
        await _settle()
        assert workers.sent == []
        last = asyncio.ensure_future(workers.queue.draw(pictures(1)))
        await _settle()
        workers.answer()
        assert len(await last) == 1

    asyncio.run(go())


@pytest.mark.parametrize("began", [True, False])
def test_a_batch_of_a_worker_that_died_is_drawn_by_the_next(began) -> None:
    async def go() -> None:
        workers = FakeWorkers()
        workers.queue.hello(0, FACTS)
        workers.queue.hello(1, FACTS)
        asked = asyncio.ensure_future(workers.queue.draw(pictures(1)))
        await _settle()
        if began:
            workers.queue.began(workers.sent[0][0], 1)
            workers.queue.hello(0, FACTS)  # another one
            assert len(workers.sent) == 1
        workers.queue.hello(1, FACTS)
        assert workers.sent[0] == workers.sent[1]
        workers.answer()
        workers.answer()  # a second answer doesn't count
        assert len(await asked) == 1
        text = workers.queue.metrics.text().decode()
        assert f"elit_worker_restarts_total {1 + began}.0" in text
        assert 'elit_pictures_total{budget="1"} 1.0' in text

    asyncio.run(go())


def test_a_worker_that_comes_later_takes_no_batch_of_another() -> None:
    async def go() -> None:
        workers = FakeWorkers()
        workers.queue.hello(0, FACTS)
        asked = asyncio.ensure_future(workers.queue.draw(pictures(1)))
        await _settle()
        for later in range(1, MOST_TRIES + 2):  # before worker 0 says that it began
            workers.queue.hello(later, FACTS)
        assert len(workers.sent) == 1
        workers.answer()
        assert "error" not in (await asked)[0]

    asyncio.run(go())


def test_a_batch_that_kills_every_worker_is_given_up() -> None:
    async def go() -> None:
        workers = FakeWorkers()
        workers.queue.hello(0, FACTS)
        asked = asyncio.ensure_future(workers.queue.draw(pictures(1)))
        await _settle()
        for _ in range(MOST_TRIES):
            workers.queue.hello(0, FACTS)
        (one,) = await asked
        assert one["status"] == 500
        assert "died 3 times" in one["error"]

    asyncio.run(go())


# ---- the worker ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def open_run(run) -> ElitPipeline:
    pipeline = ElitPipeline.from_pretrained(run)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_facts_follow_the_sweep(run) -> None:
    pipeline = open_run(run)
    facts = find_facts(pipeline, Settings(str(run), batch_size=3))
    assert (facts.num_classes, facts.size, facts.max_latents) == (3, (8, 8), 16)
    assert (facts.way, facts.latents) == (Way(4), 16)  # the best row
    assert facts.ladder == [16, 4]  # 8 costs more than 4 and is worse
    assert len(facts.points) == 6
    assert all(0 <= one <= most for one, most in [*facts.calls.values(), facts.fixed])
    ccfg = find_facts(pipeline, Settings(str(run), guidance="ccfg", min_budget=0.5))
    assert (ccfg.way, ccfg.ladder) == (Way(4, "ccfg", 3.0, 1), [16, 8])
    assert facts.front == "the best of its sweep"
    assert (facts.lowest, ccfg.lowest) == (1, 8)
    (low,) = parse(b'{"class_label": 1, "budget": 0.0625}', facts)  # of no row of the sweep
    assert low.latents == low.latents_under(16, facts.ladder[-1]) == 1
    plain = find_facts(pipeline, Settings(str(run), steps=7, min_budget=0.2))
    assert (plain.way, plain.ladder, plain.latents) == (Way(7), [16, 8, 4, 3], 16)
    assert plain.front == "the defaults; its sweep has no such point"
    pipeline.scheduler = make_scheduler("euler")
    other = find_facts(pipeline, Settings(str(run)))
    assert other.front.startswith("the defaults; ")
    assert "was measured with FlowMatchUniformEulerScheduler, but" in other.front
    assert (other.way, other.points) == (Way(40), [])
    trained = tiny_elastic(in_channels=1, min_latents=2)
    pipeline = ElitPipeline(trained, FlowMatchUniformEulerScheduler())
    with pytest.raises(ValueError, match=r"^--min-budget 0.01 .* trained with 2 or more$"):
        find_facts(pipeline, Settings("nowhere", min_budget=0.01))


def test_a_plain_model_has_no_ladder() -> None:
    pipeline = ElitPipeline(tiny_dit(in_channels=1), FlowMatchUniformEulerScheduler())
    pipeline.set_progress_bar_config(disable=True)
    facts = find_facts(pipeline, Settings("nowhere", batch_size=2))
    assert (facts.ladder, facts.latents, facts.max_latents) == ([0], 0, 0)
    (one,) = Worker(pipeline).draw(parse(b'{"class_label": 1, "budget": 1}', facts), [0])
    assert (one["budget"], one["num_latents"]) == (1.0, None)
    with pytest.raises(RefusedError, match="not elastic"):
        parse(b'{"class_label": 1, "budget": 0.5}', facts)
    with pytest.raises(RefusedError, match="not elastic"):
        parse(b'{"class_label": 1, "guidance": "ccfg"}', facts)


def image_of(one: dict) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))


def differ(a: Image.Image, b: Image.Image) -> int:
    assert (a.size, a.mode) == (b.size, b.mode)
    return max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True))


def test_a_picture_of_a_mixed_batch_is_the_picture_alone(run) -> None:
    pipeline = open_run(run)
    way = Way(3, "ccfg", 2.0, 1)
    asked = [Picture(i % 3, 10 + i, way, 16) for i in range(6)]
    latents = [16, 4, 1, 16, 4, 7]
    for one, picture, kept in zip(Worker(pipeline).draw(asked, latents), asked, latents,
                                  strict=True):  # fmt: skip
        assert (one["seed"], one["num_latents"]) == (picture.seed, kept)
        (alone,) = draw_batch(pipeline, [picture.what], [picture.seed], budget=kept / 16,
                              num_inference_steps=3, guidance=way_guidance(way))  # fmt: skip
        assert differ(image_of(one), alone) <= 1
        calls = pipeline.calls(kept / 16, 3, way_guidance(way))
        cost = pipeline.forward_cost()
        flops = sum(cost.flops(n) * times for call in calls for n, times in call)
        assert one["gflops"] == pytest.approx(flops / 1e9)


def way_guidance(way: Way):
    from elit import CheapCFG

    return CheapCFG(way.scale, way.guide_latents / 16)


def test_one_bad_picture_spoils_no_other(run) -> None:
    asked = [Picture(what, 0, Way(2), 16) for what in (1, 99, 2)]
    good, bad, other = Worker(open_run(run)).draw(asked, [16, 16, 16])
    assert "b64_json" in good
    assert "b64_json" in other
    assert (bad["status"], "class label 99" in bad["error"]) == (400, True)


def test_texts_at_budgets_of_their_own_and_negative_ones(tmp_path) -> None:
    model = randomise(create_model("elit-mmdit-tiny/2", 16, in_channels=3), std=0.05)
    pipeline = ElitTextPipeline(model, FlowMatchUniformEulerScheduler())
    pipeline.set_progress_bar_config(disable=True)
    facts = find_facts(pipeline, Settings("nowhere", batch_size=2))
    body = b'{"prompt": "a red disc", "seed": 1, "steps": 2, "guidance": "ccfg"}'
    (plain,) = parse(body, facts)
    (negative,) = parse(body[:-1] + b', "negative_prompt": "a blue square"}', facts)
    longer = Picture("a large green triangle below a small red square", 2, plain.way, 4)
    asked = [plain, negative, longer]
    drawn = Worker(pipeline).draw(asked, [4, 16, 4])
    for one, picture, kept in zip(drawn, asked, [4, 16, 4], strict=True):
        (alone,) = Worker(pipeline).draw([picture], [kept])
        assert differ(image_of(one), image_of(alone)) <= 1
    assert differ(image_of(drawn[0]), image_of(drawn[1])) > 1
    too_long = Picture("a red disc " * 200, 0, plain.way, 16)
    good, bad = Worker(pipeline).draw([plain, too_long], [16, 16])
    assert ("b64_json" in good, bad["status"]) == (True, 400)
    for wrong, words in (
        (b"{}", "needs a prompt"),
        (b'{"class_label": 1}', "this model draws texts"),
        (b'{"prompt": "a", "negative_prompt": "b"}', "no guide reads it"),
    ):
        with pytest.raises(RefusedError, match=words):
            parse(wrong, facts)


# ---- a real server ----


def test_a_server_from_start_to_end(run) -> None:
    with Server(run, "--batch-size", 4, "--p95-ms", 60000) as server:
        assert server.lines[0].endswith("serves tiny: classes 0 to 2, 8x8 pixels, on cpu")
        assert server.lines[1].endswith("1, 4 steps, guidance none (the best of its sweep)")
        assert server.lines[2] == "p95 of 60000 ms, by budgets 1 1/4"
        status, answer = server.ask(class_label=2, seed=5, n=3, budget=0.25, steps=2)
        assert status == 200
        assert [one["seed"] for one in answer["data"]] == [5, 6, 7]
        for one in answer["data"]:
            assert (one["budget"], one["num_latents"], one["steps"]) == (0.25, 4, 2)
            assert one["ms"] > 0
            (alone,) = draw_batch(open_run(run), [2], [one["seed"]], budget=0.25,
                                  num_inference_steps=2)  # fmt: skip
            assert differ(image_of(one), alone) <= 1
        status, answer = server.ask(class_label=2, budgt=1)
        assert (status, answer["error"]["code"]) == (400, "unknown_field")
        assert server.request("POST", server.path, b" " * (MAX_BODY + 1))[0] == 413
        assert server.request("GET", "/nowhere")[1]["error"]["message"] == "Not Found"
        assert server.request("GET", server.path)[0] == 405
        assert server.request("GET", "/health") == (200, "ok")
        models = server.request("GET", "/v1/models")[1]
        assert models["data"][0]["id"] == "tiny"
        metrics = server.request("GET", "/metrics")[1]
        assert 'elit_pictures_total{budget="0.25"} 3.0' in metrics
        assert 'elit_requests_total{status="413"} 1.0' in metrics
        assert server.stop() == 0


@pytest.mark.parametrize(("line", "words"), [
    (["nowhere"], "nowhere"),
    (["RUN", "--p95-ms", "0"], "--p95-ms 0 is not allowed; give a positive number"),
    (["RUN", "--scale", "2"], "--scale has no effect without guidance"),
    (["RUN", "--guidance", "cfg", "--scale", "1"], "has no effect at --scale 1"),
    (["RUN", "--guide-budget", "0.5"], "--guide-budget has no effect without guidance"),
    (["RUN", "--port", "80"], "at least 1024"),
    (["RUN", "--min-budget", "0"], "budget '0' is outside (0, 1]"),
    (["RUN", "--device", "tpu"], "device 'tpu' is unknown; use auto, cpu, cuda, cuda:1 or mps"),
    pytest.param(
        ["RUN", "--device", "mps"], "device 'mps' is not usable: there is none; use auto or cpu",
        marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one"),
    ),
])  # fmt: skip
def test_wrong_lines_are_told_in_one(run, capsys, line, words) -> None:
    from elit.cli.main import main

    assert main(["serve", *(str(run) if word == "RUN" else word for word in line)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err


# ---- slow: what a server bears ----


def random_body(draw: random.Random) -> bytes:
    """A request that may be right, wrong in a field, or no JSON at all."""
    fields = {"class_label": draw.randrange(3), "seed": draw.randrange(50), "steps": 1}
    for _ in range(draw.choice((0, 0, 1, 2))):
        fields |= draw.choice((
            {"budget": draw.choice((1, 0.5, 0.25, 1 / 16))}, {"n": draw.randint(1, 4)},
            {"guidance": "ccfg", "guidance_scale": draw.uniform(0.1, 100)}, {"size": "8x8"},
            {"guidance": draw.choice(("cfg", "ag", "none"))}, {"max_gflops": draw.uniform(0, 2)},
        ))  # fmt: skip
    wrong = (-1, 0, 2**70, 1e400, float("nan"), "", "a" * 5000, [], {}, [[]] * 9, True, "\ud800")
    if draw.random() < 0.5:
        fields[draw.choice([*FIELDS, "x", ""])] = draw.choice(wrong)
    body = json.dumps(fields).encode()
    if draw.random() < 0.2:
        body = body[: draw.randrange(len(body))]
    if draw.random() < 0.1:
        body = draw.randbytes(draw.choice((1, 100, 70_000)))
    return body


def random_client(server: Server, draw: random.Random, taken: list) -> None:
    """One request: whole, cut off, too slow to wait for, or not HTTP at all."""
    body, kind = random_body(draw), draw.random()
    if kind < 0.8:
        status, answer = server.request("POST", server.path, body)
        taken.append((status, body, answer))
        return
    head = f"POST {server.path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        if kind < 0.9:
            client.sendall(head.encode() + body)  # and leaves before the answer
        elif kind < 0.95:
            client.sendall(head.encode() + body[: len(body) // 2])
        else:
            client.sendall(draw.choice((b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01", b"\r\n" * 9)))


def memory_and_files(server: Server) -> tuple[int, int]:
    """Resident bytes and open files of all its processes."""
    processes = [psutil.Process(pid) for pid in [server.process.pid, *server.children()]]
    memory = sum(process.memory_info().rss for process in processes)
    return memory, sum(process.num_fds() for process in processes)


@pytest.mark.slow
def test_ten_thousand_random_requests(run) -> None:
    with Server(run, "--batch-size", 4, "--queue", 64) as server:
        before, taken = None, []
        for chunk in range(10):
            with ThreadPoolExecutor(16) as pool:
                for i in range(1000):
                    draw = random.Random(1000 * chunk + i)
                    pool.submit(random_client, server, draw, taken).add_done_callback(
                        lambda done: done.result()
                    )
            if chunk == 1:  # warm
                before = memory_and_files(server)
        after = memory_and_files(server)
        text = server.request("GET", "/metrics")[1]
        assert "elit_waiting_pictures 0.0" in text
        assert not re.search(r'elit_requests_total{status="5', text)
        assert "elit_worker_restarts_total 0.0" in text
        statuses = Counter(status for status, *_ in taken)
        assert set(statuses) <= {200, 400, 404, 413, 429}, statuses
        assert statuses[200] > 1000
        for status, _, answer in taken:
            if status != 200:
                assert "\n" not in answer["error"]["message"]
        assert after[0] < before[0] + 50 * 2**20, (before, after)
        assert after[1] <= before[1] + 5, (before, after)
        print(statuses, before, after)
        assert server.stop() == 0
    pipeline, drawn = open_run(run), {}
    facts = find_facts(pipeline, Settings(str(run), batch_size=4))
    for picture, one in (
        (picture, one)
        for status, body, answer in taken
        if status == 200 and b"seed" in body
        for picture, one in zip(parse(body, facts), answer["data"], strict=True)
    ):
        assert (one["seed"], one["num_latents"]) == (picture.seed, picture.latents)
        key = picture.what, picture.seed, picture.way, picture.latents
        if key not in drawn:
            (drawn[key],) = draw_mixed(pipeline, [picture], [picture.latents])
        assert differ(image_of(one), drawn[key]) <= 1, key


@pytest.mark.slow
def test_a_stop_while_it_loads(run) -> None:
    server = Server(run)
    while not server.children() or not server.workers():
        time.sleep(0.01)
    assert server.stop() == 130
    assert server.process.stdout.read() == ""
    first, last = "".join(server.errors).splitlines()
    assert first.startswith("elit: loading ")
    assert last == "elit: interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["the main process", "the whole group", "Ctrl-C"])
def test_a_stop_under_load_loses_no_accepted_request(run, to) -> None:
    with Server(run, "--batch-size", 2) as server, ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(server.ask, class_label=1, seed=i, steps=100) for i in range(40)]
        done = inside = 0.0
        while done + inside < 40:
            inside = server.metric("elit_waiting_pictures") + server.metric("elit_running_pictures")
            done = server.metric("elit_pictures_total")
        assert inside > 5, "too fast for this test"
        if to == "the main process":
            server.process.terminate()
        else:
            number = signal.SIGINT if to == "Ctrl-C" else signal.SIGTERM
            os.killpg(server.process.pid, number)
        while server.takes_connections():  # refused at once, not when the last is answered
            pass
        assert not all(future.done() for future in asked)
        code = server.process.wait(60)
        answers = [future.result() for future in asked]
        assert [status for status, _ in answers] == [200] * 40
        assert [answer["data"][0]["seed"] for _, answer in answers] == list(range(40))
        assert code == 0, server.errors


@pytest.mark.slow
def test_a_killed_worker_comes_back_and_loses_nothing(run) -> None:
    with Server(run, "--batch-size", 2) as server, ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(server.ask, class_label=1, seed=i, steps=100) for i in range(20)]
        time.sleep(0.5)
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        assert [future.result()[0] for future in asked] == [200] * 20
        os.kill(server.workers()[0], signal.SIGKILL)  # idle: the next request finds none
        assert server.ask(class_label=1)[0] == 200
        assert "elit_worker_restarts_total 2.0" in server.request("GET", "/metrics")[1]
        assert server.stop() == 0


@pytest.mark.slow
def test_what_only_the_worker_finds_is_one_line_too(run, tmp_path) -> None:
    damaged = Path(shutil.copytree(run, tmp_path / "damaged"))
    (damaged / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    server = Server(damaged)
    with pytest.raises(RuntimeError) as failed:
        server.__enter__()
    assert server.process.returncode == 2
    first, line = str(failed.value).splitlines()
    assert first.startswith("elit: loading ")
    assert line.startswith("elit: error: ")
    assert "damaged" in line


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["the first", "the one that answers"])
def test_a_killed_server_leaves_no_process_behind(run, killed) -> None:
    with Server(run) as server:
        children = server.children()
        if killed == "the first":
            server.process.kill()
        else:
            os.kill(server.answering(), signal.SIGKILL)
        assert server.process.wait(30) == (-9 if killed == "the first" else 2)
        until = time.monotonic() + 20
        while any(psutil.pid_exists(pid) for pid in children) and time.monotonic() < until:
            time.sleep(0.2)
        assert not [pid for pid in children if psutil.pid_exists(pid)]
