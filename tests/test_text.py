"""Texts: words, padding, text encoders of transformers, and the pipeline that draws texts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import make_generators, randomise, refuses
from tiny_clip import save_word_tokenizer
from torch import Tensor

from elit import ElitPipeline, ElitTextPipeline, MMDiT, create_model, load_pipeline, make_scheduler
from elit.cli.main import main
from elit.data import load_dataset
from elit.data.captioned_shapes import GROUNDS, NOUNS, PAINTS
from elit.flow.guidance import CFG, AutoGuidance, CheapCFG
from elit.layers.text import BEGIN, PADDING, pad, tokenize
from elit.layers.transformer import TransformerBlock, rotary_embedding
from elit.models.mmdit import JointBlock
from elit.pipelines.text_encoder import _warn_of_cut, encode, load_text_encoder

SIZES = {
    "sample_size": 8, "in_channels": 3, "patch_size": 2, "hidden_size": 32, "num_heads": 2,
    "depth": 3, "group": 2, "head": 1, "tail": 1, "max_text_length": 12,
}  # fmt: skip


def word_model(**changes) -> MMDiT:
    return randomise(MMDiT(**SIZES | {"vocab_size": 64} | changes))


def state_model(**changes) -> MMDiT:
    return randomise(MMDiT(**SIZES | {"text_dim": 16} | changes))


def word_pipeline() -> ElitTextPipeline:
    pipeline = ElitTextPipeline(word_model(), make_scheduler("euler"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: ElitTextPipeline, prompts: list[str], seeds=(1, 2), **options) -> Tensor:
    options = {"num_inference_steps": 2, "output_type": "latent"} | options
    return pipeline(prompts, generator=make_generators(*seeds), **options).images


# ---- words ----


def test_words_have_numbers_that_depend_on_nothing_else() -> None:
    first, again, other = tokenize(["A red disc, small", "small", "a RED  disc"], 4096)
    assert first[0] == again[0] == other[0] == BEGIN
    assert len(first) == 6  # the comma is a word
    assert other == first[:4]
    assert again[1] == first[5]
    assert tokenize([""], 4096) == [[BEGIN]]
    assert all(BEGIN < number < 8 for number in tokenize(["many words of a text"], 8)[0][1:])


def test_the_words_of_the_captions_are_told_apart() -> None:
    captions = load_dataset("captioned-shapes").batch(range(3000))["captions"]
    words = {word for caption in captions for word in caption.replace(",", " ").split()}
    numbers = {tokenize([word], 4096)[0][1] for word in words}
    assert len(numbers) == len({word.strip(":") for word in words})


@pytest.mark.parametrize(
    ("text", "same"),
    [("caf\u00e9", "cafe\u0301"), ("\uff32\uff25\uff24", "red"), ("Stra\u00dfe", "STRASSE"),
     ("re\u200bd", "red")],
)  # fmt: skip
def test_a_word_has_one_number_however_it_is_written(text: str, same: str) -> None:
    assert tokenize([text], 4096) == tokenize([same], 4096)


def test_a_text_is_encoded_once_and_cut_with_one_warning(caplog) -> None:
    texts = ["red", "word " * 20, "red", "", "word " * 30]
    config = word_model().config
    _warn_of_cut.cache_clear()
    condition = encode(texts, config, truncate=True)
    encode(texts, config, truncate=True)
    warned = [r.message for r in caplog.records if "cut off" in r.message]
    assert warned == ["texts of more than 12 tokens are cut off"]
    for name, value in condition.items():
        assert len(value) == 5
        assert torch.equal(value[0], value[2]), name
        assert torch.equal(value[1], value[4]), name
    assert condition["encoder_attention_mask"].sum(1).tolist() == [2, 12, 2, 1, 12]


def test_padding_comes_last() -> None:
    ids, mask = pad([[1, 5, 6], [1]])
    assert ids.tolist() == [[1, 5, 6], [1, PADDING, PADDING]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


# ---- padding never leaks ----


@pytest.mark.parametrize("words", [True, False])
def test_padding_never_leaks(words: bool) -> None:
    model = word_model() if words else state_model()
    samples, levels = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.8])
    text = model.example_condition(2)["encoder_hidden_states"][:, :5]
    text = text if words else torch.randn(text.shape)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])

    def run(text: Tensor, mask: Tensor | None, rows: slice = slice(None)) -> Tensor:
        inputs = samples[rows], levels[rows], None, text
        with torch.no_grad():
            return model(*inputs, encoder_attention_mask=mask, num_latents=2).sample

    out = run(text, mask)
    torch.testing.assert_close(out[1:], run(text[1:, :2], None, slice(1, 2)))
    torch.testing.assert_close(out[:1], run(text[:1], None, slice(1)))
    junk, changed = text.clone(), text.clone()
    junk[1, 2:] = 63 if words else float("nan")
    assert torch.equal(run(junk, mask), out)
    no_more = torch.cat((mask, torch.zeros_like(mask)), dim=1)
    torch.testing.assert_close(run(torch.cat((text, text), dim=1), no_more), out)
    changed[1, 1] = 60 if words else 3.0  # what is no padding counts
    assert not torch.allclose(run(changed, mask)[1], out[1], atol=1e-3)


def test_the_order_of_words_and_a_vector_for_the_whole_text_count() -> None:
    condition = [encode([text], word_model().config) for text in ("red on blue", "blue on red")]
    model, samples = word_model(), torch.randn(1, 3, 8, 8)
    outs = [model(samples, 0.5, **c).sample for c in condition]
    assert not torch.allclose(*outs, atol=1e-3)
    model = state_model(pooled_dim=6)
    samples, condition = torch.randn(2, 3, 8, 8), model.example_condition(2)
    out = model(samples, 0.5, **condition).sample
    condition["pooled_projections"] = torch.randn(2, 6)
    assert not torch.allclose(model(samples, 0.5, **condition).sample, out, atol=1e-3)


# ---- what the model refuses ----

TEXTS = torch.zeros(2, 3, 16)


@pytest.mark.parametrize(
    ("states", "others", "message"),
    [
        (None, {}, "takes encoder_hidden_states, not class_labels"),
        (TEXTS[..., 0], {}, r"shape \(2, 3\).*takes \(2, up to 12, 16"),
        (TEXTS[..., :8], {}, r"shape \(2, 3, 8\) does not fit"),
        (TEXTS[:1], {}, r"shape \(1, 3, 16\) does not fit"),
        (torch.zeros(2, 13, 16), {}, "13 tokens is too long.* 12 at most"),
        (TEXTS, {"encoder_attention_mask": torch.ones(2, 3)},
         r"encoder_attention_mask of \(2, 3\) torch.float32 does not fit.*bool"),
        (TEXTS, {"pooled_projections": torch.ones(2, 3)},
         r"pooled_projections of shape \(2, 3\) do not fit; this model takes none"),
    ],
)  # fmt: skip
def test_texts_that_do_not_fit(states: Tensor | None, others: dict, message: str) -> None:
    refuses(message, state_model(), torch.zeros(2, 3, 8, 8), 0.5, None, states, **others)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": None}, "text_dim=None and vocab_size=None: give one of them"),
        ({"text_dim": 8}, "text_dim=8 and vocab_size=64: give one of them"),
        ({"vocab_size": 3}, "vocab_size=3 is not allowed"),
        ({"max_text_length": 0}, "max_text_length=0 is not allowed"),
        ({"max_text_length": None}, "max_text_length=None is not allowed"),
        ({"pooled_dim": True}, "pooled_dim=True is not allowed"),
        ({"vocab_size": 10**20}, "vocab_size=1000.* is not allowed"),
    ],
)
def test_settings_of_the_text_that_do_not_fit(settings: dict, message: str) -> None:
    refuses(message, word_model, **settings)


# ---- the block ----


@pytest.mark.parametrize("is_last", [False, True])
def test_two_streams_of_equal_weights_are_one_block_on_both(is_last: bool) -> None:
    joint = randomise(JointBlock(32, 2, 4.0, is_last))
    one = randomise(TransformerBlock(32, 2, 4.0))
    joint.image.load_state_dict(one.state_dict())
    if is_last:  # keys and values alone
        sources = {"modulation": (one.modulation.linear, 0), "to_kv": (one.attention.to_qkv, 32)}
        for name, (whole, first) in sources.items():
            rows = {key: value[first : first + 64] for key, value in whole.state_dict().items()}
            getattr(joint.text, name).load_state_dict(rows)
        joint.text.k_norm.load_state_dict(one.attention.k_norm.state_dict())
    else:
        joint.text.load_state_dict(one.state_dict())
    text, image, condition = torch.randn(2, 4, 32), torch.randn(2, 6, 32), torch.randn(2, 32)
    places = torch.rand(10, 2) * 9
    of_both, of_text, of_image = (
        rotary_embedding(x, 16, 100.0) for x in (places, places[:4], places[4:])
    )
    with torch.no_grad():
        new_image, new_text = joint(image, text, condition, of_image, of_text)
        expected = one(torch.cat((text, image), dim=1), condition, of_both)
    torch.testing.assert_close(new_image, expected[:, 4:])
    torch.testing.assert_close(new_text, text if is_last else expected[:, :4])


# ---- the pipeline ----


@pytest.mark.parametrize("guidance", [None, CFG(2.0), CheapCFG(2.0)], ids=["none", "cfg", "cheap"])
def test_an_image_depends_on_its_text_and_seed_alone(guidance) -> None:
    pipeline = word_pipeline()
    prompts = ["a red disc on white", "blue"]
    both = draw(pipeline, prompts, guidance=guidance, budget=0.5)
    for i in range(2):
        alone = draw(pipeline, prompts[i : i + 1], (i + 1,), guidance=guidance, budget=0.5)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    other = draw(pipeline, ["a blue disc on white", "blue"], guidance=guidance, budget=0.5)
    assert not torch.allclose(other[0], both[0], atol=1e-2)


@pytest.mark.parametrize("words", [{"guidance": "cfg"}, {}])
@pytest.mark.parametrize("negative", ["", "a green thing"])
def test_guidance_by_name_guides_away_from_the_empty_text(words, negative) -> None:
    pipeline, prompts = word_pipeline(), ["a red disc", "a blue ring"]
    expected = draw(pipeline, prompts, guidance=CFG(3.0), negative_prompt=negative)
    named = draw(pipeline, prompts, **words, guidance_scale=3.0, negative_prompt=negative)
    assert torch.equal(named, expected)
    assert not torch.equal(draw(pipeline, prompts), expected)


def test_a_negative_prompt_guides_away_from_it() -> None:
    pipeline, prompts, options = word_pipeline(), ["red", "blue"], {"guidance": CFG(3.0)}
    plain = draw(pipeline, prompts, **options)
    steered = draw(pipeline, prompts, negative_prompt="a green thing", **options)
    assert not torch.allclose(steered, plain, atol=1e-2)
    each = draw(pipeline, prompts, negative_prompt=["", "a green thing"], **options)
    torch.testing.assert_close(each, torch.stack((plain[0], steered[1])), rtol=1e-4, atol=1e-4)


def test_guidance_by_name_or_scale_is_the_object_s() -> None:
    pipeline, prompts, negative = word_pipeline(), ["red", "blue"], {"negative_prompt": "green"}
    for options in ({}, negative):
        expected = draw(pipeline, prompts, guidance=CFG(3.0), **options)
        for given in ({"guidance": "cfg", "guidance_scale": 3.0}, {"guidance_scale": 3.0}):
            assert torch.equal(draw(pipeline, prompts, **given, **options), expected)


def test_prompts_encoded_before_with_a_mask_or_none() -> None:
    pipeline, options = word_pipeline(), {"guidance": CFG(2.0)}
    embeds = pipeline.encode_prompt(["red", "blue"], ["any", "some"])
    given = draw(pipeline, None, prompt_embeds=embeds, **options)
    expected = draw(pipeline, ["red", "blue"], negative_prompt=["any", "some"], **options)
    assert torch.equal(given, expected)
    assert all(one["encoder_attention_mask"].all() for one in embeds)
    without = tuple(one | {"encoder_attention_mask": None} for one in embeds)  # hides nothing
    torch.testing.assert_close(draw(pipeline, None, prompt_embeds=without, **options), expected)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (None, "prompt_embeds is .*; give what encode_prompt returned"),
        ([[1, 2]], "give tensors, named"),
        (torch.tensor(3), "give tensors, named"),
        (torch.tensor([[1, 64]]), r"words outside 0\.\.63"),
        (torch.tensor([[1, -1]]), r"words outside 0\.\.63"),
        (torch.tensor([[True]]), "torch.bool; this model takes num"),
        (torch.tensor([[0.5]]), "torch.float32; this model takes num"),
    ],
)
def test_bad_prompt_embeds(states, message: str) -> None:
    pipeline, name = word_pipeline(), "encoder_hidden_states"
    embeds = {} if states is None else {name: states}
    refuses(message, pipeline, prompt_embeds=(embeds, embeds), num_inference_steps=1)
    others = [{name: torch.ones(1, 2).long(), "foo": torch.ones(1)}] * 2
    refuses("prompt_embeds has foo", pipeline, prompt_embeds=others)
    others = [{name: torch.ones(1, length).long()} for length in (2, 3)]
    refuses("differ; encode both in one call", pipeline, prompt_embeds=others)


def test_saved_and_loaded_by_its_kind(tmp_path) -> None:
    pipeline, folder = word_pipeline(), tmp_path / "texts"
    expected = draw(pipeline, ["red", "blue"])
    pipeline.save_pretrained(folder)
    for load in (load_pipeline, ElitTextPipeline.from_pretrained):
        assert type(loaded := load(folder)) is ElitTextPipeline
        assert torch.equal(draw(loaded, ["red", "blue"]), expected)
    message = "holds a pipeline ElitTextPipeline, not ElitPipeline"
    refuses(message, ElitPipeline.from_pretrained, folder)
    classes = ElitPipeline(create_model("elit-dit-tiny/2"), make_scheduler("euler"))
    classes.save_pretrained(tmp_path / "classes")
    assert type(load_pipeline(tmp_path / "classes")) is ElitPipeline


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "word " * 12}, "a text of 13 tokens is too long.* 12 at most.*'word word"),
        ({"prompt": []}, r"prompt \[\] is no text"),
        ({"prompt": [3]}, r"prompt \[3\] is no text"),
        ({"prompt": None}, "give either prompt or prompt_embeds"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["a", "b"], "guidance": CFG(2.0)},
         "2 negative prompts for 3"),
        ({"prompt": "a", "negative_prompt": "b"}, "negative_prompt has no effect .*give CFG"),
        ({"prompt": "a", "negative_prompt": "b", "guidance": AutoGuidance(2.0)},
         "negative_prompt has no effect"),
    ],
)  # fmt: skip
def test_bad_prompts(options: dict, message: str) -> None:
    refuses(message, word_pipeline(), **options, num_inference_steps=1)


# ---- text encoders of transformers, tiny and random, saved as the real ones are ----


def save_encoder(kind: str, folder: Path) -> None:
    import transformers
    from tokenizers import pre_tokenizers

    torch.manual_seed(0)
    small = {"vocab_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"hidden_size": 16, "intermediate_size": 32}
    if kind == "qwen2":  # bytes, and no token at all for an empty text
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {symbol: number for number, symbol in enumerate(["<|endoftext|>", *alphabet])}
        transformers.Qwen2Tokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
        config = transformers.Qwen2Config(**small | {"vocab_size": 300}, num_key_value_heads=1)
        model = transformers.Qwen2Model(config)
    else:
        words = ["[pad]", "[unk]", "a", "red", "blue", "disc", "square", "on"]
        save_word_tokenizer(folder, words)
    if kind == "clip":
        config = transformers.CLIPTextConfig(
            **small, eos_token_id=7, bos_token_id=6, max_position_embeddings=16
        )
        model = transformers.CLIPTextModel(config)
    elif kind == "t5":
        config = transformers.T5Config(
            vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
        )
        model = transformers.T5EncoderModel(config)
    model.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["clip", "t5", "qwen2"])
def test_text_encoders_by_name(kind: str, tmp_path) -> None:
    save_encoder(kind, tmp_path / "encoder")
    model = state_model(pooled_dim=16 if kind == "clip" else None, max_text_length=32)
    name = str(tmp_path / "encoder")
    pipeline = ElitTextPipeline(model, make_scheduler("euler"), text_encoder_name=name)
    prompts = ["a red disc on blue", "square"]
    drawn = draw(pipeline, prompts, guidance=CheapCFG(2.0))
    alone = draw(pipeline, prompts[1:], (2,), guidance=CheapCFG(2.0))
    torch.testing.assert_close(alone, drawn[1:], rtol=1e-4, atol=1e-4)  # no padding leaks
    # The encoder's own states, and nothing else, reach the model.
    tokenizer, encoder = load_text_encoder(name)
    condition = encode(prompts, model.config, tokenizer, encoder)
    ids = tokenizer(prompts[0], return_tensors="pt")["input_ids"]
    expected = encoder(ids).last_hidden_state
    torch.testing.assert_close(condition["encoder_hidden_states"][:1], expected)
    lengths = [len(prompt) if kind == "qwen2" else len(prompt.split()) for prompt in prompts]
    assert condition["encoder_attention_mask"].sum(1).tolist() == lengths
    assert encode([""], model.config, tokenizer, encoder)["encoder_attention_mask"].sum() == 1
    assert not any(p.requires_grad for p in encoder.parameters())

    pipeline.save_pretrained(tmp_path / "named")  # keeps the name alone
    assert not (tmp_path / "named" / "text_encoder").exists()
    assert pipeline.text_encoder is not None
    parts = {"text_encoder": encoder, "tokenizer": tokenizer}
    ElitTextPipeline(model, make_scheduler("euler"), **parts).save_pretrained(tmp_path / "whole")
    index = json.loads((tmp_path / "whole" / "model_index.json").read_text())
    assert index["text_encoder"][0] == "transformers"
    for folder in ("named", "whole"):
        again = draw(load_pipeline(tmp_path / folder), prompts, guidance=CheapCFG(2.0))
        torch.testing.assert_close(again, drawn)


def test_text_encoders_that_do_not_fit(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    save_encoder("t5", tmp_path / "t5")
    shutil.copytree(tmp_path / "t5", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"d_ff": 7}))
    for name, message in (
        ("no/such", "the text encoder 'no/such' cannot be loaded.*clip-vit"),
        (tmp_path / "bert", "its model type 'bert' is none of clip"),
        (tmp_path / "other", r"other' cannot be loaded: .*size"),
    ):
        refuses(message, load_text_encoder, str(name))
    tokenizer, encoder = load_text_encoder(str(tmp_path / "t5"))

    def make(both: bool = True, **changes) -> ElitTextPipeline:
        parts = {"text_encoder": encoder} | ({"tokenizer": tokenizer} if both else {})
        return ElitTextPipeline(state_model(**changes), make_scheduler("euler"), **parts)

    refuses("states are 16 wide, but the model takes 24", make, text_dim=24)
    refuses("go together", make, both=False)
    message = "T5EncoderModel gives no vector for a whole text"
    refuses(message, make(pooled_dim=16), "a red disc")
    refuses("a text of 3 tokens is too long", make(max_text_length=2), "a red disc")
    without = ElitTextPipeline(state_model(), make_scheduler("euler"))
    refuses("has no text encoder; make it with", without, "a red disc")


def test_pipelines_of_the_other_kind_of_model() -> None:
    euler, classes = make_scheduler("euler"), create_model("elit-dit-tiny/2")
    message = "MMDiT draws texts, not classes; make an ElitTextPip"
    refuses(message, ElitPipeline, word_model(), euler)
    message = "DiT draws classes, not texts; make an ElitPipeline"
    refuses(message, ElitTextPipeline, classes, euler)
    message = "MMDiT reads words itself"
    refuses(message, ElitTextPipeline, word_model(), euler, text_encoder_name="a/b")


# ---- captions ----


def test_captions_tell_what_is_in_the_image() -> None:
    dataset = load_dataset("captioned-shapes", count=300)
    batch, scenes = dataset.batch(range(300)), dataset.scenes(range(300))

    def colour(numbers: str) -> Tensor:
        return torch.tensor(list(bytes.fromhex(numbers)))[:, None, None] / 127.5 - 1

    for image, caption, scene in zip(batch["images"], batch["captions"], scenes, strict=True):
        assert scene.paint in caption
        assert any(noun in caption for noun in NOUNS[scene.noun])
        corner, paper = image[:, :1, :1], colour(GROUNDS[scene.ground])
        assert torch.allclose(corner, paper, atol=1e-5)  # nothing lies there
        if scene.pattern == "plain":
            assert (image - colour(PAINTS[scene.paint])).abs().sum(0).min() < 1e-4
    assert len(set(batch["captions"])) > 150  # many for each class
    names = {dataset.class_names[label] for label in batch["class_labels"].tolist()}
    assert names == {scene.noun for scene in scenes} == set(NOUNS)


def test_captions_hang_on_the_index_alone() -> None:
    few, many = load_dataset("captioned-shapes", count=10), load_dataset("captioned-shapes")
    first = many.batch([3])["captions"]
    assert few.batch([3])["captions"] == many.batch([1, 3])["captions"][1:] == first
    assert many[3]["captions"] == first[0]
    held_out = load_dataset("captioned-shapes", "validation")
    assert held_out.batch(range(50))["captions"] != many.batch(range(50))["captions"]


# ---- the command line ----

SHORT = (
    "--train.steps 1 --train.sample_every 1 --train.validate_every 1 --data.batch_size 2 "
    "--sample.steps 1 --sample.budgets [0.5] --sample.columns 2 --data.options.count 8 "
    "--model.overrides.hidden_size 32 --model.overrides.num_heads 1 --model.overrides.depth 3"
)
TRAIN = f"train captioned-shapes --output_dir run {SHORT}"


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch) -> Callable[..., str]:
    """Runs a command in a folder of its own: what it prints, or the line that refuses it."""
    monkeypatch.chdir(tmp_path)

    def call(line: str, *words: str, refused: bool = False) -> str:
        code = main([*line.split(), *words])
        out, err = capsys.readouterr()
        assert code == (2 if refused else 0), err
        assert not refused or err.count("\n") == 1
        return err if refused else out

    return call


def test_captions_train_and_become_images(cli) -> None:
    cli(TRAIN)
    assert Path("run/samples/step-00000001.png").exists()
    draw = "sample run --budget 1 0.25 --steps 1 --json --guidance ccfg --prompts"
    report = json.loads(cli(draw, "a red disc", "blue"))
    names = [Path(file).name for row in report["rows"] for file in row["files"]]
    assert names == ["prompt-0-seed-0.png", "prompt-1-seed-1.png"] * 2
    assert report["settings"]["prompts"] == ["a red disc", "blue"]
    assert json.loads(cli("flops run --json"))["text_tokens"] == 32
    assert report["text_tokens"] == 4  # the longest prompt and what stands before it
    of_four = json.loads(cli("flops run --text-tokens 4 --json"))
    assert of_four["rows"][0]["gflops"] == report["rows"][0]["gflops"]
    negative = "a large blue square on grey"
    steered = json.loads(cli(draw, "a red disc", "blue", "--negative-prompt", negative))
    assert steered["text_tokens"] == 7
    assert steered["settings"]["negative_prompt"] == negative
    assert steered["out"] != report["out"]
    for command, message in (
        ("sample run", "this model draws texts; give some"),
        ("sample run --prompts red --negative-prompt blue",
         "--negative-prompt has no effect without a guide"),
        ("sample run --labels 1", "--labels are of models that draw classes"),
        ("flops dit-xl/2 --text-tokens 4", "draws classes, not texts"),
        ("train digits --model.preset elit-mmdit-tiny/2", "has no captions; use data"),
        ("train digits --text.max_length 4", "text.* have no effect on 'elit-dit-tiny/4'"),
        ("train captioned-shapes --text.encoder ./no", "the text encoder './no' cannot"),
    ):  # fmt: skip
        assert message in cli(command, refused=True)
    refused = cli("sample run --prompts", "word " * 40, refused=True)
    assert "a text of 41 tokens is too long" in refused


def test_a_frozen_encoder_by_name_trains_too(cli, tmp_path) -> None:
    save_encoder("t5", tmp_path / "t5")
    cli(f"{TRAIN} --text.encoder t5")
    pipeline = load_pipeline("run")
    assert pipeline.config.text_encoder_name == str(tmp_path / "t5")  # found from anywhere
    assert pipeline.transformer.config.text_dim == 16
    assert not Path("run/text_encoder").exists()
    cli("sample run --steps 1 --prompts", "a red disc")
    cli(f"{TRAIN} --text.encoder {tmp_path}/t5/ --train.steps 2")  # the same, spelt otherwise
    refused = cli(f"{TRAIN} --text.encoder words --train.steps 2", refused=True)
    assert "holds another run" in refused


def test_clips_of_texts(cli) -> None:
    preset = "--model.preset elit-video-mmdit-tiny/2 --output_dir run"
    sizes = ("--model.overrides.group", "[2, 4, 4]", "--model.overrides.patch_size", "[2, 2, 2]")
    cli(f"train moving-shapes {preset} {SHORT}", *sizes)
    draw = "sample run --steps 1 --video mp4 --json --frames"
    words = ("--prompts", "a red disc moves right")
    (file,) = json.loads(cli(f"{draw} 4", *words))["rows"][0]["files"]
    import imageio

    assert imageio.get_reader(file).count_frames() == 4
    for frames, message in (
        (6, "a grid of 3x8x8 tokens cannot be cut into groups of 2x4x4"),
        (3, "3x16x16 cannot be cut into patches of 2x2x2"),
    ):
        assert message in cli(f"{draw} {frames}", *words, refused=True)
