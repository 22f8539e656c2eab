"""Throughput of a batch of mixed budgets, and of guided steps whose guide shares head and tail.

    python benchmarks/mixed_batches.py --model elit-dit-tiny/2 --batch-size 8
    python benchmarks/mixed_batches.py --model elit-dit-b/2 --batch-size 8 --rounds 5

The same requests, a budget for each in turn, are answered in three ways: one mixed forward, one
forward for each budget, one forward for each request. Then one guided step: CFG in one doubled
batch, CheapCFG in two forwards, CheapCFG in one mixed forward. Every round times all of them once,
in an order drawn anew; the table has medians and what they are of the first row of their kind.
"""

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable

import torch

from elit import CFG, CheapCFG, create_model
from elit.cost.flops import cost_of
from elit.models.elastic import ElasticMixin
from elit.models.presets import preset_inputs

Ways = dict[str, tuple[Callable[[], object], float]]  # what to time, and its GFLOPs


def make(name: str, device: torch.device) -> ElasticMixin:
    """A model whose weights are no zeros."""
    torch.manual_seed(0)
    model = create_model(name, min(preset_inputs(name)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval().to(device)


def requests(model: ElasticMixin, budgets: list[float], count: int) -> Ways:
    """Ways to answer requests of mixed budgets."""
    device = model.device
    x = torch.randn(count, model.in_channels, *model.sample_size, device=device)
    level = torch.full((count,), 0.5, device=device)
    condition = {name: v.to(device) for name, v in model.example_condition(count).items()}
    kept = [model.resolve_budget(budgets[i % len(budgets)]) for i in range(count)]

    def call(rows: list[int], num_latents: int | list[int]) -> None:
        part = {name: value[rows] for name, value in condition.items()}
        model(x[rows], level[rows], **part, num_latents=num_latents)

    def by_budget() -> None:
        for n in dict.fromkeys(kept):
            call([i for i in range(count) if kept[i] == n], n)

    def one_by_one() -> None:
        for i in range(count):
            call([i], kept[i])

    gflops = sum(cost_of(model).flops(n) for n in kept) / 1e9
    everyone = list(range(count))
    return {
        "a forward for each budget": (by_budget, gflops),
        "one mixed forward": (lambda: call(everyone, kept), gflops),
        "a forward for each request": (one_by_one, gflops),
    }


def guided(model: ElasticMixin, count: int) -> Ways:
    """Guided steps."""
    device = model.device
    x = torch.randn(count, model.in_channels, *model.sample_size, device=device)
    condition = {name: v.to(device) for name, v in model.example_condition(count).items()}
    null = {name: torch.zeros_like(value) for name, value in condition.items()}
    full, low, flops = model.max_latents, model.min_latents, cost_of(model).flops

    def predict(x: torch.Tensor, sigma: float, given: dict, num_latents: object) -> torch.Tensor:
        level = torch.full((len(x),), sigma, device=device)
        return model(x, level, **given, num_latents=num_latents, return_dict=False)[0]

    def step(guidance: object, guide: int, mixes: bool) -> Callable[[], object]:
        return lambda: guidance.velocity(predict, x, 0.5, condition, null, full, guide, mixes)

    both = count * (flops(full) + flops(low)) / 1e9
    return {
        "CFG": (step(CFG(3.0), full, False), 2 * count * flops(full) / 1e9),
        "CheapCFG, two forwards": (step(CheapCFG(3.0), low, False), both),
        "CheapCFG, one mixed forward": (step(CheapCFG(3.0), low, True), both),
    }


def measure(ways: Ways, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for call, _ in ways.values():
            call()
        for _ in range(rounds):
            for name in random.sample(list(ways), len(ways)):
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                started = time.perf_counter()
                ways[name][0]()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="elit-dit-tiny/2", help="name of an elastic preset")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--budgets", type=float, nargs="+", default=[1, 1 / 2, 1 / 4, 1 / 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    model = make(args.model, device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{args.model}, {where}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for count in args.batch_size:
        for ways in (requests(model, args.budgets, count), guided(model, count)):
            times = measure(ways, args.rounds, device)
            first = next(iter(times.values()))
            titles = f"{'ms':>10}{'images/s':>10}{'time':>8}{'GFLOPs':>10}"
            print(f"\n{'batch of ' + str(count):30}{titles}")
            for name, (_, gflops) in ways.items():
                took = times[name]
                cells = f"{1000 * took:10.1f}{count / took:10.1f}{took / first:8.2f}{gflops:10.2f}"
                print(f"{name:30}{cells}")


if __name__ == "__main__":
    main()
