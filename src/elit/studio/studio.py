"""What the studio's page shows of a request: pictures, what they cost, what full budget gives."""

import base64
import io
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from elit._choices import check_choice, label_of
from elit._numbers import check_whole, is_real, is_whole
from elit.choosing.sweep_file import SWEEP_FILE, default_home, plain_rows, read_sweep
from elit.flow.words import DEFAULT_SCALE, DEFAULT_STEPS
from elit.interface.budget import default_budgets, format_budget
from elit.studio.drawing import Ask, Drawer, Drawn, Frames
from elit.viz.heatmaps import heatmap, overlay
from elit.viz.sweeps import SCORES

logger = logging.getLogger(__name__)

MOST_STEPS = 1000
MOST_KEPT = 64  # pictures, of those that were drawn last
SHOWN = 384  # pixels of a picture's longer side, at least: small ones are enlarged in whole steps
FIELDS = ("what", "budget", "steps", "guidance", "scale", "guide_budget", "seed")


class Studio:
    """Answers the page, one request at a time."""

    def __init__(self, drawer: Drawer, steps: int | None = None):
        self.drawer, self.model = drawer, drawer.model
        self.steps = drawer.few_steps or DEFAULT_STEPS if steps is None else steps
        check_whole(self.steps, "steps", 1, MOST_STEPS, f"1 to {MOST_STEPS}")
        self.rows, self.ranked_by = _front(drawer.name)
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Ask, int], Drawn] = OrderedDict()
        self._least: dict[tuple[Ask, int, float], float] = {}  # ms, of pictures of the same work

    def about(self) -> dict[str, Any]:
        """What the page has to know once."""
        budgets = default_budgets(self.model.min_latents, self.model.max_latents)
        return {
            "name": self.drawer.name,
            "model": type(self.model).__name__,
            "num_classes": self.drawer.num_classes,
            "max_latents": self.model.max_latents,
            "min_latents": self.model.min_latents,
            "budgets": [[b, format_budget(b)] for b in budgets],
            "guidances": self.drawer.guidances,
            "steps": self.steps,
            "scale": DEFAULT_SCALE,
            "rows": self.rows,
            "ranked_by": self.ranked_by,
        }

    def warm_up(self) -> None:
        """Draw once: the first call of a process is slow, and is no measure."""
        what, steps = "" if self.drawer.num_classes is None else 0, self.drawer.few_steps or 1
        with self._lock:
            self.drawer.run(Ask(what, steps, "none", 1.0, None, 0), self.model.max_latents)

    def draw(self, request: Any) -> dict[str, Any]:
        """The picture at a budget, beside that of full budget, and what both cost."""
        ask, num_latents = self.read(request)
        with self._lock:
            full = self._drawn(ask, self.model.max_latents)
            drawn = self._drawn(ask, num_latents)
        difference = [
            np.abs(np.asarray(a, float) - np.asarray(b, float)).reshape(a.height, a.width, -1)
            for a, b in zip(drawn.frames, full.frames, strict=True)
        ]
        maps = [d.mean(-1) / 255 for d in difference]
        answer = {
            "image": encode(drawn.frames),
            "full": encode(full.frames),
            "difference": encode([heatmap(m, m.shape[::-1], (0.0, 0.5)) for m in maps]),
            "mean_difference": float(np.mean(maps)),
            "attention": None,
            "num_latents": num_latents,
            "budget": format_budget(self.model.budget_of(num_latents)),
        }
        for name, one in (("", drawn), ("full_", full)):
            answer |= {f"{name}gflops": one.gflops, f"{name}ms": one.ms}
        if drawn.attention is not None:
            answer["attention"] = encode(_overlays(drawn))
        return answer

    def strip(self, request: Any) -> list[dict[str, Any]]:
        """The same noise at each budget of the ladder."""
        ask, _ = self.read(request)
        cells = []
        for budget in default_budgets(self.model.min_latents, self.model.max_latents):
            n = self.model.resolve_budget(budget)
            with self._lock:
                one = self._drawn(ask, n)
            cells.append({
                "image": encode(one.frames), "budget": format_budget(budget), "num_latents": n,
                "gflops": one.gflops, "ms": one.ms,
            })  # fmt: skip
        return cells

    def read(self, request: Any) -> tuple[Ask, int]:
        """A request, checked: what to draw, and at how many latents per group."""
        if not isinstance(request, Mapping):
            raise ValueError(f"the request is a {type(request).__name__}; send a JSON object")
        for name in request:
            check_choice(name, FIELDS, "field")
        given = {
            "what": None, "budget": 1.0, "steps": self.steps, "guidance": "none",
            "scale": DEFAULT_SCALE, "guide_budget": None, "seed": 0, **request,
        }  # fmt: skip
        classes = self.drawer.num_classes
        if classes is not None:
            labels = getattr(self.drawer.pipeline, "labels", {})
            given["what"] = label_of(given["what"], labels, classes)
        what = given["what"]
        if classes is not None and not (is_whole(what, 0) and what < classes):
            raise ValueError(f"what={what!r:.60} is no class; give one of 0..{classes - 1}")
        if classes is None and not isinstance(what, str):
            raise ValueError(f"what={what!r:.60} is no text; give a prompt")
        for name, least, most in (("steps", 1, MOST_STEPS), ("seed", 0, 2**53)):
            if not is_whole(given[name], least, most):
                raise ValueError(f"{name}={given[name]!r:.60}; give {least} to {most}")
        if not (is_real(given["scale"]) and 0 <= given["scale"] <= 100):
            raise ValueError(f"scale={given['scale']!r:.60}; give 0 to 100, 1 is no guidance")
        check_choice(given["guidance"], self.drawer.guidances, "guidance")
        used = {"none": (), "cfg": ("scale",)}.get(given["guidance"], ("scale", "guide_budget"))
        for name in ("scale", "guide_budget"):
            if name not in used and request.get(name) is not None:
                raise ValueError(
                    f"{name}={request[name]!r:.60} has no effect with guidance "
                    f"{given['guidance']!r}; leave it out"
                )
        if given["guide_budget"] is not None:
            self.model.resolve_budget(given["guide_budget"])
        num_latents = self.model.resolve_budget(given.pop("budget"))
        return Ask(**given), num_latents

    def _drawn(self, ask: Ask, num_latents: int) -> Drawn:
        """A picture, kept since it was drawn last, or drawn now; its ms are the least so far."""
        key = ask, num_latents
        if key not in self._kept:
            self._kept[key] = self.drawer.draw(ask, num_latents)
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        one = self._kept[key]
        work = replace(ask, what="", seed=0), num_latents, one.gflops
        self._least[work] = min(one.ms, self._least.get(work, one.ms))
        return replace(one, ms=self._least[work])


def encode(frames: Frames) -> str:
    """A picture as a data URI: PNG, or a GIF of several frames; small ones enlarged."""
    factor = max(1, -(-SHOWN // max(frames[0].size)))
    size = frames[0].width * factor, frames[0].height * factor
    large = [frame.convert("RGB").resize(size, Image.Resampling.NEAREST) for frame in frames]
    kind, file = "png" if len(large) == 1 else "gif", io.BytesIO()
    more = {} if len(large) == 1 else {"save_all": True, "append_images": large[1:], "loop": 0}
    large[0].save(file, kind, **more)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _overlays(drawn: Drawn) -> Frames:
    """Where Read looked, over each frame."""
    maps = drawn.attention
    assert maps is not None
    maps = maps[None] if maps.ndim == 2 else maps  # (t, h, w)
    scale = 0.0, max(2.0, float(maps.max()))
    count = len(drawn.frames)
    return [
        overlay(frame, maps[i * len(maps) // count], scale) for i, frame in enumerate(drawn.frames)
    ]


def _front(name: str) -> tuple[list[dict[str, Any]], str | None]:
    """Rows of the run's sweep, as the page's chart takes them, and what their score is."""
    file = default_home(name) / SWEEP_FILE
    if not file.exists():
        return [], None
    try:
        report = read_sweep(file)
    except ValueError as error:
        logger.warning("the chart is left out: %s", error)
        return [], None
    score = report["ranked_by"]
    names = ("budget", "steps", "guidance", "scale", "guide_budget")
    rows = [
        {**{name: row.get(name) for name in names}, "gflops": row["gflops_per_image"],
         "score": row["scores"][score]}
        for row in plain_rows(report) if row["scores"].get(score) is not None
    ]  # fmt: skip
    title = SCORES[score].title if score in SCORES else score
    return rows, f"{title}, {'lower' if report['lower_is_better'] else 'higher'} is better"
