"""Public checkpoints: files as they come, a little different, and wrong."""

import argparse
import os
import pickle
import random
import re
import struct
import zipfile

import pytest
import torch
from helpers import refuses
from official_files import GOLDEN, TINY, elastic_state, public_file
from official_files import file as file  # fixtures
from official_files import state as state
from sit_reference import READ, make_state

from elit import from_official_checkpoint
from elit._pickles import check_bytes, read_pickle
from elit._wrappers import without_wrapping
from elit.interop.convert import ConversionSettings, convert_official

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
    message = r"num_heads=4 contradicts the file.*num_heads=8"
    refuses(message, from_official_checkpoint, file, encoder_depth=2, num_heads=4)
    deep = public_file(tmp_path / "deep.pt", elastic_state(depth=14, width=8, heads=1))
    model = from_official_checkpoint(deep, num_heads=1)  # more blocks than B: four in the tail
    assert model.split == (8, 2, 4)


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)], ids=str)
def test_heads_are_those_of_the_public_size(width: int, heads: int) -> None:
    from elit.interop.official import settings_of

    meta = make_state(width=16, depth=1, group=None, heads=1)
    state = {}
    for name, value in meta.items():  # only shapes count
        shape = [width if n == 16 else 4 * width if n == 64 else n for n in value.shape]
        state[name] = torch.empty(shape, device="meta")
    state["pos_embed"] = torch.empty(1, 64, width, device="meta")
    assert settings_of(state, ConversionSettings())["num_heads"] == heads


@pytest.mark.parametrize("form", ["bare", "older pickle", "safetensors"])
def test_other_forms_of_a_file(tmp_path, state, form) -> None:
    golden, file = GOLDEN / "elit_tiny.weights.safetensors", tmp_path / "x.pt"
    if form == "safetensors":
        file.write_bytes(golden.read_bytes())
    else:
        content = state if form == "bare" else {"ema": state}
        torch.save(content, file, _use_new_zipfile_serialization=form == "bare")
    model = from_official_checkpoint(file, **TINY)
    expected = from_official_checkpoint(golden, **TINY).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


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
    refuses(rf"wants {function.__name__} called to be read", from_official_checkpoint, file)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file(tmp_path, file, share) -> None:
    cut = tmp_path / "cut.pt"
    cut.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    refuses(r"cut.pt cannot be read \(.*cut off, damaged", from_official_checkpoint, cut, **TINY)


def test_what_is_no_checkpoint(tmp_path) -> None:
    (tmp_path / "text.pt").write_text("<html>404</html>")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme", "nothing")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"ema": 1}))
    for name in ("text.pt", "zip.pt", "cut.safetensors", "plain.pt"):
        refuses(re.escape(f"{name} "), from_official_checkpoint, tmp_path / name)
    for path, message in (
        (tmp_path / "none.pt", r"there is no file .*none.pt; give a checkpoint's file"),
        (tmp_path, r"is a folder; give a checkpoint's file"),
        *((path, "is no path") for path in (None, 5, b"x.pt")),
        ("~nobody-of-this-name/x.pt", "there is no such user"),
    ):
        refuses(message, from_official_checkpoint, path)


def without(state: dict, *names: str) -> dict:
    return {key: value for key, value in state.items() if not key.startswith(names)}


def plain(_: dict) -> dict:
    return make_state(width=32, depth=3, group=None)


ATTENTION = f"{READ}fit_layer.latents_attend_to_patches.0"
BIAS = "blocks.1.attn.proj.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, f"{ATTENTION}.q_proj"),
         rf"2 missing keys \({ATTENTION}.q_proj.bias, .*q_proj.weight\)"),
        (lambda s: without(s, "blocks.2."), r"it has blocks.5, but no blocks.2"),
        (lambda s: without(s, "input_token_editor"), r"it has no input_token_editor"),
        (lambda s: without(s, "output_token_editor"), r"11 missing keys \(output_token_editor"),
        (lambda s: s | {"blocks.0.extra": torch.ones(2)}, r"1 unknown keys \(blocks.0.extra\)"),
        (lambda s: s | {BIAS: torch.ones(63)},
         rf"1 keys of another shape \({BIAS} is \(63,\), not \(64,\)\)"),
        (lambda s: s | {BIAS: torch.full((64,), torch.nan)},
         rf"1 keys without finite float32 numbers \({BIAS}\)"),
        (lambda s: s | {BIAS: torch.full((64,), 1e300, dtype=torch.float64)},
         rf"1 keys without finite float32 numbers \({BIAS}\)"),
        (lambda s: s | {"pos_embed": torch.zeros(1, 1, 64).expand(1, 4096, 64)},
         r"pos_embed claims the shape \(1, 4096, 64\), but the file holds 256 bytes of it"),
        (lambda s: s | {BIAS: torch.ones(64).to_sparse()}, rf"{BIAS} is sparse or quantized"),
        (lambda s: s | {BIAS: torch.ones(64, device="meta")}, rf"{BIAS} is without data"),
        (lambda s: s | {"\x1b[2J\n": torch.ones(2)}, r"1 unknown keys \(\?\[2J\?\)"),
        (lambda s: s | {BIAS: torch.ones(64, dtype=torch.int64)},
         rf"{BIAS} is of torch.int64, not one of torch.float16"),
        (lambda s: s | {"pos_embed": s["pos_embed"].roll(1, 1)}, r"made with other positions"),
        (lambda s: s | {"pos_embed": s["pos_embed"][:, :63]}, r"63 tokens is of no square image"),
        (lambda s: s | {"x_embedder.proj.weight": torch.ones(64)}, r"\(64,\) should have 4 axes"),
        (lambda s: s | {"final_layer.linear.weight": torch.ones(32, 64),
                        "final_layer.linear.bias": torch.ones(32)}, r"predicts a variance too"),
        (lambda s: s | {f"{READ}learned_query_embed": torch.ones(15, 64)}, r"15 latents .*square"),
        (lambda s: s | {f"{READ}learned_query_embed": torch.ones(9, 64)},
         r"8x8 tokens cannot be cut into groups of 3x3"),
        (plain, r"encoder_depth=2 is of an ELIT-SiT, but this is a plain"),
        (lambda s: {f"{name}.{key}": x for name in ("net", "teacher") for key, x in s.items()},
         r"net\.pos_embed, teacher\.pos_embed"),
        (lambda s: s | {f"_orig_mod.{key}": x for key, x in s.items()}, r"it has .* twice"),
        (lambda s: {"x": torch.ones(1)}, r"it has no pos_embed, .* it is another model"),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit_are_named(tmp_path, state, change, message) -> None:
    torch.save({"ema": change(state)}, tmp_path / "x.pt")
    message = rf"x.pt cannot be converted: .*{message}"
    refuses(message, from_official_checkpoint, tmp_path / "x.pt", **TINY)


@pytest.mark.parametrize(
    ("content", "given", "message"),
    [
        (lambda s: [1], {}, r"holds a list, not a checkpoint"),
        (lambda s: {"epoch": 3}, {}, r"no 'ema': it holds epoch; it is no checkpoint of a DiT or"),
        (lambda s: {"model": {}}, {}, r"has no 'ema': it holds model; give weights='model'"),
        (lambda s: {"ema": {"a": 1}}, {}, r"'ema' in .* is a dict, not tensors by name"),
        *((lambda s, key=key: {"ema": {key: torch.ones(1)}}, {}, r"not by name")
          for key in (0, None, (1, 2), b"pos_embed")),
        (lambda s: {"ema": s}, {"encoder_depth": 8}, r"8 and 2 blocks .*no core in the 6 blocks"),
        (lambda s: {"ema": s}, {"encoder_depth": 4}, r"encoder_depth=4 .*8 in all public"),
        *((lambda s: {"ema": s}, {"encoder_depth": wrong}, f"encoder_depth={wrong} is not allowed")
          for wrong in (-1, 2.0, True, None)),
        (lambda s: {"ema": s}, {"num_heads": 0}, r"num_heads=0 is not allowed"),
        (lambda s: {"ema": s}, {"num_heads": 5}, r"width 64 cannot be divided into 5 heads"),
        (lambda s: {"ema": s}, {"num_heads": None},
         r"width 64 .*no public one .*\(384, 768, 1024, 1152\)"),
        (lambda s: {"ema": s}, {"weights": "emma"}, r"unknown weights 'emma'.*did you mean 'ema'"),
        (lambda s: {"ema": s, "args": argparse.Namespace(encoder_depth=2)}, {"encoder_depth": 3},
         r"encoder_depth=3 contradicts the args .*give encoder_depth=2"),
        (lambda s: {"ema": s, "args": {"dit_decoder_depth": 1.0}}, {"decoder_depth": 2},
         r"decoder_depth=2 contradicts the args .*decoder_depth=1"),
        (lambda s: {"ema": s, "args": {"num_heads": torch.tensor(8)}}, {},
         r"num_heads=4 contradicts the args .*num_heads=8"),
        (lambda s: {"ema": s, "args": {"enable_elit": False}}, {},
         r"enable_elit=False, but its tensors are of an ELIT-SiT"),
        (lambda s: {"ema": plain(s), "args": argparse.Namespace(enable_elit=True)},
         {"encoder_depth": 8}, r"enable_elit=True, but its tensors are of a plain SiT"),
        (lambda s: {"ema": plain(s)}, {"encoder_depth": 8, "decoder_depth": 1},
         r"decoder_depth=1 is of an ELIT-SiT"),
        (lambda s: {"ema": s, "args": {"class_dropout_prob": 0.0, "num_classes": 9}}, {},
         r"embedding_table.weight is \(11, 64\), not \(9, 64\)"),
    ],
)  # fmt: skip
def test_files_and_arguments_that_contradict(tmp_path, state, content, given, message) -> None:
    torch.save(content(state), tmp_path / "x.pt")
    refuses(message, from_official_checkpoint, tmp_path / "x.pt", **TINY | given)


def test_depths_are_as_given_or_told(tmp_path, file, state) -> None:
    told = public_file(tmp_path / "x.pt", state, args=argparse.Namespace(encoder_depth=2))
    for path, given, split in (
        (file, {"encoder_depth": 0}, (0, 4, 2)),
        (file, {"decoder_depth": 0}, (2, 4, 0)),
        (told, {}, (2, 2, 2)),
    ):
        assert from_official_checkpoint(path, **TINY | given).split == split
    plain_file = public_file(tmp_path / "y.pt", plain(state))
    assert not from_official_checkpoint(plain_file, num_heads=4).is_elastic


def test_flipped_bits_are_found_by_their_checksum(tmp_path, file) -> None:
    whole, damaged, generator = file.read_bytes(), tmp_path / "x.pt", random.Random(0)
    header = struct.Struct("<26xHH")  # of a member: the lengths of its name and of what follows
    with zipfile.ZipFile(file) as archive:
        members = [m for m in archive.infolist() if "/data/" in m.filename and m.file_size > 1000]
    members.sort(key=lambda member: member.file_size)
    found = []
    for member in [*members[:-1:6], members[-1]]:  # of every size, the least and the largest too
        place = member.header_offset + header.size + generator.randrange(member.file_size)
        place += sum(header.unpack_from(whole, member.header_offset))
        changed = bytearray(whole)
        changed[place] ^= 1 << generator.randrange(8)
        damaged.write_bytes(changed)
        content, hit = read_pickle(damaged), []
        for weights in ("ema", "model"):
            try:
                check_bytes(damaged, content[weights])
            except ValueError:
                hit.append(weights)
        found.append(hit)
    assert all(hit in (["ema"], ["model"], ["ema", "model"]) for hit in found)
    assert max(sum(weights in hit for hit in found) for weights in ("ema", "model")) < len(found)
    message = "do not match their checksum"  # whoever loads it is told
    refuses(message, from_official_checkpoint, damaged, weights=found[-1][0], **TINY)
    if len(found[-1]) == 1:  # the damage is in weights that nobody asked for
        other = "model" if found[-1] == ["ema"] else "ema"
        from_official_checkpoint(damaged, weights=other, **TINY)


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
        refuses(r"x\.pt", from_official_checkpoint, tmp_path / "x.pt", **TINY)


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


def _block(name: str, key: str) -> str:
    return re.sub(r"^(blocks\.\d+)\.", rf"\1.{name}.", key)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"model.{key}",
        lambda key: f"_fsdp_wrapped_module.{_block('_fsdp_wrapped_module', key)}",
        lambda key: _block("_orig_mod", key),
        lambda key: f"module.{_block('_fsdp_wrapped_module._checkpoint_wrapped_module', key)}",
    ],
)
@pytest.mark.parametrize("holder", ["ema", "state_dict", None])
def test_wrapped_modules_are_read(tmp_path, state, wrap, holder) -> None:
    wrapped = {wrap(key): value for key, value in state.items()}
    torch.save(wrapped if holder is None else {holder: wrapped}, tmp_path / "x.pt")
    found = from_official_checkpoint(tmp_path / "x.pt", **TINY).state_dict()
    wanted = from_official_checkpoint(public_file(tmp_path / "y.pt", state), **TINY).state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_wrapped_modules_of_torch_are_read(tmp_path) -> None:
    """What torch itself makes of the names: AveragedModel, compiled and checkpointed blocks."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.optim.swa_utils import AveragedModel

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    wanted = model.state_dict()
    model[0] = torch.compile(checkpoint_wrapper(model[0]))
    for wrapped in (model, torch.compile(model), AveragedModel(model)):
        found = without_wrapping(wrapped.state_dict())
        assert found.keys() == wanted.keys()


def test_what_the_args_tell_is_taken_or_contradicted(tmp_path, state) -> None:
    told = {"encoder_depth": "2", "dit_decoder_depth": 1.0, "num_heads": torch.tensor(8)}
    file = public_file(tmp_path / "x.pt", state, args=told, steps=torch.tensor(7.0))
    model = from_official_checkpoint(file, encoder_depth=2)
    assert (model.split, model.config.num_heads) == ((2, 3, 1), 8)
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


def test_what_means_nothing_is_not_taken_in_silence(tmp_path, state, caplog) -> None:
    torch.save(state, tmp_path / "bare.pt")
    from_official_checkpoint(tmp_path / "bare.pt", weights="model", **TINY)
    assert "has one set of weights" in caplog.text
