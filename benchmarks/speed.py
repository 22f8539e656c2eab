"""Time of an elastic model over the plain one's, beside the ratio of their FLOPs.

    python benchmarks/speed.py --model dit-b/2 --batch-size 4
    python benchmarks/speed.py --model dit-s/2 --batch-size 8 --train
    python benchmarks/speed.py --model dit-b/2 --batch-size 1 4 16 --parts
    python benchmarks/speed.py --model sit-b/2 --batch-size 4 --head 4

Every round times each budget beside a call of the plain model, in an order drawn anew. The table
shows the medians of the ratios of neighbours, so that a noisy machine slows both sides alike.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable

import torch

from elit import create_model
from elit.cost.flops import cost_of
from elit.models.elastic import ElasticMixin
from elit.models.presets import preset_inputs


def randomised(model: ElasticMixin) -> ElasticMixin:
    """Weights without zeros: a multiplication by zero may be quicker than another."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def elastic_model(args: argparse.Namespace) -> ElasticMixin:
    """The elastic preset, with another split where asked for."""
    changes = {} if args.head is None else {"head": args.head}
    return create_model(f"elit-{args.model}", args.resolution, **changes)


def condition_of(model: ElasticMixin, batch_size: int, device: torch.device) -> dict:
    """What to draw; a text with its mask, as pipelines and training give it."""
    condition = model.example_condition(batch_size)
    if model.takes_text:
        mask = torch.ones(condition["encoder_hidden_states"].shape[:2], dtype=torch.bool)
        condition["encoder_attention_mask"] = mask
    return {name: value.to(device) for name, value in condition.items()}


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_call(
    model: ElasticMixin, inputs: tuple, condition: dict, num_latents: int | None, train: bool
) -> None:
    """A forward, or a forward and a backward."""
    kwargs = condition if num_latents is None else condition | {"num_latents": num_latents}
    if train:
        model.zero_grad(set_to_none=True)
        model(*inputs, **kwargs).sample.square().mean().backward()
    else:
        with torch.inference_mode():
            model(*inputs, **kwargs)


def timed(call: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def compare(args: argparse.Namespace, batch_size: int, device: torch.device) -> list[dict]:
    """Rows of the table: one for each budget."""
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    plain = randomised(create_model(args.model, args.resolution)).to(device).to(dtype)
    elastic = randomised(elastic_model(args)).to(device).to(dtype)
    sample = torch.randn(batch_size, plain.in_channels, *plain.sample_size)
    inputs = (sample.to(device, dtype), torch.rand(batch_size).to(device))
    condition = condition_of(plain, batch_size, device)

    kept = [elastic.resolve_budget(budget) for budget in args.budgets]

    def seconds_of(model: ElasticMixin, num_latents: int | None) -> float:
        return timed(lambda: one_call(model, inputs, condition, num_latents, args.train), device)

    for n in kept:  # warm up
        seconds_of(plain, None)
        seconds_of(elastic, n)
    pairs: dict[int | None, list[tuple[float, float]]] = {n: [] for n in kept}
    for _ in range(args.rounds):
        for n in random.sample(kept, len(kept)):
            plain_first = random.random() < 0.5
            first = seconds_of(plain, None) if plain_first else 0.0
            seconds = seconds_of(elastic, n)
            pairs[n].append((seconds, first if plain_first else seconds_of(plain, None)))

    flops, plain_flops = cost_of(elastic).flops, cost_of(plain).flops()
    fastest_plain = min(beside for timings in pairs.values() for _, beside in timings)
    rows = []
    for n in kept:
        time_ratio = statistics.median(seconds / beside for seconds, beside in pairs[n])
        flops_ratio = flops(n) / plain_flops
        rows.append(
            {
                "batch_size": batch_size,
                "budget": elastic.budget_of(n),
                "num_latents": n,
                "ms": 1000 * statistics.median(seconds for seconds, _ in pairs[n]),
                "time_ratio": time_ratio,
                "flops_ratio": flops_ratio,
                "overhead": time_ratio / flops_ratio,
                # Of the least times: what the machine can do when nobody else uses it.
                "overhead_of_minima": min(pairs[n])[0] / fastest_plain / flops_ratio,
            }
        )
    return rows


def shares(args: argparse.Namespace, batch_size: int, device: torch.device) -> dict[str, float]:
    """Shares of Read and Write in the time of a forward at full budget."""
    model = randomised(elastic_model(args)).to(device)
    sample = torch.randn(batch_size, model.in_channels, *model.sample_size, device=device)
    inputs = (sample, torch.rand(batch_size, device=device))
    condition = condition_of(model, batch_size, device)
    spent: dict[str, float] = {}
    begun: dict[str, float] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        def before(*_: object) -> None:
            synchronize(device)
            begun[name] = time.perf_counter()

        def after(*_: object) -> None:
            synchronize(device)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - begun[name]

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    one_call(model, inputs, condition, None, False)
    for name in ("read", "write"):
        watch(name, getattr(model, name))
    watch("all", model)
    for _ in range(args.rounds):
        one_call(model, inputs, condition, None, False)
    return {name: spent[name] / spent["all"] for name in ("read", "write")}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dit-b/2", help="name of a plain preset")
    parser.add_argument("--resolution", type=int, help="pixels (default: the preset's lowest)")
    parser.add_argument("--head", type=int, help="blocks before Read (default: the preset's)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[4])
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--parts", action="store_true", help="shares of Read and Write instead")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.resolution = args.resolution or min(preset_inputs(args.model))
    device = torch.device(args.device)
    if args.parts and (args.train or args.dtype != "fp32"):
        parser.error("--parts knows fp32 forwards alone; leave out --train and --dtype")

    if args.parts:
        rows = [{"batch_size": b, **shares(args, b, device)} for b in args.batch_size]
    else:
        rows = [row for b in args.batch_size for row in compare(args, b, device)]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    head = "" if args.head is None else f", head {args.head}"
    kind = "forward and backward" if args.train else "forward"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{args.model} at {args.resolution} px{head}, {kind}, {args.dtype}, {where},", end=" ")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("  ".join(f"{name:>18}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>18.4g}" for value in row.values()))


if __name__ == "__main__":
    main()
