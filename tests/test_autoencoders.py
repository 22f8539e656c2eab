"""Every autoencoder of diffusers': there and back, or refused by name."""

import inspect
import json

import diffusers
import pytest
import torch
from prepare_sources import class_folder, run, shard, tiny_vae
from tiny_autoencoders import TINY, tiny_autoencoder

from elit import ElitPipeline, create_model
from elit.data.manifest import read_manifest
from elit.flow.schedulers import make_scheduler
from elit.pipelines.autoencoder import (
    UNFIT,
    SamplesDivergedError,
    check_round_trip,
    decode,
    encode,
    has_time,
    scale_and_shift,
    spatial_scale,
)
from elit.preparation.autoencoder import load_vae

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
    mean, _ = encode(vae, pictures)
    scale, shift = (columns(numbers, mean) for numbers in scale_and_shift(vae))
    torch.manual_seed(0)  # ConsistencyDecoderVAE draws
    back = decode(vae, (mean - shift) * scale)
    assert back.shape == pictures.shape
    assert mean.shape[-1] == size[-1] // spatial_scale(vae)
    # By the class's own functions alone
    one_frame = len(size) == 2 and has_time(vae)
    given = pictures[:, :, None] if one_frame else pictures
    given = given / 2 + 0.5 if name == "AutoencoderRAE" else given
    encoded = vae.encode(given)
    raw = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded[0]
    torch.manual_seed(0)
    wanted = vae.decode(raw).sample
    wanted = wanted * 2 - 1 if name == "AutoencoderRAE" else wanted
    wanted = wanted[:, :, 0] if one_frame else wanted
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
    assert "overflows fp16, its config says (force_upcast): it computes in fp32" in caplog.text
    run(tmp_path / "images", tmp_path / "fp32", **settings)
    found, wanted = (shard(tmp_path / name)["moments"] for name in ("out", "fp32"))
    assert torch.equal(found, wanted)
