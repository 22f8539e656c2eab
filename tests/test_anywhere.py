"""Folders of ours, and of elasticized stock pipelines, in a process that never imported elit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers import TINY_ELASTIC, randomise, refuses, tiny_dit, tiny_elastic
from retrofit_models import make
from runs import tiny_config
from stock_pipelines import POOLED, build, prompt, run, text, tiny_vae

import elit
from elit import ElitPipeline, ElitTextPipeline, create_model, elasticize, make_scheduler
from elit._files import json_text
from elit.pipelines.shapes import load_shape
from elit.studio.drawing import open_drawer
from elit.training.finetune import load_base
from elit.training.loop import train

STOCK = ("sd3", "dit")
FRESH = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from diffusers import DiffusionPipeline
assert "elit" not in sys.modules
TRUSTED = {{"trust_remote_code": True}}
"""
FRESH += """
for folder, what in (("classes", [1, 2]), ("texts", ["red", "blue"]), ("some/texts", ["red"])):
    if "/" in folder:
        ways = ({},)
    else:
        ways = ({}, {"custom_pipeline": folder})
        try:
            DiffusionPipeline.from_pretrained(folder)
        except ValueError as error:
            assert "Pass `trust_remote_code=True`" in str(error)
        else:
            raise AssertionError
    for number, way in enumerate(ways):
        pipe = DiffusionPipeline.from_pretrained(folder, **way, **TRUSTED)
        pipe.set_progress_bar_config(disable=True)
        drawn = pipe(what, budget=0.5, num_inference_steps=2, seed=0, output_type="pt",
                     guidance="ccfg", guidance_scale=2.0).images
        torch.save(drawn, f"{folder.replace('/', '-')}-{number}.pt")
for name in ("sd3", "dit"):
    absent = {n: None for n, part in json.load(open(name + "/model_index.json")).items()
              if part == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(name, custom_pipeline=name, **absent, **TRUSTED)
    pipe.set_progress_bar_config(disable=True)
    from stock_pipelines import run
    with pipe.transformer.at_budget(0.25, guide=0.5):
        torch.save(run(pipe, name), name + ".pt")
    pipe.save_pretrained(name + "-again")
sys.modules["elit.models.dit"] = None  # as where there is no elit, or another
try:
    DiffusionPipeline.from_pretrained("classes", **TRUSTED)
except ImportError as error:
    assert str(error).startswith("this pipeline needs elit, by its distribution elit-diffusion (")
else:
    raise AssertionError
"""


def word_pipeline() -> ElitTextPipeline:
    model = create_model("elit-mmdit-tiny/2", hidden_size=32, num_heads=2)
    return ElitTextPipeline(randomise(model), make_scheduler("euler"))


def class_pipeline(**more: Any) -> ElitPipeline:
    return ElitPipeline(tiny_elastic(in_channels=1), make_scheduler("heun"), **more)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Weights that lie elsewhere in memory are multiplied in another order."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def on_hub(pipeline: Any, name: str, cache: Path) -> None:
    """Save as what was downloaded of the hub earlier."""
    cached = cache / f"models--{name.replace('/', '--')}"
    pipeline.save_pretrained(cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")


def test_a_process_that_never_imported_elit_draws_the_same(tmp_path: Path) -> None:
    """Of all of them one after the other: diffusers runs each pipeline.py in the same module."""
    pipelines = {"classes": class_pipeline(), "texts": word_pipeline()}
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(tmp_path / name)
    on_hub(word_pipeline(), "some/texts", tmp_path / "hub")
    stock = {name: elasticize(build(name), 1, 1, 4) for name in STOCK}
    for name, pipe in stock.items():
        pipe.save_pretrained(tmp_path / name)
    own = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", FRESH], cwd=tmp_path, text=True,
                          capture_output=True, timeout=120, env=os.environ | own)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]

    def drawn(file: str) -> torch.Tensor:
        return torch.load(tmp_path / f"{file}.pt")

    options = {"num_inference_steps": 2, "seed": 0, "output_type": "pt", "budget": 0.5}
    options |= {"guidance": "ccfg", "guidance_scale": 2.0}
    for name, what in (("classes", [1, 2]), ("texts", ["red", "blue"])):
        pipelines[name].set_progress_bar_config(disable=True)
        wanted = pipelines[name](what, **options).images
        close(drawn(f"{name}-0"), wanted)
        close(drawn(f"{name}-1"), wanted)
    wanted = pipelines["texts"](["red"], **options).images
    close(drawn("some-texts-0"), wanted)
    for name, pipe in stock.items():
        with pipe.transformer.at_budget(0.25, guide=0.5):
            close(drawn(name), run(pipe, name))
        again = tmp_path / f"{name}-again"  # saves as it was saved
        for file in ("pipeline.py", "README.md"):
            assert (again / file).read_text() == (tmp_path / name / file).read_text()


@pytest.mark.parametrize("form", ["old", "new"])
def test_ours_load_both_forms_and_run_no_code_of_a_folder(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    ElitPipeline(tiny_dit(in_channels=1), make_scheduler("euler")).save_pretrained(folder)
    on_hub(word_pipeline(), "some/texts", tmp_path)
    texts = tmp_path / "models--some--texts" / "snapshots" / "0123"
    for run_ in (folder, texts):
        (run_ / "pipeline.py").write_text("raise SystemExit('it ran')")
        index = run_ / "model_index.json"
        if form == "old":
            content = json.loads(index.read_text())
            index.write_text(json_text(content | {"_class_name": content["_class_name"][1]}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert type(ElitPipeline.from_pretrained(folder)) is ElitPipeline
    assert type(elit.load_pipeline(folder)) is ElitPipeline
    assert type(elit.load_pipeline("some/texts")) is ElitTextPipeline
    assert type(ElitTextPipeline.from_pretrained("some/texts")) is ElitTextPipeline
    assert type(load_base(str(folder))) is elit.DiT
    assert load_shape(str(folder)).kind == "DiT"
    assert type(open_drawer(str(texts), "cpu").pipeline) is ElitTextPipeline
    refuses("holds a pipeline ElitPipeline, not ElitText", ElitTextPipeline.from_pretrained, folder)


def test_a_class_of_ones_own_stays_a_name_without_code(tmp_path: Path) -> None:
    class Mine(ElitPipeline):
        pass

    Mine(tiny_elastic(in_channels=1), make_scheduler("euler")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "Mine"
    assert not (tmp_path / "pipeline.py").exists()
    assert type(Mine.from_pretrained(tmp_path)) is Mine


# ---- elasticized pipelines ----


def test_of_image_to_image_and_inpainting_the_budgets_act(tmp_path: Path) -> None:
    """Also of a pipeline that was loaded."""
    channels = {"in_channels": 16, "out_channels": 16}  # inpainting takes no other number
    config = {**make("sd3").config, **channels}
    pipe = build("sd3", randomise(diffusers.SD3Transformer2DModel.from_config(config)))
    config = {**tiny_vae().config, "latent_channels": 16, "shift_factor": 0.1}
    del config["_use_default_values"]
    pipe.register_modules(vae=diffusers.AutoencoderKL.from_config(config).eval())
    elasticize(pipe, 1, 1, 4).save_pretrained(tmp_path)
    absent = dict.fromkeys(n for n, part in pipe.components.items() if part is None)
    loaded = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path, **absent)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    size = {"height": 64, "width": 64, "image": picture, "num_inference_steps": 4}
    away = {"negative_prompt_embeds": text(2), "negative_pooled_prompt_embeds": text(2)[:, 0, :8]}
    given = prompt(**POOLED, **size, **away, guidance_scale=3.0, output_type="pt", strength=0.8)()
    makers = {
        diffusers.AutoPipelineForImage2Image: {},
        diffusers.AutoPipelineForInpainting: {"mask_image": torch.ones(1, 1, 64, 64)},
    }
    for kind, more in makers.items():
        drawn = {}
        for source in (pipe, loaded):
            made = kind.from_pipe(source)
            assert made.transformer is source.transformer
            made.set_progress_bar_config(disable=True)
            for budgets in ((1.0, None), (0.25, None), (1.0, 0.25)):
                with made.transformer.at_budget(*budgets):
                    generator = torch.Generator().manual_seed(0)
                    found = made(**given, **more, generator=generator).images
                close(found, drawn.setdefault(budgets, found))
        first, *others = drawn.values()
        assert all((first - other).abs().max() > 1e-3 for other in others)
    # By a class of diffusers' own, the transformer has to be given: its type is another.
    made = diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(pipe, transformer=pipe.transformer)
    assert made.transformer is pipe.transformer


def test_a_pipeline_is_a_stock_one_again() -> None:
    pipe = build("dit")
    stock = type(pipe)
    assert isinstance(elasticize(pipe, 1, 1, 4), stock)
    assert type(pipe) is type(elasticize(build("dit"), 1, 1, 4)) is not stock
    assert type(pipe).__name__ == stock.__name__
    assert type(elit.unelasticize(pipe)) is stock


# ---- the model card ----


def front_matter(card: str) -> dict[str, str]:
    _, head, _ = card.split("---\n", 2)
    return dict(line.split(": ", 1) for line in head.splitlines())


@pytest.mark.parametrize("kind", ["classes", "texts", "plain", "latents"])
def test_a_card_whose_lines_run(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    model = {"plain": tiny_dit(in_channels=1), "latents": randomise(elit.DiT(**TINY_ELASTIC))}
    pipeline: Any = word_pipeline() if kind == "texts" else class_pipeline()
    if kind in model:
        pipeline = ElitPipeline(model[kind], make_scheduler("euler"))
    pipeline.save_pretrained(tmp_path, license=None if kind == "texts" else "mit")
    card = (tmp_path / "README.md").read_text()
    head = front_matter(card)
    task = "text-to-image" if kind == "texts" else "unconditional-image-generation"
    assert (head["library_name"], head["pipeline_tag"]) == ("diffusers", task)
    assert head["license"] == ("other" if kind == "texts" else "mit")
    assert ("unknown: whoever saved them named none" in card) == (kind == "texts")
    assert ("holds no autoencoder" in card) == (kind == "latents")
    cost = pipeline.forward_cost()
    for kept in (None,) if kind == "plain" else (16, 8) if kind == "classes" else ():
        gflops = cost.flops(kept) / 1e9
        assert f"| {kept or '-'} | {gflops:.3g} | {gflops * 1e9 / cost.flops():.0%} |" in card
    if kind == "latents":
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    snippets = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    assert len(snippets) == 2
    drawn = []
    for snippet in snippets:
        names: dict[str, Any] = {}
        exec(snippet.replace("seed=0", "seed=0, num_inference_steps=2"), names)
        drawn.append(names["image"])
    assert drawn[0] == drawn[1]


def test_a_card_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    class_pipeline().save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "README.md").read_text() == "mine"
    class_pipeline().save_pretrained(tmp_path / "other", variant="fp16")
    assert 'code=True, variant="fp16")' in (tmp_path / "other" / "README.md").read_text()


def test_a_run_keeps_the_card_that_a_person_wrote(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, 2), progress=False)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlicense: other\n")
    (tmp_path / "README.md").write_text("mine")
    train(tiny_config(tmp_path, 4), progress=False)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "ElitPipeline" in (tmp_path / "pipeline.py").read_text()


@pytest.mark.parametrize("has_card", [True, False])
def test_pushed_to_the_hub(has_card: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """With the card, unless there is one: diffusers' own would take its place."""
    pushed: list[dict[str, Any]] = []

    def upload(folder_path: Path, **given: Any) -> str:
        files = {path.name for path in Path(folder_path).iterdir()}
        card = (Path(folder_path) / "README.md").read_text()
        pushed.append({"files": files, "card": card, **given})
        return "done"

    made = type("Made", (), {"repo_id": "me/run"})
    monkeypatch.setattr("huggingface_hub.create_repo", lambda *_, **__: made)
    monkeypatch.setattr("huggingface_hub.file_exists", lambda *_, **__: has_card)
    monkeypatch.setattr("huggingface_hub.upload_folder", upload)
    pipeline = class_pipeline()
    assert pipeline.push_to_hub("run", "a message", token="secret") == "done"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").write_text("mine")
    word_pipeline().save_pretrained(tmp_path / "run", push_to_hub=True, repo_id="run")
    first, second = pushed
    assert {"model_index.json", "pipeline.py", "transformer"} <= first["files"]
    assert first["card"].startswith("---\nlicense: other\n")
    assert (first["repo_id"], first["token"]) == ("me/run", "secret")
    assert first["commit_message"] == "a message"
    assert second["commit_message"] == "Upload ElitTextPipeline"
    assert second["card"] == "mine"
    assert {one["ignore_patterns"] and one["ignore_patterns"][0] for one in pushed} == (
        {"README.md"} if has_card else {None}
    )
