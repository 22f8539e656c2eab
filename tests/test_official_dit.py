"""Facebook's DiT checkpoints: the same layout as SiT, into diffusers' DiTTransformer2DModel."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps
from helpers import refuses
from sit_reference import ReferenceSiT, make_state
from torch import Tensor

from elit import elasticize, from_official_checkpoint, load_elastic
from elit.cli.main import main
from elit.interop.convert import ConversionSettings, convert_official
from elit.interop.dit import read_dit

HEADS = 4


def read(file, **given):
    return read_dit(file, ConversionSettings("dit", **given))


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """A plain SiT's state dict that predicts noise and its variance."""
    settings = {"width": 32, "depth": 3, "group": None, "side": 4, "classes": 1000}
    last = make_state(**settings, channels=8)
    wide = {name: v for name, v in last.items() if name.startswith("final_layer.linear")}
    return make_state(**settings) | wide


@pytest.fixture(scope="module")
def file(state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dit") / "DiT-XL-2-256x256.pt"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def folder(file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "dit"
    vae = out.parent / "vae"
    AutoencoderKL(latent_channels=4, block_out_channels=(32,)).save_pretrained(vae)
    words = ["convert", "dit", str(file), str(out), "--num-heads", str(HEADS), "--vae", str(vae)]
    assert main(words) == 0
    return out


@pytest.mark.parametrize("time", [0, 1, 500, 999])
def test_outputs_are_those_of_the_formulas(file, state, time) -> None:
    """Written out in tests/sit_reference.py, which the public SiT format's golden values check."""
    model, _ = read(file, num_heads=HEADS)
    for module in model.modules():
        if isinstance(module, Timesteps):  # its lowest frequency is that of 128 of 127
            module.downscale_freq_shift = 0
    torch.manual_seed(0)
    x, t, labels = torch.randn(2, 4, 8, 8), torch.full((2,), time), torch.tensor([3, 1000])
    expected = ReferenceSiT(state, HEADS, 0, 0)(x, t, labels)
    assert expected.shape == (2, 8, 8, 8)
    model.double()
    with torch.no_grad():
        found = model(x.double(), t, labels).sample
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_steps_are_those_of_the_training(folder) -> None:
    """Ho et al.: 1000 variances from 1e-4 to 0.02, and noise is predicted."""
    scheduler = DiTPipeline.from_pretrained(folder).scheduler
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0).float()
    torch.testing.assert_close(scheduler.alphas_cumprod, kept, rtol=1e-4, atol=0)
    assert scheduler.config.prediction_type == "epsilon"
    assert not scheduler.config.clip_sample


def test_a_converted_folder_is_a_pipeline_of_diffusers(folder, file) -> None:
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = read(file, num_heads=HEADS)[0].state_dict()
    found = pipeline.transformer.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    draw = {"num_inference_steps": 2, "output_type": "np"}
    (image,) = pipeline([207], **draw, generator=torch.Generator().manual_seed(0)).images
    assert image.shape == (8, 8, 3)
    elasticize(pipeline, head=1, tail=1, group=2)
    (same,) = pipeline([207], **draw, generator=torch.Generator().manual_seed(0)).images
    assert abs(same - image).max() < 1e-4
    pipeline.transformer.set_budget(0.25)
    (cheap,) = pipeline([207], **draw, generator=torch.Generator().manual_seed(0)).images
    assert abs(cheap - image).max() > 1e-4


def test_a_plain_sit_becomes_elastic_too(tmp_path) -> None:
    """Lossless at full budget, and still so out of its folder."""
    torch.save(make_state(width=32, depth=5, group=None), tmp_path / "x.pt")
    model = from_official_checkpoint(tmp_path / "x.pt", num_heads=HEADS)
    torch.manual_seed(0)
    given = torch.randn(2, 4, 16, 8), torch.rand(2), torch.tensor([3, 9])
    with torch.no_grad():
        original = model(*given).sample
        elasticize(model, head=1, tail=1, group=4)
        torch.testing.assert_close(model(*given).sample, original, rtol=0, atol=2e-5)
        with pytest.raises(ValueError, match=r"an elasticized SiT keeps the first latents"):
            model(*given, num_latents=2, latent_indices=torch.tensor([0, 3]))
        cheap = model(*given, num_latents=4).sample
        assert abs(cheap - original).max() > 1e-3
        model.save_pretrained(tmp_path / "elastic")
        again = load_elastic(tmp_path / "elastic")
        assert torch.equal(again(*given, num_latents=4).sample, cheap)


def test_the_card_has_source_licence_and_use(folder) -> None:
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-nc-4.0\n")
    for said in ("# DiT from DiT-XL-2-256x256.pt", "under CC BY-NC 4.0", "`elit convert dit`",
                 "| num_layers | 3 |", "| training steps | unknown |"):  # fmt: skip
        assert said in card
    assert "Snap" not in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert 'DiTPipeline.from_pretrained(".")' in code
    compile(code, "card", "exec")
    assert json.loads((folder / "conversion.json").read_text())["num_classes"] == 1000


def test_convert_tells_what_it_did(file, tmp_path, capsys) -> None:
    words = ["convert", "dit", str(file), str(tmp_path / "a"), "--num-heads", "4"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^DiT of [\d.]+ k parameters, the only weights\n", shown)
    assert "width 32, 4 heads, 3 blocks" in shown
    assert "with --vae stabilityai/sd-vae-ft-mse" in shown
    assert main([*words, "--encoder-depth", "2"]) == 2  # the folder is of other settings
    assert "holds another conversion" in capsys.readouterr().err
    words[3] = str(tmp_path / "b")
    assert main([*words, "--encoder-depth", "2"]) == 2
    assert "--encoder-depth 2 is of an ELIT-SiT, not of a DiT" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "a"), "--labels", "1"]) == 2
    advice = "not ElitPipeline; load it by diffusers.DiTPipeline.from_pretrained"
    assert advice in capsys.readouterr().err


def test_ema_and_wrapped_training_checkpoints(state, tmp_path) -> None:
    wrapped = {f"module.{name}": value for name, value in state.items()}
    torch.save({"model": wrapped, "ema": state, "steps": 7}, tmp_path / "x.pt")
    model, about = read(tmp_path / "x.pt", weights="model", num_heads=HEADS)
    assert (about.weights, about.steps, about.stored) == ("model", 7, ["float32"])
    name = "transformer_blocks.2.attn1.to_k.weight"
    assert torch.equal(model.state_dict()[name], state["blocks.2.attn.qkv.weight"][32:64])


def test_blocks_do_not_share_memory(file) -> None:
    """Each has the embeddings of its own in diffusers; one that changes must not change others."""
    model, _ = read(file, num_heads=HEADS)
    places = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: make_state(width=32, depth=3, group=None, side=4),
         r"has 16 rows .*in 32; if it is a SiT, use `elit convert official`"),
        (lambda s: make_state(width=32, depth=5),
         r"it is an ELIT-SiT; use `elit convert official`"),
        (lambda s: s | {"blocks.0.attn.extra": torch.zeros(3)}, r"1 unknown keys \(blocks.0.attn"),
        (lambda s: {k: v for k, v in s.items() if k != "blocks.1.mlp.fc1.bias"},
         r"1 missing keys \(blocks.1.mlp.fc1.bias\)"),
        (lambda s: s | {"pos_embed": s["pos_embed"] + 0.1}, r"made with other positions"),
        (lambda s: s | {"blocks.0.mlp.fc1.weight": torch.zeros(64, 32)},
         r"blocks.0.mlp.fc1.weight is \(64, 32\), not \(128, 32\)"),
        (lambda s: s | {"blocks.2.attn.proj.bias": torch.full((32,), torch.nan)},
         r"without finite float32 numbers \(blocks.2.attn.proj.bias"),
        (lambda s: s | {"pos_embed": torch.zeros(1, 10**6, 1)}, r"pos_embed is \(1, 1000000, 1\)"),
        (lambda s: s | {"y_embedder.embedding_table.weight": torch.zeros(11, 32)},
         r"has 11 rows, but .*only DiTs of 1000 classes"),
        (lambda s: s | {"y_embedder.embedding_table.weight": torch.zeros(0, 32)}, r"is empty"),
        (lambda s: {k: v for k, v in s.items() if "blocks" not in k},
         r"it has no blocks.0.mlp.fc1.weight"),
    ],
)  # fmt: skip
def test_files_that_are_no_dit(state, tmp_path, change, message) -> None:
    torch.save(change(dict(state)), tmp_path / "x.pt")
    refuses(message, read, tmp_path / "x.pt", num_heads=HEADS)


def test_settings_that_are_not_allowed(file, tmp_path) -> None:
    refuses(r"width 32 .*no public one .*give num_heads", read, file)
    refuses(r"num_heads=0 is not allowed", read, file, num_heads=0)
    refuses(r"cannot be divided into 5 heads", read, file, num_heads=5)
    torch.save({"ema": torch.load(file), "args": {"num_heads": 8}}, tmp_path / "told.pt")
    message = r"num_heads=4 contradicts the args .*give num_heads=8"
    refuses(message, read, tmp_path / "told.pt", num_heads=HEADS)
    message = r"a variance too.*`elit convert dit` makes a DiTPipeline"
    refuses(message, from_official_checkpoint, file, num_heads=HEADS)
    message, settings = r"unknown format 'dlt'.*did you mean 'dit'", ConversionSettings("dlt")
    refuses(message, convert_official, file, tmp_path / "out", settings)


def test_settings_of_the_public_ones() -> None:
    """XL/2 of 256 px: what diffusers takes by default, but for the variance and the norm's eps."""
    from elit.interop.dit import _settings_of

    with torch.device("meta"):
        theirs = {
            "pos_embed": torch.empty(1, 256, 1152),
            "x_embedder.proj.weight": torch.empty(1152, 4, 2, 2),
            "final_layer.linear.weight": torch.empty(32, 1152),
            "y_embedder.embedding_table.weight": torch.empty(1001, 1152),
        } | {f"blocks.{i}.mlp.fc1.weight": torch.empty(4608, 1152) for i in range(28)}
        settings = _settings_of(theirs, None)
        defaults = DiTTransformer2DModel().config
    assert settings["out_channels"] == 8
    changed = ("out_channels", "norm_eps")
    assert all(defaults[k] == v for k, v in settings.items() if k not in changed)
