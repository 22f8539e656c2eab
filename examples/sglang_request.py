"""Ask SGLang's diffusion server for a picture of a run of texts, at a budget of its own.

sglang serve --model-path runs/captioned-shapes --backend diffusers --trust-remote-code
python examples/sglang_request.py "a red circle" --size 32x32 --budget 0.25 --out circle.png
"""

import argparse
import base64
import json
import urllib.request
from pathlib import Path


def request_body(args: argparse.Namespace) -> dict:
    """The server's own fields, and those that it hands to the pipeline's `__call__` as they are."""
    return {
        "prompt": args.prompt,
        "size": args.size,  # or the server asks for one that fits no small model
        "seed": args.seed,
        "num_inference_steps": args.steps,
        "guidance_scale": args.scale,
        "response_format": "b64_json",
        "diffusers_kwargs": {
            "budget": args.budget,
            "guidance": args.guidance,
            "negative_prompt": "",  # or the server fills in one of its own
        },
    }


def main() -> None:
    """Send the request, or print it, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="a red circle")
    parser.add_argument("--size", default="32x32", help="the model's own, in pixels")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--guidance", choices=("cfg", "ag", "ccfg"), default="ccfg")
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", default="http://127.0.0.1:30000/v1/images/generations")
    parser.add_argument("--out", type=Path, default=Path("sglang.png"))
    parser.add_argument("--dry-run", action="store_true", help="print the request alone")
    args = parser.parse_args()

    body = json.dumps(request_body(args))
    if args.dry_run:
        print(body)
        return
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(args.url, body.encode(), headers)) as answer:
        image = json.load(answer)["data"][0]["b64_json"]
    args.out.write_bytes(base64.b64decode(image))
    print(args.out)


if __name__ == "__main__":
    main()
