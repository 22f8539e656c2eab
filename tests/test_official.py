"""Public checkpoints: files as they come, files that are wrong, and folders made of them."""

import argparse
import json
import os
import pathlib
import pickle
import random
import re
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sit_reference import READ, make_state
from torch import Tensor

from elit import ElitPipeline, _files, from_official_checkpoint, load_pipeline
from elit.cli.main import main
from elit.interop import convert
from elit.interop.convert import ConversionSettings, convert_official
from elit.models.sit import SiT

GOLDEN = Path(__file__).parent / "golden_sit"
TINY = {"encoder_depth": 2, "num_heads": 4}
FLAGS = ["--encoder-depth", "2", "--num-heads", "4"]


def public_file(path: Path, state: dict[str, Tensor], **changes) -> Path:
    """A .pt file in the public files' layout."""
    content = {
        "ema": state,
        "model": {name: value * 0.5 for name, value in state.items()} | {
            "pos_embed": state["pos_embed"]
        },
        "opt": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3)}},
            "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}],
        },
        "args": argparse.Namespace(
            exp_name="tiny", output_dir=pathlib.PosixPath("exps"), learning_rate=1e-4, resume=None
        ),
        "steps": 400_000,
    }  # fmt: skip
    torch.save(content | changes, path)
    return path


def elastic_state(**changes) -> dict[str, Tensor]:
    return make_state(**{"width": 32, "depth": 5} | changes)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return {
        name: value.float()
        for name, value in load_file(GOLDEN / "elit_tiny.weights.safetensors").items()
    }


@pytest.fixture(scope="module")
def file(state, tmp_path_factory) -> Path:
    return public_file(tmp_path_factory.mktemp("public") / "elit_tiny.pt", state)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """A tiny autoencoder of four channels, half the size."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(file, vae, tmp_path_factory) -> Path:
    """A converted folder with an autoencoder."""
    out = tmp_path_factory.mktemp("converted") / "elit"
    assert main(["convert", "official", str(file), str(out), *FLAGS, "--vae", str(vae)]) == 0
    return out


# ---- what a file means ----


def test_ema_or_model_of_a_public_file(file, state) -> None:
    ema = from_official_checkpoint(file, **TINY)
    model = from_official_checkpoint(str(file), weights="model", **TINY)
    assert not ema.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in ema.parameters())
    key = "label_embed.table.weight"
    assert torch.equal(ema.state_dict()[key], state["y_embedder.embedding_table.weight"])
    assert torch.equal(model.state_dict()[key], 0.5 * ema.state_dict()[key])


def test_settings_come_from_the_tensors(tmp_path) -> None:
    state = elastic_state(side=6, patch=1, channels=3, group=3, writes=2, qk_norm=True, heads=8,
                          ratio=2, classes=7)  # fmt: skip
    file = public_file(tmp_path / "x.pt", state)
    model = from_official_checkpoint(file, encoder_depth=2)  # heads: of the norm's width
    found = {key: model.config[key] for key in model.config if not key.startswith("_")}
    assert found == {
        "sample_size": 6, "in_channels": 3, "patch_size": 1, "hidden_size": 32, "num_heads": 8,
        "depth": 5, "num_classes": 7, "group": 3, "head": 2, "tail": 2, "min_latents": 1,
        "mlp_ratio": 2.0, "qk_norm": True, "write_depth": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"num_heads=4 contradicts the file.*num_heads=8"):
        from_official_checkpoint(file, encoder_depth=2, num_heads=4)
    deep = public_file(tmp_path / "deep.pt", elastic_state(depth=14, width=8, heads=1))
    model = from_official_checkpoint(deep, num_heads=1)  # more blocks than B: four in the tail
    assert model.split == (8, 2, 4)


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)], ids=str)
def test_heads_are_those_of_the_public_size(width: int, heads: int) -> None:
    from elit.interop.official_format import Unknowns, settings_of

    meta = make_state(width=16, depth=1, group=None, heads=1)
    state = {}
    for name, value in meta.items():  # only shapes count
        shape = [width if n == 16 else 4 * width if n == 64 else n for n in value.shape]
        state[name] = torch.empty(shape, device="meta")
    state["pos_embed"] = torch.empty(1, 64, width, device="meta")
    assert settings_of(state, Unknowns())["num_heads"] == heads


def test_a_state_dict_alone_is_a_checkpoint_too(tmp_path, state) -> None:
    torch.save(state, tmp_path / "bare.pt")
    model = from_official_checkpoint(tmp_path / "bare.pt", **TINY)
    expected = from_official_checkpoint(GOLDEN / "elit_tiny.weights.safetensors", **TINY)
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in model.state_dict().items())


def test_an_older_pickle_without_a_zip(tmp_path, state) -> None:
    torch.save({"ema": state}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert isinstance(from_official_checkpoint(tmp_path / "old.pt", **TINY), SiT)


def test_the_model_outlives_its_file(tmp_path, state) -> None:
    """The file is mapped while it is read; nothing of it stays mapped."""
    file = public_file(tmp_path / "x.pt", state)
    model = from_official_checkpoint(file, **TINY)
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.write(b"\0" * size)
    assert torch.equal(model.patch_embed.bias, state["x_embedder.proj.bias"])


def test_repa_s_projectors_are_left_out_with_a_word(tmp_path, state, caplog) -> None:
    layers = {f"projectors.0.{i}.{part}": torch.zeros(2) for i in (0, 2, 4)
              for part in ("weight", "bias")}  # fmt: skip
    file = public_file(tmp_path / "repa.pt", state | layers)
    model = from_official_checkpoint(file, **TINY)
    assert "left out 6 tensors of REPA's projectors (projectors.0.0.bias, ...)" in caplog.text
    plain = from_official_checkpoint(GOLDEN / "elit_tiny.weights.safetensors", **TINY)
    assert model.state_dict().keys() == plain.state_dict().keys()
    report = convert_official(file, tmp_path / "out", ConversionSettings(**TINY))
    assert len(report["left_out"]) == 6
    assert "6 tensors of REPA's projectors" in (tmp_path / "out" / "README.md").read_text()


# ---- files that are wrong ----


class Call:
    """Asks the unpickler to call something."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["args", "ema", "whole", "namespace"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, state, place, legacy) -> None:
    mark = tmp_path / "ran"
    attack = Call(os.system, f"touch {mark}")
    content: object = {"ema": state, "args": argparse.Namespace()}
    if place == "whole":
        content = attack
    elif place == "namespace":
        content["args"].hidden = [attack]
    else:
        content[place] = attack
    file = tmp_path / "evil.pt"
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"evil.pt wants \w+.system called .*nothing was run"):
        from_official_checkpoint(file, **TINY)
    assert not mark.exists()
    torch.load(file, weights_only=False)  # the attack is a real one
    assert mark.exists()


@pytest.mark.parametrize("function", [eval, getattr, __import__], ids=lambda f: f.__name__)
def test_no_function_of_python_is_called(tmp_path, function) -> None:
    file = tmp_path / "evil.pt"
    torch.save({"ema": {}, "args": Call(function, "1")}, file)
    with pytest.raises(ValueError, match=rf"wants {function.__name__} called to be read"):
        from_official_checkpoint(file)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file(tmp_path, file, share) -> None:
    cut = tmp_path / "cut.pt"
    cut.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"cut.pt cannot be read \(.*cut off, damaged"):
        from_official_checkpoint(cut, **TINY)


def test_what_is_no_checkpoint(tmp_path) -> None:
    (tmp_path / "text.pt").write_text("<html>404</html>")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme", "nothing")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"ema": 1}))
    for name in ("text.pt", "zip.pt", "cut.safetensors", "plain.pt"):
        with pytest.raises(ValueError, match=re.escape(f"{name} ")):
            from_official_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match=r"there is no file .*none.pt; give a checkpoint's file"):
        from_official_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"is a folder; give a checkpoint's file"):
        from_official_checkpoint(tmp_path)
    for content, message in (
        ([1], r"holds a list, not a checkpoint"),
        ({"epoch": 3}, r"has no 'ema': it holds epoch; it is no checkpoint of SiT's"),
        ({"model": {}}, r"has no 'ema': it holds model; give weights='model'"),
        ({"ema": {"a": 1}}, r"'ema' in .* is a dict, not tensors by name"),
        ({"ema": {"x": torch.ones(1)}}, r"it has no pos_embed, .* it is another model"),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=message):
            from_official_checkpoint(tmp_path / "x.pt")


def without(state: dict, *names: str) -> dict:
    return {key: value for key, value in state.items() if not key.startswith(names)}


ATTENTION = f"{READ}fit_layer.latents_attend_to_patches.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, f"{ATTENTION}.q_proj"),
         rf"2 missing keys \({ATTENTION}.q_proj.bias, .*q_proj.weight\)"),
        (lambda s: without(s, "blocks.2."), r"it has blocks.5, but no blocks.2"),
        (lambda s: without(s, "input_token_editor"), r"it has no input_token_editor"),
        (lambda s: without(s, "output_token_editor"), r"11 missing keys \(output_token_editor"),
        (lambda s: s | {"blocks.0.extra": torch.ones(2)}, r"1 unknown keys \(blocks.0.extra\)"),
        (lambda s: s | {"blocks.1.attn.proj.bias": torch.ones(63)},
         r"1 keys of another shape \(blocks.1.attn.proj.bias is \(63,\), not \(64,\)\)"),
        (lambda s: s | {"blocks.1.attn.proj.bias": torch.full((64,), torch.nan)},
         r"1 keys without finite float32 numbers \(blocks.1.attn.proj.bias\)"),
        (lambda s: s | {"blocks.1.attn.proj.bias": torch.full((64,), 1e300, dtype=torch.float64)},
         r"1 keys without finite float32 numbers \(blocks.1.attn.proj.bias\)"),
        (lambda s: s | {"pos_embed": torch.zeros(1, 1, 64).expand(1, 4096, 64)},
         r"pos_embed claims the shape \(1, 4096, 64\), but the file holds 256 bytes of it"),
        (lambda s: s | {"blocks.1.attn.proj.bias": torch.ones(64).to_sparse()},
         r"blocks.1.attn.proj.bias is sparse or quantized"),
        (lambda s: s | {"blocks.1.attn.proj.bias": torch.ones(64, device="meta")},
         r"blocks.1.attn.proj.bias is without data"),
        (lambda s: s | {"\x1b[2J\n": torch.ones(2)}, r"1 unknown keys \(\?\[2J\?\)"),
        (lambda s: s | {"blocks.1.attn.proj.bias": torch.ones(64, dtype=torch.int64)},
         r"blocks.1.attn.proj.bias is of torch.int64, not one of torch.float16"),
        (lambda s: s | {"pos_embed": s["pos_embed"].roll(1, 1)}, r"made with other positions"),
        (lambda s: s | {"pos_embed": s["pos_embed"][:, :63]}, r"63 tokens is of no square image"),
        (lambda s: s | {"x_embedder.proj.weight": torch.ones(64)}, r"\(64,\) should have 4 axes"),
        (lambda s: s | {"final_layer.linear.weight": torch.ones(32, 64),
                        "final_layer.linear.bias": torch.ones(32)}, r"predicts a variance too"),
        (lambda s: s | {f"{READ}learned_query_embed": torch.ones(15, 64)}, r"15 latents .*square"),
        (lambda s: s | {f"{READ}learned_query_embed": torch.ones(9, 64)},
         r"8x8 tokens cannot be cut into groups of 3x3"),
    ],
    ids=["read", "block", "no read", "no write", "extra", "shape", "nan", "beyond float32", "claim",
         "sparse", "meta", "control", "whole", "positions",
         "oblong", "axes", "variance", "latents", "group"],
)  # fmt: skip
def test_keys_that_do_not_fit_are_named(tmp_path, state, change, message) -> None:
    file = public_file(tmp_path / "x.pt", change(state))
    with pytest.raises(ValueError, match=rf"x.pt cannot be converted: .*{message}"):
        from_official_checkpoint(file, **TINY)


def test_a_wrong_encoder_depth(tmp_path, file, state) -> None:
    with pytest.raises(ValueError, match=r"encoder_depth=8 and 2 blocks .*no core in the 6 blocks"):
        from_official_checkpoint(file, num_heads=4)
    with pytest.raises(ValueError, match=r"encoder_depth=4 .*8 in all public"):
        from_official_checkpoint(file, encoder_depth=4, num_heads=4)
    for wrong in (-1, 2.0, True, None):
        with pytest.raises(ValueError, match=rf"encoder_depth={wrong} is not allowed"):
            from_official_checkpoint(file, encoder_depth=wrong, num_heads=4)
    assert from_official_checkpoint(file, encoder_depth=0, num_heads=4).split == (0, 4, 2)
    none_after = from_official_checkpoint(file, encoder_depth=2, decoder_depth=0, num_heads=4)
    assert none_after.split == (2, 4, 0)
    told = public_file(tmp_path / "x.pt", state, args=argparse.Namespace(encoder_depth=2))
    with pytest.raises(
        ValueError, match=r"encoder_depth=3 contradicts the args .*give encoder_depth=2"
    ):
        from_official_checkpoint(told, encoder_depth=3, num_heads=4)
    assert from_official_checkpoint(told, **TINY).split == (2, 2, 2)


def test_a_plain_sit_given_as_elit_and_the_other_way(tmp_path, state) -> None:
    plain = make_state(width=32, depth=3, group=None)
    file = public_file(tmp_path / "x.pt", plain)
    assert not from_official_checkpoint(file, num_heads=4).is_elastic
    with pytest.raises(ValueError, match=r"encoder_depth=2 is of an ELIT-SiT, but this is a plain"):
        from_official_checkpoint(file, **TINY)
    file = public_file(tmp_path / "x.pt", plain, args=argparse.Namespace(enable_elit=True))
    with pytest.raises(ValueError, match=r"enable_elit=True, but its tensors are of a plain SiT"):
        from_official_checkpoint(file, num_heads=4)
    file = public_file(tmp_path / "x.pt", state, args={"enable_elit": False})
    with pytest.raises(ValueError, match=r"enable_elit=False, but its tensors are of an ELIT-SiT"):
        from_official_checkpoint(file, **TINY)


def test_arguments_that_are_not_allowed(file) -> None:
    with pytest.raises(ValueError, match=r"unknown weights 'emma'.*did you mean 'ema'"):
        from_official_checkpoint(file, weights="emma", **TINY)
    with pytest.raises(ValueError, match=r"width 64 .*no public one .*\(384, 768, 1024, 1152\)"):
        from_official_checkpoint(file, encoder_depth=2)
    with pytest.raises(ValueError, match=r"num_heads=0 is not allowed"):
        from_official_checkpoint(file, encoder_depth=2, num_heads=0)
    with pytest.raises(ValueError, match=r"width 64 cannot be divided into 5 heads"):
        from_official_checkpoint(file, encoder_depth=2, num_heads=5)


def test_diffusers_dit_is_refused_with_what_to_do(tmp_path, folder) -> None:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1,
                                  sample_size=4, num_embeds_ada_norm=3)  # fmt: skip
    model.save_pretrained(tmp_path / "DiT" / "transformer")
    for name in ("DiT", "DiT/transformer"):
        with pytest.raises(
            ValueError, match=r"not a velocity, and can be no ElitPipeline.*elasticize"
        ):
            from_official_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match=r"a folder with a SiT, .*ElitPipeline.from_pretrained"):
        from_official_checkpoint(folder)


def test_flipped_bits_are_found_by_their_checksum(tmp_path, file) -> None:
    whole = file.read_bytes()
    header = struct.Struct("<26xHH")  # of a member: the lengths of its name and of what follows
    with zipfile.ZipFile(file) as archive:
        members = [m for m in archive.infolist() if "/data/" in m.filename and m.file_size > 1000]
    generator = random.Random(0)
    damaged = tmp_path / "x.pt"
    for weights in ("ema", "model"):
        found = 0
        for member in members:
            lengths = header.unpack_from(whole, member.header_offset)
            place = member.header_offset + header.size + sum(lengths)
            place += generator.randrange(member.file_size)
            changed = bytearray(whole)
            changed[place] ^= 1 << generator.randrange(8)
            damaged.write_bytes(changed)
            try:
                from_official_checkpoint(damaged, weights=weights, **TINY)
            except ValueError as error:
                assert "do not match their checksum" in str(error)  # noqa: PT017
                found += 1
        assert 0 < found < len(members)  # the others are of weights that nobody asked for


@pytest.mark.parametrize("legacy", [False, True])
def test_any_damage_is_a_value_error(tmp_path, state, legacy) -> None:
    small = {key: value for key, value in state.items() if value.numel() < 200}
    torch.save({"ema": small, "args": argparse.Namespace(a=1)}, tmp_path / "x.pt",
               _use_new_zipfile_serialization=not legacy)  # fmt: skip
    whole = (tmp_path / "x.pt").read_bytes()
    generator = random.Random(1)
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(3):
            changed[generator.randrange(len(whole))] = generator.randrange(256)
        (tmp_path / "x.pt").write_bytes(changed)
        with pytest.raises(ValueError, match=r"x\.pt"):
            from_official_checkpoint(tmp_path / "x.pt", **TINY)


@pytest.mark.parametrize("key", [0, None, (1, 2), b"pos_embed"], ids=str)
def test_keys_are_names(tmp_path, key) -> None:
    torch.save({"ema": {key: torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"not by name"):
        from_official_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("path", [None, 5, b"x.pt", "~nobody-of-this-name/x.pt"], ids=str)
def test_what_is_no_path(path) -> None:
    with pytest.raises(ValueError, match=r"is no path"):
        from_official_checkpoint(path)


# ---- files that are a little different ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_are_read(tmp_path, state, dtype) -> None:
    file = public_file(tmp_path / "x.pt", {key: value.to(dtype) for key, value in state.items()})
    model = from_official_checkpoint(file, **TINY)
    found = model.state_dict()["label_embed.table.weight"]
    assert torch.equal(found, state["y_embedder.embedding_table.weight"].to(dtype).float())
    convert_official(file, tmp_path / "out", ConversionSettings(**TINY))
    name = str(dtype).removeprefix("torch.")
    assert f"stored as {name}, as float32" in (tmp_path / "out" / "README.md").read_text()


def test_wrapped_modules_are_read(tmp_path, state) -> None:
    wrapped = {f"module._orig_mod.{key}": value for key, value in state.items()}
    torch.save({"ema": wrapped}, tmp_path / "x.pt")
    assert from_official_checkpoint(tmp_path / "x.pt", **TINY).split == (2, 2, 2)


def test_safetensors_by_any_name(tmp_path) -> None:
    golden = (GOLDEN / "elit_tiny.weights.safetensors").read_bytes()
    (tmp_path / "x.pt").write_bytes(golden)
    assert isinstance(from_official_checkpoint(tmp_path / "x.pt", **TINY), SiT)


def test_what_the_args_tell_is_taken_or_contradicted(tmp_path, state) -> None:
    told = {"encoder_depth": "2", "dit_decoder_depth": 1.0, "num_heads": torch.tensor(8)}
    file = public_file(tmp_path / "x.pt", state, args=told, steps=torch.tensor(7.0))
    model = from_official_checkpoint(file, encoder_depth=2)
    assert (model.split, model.config.num_heads) == ((2, 3, 1), 8)
    for name, value in (("encoder_depth", 3), ("decoder_depth", 2), ("num_heads", 4)):
        with pytest.raises(ValueError, match=rf"{name}={value} contradicts the args .*{name}="):
            from_official_checkpoint(file, **{"encoder_depth": 2} | {name: value})
    report = convert_official(file, tmp_path / "out", ConversionSettings(encoder_depth=2))
    assert report["steps"] == 7


def test_a_model_without_a_null_class_keeps_all_its_classes(tmp_path, state, caplog) -> None:
    args = argparse.Namespace(class_dropout_prob=0.0, num_classes=11)
    model = from_official_checkpoint(public_file(tmp_path / "x.pt", state, args=args), **TINY)
    assert model.config.num_classes == 11
    table = model.state_dict()["label_embed.table.weight"]
    assert torch.equal(table[:11], state["y_embedder.embedding_table.weight"])
    assert not table[11].any()
    assert "no null class" in caplog.text
    args.num_classes = 9
    with pytest.raises(ValueError, match=r"embedding_table.weight is \(11, 64\), not \(9, 64\)"):
        from_official_checkpoint(public_file(tmp_path / "x.pt", state, args=args), **TINY)


def test_what_means_nothing_is_not_taken_in_silence(tmp_path, state, caplog) -> None:
    plain = public_file(tmp_path / "x.pt", make_state(width=32, depth=3, group=None))
    with pytest.raises(ValueError, match=r"decoder_depth=1 is of an ELIT-SiT"):
        from_official_checkpoint(plain, num_heads=4, decoder_depth=1)
    torch.save(state, tmp_path / "bare.pt")
    from_official_checkpoint(tmp_path / "bare.pt", weights="model", **TINY)
    assert "has one set of weights" in caplog.text


# ---- a converted folder ----


def test_a_converted_folder_is_the_checkpoint(folder, state) -> None:
    pipeline = load_pipeline(folder)
    assert type(pipeline) is ElitPipeline
    expected = from_official_checkpoint(GOLDEN / "elit_tiny.weights.safetensors", **TINY)
    x, sigma, label = torch.randn(1, 4, 16, 16), torch.tensor([0.4]), torch.tensor([3])
    for kept in (1, 16):
        with torch.no_grad():
            found = pipeline.transformer(x, sigma, label, num_latents=kept).sample
            wanted = expected(x, sigma, label, num_latents=kept).sample
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
    (image,) = pipeline([3], budget=0.25, num_inference_steps=2, output_type="np").images
    assert image.shape == (32, 32, 3)
    wide = pipeline([3], num_inference_steps=1, height=16, width=48, output_type="np").images
    assert wide.shape == (1, 16, 48, 3)


def test_the_card_has_source_licence_and_settings(folder, file) -> None:
    import hashlib

    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: other\nlicense_name: snap-non-commercial\n")
    for said in ("Snap Inc.'s non-commercial\nlicence", "| file | `elit_tiny.pt` |", "400,000",
                 "| head | 2 |", "| group | 4 |", "| weights | ema |",
                 hashlib.sha256(file.read_bytes()).hexdigest()):  # fmt: skip
        assert said in card
    assert "AutoencoderKL" not in card  # the folder has one
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    compile(code, "card", "exec")


def test_a_folder_of_others_is_never_written_into(folder, file, tmp_path, vae, capsys) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    words = ["convert", "official", str(file)]
    cases = [
        (tmp_path / "mine", FLAGS, "is not empty and holds no conversion"),
        (folder, FLAGS, "holds another conversion, of elit_tiny.pt or with other settings"),
        (file, FLAGS, "is not a folder"),
    ]
    for out, flags, message in cases:
        assert main([*words, str(out), *flags]) == 2
        assert message in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert (
        main([*words, str(folder), *FLAGS, "--vae", str(vae)]) == 0
    )  # this very one: nothing to do
    assert "holds this conversion already" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_conversion_that_fails_leaves_nothing(file, tmp_path, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("elit.interop.convert.model_card", full)
        with pytest.raises(OSError, match="No space"):
            convert_official(file, tmp_path / "out", ConversionSettings(**TINY))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").iterdir())
    convert_official(file, tmp_path / "out", ConversionSettings(**TINY))
    assert (tmp_path / "out" / "model_index.json").exists()


def test_a_conversion_that_was_damaged_is_not_taken_for_whole(file, tmp_path) -> None:
    settings, out = ConversionSettings(**TINY), tmp_path / "out"
    convert_official(file, out, settings)
    (weights,) = out.glob("transformer/*.safetensors")
    weights.write_bytes(b"1")
    with pytest.raises(ValueError, match=r"safetensors is missing or was changed; remove"):
        convert_official(file, out, settings)
    (out / "conversion.json").write_text('{"source": 5}')
    with pytest.raises(ValueError, match=r"holds no conversion"):
        convert_official(file, out, settings)


def test_two_conversions_at_once_are_one(file, tmp_path, monkeypatch) -> None:
    settings, out = ConversionSettings(**TINY), tmp_path / "out"
    card = convert.model_card

    def slow(report) -> str:
        monkeypatch.undo()
        convert_official(file, out, settings)  # another process, in the meantime
        return card(report)

    monkeypatch.setattr(convert, "model_card", slow)
    assert convert_official(file, out, settings)["parameters"] == 561_936
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_conversion_left_is_removed(file, tmp_path) -> None:
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, check=True).stdout
    left = tmp_path / f".out.{_files._place()}-{int(dead)}-00000000.part"
    (left / "transformer").mkdir(parents=True)
    alive = tmp_path / f".out.{_files._place()}-{os.getpid()}-00000000.part"
    alive.mkdir()
    convert_official(file, tmp_path / "out", ConversionSettings(**TINY))
    assert {p.name for p in tmp_path.iterdir()} == {"out", alive.name}


def test_places_of_the_folder(file, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = ConversionSettings(**TINY)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for out in (tmp_path / "link", "~/home", tmp_path / ("x" * 250)):
        convert_official(file, out, settings)
    for name in ("real", "home", "x" * 250):
        assert (tmp_path / name / "model_index.json").exists()


def test_a_converted_folder_runs_the_published_sampler(folder) -> None:
    pipeline = load_pipeline(folder)
    assert type(pipeline.scheduler).__name__ == "FlowMatchUniformEulerScheduler"
    noise = torch.randn(1, 4, 16, 16, dtype=torch.float64)
    settings = {"num_inference_steps": 3, "output_type": "latent", "noise": noise}
    exact = pipeline([3], dtype=torch.float64, **settings).images
    assert exact.dtype == torch.float64
    torch.testing.assert_close(pipeline([3], **settings).images.double(), exact, rtol=0, atol=1e-5)


def test_convert_tells_what_it_did(file, tmp_path, capsys) -> None:
    words = ["convert", "official", str(file), str(tmp_path / "a"), *FLAGS]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "ELIT-SiT of 561.9 k parameters, ema, 400000 steps" in shown
    assert "head 2, core 2, tail 2, group 4" in shown
    assert "README.md has the licence" in shown
    assert "with --vae stabilityai/sd-vae-ft-mse" in shown
    assert "elit sample" not in shown  # which could draw no image from it
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"out", "source", "kind", "elastic", "num_classes", "config"} | {
        "weights", "stored", "steps", "parameters", "left_out",
    }  # fmt: skip
    assert (report["steps"], report["elastic"], report["parameters"]) == (400_000, True, 561_936)
    assert main(["convert", "pickle", "x", "y"]) == 2
    assert "unknown format 'pickle': use one of 'official', 'dit'" in capsys.readouterr().err
    assert main(["convert", "official", str(file), str(tmp_path / "b")]) == 2
    assert "give --num-heads" in capsys.readouterr().err


def test_an_autoencoder_that_does_not_fit(file, tmp_path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(latent_channels=8, block_out_channels=(32,)).save_pretrained(tmp_path / "vae")
    settings = ConversionSettings(**TINY, vae=str(tmp_path / "vae"))
    with pytest.raises(ValueError, match=r"VAE latents of 8 channels, but the model takes 4"):
        convert_official(file, tmp_path / "out", settings)


def run_json(capsys, *words: object) -> dict:
    assert main([*map(str, words), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_commands_work_from_a_converted_folder(folder, tmp_path, capsys) -> None:
    flops = run_json(capsys, "flops", folder)
    assert flops["resolution"] == 32
    assert [row["num_latents"] for row in flops["rows"]] == [16, 8, 4, 2, 1]
    info = run_json(capsys, "info", folder)
    assert (info["split"], info["min_latents"], info["max_latents"]) == ([2, 2, 2], 1, 16)
    words = ["--labels", 3, "--budget", 1, 0.25, "--steps", 2, "--guidance", "ccfg"]
    drawn = run_json(capsys, "sample", folder, *words, "--out", tmp_path / "drawn")
    assert [row["num_latents"] for row in drawn["rows"]] == [16, 4]
    assert all(Path(name).exists() for row in drawn["rows"] for name in row["files"])


def test_eval_from_a_converted_folder(folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path / "cache"))

    class Mean(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)

    network = tmp_path / "mean.pt"
    torch.jit.script(Mean()).save(str(network))
    from PIL import Image

    (tmp_path / "real").mkdir()
    for i in range(16):
        Image.effect_noise((32, 32), 40 + i).convert("RGB").save(tmp_path / "real" / f"{i}.png")
    report = run_json(
        capsys, "eval", folder, "--reference", tmp_path / "real", "--network", network,
        "--samples", 16, "--steps", 1, "--batch-size", 8, "--budget", 0.25, "--device", "cpu",
        "--out", tmp_path / "scores",
    )  # fmt: skip
    (row,) = report["rows"]
    assert row["budget"] == 0.25
    assert report["model"]["class"] == "SiT"
    assert row["scores"]
