"""Draw one sheet over the budgets of a trained run: a row for each budget, all from one noise.

python examples/sample_budgets.py runs/quickstart --out budgets.png
"""

import argparse
from pathlib import Path

import torch

from elit import CFG, AutoGuidance, CheapCFG, ElitPipeline
from elit.cost.flops import forward_flops
from elit.interface.budget import format_budget
from elit.viz.sheet import contact_sheet, save_image

GUIDANCE = {"cfg": CFG, "ag": AutoGuidance, "ccfg": CheapCFG}


def main() -> None:
    """Print what each row costs, and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run, such as runs/quickstart")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1, 0.5, 0.25, 0.125, 0.0625])
    parser.add_argument("--labels", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", choices=tuple(GUIDANCE), default="ccfg")
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("budgets.png"))
    args = parser.parse_args()

    pipe = ElitPipeline.from_pretrained(args.run)
    model = pipe.transformer
    kept = [model.resolve_budget(budget) for budget in args.budgets]
    ran = [model.budget_of(num_latents) for num_latents in kept]  # after rounding
    rows = []
    for num_latents, budget in zip(kept, ran, strict=True):
        seeds = range(args.seed, args.seed + len(args.labels))
        images = pipe(
            args.labels,
            budget=budget,
            num_inference_steps=args.steps,
            guidance=GUIDANCE[args.guidance](args.scale),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        rows.append(images)
        mflops = forward_flops(model, num_latents) / 1e6
        print(
            f"{format_budget(budget):>6}  {num_latents:>3} latents per group  {mflops:.1f} MFLOPs"
        )
    captions = [format_budget(budget) for budget in ran]
    sheet = contact_sheet(rows, captions, list(map(str, args.labels)), corner="budget")
    save_image(sheet, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
