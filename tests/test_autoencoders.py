"""Every autoencoder of diffusers': there and back, or refused by name."""

import inspect
import json
from pathlib import Path

import diffusers
import pytest
import torch
from prepare_sources import class_folder, run, shard, tiny_vae
from tiny_autoencoders import TINY, tiny_autoencoder

from elit import ElitPipeline, create_model
from elit._plain import from_plain
from elit.data import load_dataset
from elit.data.manifest import Autoencoder, read_manifest
from elit.evaluation.subjects import open_reference
from elit.flow.schedulers import make_scheduler
from elit.inspection.subject import choose_subject
from elit.pipelines.autoencoder import (
    UNFIT,
    SamplesDivergedError,
    check_round_trip,
    check_same_latents,
    decode,
    decoding_in_words,
    encode,
    has_time,
    scale_and_shift,
    spatial_scale,
    upcasts,
)
from elit.preparation.autoencoder import load_vae
from elit.training.build import warn_of_width
from elit.training.config import TrainConfig
from elit.training.loop import train

FIT = sorted(TINY.keys() - UNFIT.keys())


def columns(numbers, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(numbers).view(1, -1, *(1,) * (like.ndim - 2))


def with_statistics(name: str):
    """A tiny one whose statistics in buffers, not in its config, are those of data."""
    vae = tiny_autoencoder(name)
    buffers = dict(vae.named_buffers())
    for key in ("latents_mean", "latents_std", "bn.running_mean", "bn.running_var"):
        if key in buffers:
            buffers[key].uniform_(0.5, 2)
    return vae


def test_every_class_of_diffusers_is_tried_or_refused() -> None:
    found = set()
    for name in dir(diffusers):
        try:
            kind = getattr(diffusers, name)
        except (AttributeError, ImportError, RuntimeError):  # of a package that is not here, or old
            continue
        if inspect.isclass(kind) and issubclass(kind, diffusers.ModelMixin):
            found |= {name} if hasattr(kind, "encode") else set()
    assert found == TINY.keys() | UNFIT.keys()


@pytest.mark.parametrize("name", FIT)
@torch.no_grad()
def test_there_and_back(name: str) -> None:
    vae, size = with_statistics(name), TINY[name][1]
    pictures = torch.rand(2, 3, *size) * 2 - 1
    assert check_round_trip(vae, "folder", pictures) == (encode(vae, pictures)[1] is not None)
    mean, logvar = encode(vae, pictures)
    scale, shift = (columns(numbers, mean) for numbers in scale_and_shift(vae))
    torch.manual_seed(0)  # ConsistencyDecoderVAE draws
    back = decode(vae, (mean - shift) * scale)
    assert back.shape == pictures.shape
    assert mean.shape[-1] == size[-1] // spatial_scale(vae)
    # By the class's own functions alone
    one_frame = len(size) == 2 and has_time(vae)
    given = pictures[:, :, None] if one_frame else pictures
    given = given / 2 + 0.5 if name == "AutoencoderRAE" else given
    if name == "AutoencoderKLQwenImage21":  # opaque
        given = torch.cat((given, torch.ones_like(given[:, :1])), dim=1)
    encoded = vae.encode(given)
    raw = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded[0]
    if logvar is not None:  # training draws mean + exp(logvar / 2) noise
        drawn = torch.exp(logvar / 2) * torch.ones_like(mean)
        assert sorted(drawn.flatten().tolist()) == pytest.approx(
            sorted(encoded.latent_dist.std.flatten().tolist()), rel=1e-4
        )
    torch.manual_seed(0)
    wanted = vae.decode(raw).sample
    wanted = wanted * 2 - 1 if name == "AutoencoderRAE" else wanted
    wanted = (wanted[:, :, 0] if one_frame else wanted)[:, :3]
    torch.testing.assert_close(back, wanted, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_latents_are_scaled_as_diffusers_pipelines_do() -> None:
    flux, pictures = with_statistics("AutoencoderKLFlux2"), torch.rand(1, 3, 16, 24)
    mean, logvar = encode(flux, pictures)
    raw = diffusers.Flux2Pipeline._patchify_latents(flux.encode(pictures).latent_dist.mean)
    assert torch.equal(mean, raw)
    assert logvar.shape == mean.shape == (1, 16, 4, 6)
    scale, shift = (columns(numbers, mean) for numbers in scale_and_shift(flux))
    std = (flux.bn.running_var + 1e-4).sqrt().view(1, -1, 1, 1)
    wanted = (raw - flux.bn.running_mean.view(1, -1, 1, 1)) / std
    torch.testing.assert_close((mean - shift) * scale, wanted)
    assert scale_and_shift(tiny_autoencoder("AutoencoderRAE")) == ((1.0,), (0.0,))
    assert scale_and_shift(tiny_autoencoder("AutoencoderTiny")) == ((0.5,), (0.25,))
    assert scale_and_shift(tiny_autoencoder("AutoencoderKLKVAE")) == ((1.0,), (0.0,))
    scale, shift = scale_and_shift(tiny_autoencoder("AutoencoderKLWan"))
    assert (scale, shift) == (pytest.approx((2.0, 0.5, 1.0, 1 / 3)), (0.5, -1.0, 0.25, 2.0))
    ltx = with_statistics("AutoencoderKLLTXVideo")  # in buffers
    scale, shift = scale_and_shift(ltx)
    assert shift == pytest.approx(ltx.latents_mean.tolist())
    factor = ltx.config.scaling_factor
    assert scale == pytest.approx([factor / x for x in ltx.latents_std.tolist()])
    # And with a scaling factor beside the statistics, as of Playground 2.5
    scale, shift = scale_and_shift(tiny_autoencoder("AutoencoderKL"))
    assert (scale, shift) == (pytest.approx((1.0, 0.25, 0.5, 1 / 6)), (0.5, -1.0, 0.25, 2.0))


@pytest.mark.parametrize("name", sorted(UNFIT))
def test_one_that_cannot_be_used_is_refused_by_name(name: str, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match=f"a {name} cannot be used here: .*; give another"):
        load_vae(str(tmp_path))


def make_pipeline(vae, channels: int, side: int = 8) -> ElitPipeline:
    torch.manual_seed(0)
    model = create_model(
        "elit-dit-tiny/2", sample_size=side, in_channels=channels, num_classes=4, group=side // 4
    )
    return ElitPipeline(model.eval(), make_scheduler("euler"), vae)


def test_pipelines_refuse_what_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="a AutoencoderKLTemporalDecoder cannot be used here"):
        make_pipeline(tiny_autoencoder("AutoencoderKLTemporalDecoder"), 4)
    stepped = tiny_autoencoder("AutoencoderKLLTXVideo")
    stepped.register_to_config(timestep_conditioning=True)
    with pytest.raises(ValueError, match=r"AutoencoderKLLTXVideo .* decoder takes a time step"):
        make_pipeline(stepped, 4)


def test_sizes_that_an_autoencoder_does_not_give_back() -> None:
    rae = tiny_autoencoder("AutoencoderRAE")  # of 32x32 alone
    message = "this AutoencoderRAE is of pictures of 32x32 alone, not of 64x64"
    with pytest.raises(ValueError, match=f"folder cannot be used: {message}"):
        check_round_trip(rae, "folder", torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=message):
        decode(rae, torch.zeros(1, 64, 8, 8))
    cog = tiny_autoencoder("AutoencoderKLCogVideoX")
    with pytest.raises(ValueError, match="decodes latents of 2x2x3 to 8x16x24, not to 5x16x24"):
        check_round_trip(cog, "folder", torch.zeros(1, 3, 5, 16, 24))


def test_scales_that_cannot_be_undone_or_fit_no_channel() -> None:
    with pytest.raises(ValueError, match=r"AutoencoderKL scales its .* by 0.*'t be undone"):
        scale_and_shift(tiny_vae(scaling_factor=0.0))
    with pytest.raises(ValueError, match="can't be undone; look at scaling_factor, latents_mean"):
        scale_and_shift(tiny_vae(latents_mean=[0.0, 0.0], latents_std=[1.0, 0.0]))
    wrong = tiny_vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)  # as Cosmos 1 has them
    with pytest.raises(ValueError, match=r"folder cannot be used: .* 4 channels, but .* have 2"):
        check_round_trip(wrong, "folder", torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("name", ["AutoencoderRAE", "AutoencoderKLFlux2", "AutoencoderKLQwenImage"])
def test_prepared_and_drawn_alike(name: str, tmp_path) -> None:
    """What `elit prepare` stores is what a pipeline's decoder takes back."""
    vae = with_statistics(name)
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    class_folder(tmp_path / "images", 2)
    run(
        tmp_path / "images", tmp_path / "out", tmp_path / "pipeline", resolution=[32],
        store_dtype="fp32",
    )  # fmt: skip
    manifest = read_manifest(tmp_path / "out")
    ((channels, side, _),) = manifest.shapes.values()
    kind = "latents" if name == "AutoencoderRAE" else "moments"
    stored = shard(tmp_path / "out", "train-00000-32x32")[kind][:, :channels]
    scale, shift = (
        columns(x, stored) for x in (manifest.autoencoder.scale, manifest.autoencoder.shift)
    )
    latents = (stored - shift) * scale
    pipeline = make_pipeline(vae, channels, side)
    found = pipeline.decode(latents, "pt") * 2 - 1
    given = (shard_pixels(tmp_path) / 127.5 - 1).movedim(-1, 1)
    with torch.no_grad():
        if name == "AutoencoderRAE":
            wanted = vae(given / 2 + 0.5).sample * 2 - 1
        elif name == "AutoencoderKLFlux2":
            wanted = vae.decode(vae.encode(given).latent_dist.mean).sample
        else:
            wanted = vae.decode(vae.encode(given[:, :, None]).latent_dist.mean).sample[:, :, 0]
    torch.testing.assert_close(found, wanted.clamp(-1, 1), rtol=1e-3, atol=1e-3)
    assert pipeline(class_labels=[1], num_inference_steps=1, output_type="np").images.shape == (
        1, 32, 32, 3
    )  # fmt: skip


def shard_pixels(folder) -> torch.Tensor:
    run(folder / "images", folder / "pixels", resolution=[32])
    return shard(folder / "pixels", "train-00000-32x32")["images"].movedim(1, -1).float()


@pytest.mark.parametrize(
    ("name", "changes", "scale"),
    [
        ("AutoencoderKLWan", {"in_channels": 12, "out_channels": 12, "patch_size": 2,
                              "scale_factor_spatial": 16, "is_residual": True}, 16),  # Wan 2.2's
        ("AutoencoderKLQwenImage", {"input_channels": 4}, 8),  # Qwen-Image-Layered's
        ("AutoencoderKLQwenImage21", {}, 16),
    ],
)  # fmt: skip
def test_pictures_of_other_channels_than_three(
    name: str, changes: dict, scale: int, tmp_path
) -> None:
    torch.manual_seed(0)
    getattr(diffusers, name)(**TINY[name][0] | changes).save_pretrained(tmp_path / "vae")
    class_folder(tmp_path / "images", 2)
    run(tmp_path / "images", tmp_path / "out", tmp_path / "vae", resolution=[32])
    side = 32 // scale
    assert read_manifest(tmp_path / "out").shapes == {"32x32": (4, side, side)}
    vae, _ = load_vae(str(tmp_path / "vae"))
    with torch.no_grad():
        assert decode(vae, torch.zeros(1, 4, side, side)).shape == (1, 3, 32, 32)


def test_pictures_that_are_not_of_colours_are_refused(tmp_path) -> None:
    tiny_vae(in_channels=4, out_channels=4).save_pretrained(tmp_path / "vae")
    class_folder(tmp_path / "images", 2)
    with pytest.raises(ValueError, match="vae takes pictures of 4 channels; give one of 3"):
        run(tmp_path / "images", tmp_path / "out", tmp_path / "vae")


def overflowing(**changes):
    """Its decoder goes beyond float16, and is sound in float32."""
    vae = tiny_vae(**changes)
    with torch.no_grad():
        vae.post_quant_conv.weight *= 6e4  # a group norm comes after
    return vae.to(torch.float16)


@torch.no_grad()
def test_an_autoencoder_that_overflows_float16_gives_no_black_pictures() -> None:
    latents = torch.full((1, 2, 8, 8), 9.0)
    latents[:, :, ::2] = -7
    vae = overflowing()  # force_upcast is the default
    found = decode(vae, latents)
    assert vae.dtype == torch.float16
    wanted = decode(overflowing().to(torch.float32), latents)
    assert torch.equal(found, wanted)
    assert found.std() > 0.01
    pipeline = make_pipeline(overflowing(force_upcast=False), 2)
    message = "AutoencoderKL makes pictures that are not finite in float16; load it in float32"
    for output in ("pil", "np", "pt"):
        with pytest.raises(SamplesDivergedError, match=message):
            pipeline.decode(latents, output)
    broken = tiny_vae()
    broken.decoder.conv_in.weight.fill_(float("inf"))
    with pytest.raises(SamplesDivergedError, match="in float32; look at its weights"):
        decode(broken, latents)


def test_preparing_honours_force_upcast(tmp_path, caplog) -> None:
    vae = tiny_vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight *= 1e6
    vae.save_pretrained(tmp_path / "vae")
    class_folder(tmp_path / "images", 2)
    settings = {"vae": tmp_path / "vae", "store_dtype": "fp32"}
    result = run(tmp_path / "images", tmp_path / "out", dtype="fp16", **settings)
    assert result.samples == {"train": 2}
    assert "is not sound in fp16, as its config says: it computes in fp32" in caplog.text
    run(tmp_path / "images", tmp_path / "fp32", **settings)
    found, wanted = (shard(tmp_path / name)["moments"] for name in ("out", "fp32"))
    assert torch.equal(found, wanted)


def tiny_rae(encoder_type: str, patch: int = 4, grid: int = 8, **changes):
    """An AutoencoderRAE of pictures of 4 pixels a token."""
    torch.manual_seed(0)
    return diffusers.AutoencoderRAE(
        **{
            "encoder_type": encoder_type, "encoder_hidden_size": 64, "encoder_patch_size": patch,
            "encoder_num_hidden_layers": 1, "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 16, "patch_size": 4, "encoder_input_size": patch * grid,
            **changes,
        }
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("kind", "patch"), [("dinov2", 14), ("siglip2", 16), ("mae", 16)])
@torch.no_grad()
def test_each_encoder_of_an_rae(kind: str, patch: int, tmp_path) -> None:
    """As published: 16x16 tokens, each place normalised by a mean and deviation of its own."""
    try:
        vae = tiny_rae(kind, patch, 16)
    except AttributeError:  # diffusers 0.42 can't build SigLIP 2 beside transformers 5
        tiny_rae("dinov2").save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"encoder_type": kind}))
        with pytest.raises(ValueError, match=r"cannot be loaded: .* another version of transfo"):
            load_vae(str(tmp_path))
        return
    pictures = torch.rand(8, 3, 64, 64) * 2 - 1
    raw = encode(vae, pictures)[0]
    assert raw.shape == (8, 64, 16, 16)
    numbers = {"latents_mean": raw.mean(0), "latents_std": raw.std(0)}
    vae = tiny_rae(kind, patch, 16, **numbers)
    vae.save_pretrained(tmp_path)
    vae = load_vae(str(tmp_path))[0].eval()
    latents, _ = encode(vae, pictures)
    torch.testing.assert_close(latents.mean(0), torch.zeros_like(raw[0]), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std(0), torch.ones_like(raw[0]), rtol=0, atol=2e-3)
    wanted = vae(pictures / 2 + 0.5).sample * 2 - 1
    torch.testing.assert_close(decode(vae, latents), wanted)


@torch.no_grad()
def test_an_rae_of_mae_does_not_mix_up_patches_in_bfloat16() -> None:
    vae, pictures = tiny_rae("mae", 2, 18), torch.rand(1, 3, 72, 72) * 2 - 1
    wanted = encode(vae, pictures)[0]
    half = tiny_rae("mae", 2, 18).to(torch.bfloat16)
    found = encode(half, pictures.bfloat16())[0]  # 324 patches, 257 have numbers of their own
    assert (found - wanted).abs().max() < 0.2
    assert half.dtype == torch.bfloat16
    assert not upcasts(tiny_rae("mae", 2, 16), torch.bfloat16)


def test_a_size_that_an_rae_cannot_decode_is_refused_before_drawing() -> None:
    pipeline = make_pipeline(tiny_rae("mae"), 64)
    steps = []
    with pytest.raises(ValueError, match="AutoencoderRAE is of pictures of 32x32 alone, not of 64"):
        pipeline(
            class_labels=[1], num_inference_steps=1, height=64, width=64,
            callback_on_step_end=lambda _, step, *rest: steps.append(step) or {},
        )  # fmt: skip
    assert steps == []


def test_an_rae_without_transformers_is_refused_with_its_extra(tmp_path, monkeypatch) -> None:
    tiny_rae("mae").save_pretrained(tmp_path)
    monkeypatch.setattr("elit.pipelines.autoencoder.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs transformers; .*\[text\]"):
        load_vae(str(tmp_path))


@torch.no_grad()
def test_training_on_rae_latents(tmp_path, caplog) -> None:
    """From pictures to a folder that draws, and real pictures to compare with."""
    vae = tiny_rae("dinov2", 14)
    vae.save_pretrained(tmp_path / "rae")
    class_folder(tmp_path / "images", 4)
    run(
        tmp_path / "images", tmp_path / "data", tmp_path / "rae", resolution=[32],
        store_dtype="fp32",
    )  # fmt: skip
    config = from_plain(TrainConfig, {
        "output_dir": str(tmp_path / "run"),
        "model": {
            "preset": "elit-rae-dit-b/1",
            "overrides": {"hidden_size": 32, "num_heads": 2, "depth": 3, "head": 1, "tail": 1},
        },
        "data": {"name": "prepared", "options": {"path": str(tmp_path / "data")}, "batch_size": 2},
        "train": {"steps": 1, "sample_every": 1},
        "sample": {"steps": 1},
    })  # fmt: skip
    with torch.enable_grad():
        train(config, progress=False)
    assert caplog.text.count("the model is 32 wide, but its tokens hold 64 numbers each") == 1
    pipeline = ElitPipeline.from_pretrained(tmp_path / "run")
    assert isinstance(pipeline.vae, diffusers.AutoencoderRAE)
    assert pipeline.transformer.sample_size == (8, 8)
    images = pipeline(class_labels=[1], num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    real = open_reference(pipeline, str(tmp_path / "data"))
    pixels = shard_pixels(tmp_path).movedim(-1, 1)
    wanted = (vae(pixels / 255).sample * 255).round().clamp(0, 255)
    difference = real.read(range(real.count)) - wanted[: real.count]
    assert difference.abs().max() <= 1
    assert "other weights" not in caplog.text
    pipeline.vae.decoder.decoder_pred.bias += 1
    open_reference(pipeline, str(tmp_path / "data"))
    assert "autoencoder has other weights than the one that encoded" in caplog.text


def test_velocities_alone_ask_for_width(caplog) -> None:
    small = {"num_heads": 2, "depth": 3, "head": 1, "tail": 1}
    for wide in ({"hidden_size": 32, "prediction_type": "sample"}, {"hidden_size": 768}):
        warn_of_width(create_model("elit-rae-dit-b/1", **small, **wide))
    warn_of_width(create_model("elit-hdit-tiny/2"))
    assert caplog.text == ""
    warn_of_width(create_model("elit-rae-dit-b/1", **small, hidden_size=32))
    assert "the model is 32 wide, but its tokens hold 768 numbers each" in caplog.text


def test_a_reference_of_other_latents_is_refused(tmp_path) -> None:
    """Latents of Stable Diffusion and of SDXL have one shape."""
    tiny_vae(scaling_factor=0.18215).save_pretrained(tmp_path / "sd")
    class_folder(tmp_path / "images", 2)
    run(tmp_path / "images", tmp_path / "data", tmp_path / "sd")
    pipeline = make_pipeline(tiny_vae(scaling_factor=0.13025), 2, 16)
    message = "the AutoencoderKL does not scale latents as the AutoencoderKL .*sd did when .*data"
    with pytest.raises(ValueError, match=message):
        open_reference(pipeline, str(tmp_path / "data"))
    dataset = load_dataset("prepared", "train", path=str(tmp_path / "data"))
    with pytest.raises(ValueError, match=message):
        choose_subject(pipeline, dataset, "data")


def test_statistics_are_as_exact_in_bfloat16_as_its_buffers() -> None:
    vae = with_statistics("AutoencoderKLFlux2")
    about = Autoencoder("", "AutoencoderKLFlux2", "", *scale_and_shift(vae))
    half = vae.to(torch.bfloat16)
    check_same_latents(half, about, "data")
    with torch.no_grad():
        half.bn.running_var *= 1.1
    with pytest.raises(ValueError, match="does not scale latents as the AutoencoderKLFlux2"):
        check_same_latents(half, about, "data")


def test_what_an_exported_file_says_of_decoding() -> None:
    plain = "it decodes samples / scale + shift"
    assert decoding_in_words(tiny_vae()) == plain
    flux = tiny_autoencoder("AutoencoderKLFlux2")
    assert decoding_in_words(flux) == f"{plain}, after torch's pixel_shuffle by 2"
    assert decoding_in_words(tiny_rae("mae")) == f"{plain}, to pictures in [0, 1]"


def table_of_autoencoders() -> list[str]:
    """Lines of docs/data.md: one for those that are alike."""
    rows: dict[str, list[str]] = {}
    for name in FIT:
        vae, size = tiny_autoencoder(name), TINY[name][1]
        with torch.no_grad():
            posterior = encode(vae, torch.zeros(1, 3, *size))[1] is not None
        known = {*vae.config, *dict(vae.named_buffers())}
        numbers = {
            "AutoencoderRAE": "its own, of each place",
            "AutoencoderKLFlux2": "of its batch norm",
        }
        usual = "of each channel, where it has them" if "latents_mean" in known else "one number"
        stored = "mean and log-variance" if posterior else "latents"
        cells = "clips" if has_time(vae) else "pictures", stored, numbers.get(name, usual)
        rows.setdefault(" | ".join(cells), []).append(f"`{name}`")
    for name in sorted(UNFIT):
        rows.setdefault(f"refused: {UNFIT[name]} | - | -", []).append(f"`{name}`")
    return [f"| {', '.join(names)} | {cells} |" for cells, names in rows.items()]


def test_the_docs_have_every_autoencoder() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [line for line in table_of_autoencoders() if line not in page.splitlines()] == []


def test_latents_far_from_zero_are_told(tmp_path, caplog) -> None:
    class_folder(tmp_path / "images", 2)
    for shift in (0.0, 9.0):
        vae = tiny_vae(shift_factor=shift)
        with torch.no_grad():  # to a deviation that is usual
            vae.encoder.conv_out.weight[:2] *= 8
        vae.save_pretrained(tmp_path / f"{shift}")
        result = run(tmp_path / "images", tmp_path / f"out{shift}", tmp_path / f"{shift}")
        assert 0.3 < result.std < 3
        assert ("the scaled latents have mean -" in caplog.text) == (shift == 9)
