"""For the tests of `elit serve`: a small run with a sweep, made-up facts, a server."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
from helpers import tiny_elastic
from sweeps import sweep_report

from elit import ElitPipeline
from elit.choosing.points import OperatingPoint
from elit.flow.schedulers import FlowMatchUniformEulerScheduler
from elit.pipelines.folder import weights_digest
from elit.serving.control import Way
from elit.serving.facts import Facts, Point

WAY = Way(10)
FACTS = Facts(
    name="tiny",
    num_classes=10,
    labels={},
    max_latents=16,
    min_latents=1,
    lowest=2,
    size=(32, 16),
    way=WAY,
    latents=16,
    ladder=[16, 8, 4, 2],
    points=[
        Point(Way(10), 4, 1.0, 10.0, badness=3.0),
        Point(Way(10), 8, 5.0, 20.0, badness=2.0),
        Point(Way(10, "ccfg", 3.0, 1), 16, 8.0, 30.0, badness=1.5),
        Point(Way(20), 16, 10.0, 40.0, badness=1.0),
        Point(Way(20, "cfg", 3.0), 16, 20.0, 80.0, badness=1.0),  # as good, and dearer
    ],
    calls={n: (n / 1000, 4 * n / 1000) for n in (1, 4, 16)},
    fixed=(0.004, 0.004),
    calls_per_step=1.0,
    batch_size=4,
    device="cpu",
    front="made up",
)


def small_run(folder: Path) -> Path:
    """A pipeline of random weights of 8x8 pixels, and a sweep of it."""
    pipeline = ElitPipeline(tiny_elastic(in_channels=1), FlowMatchUniformEulerScheduler())
    pipeline.save_pretrained(folder)
    scores = {1.0: 1.0, 0.5: 3.0, 0.25: 2.0}  # half is worse than a quarter: not on the front
    rows = []
    for guide in (("none",), ("ccfg", 3.0, 1 / 16)):
        for budget, score in scores.items():
            point = OperatingPoint(budget, 4, *guide)
            score += guide != ("none",)
            rows.append({**point.to_dict(), "gflops_per_image": budget, "scores": {"fd": score}})
    report = sweep_report(scores=("fd",))
    report |= {"model": {"weights": weights_digest(folder)}, "rows": rows}
    report["settings"] |= {"sampler": "FlowMatchUniformEulerScheduler", "size": [8, 8]}
    (folder / "swept").mkdir()
    (folder / "swept" / "sweep.json").write_text(json.dumps(report))
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`elit serve` in a process of its own."""

    path = "/v1/images/generations"

    def __init__(self, run: Path, *flags: Any):
        self.port = free_port()
        line = ["serve", run, "--port", self.port, "--device", "cpu", *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "elit", *map(str, line)], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.errors: list[str] = []
        threading.Thread(target=self._read_errors, daemon=True).start()

    def _read_errors(self) -> None:
        self.errors.extend(self.process.stderr)

    def __enter__(self) -> "Server":
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("curl"):
                return self
        self.process.wait(10)
        raise RuntimeError("".join(self.errors))

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def request(self, method: str, path: str, body: bytes | None = None, timeout: float = 60):
        """Status, and the answer: of JSON, or a text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        is_json = response.headers.get("Content-Type") == "application/json"
        return response.status, json.loads(text) if is_json else text.decode()

    def ask(self, **fields: Any):
        return self.request("POST", self.path, json.dumps(fields).encode())

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def metric(self, name: str) -> float:
        """Sum over its labels of a number at /metrics."""
        text = self.request("GET", "/metrics")[1]
        return sum(float(x) for x in re.findall(rf"(?m)^{name}(?:{{.*}})? (\S+)$", text))

    def children(self) -> list[int]:
        """All its processes but the first."""
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]

    def workers(self) -> list[int]:
        """Those that draw."""
        processes = map(psutil.Process, self.children())
        return [p.pid for p in processes if any("spawn_main" in word for word in p.cmdline())]

    def answering(self) -> int:
        """The one that listens."""
        for pid in self.children():
            if any(c.status == "LISTEN" for c in psutil.Process(pid).net_connections("tcp")):
                return pid
        raise AssertionError("none listens")

    def takes_connections(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except ConnectionRefusedError:
            return False
        except ConnectionResetError:  # it closes right now
            return True
        return True
