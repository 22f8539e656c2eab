"""Budgets and classes as a person types them: "1/4", "25%", "boot"; on the command line too."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from serving import FACTS

from elit import DiT, ElitPipeline, TailDropping, make_scheduler, resolve_budget
from elit.choosing.points import OperatingPoint
from elit.cli.flags import FLAGS
from elit.cli.main import main
from elit.flow.guidance import CheapCFG
from elit.interface.budget import read_budget
from elit.retrofit.guider import ElasticGuidance
from elit.serving.facts import RefusedError
from elit.serving.requests import parse
from elit.studio.drawing import ElitDrawer
from elit.studio.studio import Studio
from elit.training.config import SampleConfig
from elit.training.config_files import load_config

NAMED = replace(FACTS, labels={"boot": 3})
NAMES = {0: "shirt", 1: "trouser, jeans", 2: "bag", 3: "boot"}


@pytest.fixture(scope="module")
def pipe() -> ElitPipeline:
    torch.manual_seed(0)
    model = DiT(
        sample_size=8, in_channels=1, patch_size=2, hidden_size=16, num_heads=2, depth=3,
        num_classes=4, group=2, head=1, tail=1,
    )  # fmt: skip
    pipeline = ElitPipeline(model, make_scheduler("euler"), id2label=NAMES)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipe: ElitPipeline, what, **options) -> torch.Tensor:
    return pipe(what, num_inference_steps=2, seed=0, output_type="pt", **options).images


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("num_images", r"did you mean num_images_per_prompt\?"),
        ("nsteps", r"did you mean num_inference_steps\?"),
        ("scale", r"did you mean guidance_scale\?"),
        ("labels", r"did you mean class_labels\?"),
        ("eta", "it takes class_labels, budget, num_inference_steps, "),
        ("condition_", "it takes class_labels, "),
    ],
)
def test_a_pipelines_unknown_word_is_told_what_it_means(pipe, word, hint):
    with pytest.raises(TypeError, match=f"unknown argument '{word}' of ElitPipeline: {hint}"):
        draw(pipe, 1, **{word: 2})


@pytest.mark.parametrize("word", ["1/4", "25%", " 25 % ", "0.25", ".25", 0.25])
def test_a_budget_is_read_alike_everywhere(pipe, word):
    assert read_budget(word) == 0.25
    assert FLAGS["budget"]["type"](str(word)) == 0.25
    assert resolve_budget(word, 16) == 4
    assert pipe.transformer.resolve_budget(word) == 1
    assert SampleConfig(budgets=[1, word]).budgets == [1.0, 0.25]
    assert load_config(None, {"sample.budgets": f"[1, {word}]"}).sample.budgets == [1.0, 0.25]
    assert OperatingPoint(word, guide_budget=word) == OperatingPoint(0.25, guide_budget=0.25)
    assert CheapCFG(2.0, word) == CheapCFG(2.0, 0.25)
    assert (
        ElasticGuidance(2.0, guide_budget=word).guidance
        == ElasticGuidance(2.0, guide_budget=0.25).guidance
    )
    expected = draw(pipe, [0, 3], budget=0.25)
    assert torch.equal(draw(pipe, [0, 3], budget=word), expected)
    assert torch.equal(draw(pipe, [0, 3], budget=[word, word]), expected)
    assert torch.equal(draw(pipe, [0, 3], budgets_of_steps=[word, 0.25]), expected)
    (picture,) = parse(json.dumps({"class_label": 1, "budget": word}).encode(), FACTS)
    assert picture.latents == 4
    _, latents = Studio(ElitDrawer(pipe, "tiny")).read({"what": 0, "budget": word})
    assert latents == 1


@pytest.mark.parametrize("word", ["", "quarter", "0%", "101%", "2", "1/0", "%", "nan", True, None])
def test_what_is_no_budget_is_refused(word):
    with pytest.raises(ValueError, match=r"budget .* (fraction)"):
        read_budget(word)


def test_tail_dropping_takes_numbers_of_latents_alone():
    with pytest.raises(ValueError, match=r"min_latents '1/4' is no whole number of latents"):
        TailDropping("1/4", 16, 16)


@pytest.mark.parametrize("words", [{}, {"prompt": "a boot"}])
def test_a_pipeline_of_classes_says_that_it_wants_them(pipe, words):
    with pytest.raises(ValueError, match=r"draws classes, not prompts; .* 0\.\.3"):
        pipe(**words)


def test_a_class_is_given_by_its_name(pipe, tmp_path, caplog):
    expected = draw(pipe, [3, 1, 1, 2])
    assert torch.equal(draw(pipe, ["boot", "jeans", "trouser", "2"]), expected)
    assert torch.equal(draw(pipe, "boot"), draw(pipe, 3))
    assert pipe.get_label_ids(["bag", "trouser, jeans"]) == [2, 1]
    with pytest.raises(ValueError, match=r"unknown class 'boots'.*did you mean 'boot'"):
        pipe("boots")
    pipe.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "diffusers"):
        assert ElitPipeline.from_pretrained(tmp_path).labels == pipe.labels
    assert "id2label" not in caplog.text
    again = ElitPipeline.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert ElitPipeline.from_pretrained(tmp_path / "again").labels == pipe.labels


def test_a_name_of_several_classes_is_none_of_them(pipe):
    """As crane, the bird and the machine, is in ImageNet."""
    names = {0: "crane", 1: "crane", 2: "missile", 3: "projectile, missile"}
    pipe = ElitPipeline(pipe.transformer, pipe.scheduler, id2label=names)
    assert pipe.get_label_ids(["crane (1)", "missile", "projectile"]) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"unknown class 'crane': .*'crane \(0\)'"):
        pipe("crane")


def test_names_are_of_the_model_s_classes(pipe):
    with pytest.raises(ValueError, match=r"give a name to numbers from 0 to 3"):
        ElitPipeline(pipe.transformer, pipe.scheduler, id2label={4: "hat"})
    for names in (7, ["a", "b"], " , ", None):
        with pytest.raises(ValueError, match="give a name to numbers from 0 to 3"):
            ElitPipeline(pipe.transformer, pipe.scheduler, id2label={0: names})
    with pytest.raises(ValueError, match="is no dict; give names by class numbers"):
        ElitPipeline(pipe.transformer, pipe.scheduler, id2label=["a", "b"])
    with pytest.raises(
        ValueError, match=r"class 'boot' is no number, .* knows no names; give 0 to 3"
    ):
        ElitPipeline(pipe.transformer, pipe.scheduler)("boot")


def test_saved_names_are_loaded_without_a_warning(pipe, tmp_path, caplog):
    """JSON has text for the numbers, which diffusers compares with the signature."""
    pipe.save_pretrained(tmp_path)
    caplog.set_level(logging.WARNING)
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        assert ElitPipeline.from_pretrained(tmp_path).labels == pipe.labels
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not [text for text in caplog.messages if "id2label" in text]


def test_names_and_percentages_on_the_command_line(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path)
    flags = ["--steps", "2", "--device", "cpu", "--json", "--out", str(tmp_path / "out")]
    run = ["sample", str(tmp_path), *flags, "--budget", "100%", "25%", "--labels"]
    assert main([*run, "boot", "1"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["labels"], settings["budget"]) == ([3, 1], [1.0, 0.25])
    assert main([*run, "boots"]) == 2
    assert "did you mean 'boot'" in capsys.readouterr().err


def test_names_over_http():
    for body in ({"class_label": "boot"}, {"prompt": "boot"}, {"class_label": 3}):
        (picture,) = parse(json.dumps(body).encode(), NAMED)
        assert picture.what == 3
    with pytest.raises(RefusedError, match=r"unknown class 'bot'.*boot"):
        parse(b'{"prompt": "bot"}', NAMED)
    with pytest.raises(RefusedError, match=r"draws no texts; give a class from 0 to 9"):
        parse(b'{"prompt": "a cat"}', FACTS)
    with pytest.raises(RefusedError, match=r"outside"):
        parse(b'{"class_label": 1, "budget": "200%"}', FACTS)


def test_names_in_the_studio(pipe):
    studio = Studio(ElitDrawer(pipe, "tiny"))
    assert studio.read({"what": "jeans"})[0].what == 1
