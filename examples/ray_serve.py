"""Serve a run with Ray Serve: a request has a budget of its own, those that wait share one batch.

pip install 'ray[serve]' && python examples/ray_serve.py runs/quickstart
curl -s localhost:8000 -d '{"class_label": 7, "budget": 0.25, "seed": 0}' > seven.png
"""

import argparse
import io

from ray import serve
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from elit.pipelines.load import load_pipeline

FIELDS = {"class_label": 0, "budget": 1.0, "seed": 0}


@serve.deployment(max_ongoing_requests=64)
class Budgets:
    """A replica: one pipeline on one device. More machines are more replicas."""

    def __init__(self, run: str, device: str, steps: int):
        self.pipeline = load_pipeline(run).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.steps = steps

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.02)
    async def draw(self, requests: list[dict]) -> list:
        """Pictures of all requests that wait, at their budgets, in one call."""
        columns = {name: [request[name] for request in requests] for name in FIELDS}
        images = self.pipeline(
            class_labels=columns["class_label"],
            budget=columns["budget"],
            seed=columns["seed"],
            num_inference_steps=self.steps,
        ).images
        print(f"{len(images)} in one call, budgets {columns['budget']}", flush=True)
        return images

    def read(self, given: dict) -> dict:
        """A request with all its fields; a wrong one is refused here, not with its batch."""
        if not isinstance(given, dict) or given.keys() - FIELDS.keys():
            raise ValueError(f"give a JSON object with some of {', '.join(FIELDS)}")
        request = FIELDS | given
        budget, label, seed = (request[name] for name in ("budget", "class_label", "seed"))
        if not (type(budget) in (int, float) and 0 < budget <= 1):
            raise ValueError(f"budget {budget!r:.60} is not in (0, 1]; 0.25 keeps a quarter")
        if type(label) is not int or label not in range(self.pipeline.null_label):
            raise ValueError(
                f"class_label {label!r:.60} is not in 0..{self.pipeline.null_label - 1}"
            )
        if type(seed) is not int or seed not in range(2**63):
            raise ValueError(f"seed {seed!r:.60} is no whole number from 0")
        return request

    async def __call__(self, http: Request) -> Response:
        """Answer a request with a PNG, or with one line of what is wrong with it."""
        try:
            request = self.read(await http.json())
        except ValueError as error:
            return PlainTextResponse(f"{error}\n", status_code=400)
        png = io.BytesIO()
        (await self.draw(request)).save(png, "png")
        return Response(png.getvalue(), media_type="image/png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run, such as runs/quickstart")
    parser.add_argument("--device", default="cpu", help="of each replica")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    serve.start(http_options={"port": args.port})
    gpus = {"num_gpus": float(args.device.startswith("cuda"))}
    replica = Budgets.options(num_replicas=args.replicas, ray_actor_options=gpus)
    serve.run(replica.bind(args.run, args.device, args.steps), blocking=True)
