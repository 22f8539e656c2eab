"""elit serve: what does holding a latency by budget bring, and what does it cost?

    elit quickstart && elit sweep runs/quickstart
    python benchmarks/serving.py runs/quickstart
    python benchmarks/serving.py runs/quickstart --guidance cfg --scale 1.5 --requests 200

Requests for full budget: a burst all at once, a closed loop in which as many
clients ask again and again, and an open loop (Poisson) at a rate that full budget can't keep up
with. The target is half of what the 95th percentile is without one. Say on how idle a machine.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from elit.choosing.sweep_file import SWEEP_FILE, read_sweep

HEADER = (
    "| load | control | p50, ms | p95, ms | within | refused | mean budget | images/s | score |"
)


def start(args: argparse.Namespace, *flags: str) -> subprocess.Popen:
    """A server that answers."""
    names = ("port", "steps", "guidance", "scale", "batch_size")
    given = {name: x for name in names if (x := getattr(args, name)) is not None}
    flags += tuple(part for k, x in given.items() for part in (f"--{k.replace('_', '-')}", f"{x}"))
    server = subprocess.Popen(
        [sys.executable, "-m", "elit", "serve", args.run, *flags],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for text in server.stdout:
        if text.startswith("curl"):
            return server
    raise SystemExit(server.wait())


def stop(server: subprocess.Popen) -> None:
    """In order."""
    server.send_signal(signal.SIGTERM)
    server.wait()


async def ask(port: int, seed: int) -> tuple[int, float, float]:
    """Status, milliseconds and budget of a request."""
    started = time.perf_counter()
    body = json.dumps({"class_label": seed % 10, "seed": seed, "budget": 1}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    took = 1000 * (time.perf_counter() - started)
    status = int(answer.split()[1])
    if status != 200:
        return status, took, 0.0
    (one,) = json.loads(answer.partition(b"\r\n\r\n")[2])["data"]
    base64.b64decode(one["b64_json"], validate=True)
    return status, took, one["budget"]


async def burst(port: int, count: int, rate: float) -> list:
    """All at once."""
    del rate
    return await asyncio.gather(*(ask(port, i) for i in range(count)))


async def closed(port: int, count: int, rate: float) -> list:
    """Clients that ask three times each, one request after the other."""
    del rate

    async def client(number: int) -> list:
        return [await ask(port, 3 * number + i) for i in range(3)]

    return [one for some in await asyncio.gather(*map(client, range(count))) for one in some]


async def poisson(port: int, count: int, rate: float) -> list:
    """At random times, whether or not those before are answered."""
    draw, asked = random.Random(0), []
    for i in range(10 * count):
        asked.append(asyncio.ensure_future(ask(port, i)))
        await asyncio.sleep(draw.expovariate(rate))
    return await asyncio.gather(*asked)


LOADS = {"burst": burst, "closed": closed, "Poisson": poisson}


def quantile(values: list[float], share: float) -> float:
    """The least value that so great a share is at or below."""
    return sorted(values)[max(0, -(-int(1000 * share) * len(values) // 1000) - 1)]


def measure(load: str, port: int, count: int, rate: float) -> dict:
    """Milliseconds and budgets of those that were answered, how many were not, images/s."""
    started = time.perf_counter()
    answers = asyncio.run(LOADS[load](port, count, rate))
    seconds = time.perf_counter() - started
    done = [(ms, budget) for status, ms, budget in answers if status == 200]
    assert {status for status, *_ in answers} <= {200, 429}
    return {
        "ms": [ms for ms, _ in done], "budgets": [budget for _, budget in done],
        "asked": len(answers), "rate": len(done) / seconds,
    }  # fmt: skip


def row(load: str, control: str, found: dict, target: float, scores: dict[float, float]) -> str:
    """Of the table; a refused request is not within the target."""
    ms, budgets = found["ms"], found["budgets"]
    score = statistics.mean(scores[budget] for budget in budgets) if scores else float("nan")
    return (
        f"| {load} | {control} | {quantile(ms, 0.5):.0f} | {quantile(ms, 0.95):.0f} "
        f"| {sum(x <= target for x in ms) / len(ms):.1%} "
        f"| {found['asked'] - len(ms)} of {found['asked']} "
        f"| {statistics.mean(budgets):.3f} | {found['rate']:.1f} | {score:.3f} |"
    )


def main() -> None:
    """Serve, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a swept run")
    parser.add_argument("--steps", type=int, default=32, help="of the sampler (default: 32)")
    parser.add_argument("--guidance", default="none", help="none, cfg, ... (default: none)")
    parser.add_argument("--scale", type=float, help="of the guidance (default: the sweep's best)")
    parser.add_argument("--requests", type=int, default=64, help="at once (default: 64)")
    parser.add_argument("--batch-size", type=int, default=32, help="at a time (default: 32)")
    parser.add_argument("--share", type=float, default=0.5, help="target / p95 (default: 0.5)")
    parser.add_argument("--load", type=float, default=1.5, help="Poisson / capacity (default: 1.5)")
    parser.add_argument("--port", type=int, default=8765, help="of the server (default: 8765)")
    args = parser.parse_args()

    report = read_sweep(Path(args.run) / SWEEP_FILE)
    scores = {
        row["budget"]: row["scores"][report["ranked_by"]]
        for row in report["rows"]
        if (row["steps"], row["guidance"]) == (args.steps, args.guidance)
        and args.scale in (None, row["scale"])
    }
    found, budgets = {}, []
    server = start(args)
    measure("burst", args.port, args.requests, 0)  # warm
    for load in LOADS:
        rate = args.load * found["burst"]["rate"] if found else 0.0
        found[load] = measure(load, args.port, args.requests, rate)
    stop(server)
    targets = {load: args.share * quantile(one["ms"], 0.95) for load, one in found.items()}
    guide = args.guidance if args.scale is None else f"{args.guidance} {args.scale:g}"
    print(
        f"{args.steps} steps, guidance {guide}, batches of {args.batch_size}, {args.requests} "
        f"clients, Poisson at {args.load:g} of full budget's capacity\n\n{HEADER}"
    )
    print(f"|{' --- |' * 9}")
    for load, target in targets.items():
        rate = args.load * found["burst"]["rate"]
        server = start(args, "--p95-ms", f"{target:.0f}")
        measure("burst", args.port, args.batch_size, 0)  # warm
        controlled = measure(load, args.port, args.requests, rate)
        stop(server)
        print(row(load, "none", found[load], target, scores))
        print(row(load, f"p95 {target:.0f} ms", controlled, target, scores), flush=True)
        budgets.append(controlled["budgets"])
    for load, some in zip(targets, budgets, strict=True):
        counts = {f"{budget:g}": some.count(budget) for budget in sorted(set(some), reverse=True)}
        print(f"\n{load}: pictures at each budget {re.sub(r'[{}]', '', str(counts))}")
    print(f"\n{report['ranked_by']} at each budget: {scores}")


if __name__ == "__main__":
    main()
