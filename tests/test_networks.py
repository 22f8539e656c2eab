"""Feature networks: resizing, Inception, DINOv2, CLIP, I3D, the classifier, one's own.

Goldens in `golden_networks/` come from other implementations, run on the same inputs:

- tf_bilinear: `tf.raw_ops.ResizeBilinear(images=..., size=..., align_corners=False,
  half_pixel_centers=False)` of tensorflow-cpu 2.21.0 on crops of scikit-learn's photographs; of
  each result 12 rows and columns. A name is photograph, top, left, height, width, new size.
- inception: torch-fidelity 0.4.0's `FeatureExtractorInceptionV3("inception-v3-compat",
  ["2048", "logits_unbiased"])` with the weights of `inception_weights` and the pictures of
  `photographs`; spatial from a hook on its Mixed_6d.branch1x1; some columns.
- dinov2: `DinoVisionTransformer(img_size=70, patch_size=14, embed_dim=32, depth=2, num_heads=2,
  init_values=1.0)` of the package dinov2 0.0.1.dev2 with the weights of `save_dinov2`, renamed.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import refuses
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image
from tiny_clip import save_tiny_clip
from torch import Tensor, nn

from elit.data import load_dataset
from elit.networks import weights as weight_files
from elit.networks.encoders import _warn_of_cut
from elit.networks.feature_network import NETWORKS, load_network
from elit.networks.inception import Inception
from elit.networks.resize import resize_pil, resize_tf_bilinear
from elit.networks.weights import checksum_of

GOLDEN = Path(__file__).parent / "golden_networks"
PHOTOGRAPHS = ("china", "flower")


def refused(message: str, network: str | nn.Module, **options) -> None:
    refuses(message, load_network, network, **options)


def photograph(name: str) -> Tensor:
    """(1, 3, 427, 640) uint8."""
    return torch.from_numpy(load_sample_image(f"{name}.jpg").copy()).permute(2, 0, 1)[None]


def photographs() -> Tensor:
    """(2, 3, 256, 256) uint8."""
    china, flower = map(photograph, PHOTOGRAPHS)
    return torch.cat((china[..., 100:356, 200:456], flower[..., 50:306, 150:406]))


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


# ---- resizing ----


@pytest.mark.parametrize("case", sorted(load_file(GOLDEN / "tf_bilinear.safetensors")))
def test_tf_bilinear_is_tensorflows(case: str) -> None:
    name, *numbers = case.split()
    top, left, height, width, *size = map(int, numbers)
    image = photograph(name)[..., top : top + height, left : left + width].float()
    found = resize_tf_bilinear(image, tuple(size))[0].permute(1, 2, 0)
    rows, columns = (torch.linspace(0, n - 1, 12).long() for n in size)
    expected = load_file(GOLDEN / "tf_bilinear.safetensors")[case]
    torch.testing.assert_close(found[rows][:, columns], expected, rtol=0, atol=1e-4)
    # and this is none of the usual ones
    usual = F.interpolate(image, size=size, mode="bilinear")[0].permute(1, 2, 0)
    assert (usual[rows][:, columns] - expected).abs().max() > 1


def test_tf_bilinear_keeps_the_corner() -> None:
    ramp = torch.arange(4.0).expand(1, 1, 3, 4)
    found = resize_tf_bilinear(ramp, (5, 8))
    assert torch.equal(found[0, 0, 0], torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3, 3]))
    assert torch.equal(resize_tf_bilinear(ramp, (3, 4)), ramp)
    assert torch.equal(resize_tf_bilinear(ramp, (1, 2)), torch.tensor([[[[0.0, 2.0]]]]))


SIZES = [(224, 224), (299, 299), (500, 901), (37, 53), (428, 641), (200, 700), (427, 640)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_resize_is_pillows(name: str, size: tuple[int, int]) -> None:
    image = photograph(name)
    filtering, turned = Image.Resampling.BICUBIC, (size[1], size[0])
    channels = [Image.fromarray(c.float().numpy()).resize(turned, filtering) for c in image[0]]
    assert channels[0].mode == "F"
    expected = torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]))
    found = resize_pil(image.float(), size)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)  # of 255

    if size == (200, 700):
        return  # whose height new versions of Pillow resize first, old ones its width
    eight = np.asarray(to_pil(image[0]).resize(turned, filtering))
    expected = torch.from_numpy(eight.copy()).permute(2, 0, 1).float()
    found = resize_pil(image.float(), size, eight_bit=True)[0]
    assert (found != expected).float().mean() < 0.006
    assert ((found - expected).abs() > 1).float().mean() < 1e-5


# ---- Inception ----


def inception_weights() -> dict[str, Tensor]:
    """Random ones, drawn in the order of the names, that keep activations near 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Inception().state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(shape, generator=generator)
        if name.endswith("conv.weight"):
            noise *= (2 / shape[1:].numel()) ** 0.5
        elif name.endswith("running_var"):
            noise = 1 + 0.2 * noise.abs()
        elif name.endswith("bn.weight"):
            noise = 1 + 0.1 * noise
        else:
            noise *= 0.02 if name.startswith("fc.") else 0.1
        weights[name] = noise
    return weights


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(inception_weights(), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file):
    return load_network("inception", weights=inception_file)


def test_inception_is_torch_fidelitys(inception) -> None:
    found = inception.features(photographs())
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "pool": (2, 2048), "spatial": (2, 2023), "logits": (2, 1008),
    }  # fmt: skip
    expected = load_file(GOLDEN / "inception.safetensors")
    every = {"pool": 64, "spatial": 119, "logits": 63}
    for name, step in every.items():
        columns = found[name][:, ::step]
        torch.testing.assert_close(columns, expected[name], rtol=1e-4, atol=1e-5)
        assert (expected[name][0] - expected[name][1]).abs().max() > 1e-2, name


def test_inception_has_the_public_names(inception) -> None:
    names = inception_weights().keys()
    assert len(names) == 94 * 5 + 2
    # Inception-v3 without its auxiliary head has 23,834,568 parameters at 1000 classes
    assert sum(p.numel() for p in inception.module.parameters()) == 23_834_568 + 8 * 2049
    assert {
        "Conv2d_1a_3x3.conv.weight", "Conv2d_4a_3x3.bn.running_var", "fc.bias",
        "Mixed_5b.branch1x1.conv.weight", "Mixed_5d.branch5x5_2.bn.bias",
        "Mixed_6a.branch3x3dbl_3.bn.weight", "Mixed_6e.branch7x7dbl_5.conv.weight",
        "Mixed_7a.branch7x7x3_4.conv.weight", "Mixed_7c.branch3x3dbl_3b.bn.running_mean",
    } <= names  # fmt: skip


def test_inception_takes_any_size_and_grey(inception) -> None:
    grey = F.pad(photographs()[:, :1], (0, 43, 0, 43))  # nothing to resize
    together = inception.features(grey)["pool"]
    alone = inception.features(grey[1:].expand(-1, 3, -1, -1))["pool"]
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-6)
    prepared = inception.prepare(torch.tensor([0.0, 128.0, 255.0]).view(3, 1, 1, 1))
    assert prepared.shape == (3, 3, 299, 299)
    assert prepared.amax((1, 2, 3)).tolist() == prepared.amin((1, 2, 3)).tolist()
    assert prepared[:, 0, 0, 0].tolist() == [-1, 0, 127 / 128]


def test_inception_says_on_what_it_depends(inception, inception_file) -> None:
    assert inception.checksum == hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert inception.preprocessing == "TensorFlow 1 bilinear to 299x299, (x - 128) / 128"
    assert (inception.name, inception.takes) == ("inception", "images")
    assert not any(p.requires_grad for p in inception.module.parameters())


def test_other_files_of_inception(inception, tmp_path) -> None:
    weights = inception_weights()
    more = weights | {
        "AuxLogits.fc.weight": torch.zeros(2, 2),
        "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(7),
    }
    save_file(more, tmp_path / "more.safetensors")
    wrapped = {f"module.{key}": value for key, value in weights.items()}  # as in training
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "wrapped.pth")
    image = photographs()[:1]
    for name in ("more.safetensors", "wrapped.pth"):
        other = load_network("inception", weights=tmp_path / name)
        assert torch.equal(other.features(image)["pool"], inception.features(image)["pool"])

    def refused(changed: dict[str, Tensor], message: str) -> None:
        save_file(changed, tmp_path / "wrong.safetensors")
        refuses(message, load_network, "inception", weights=str(tmp_path / "wrong.safetensors"))

    refused(
        {k: v for k, v in weights.items() if not k.startswith("fc.")} | {"head": torch.ones(1)},
        r"not those of FID's Inception: the file lacks fc.weight, fc.bias, and also has head; use "
        r"pt_inception-2015-12-05-6726825d.pth",
    )
    refused(
        weights | {"fc.bias": torch.zeros(1000)},
        r"in another shape fc.bias \(1000,\) for \(1008,\)",
    )
    refused({"a": torch.ones(1)}, r"lacks Conv2d_1a_3x3.conv.weight, .* and 469 more, and also has")


class Opens:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_files_that_hold_no_weights(tmp_path) -> None:
    def refused(path: Path, message: str) -> None:
        refuses(message, load_network, "inception", weights=path)

    bad = tmp_path / "bad.pth"
    torch.save({"conv": Opens(tmp_path / "opened")}, bad)
    refused(bad, r"bad.pth wants \w+.open called to be read")
    assert not (tmp_path / "opened").exists()
    for text in (b"", b"<html>not found</html>"):
        bad.write_bytes(text)
        refused(bad, r"bad.pth cannot be read .*cut off, damaged, or no checkpoint")
    (tmp_path / "bad.safetensors").write_bytes(b"12345")
    refused(tmp_path / "bad.safetensors", "cannot be read")
    torch.save({"weights": {}, "epoch": 3}, bad)
    refused(bad, "holds a dict that is no plain dictionary of tensors")
    torch.save([torch.ones(1)], bad)
    refused(bad, "holds a list")
    torch.jit.save(torch.jit.script(nn.Flatten()), bad)
    refused(bad, "cannot be read")
    refused(tmp_path, "are a file, but .* is a folder")
    refused(tmp_path / "none.pth", r"no file .*none.pth with the weights of inception; give the")
    refused("none", "no file none with the weights of inception")
    refused("hf://only/two", "no file hf://only/two with")
    for name in ("hf://user/repository/weights.pth", "user/repository/in/weights.pth"):
        refused(name, r"neither here nor on the hub .*give the path of a file")


def test_where_inceptions_weights_are_looked_for(inception_file, tmp_path, monkeypatch) -> None:
    """Named by the environment, in torch's folder, fetched; the network itself is cut off."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("ELIT_INCEPTION_WEIGHTS", raising=False)
    refused(
        r"cannot be fetched .*get https://github.com/mseitzer.*-6726825d.pth and give its "
        r"path as the weights or in ELIT_INCEPTION_WEIGHTS, or put it into .*checkpoints",
        "inception",
    )

    data = inception_file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    source = tmp_path / f"inception-{digest[:8]}.pth"
    source.write_bytes(data)
    monkeypatch.setattr(weight_files, "INCEPTION_URL", source.as_uri())
    assert load_network("inception").checksum == digest
    source.rename(tmp_path / "inception-0badc0de.pth")
    wrong = (tmp_path / "inception-0badc0de.pth").as_uri()
    monkeypatch.setattr(weight_files, "INCEPTION_URL", wrong)
    refused(r"cannot be fetched .*invalid hash", "inception")
    assert not list((tmp_path / "hub" / "checkpoints").glob("*0badc0de*"))

    name = "weights-inception-2015-12-05-6726825d.pth"
    (tmp_path / "hub" / "checkpoints" / name).write_bytes(data)
    assert load_network("inception").checksum == digest
    monkeypatch.setenv("ELIT_INCEPTION_WEIGHTS", str(tmp_path / "mine.pth"))
    refused(r"no file .*mine.pth with the weights of inception", "inception")
    (tmp_path / "mine.pth").write_bytes(data)
    assert load_network("inception").checksum == digest


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 8, 8), r"images of torch.float32 for inception: use uint8, 0 to 255"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"images of shape \(3, 8, 8\) for inception"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), r"with 1 or 3 channels"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "none of them 0"),
        (torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8), r"use \(B, C, H, W\)"),
    ],
)
def test_pictures_that_no_network_takes(inception, images: Tensor, message: str) -> None:
    refuses(message, inception.features, images)


def test_what_goes_on_around_changes_no_feature(inception) -> None:
    image = photographs()[:1]
    quiet = inception.features(image)["pool"]
    with torch.autocast("cpu", torch.bfloat16):
        found = inception.features(image)["pool"]
    assert torch.equal(found, quiet)
    assert not found.requires_grad
    refuses("inception reads no texts; use clip", inception.text_features, ["a"])


# ---- DINOv2 ----


def save_dinov2(folder: Path, **changes) -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Dinov2Config(**sizes | {"image_size": 70, "patch_size": 14} | changes)
    model = transformers.Dinov2Model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = 0.2 * torch.randn(value.shape, generator=generator)
            scales = "lambda1" in name or ("norm" in name and name.endswith("weight"))
            value.copy_(noise + 1 if scales else noise)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2")
    save_dinov2(folder)
    return folder


def test_dinov2_is_the_original(dinov2_folder) -> None:
    """Its positions lie a tenth of a patch off transformers' at this size, and this shows."""
    import transformers

    network = load_network("dinov2", weights=dinov2_folder)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    expected = load_file(GOLDEN / "dinov2.safetensors")["first_token"]
    with torch.no_grad():
        torch.testing.assert_close(network.module(images), expected, rtol=1e-4, atol=1e-5)
        stock = transformers.Dinov2Model.from_pretrained(dinov2_folder).eval()
        assert (stock(images).last_hidden_state[:, 0] - expected).abs().max() > 5e-4


def test_dinov2_prepares_as_its_processor(dinov2_folder) -> None:
    import transformers

    network = load_network("dinov2", weights=dinov2_folder)
    processor = transformers.BitImageProcessorPil(
        size={"height": 224, "width": 224}, do_center_crop=False, resample=Image.Resampling.BICUBIC,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    for image in map(photograph, PHOTOGRAPHS):
        expected = processor(to_pil(image[0]), return_tensors="pt")["pixel_values"]
        prepared = network.prepare(image.float())
        low, high = expected.amin((2, 3), keepdim=True), expected.amax((2, 3), keepdim=True)
        # It rounds to whole numbers and cuts off what overshoots, after each axis: on average
        # less than half a level apart, at the hardest edges six
        torch.testing.assert_close(prepared.clamp(low, high), expected, rtol=0, atol=6 / 255 / 0.22)
        assert (prepared.clamp(low, high) - expected).abs().mean() < 0.4 / 255 / 0.22
        pool = network.features(image)["pool"]
        assert pool.shape == (1, 32)
        with torch.no_grad():
            torch.testing.assert_close(pool, network.module(prepared))


def test_checksums_of_folders(dinov2_folder, tmp_path) -> None:
    import transformers

    network = load_network("dinov2", weights=str(dinov2_folder))
    file = dinov2_folder / "model.safetensors"
    assert network.checksum == hashlib.sha256(file.read_bytes()).hexdigest()
    model = transformers.Dinov2Model.from_pretrained(dinov2_folder)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    sharded = load_network("dinov2", weights=tmp_path)
    assert sharded.checksum == checksum_of(sharded.module)
    image = photographs()
    assert torch.equal(sharded.features(image)["pool"], network.features(image)["pool"])


def test_folders_that_hold_no_network(dinov2_folder, clip_folder, tmp_path) -> None:
    refused(r"'dinov2' cannot be loaded from 'no/such'.*on the hub", "dinov2", weights="no/such")
    refused(r"cannot be loaded .*'clip' is not 'dinov2'.*-large", "dinov2", weights=clip_folder)
    refused("its model type 'dinov2' is not 'clip'", "clip", weights=dinov2_folder)
    save_dinov2(tmp_path, patch_size=10)
    refused("patches of 10 pixels don't tile 224x224", "dinov2", weights=tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    refused(r"lacks 1 of its weights, such as layernorm.weight", "dinov2", weights=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    refused("'dinov2' cannot be loaded", "dinov2", weights=tmp_path)


# ---- CLIP ----


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    save_tiny_clip(folder)
    return folder


def test_clip_is_transformers(clip_folder) -> None:
    import transformers

    network = load_network("clip", weights=clip_folder)
    assert network.takes == "texts"
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    side = {"height": 32, "width": 32}
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side)
    for image in (photograph("china"), photograph("flower").mT, photographs()[:1]):
        inputs = processor(to_pil(image[0]), return_tensors="pt")
        prepared = network.prepare(image.float())
        difference = (prepared - inputs["pixel_values"]).abs()
        assert difference.max() <= 1.01 / 255 / 0.26  # one level of few pixels
        assert (difference > 1e-5).float().mean() < 0.01
        with torch.no_grad():
            found = model.get_image_features(**inputs)
        expected = found if isinstance(found, Tensor) else found.pooler_output
        pool = network.features(image)["pool"]
        torch.testing.assert_close(pool, expected, rtol=1e-2, atol=1e-3)

    texts = ["a red disc [end]", "blue [end]", "a blue blue red disc [end]"]
    found = network.text_features(texts)
    assert found.shape == (3, 10)
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)
    for row, text in zip(found, texts, strict=True):
        with torch.no_grad():
            alone = model.get_text_features(**tokenizer(text, return_tensors="pt"))
        alone = alone if isinstance(alone, Tensor) else alone.pooler_output
        torch.testing.assert_close(row, alone[0], rtol=1e-4, atol=1e-5)


def test_long_texts_are_cut_off_with_one_warning(clip_folder, caplog) -> None:
    network = load_network("clip", weights=clip_folder)
    _warn_of_cut.cache_clear()
    long = network.text_features(["red " * 40, "red " * 12])
    network.text_features(["blue " * 40])
    assert torch.equal(long[0], long[1])
    assert [r.message for r in caplog.records if "cut off" in r.message] == [
        "CLIP reads no more than 12 tokens of a text: longer ones are cut off"
    ]
    with pytest.raises(ValueError, match=r"images of shape \(3, 8, 8\) for clip"):
        network.features(torch.zeros(3, 8, 8, dtype=torch.uint8))
    for none in ([], "a text"):
        refuses("use a list of at least one text", network.text_features, none)


# ---- I3D ----


class TinyI3D(nn.Module):
    """The public file's signature; its features show each frame's range and the corner's value."""

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        if rescale or resize or not return_features or x.shape[-2:] != (224, 224):
            raise RuntimeError("asked for something else")
        frames = x.flatten(3)
        return torch.cat([frames.amin(3).flatten(1), frames.amax(3).flatten(1)], dim=1)


@pytest.fixture
def i3d_file(tmp_path) -> Path:
    torch.jit.script(TinyI3D()).save(tmp_path / "i3d.pt")
    return tmp_path / "i3d.pt"


def test_i3d_sees_clips(i3d_file, monkeypatch) -> None:
    monkeypatch.delenv("ELIT_I3D_WEIGHTS", raising=False)
    refused(r"i3d needs the file i3d_.*ELIT_I3D_WEIGHTS", "i3d")
    monkeypatch.setenv("ELIT_I3D_WEIGHTS", str(i3d_file))
    network = load_network("i3d")
    assert (network.takes, network.outputs) == ("clips", ("pool",))
    assert network.checksum == hashlib.sha256(i3d_file.read_bytes()).hexdigest()
    clips = torch.zeros(2, 3, 11, 40, 56, dtype=torch.uint8)
    clips += torch.arange(11, dtype=torch.uint8).view(11, 1, 1)
    clips[1, :, 4:] = 255
    found = network.features(clips)["pool"].view(2, 2, 3, 11)  # clip, (least, most), channel, frame
    expected = clips[..., 0, 0].float() / 127.5 - 1
    for bound in (found[:, 0], found[:, 1]):
        torch.testing.assert_close(bound, expected)
    # Each frame is resized by itself, and grey becomes RGB
    clips = torch.randint(0, 256, (1, 1, 10, 30, 50), dtype=torch.uint8)
    prepared = network.prepare(clips.float())
    frame = resize_tf_bilinear(clips[:, :, 7].float(), (224, 224)) / 127.5 - 1
    torch.testing.assert_close(prepared[:, :, 7], frame.expand(-1, 3, -1, -1))


def test_clips_that_i3d_does_not_take(i3d_file, tmp_path) -> None:
    network = load_network("i3d", weights=i3d_file)
    with pytest.raises(ValueError, match="clips of 9 frames: i3d takes 10 or more"):
        network.features(torch.zeros(1, 3, 9, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"clips of shape .* for i3d: use \(B, C, T, H, W\)"):
        network.features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    torch.jit.script(nn.Flatten()).save(tmp_path / "other.pt")
    refused("is not the I3D of FVD: .* doesn't take rescale", "i3d", weights=tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no archive")
    refused(r"text.pt is no TorchScript file", "i3d", weights=tmp_path / "text.pt")


# ---- one's own ----


class Mean(nn.Module):
    """(B, 3): the mean of each channel, times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3)) * self.weight


class Both(Mean):
    outputs = ("pool", "logits")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": images.amax(dim=(2, 3)), "pool": super().forward(images)}


def test_a_module_of_ones_own() -> None:
    module = Mean().train()
    network = load_network(module)
    assert (network.name, network.outputs, network.takes) == ("Mean", ("pool",), "images")
    assert not module.training
    images = photographs()
    found = network.features(images)
    torch.testing.assert_close(found["pool"], images.double().mean((2, 3)).float() / 127.5 - 1)
    assert not found["pool"].requires_grad
    before = network.checksum
    with torch.no_grad():
        module.weight[1] += 1e-7
    assert load_network(module).checksum != before
    assert load_network(Mean()).checksum == before

    both = load_network(Both()).features(images)
    assert list(both) == ["pool", "logits"]
    assert both["logits"].tolist() == load_network(Both()).features(images)["logits"].tolist()


def test_a_modules_scores_are_not_anothers() -> None:
    kind = type("inception", (Mean,), {})
    assert load_network(kind()).name == "own-inception"
    for dtype in (torch.bfloat16, torch.bool, torch.int64):  # each type has bytes to sum up
        module = Mean()
        module.register_buffer("more", torch.ones(2, 3).to(dtype).T)
        assert len(load_network(module).checksum) == 64


class Wrong(nn.Module):
    def __init__(self, answer, outputs=None) -> None:
        super().__init__()
        self.answer = answer
        if outputs is not None:
            self.outputs = outputs

    def forward(self, images: Tensor):
        return self.answer


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Wrong(torch.ones(2, 3, 4)), r"pool \(2, 3, 4\) for 2 samples: features are \(B, d\)"),
        (Wrong(torch.ones(3, 4)), r"pool \(3, 4\) for 2 samples"),
        (Wrong({"pool": 3.0}), r"returned pool float for 2 samples"),
        (Wrong((torch.ones(2, 3),)), r"Wrong returned tuple, not pool; a module returns a tensor"),
        (Wrong({"mine": torch.ones(2, 3)}), r"returned \['mine'\], not pool"),
        (Wrong(torch.ones(2, 3), ("a", "b")), r"returned one tensor, not a, b; .*`outputs`"),
        (Wrong(None, ("a", "a")), r"outputs \('a', 'a'\) of Wrong: use a list of different names"),
        (Wrong(None, []), "use a list of different names"),
        (Wrong(None, "pool"), "use a list of different names"),
    ],
)
def test_modules_that_are_no_feature_network(module: nn.Module, message: str) -> None:
    refuses(message, lambda: load_network(module).features(photographs()))


@pytest.mark.parametrize("suffix", [".pt", ".ts", ".pt2"])
def test_networks_of_files(suffix: str, tmp_path) -> None:
    path = tmp_path / f"mean{suffix}"
    if suffix == ".pt2":
        batch = {0: torch.export.Dim("batch")}
        example = (torch.zeros(3, 3, 256, 256),)
        torch.export.save(torch.export.export(Mean(), example, dynamic_shapes=(batch,)), path)
    else:
        torch.jit.script(Mean()).save(path)
    network = load_network(str(path))
    assert network.name == path.name
    assert network.checksum == hashlib.sha256(path.read_bytes()).hexdigest()
    expected = load_network(Mean()).features(photographs())
    torch.testing.assert_close(network.features(photographs()), expected)


def test_names_and_options_that_are_wrong(tmp_path) -> None:
    refused(r"unknown feature network 'inceptoin'.*'inception'", "inceptoin")
    refused(r"no file none.pt with a feature network", "none.pt")
    (tmp_path / "text.pt2").write_text("no archive")
    refused(r"text.pt2 is no exported program", str(tmp_path / "text.pt2"))
    refused("weights have no effect on Mean, which brings its own", Mean(), weights="a.pth")
    digits = load_dataset("digits")
    refused("weights have no effect on class", "classifier", weights="a.pth", dataset=digits)
    refused("dataset has no effect on clip: only the classifier", "clip", dataset=digits)
    refused("fitted on real images: give a training split", "classifier")
    assert NETWORKS == ("inception", "dinov2", "clip", "i3d", "classifier")


# ---- the classifier ----


def test_of_clips_it_sees_frames() -> None:
    clips = load_dataset("moving-shapes", count=40)
    network = load_network("classifier", dataset=clips)
    frames = torch.zeros(2, 3, *clips.image_shape[-2:], dtype=torch.uint8)
    assert network.features(frames)["logits"].shape == (2, clips.num_classes)
    refuses("fitted on", network.features, frames[..., :-1])


def test_the_classifier_tells_digits_apart() -> None:
    network = load_network("classifier", dataset=load_dataset("digits"))
    held_out = load_dataset("digits", "validation")
    batch = held_out.batch(range(len(held_out)))
    images, labels = ((batch["images"] + 1) * 127.5).round().byte(), batch["class_labels"]
    found = network.features(images)
    assert found["logits"].shape == (364, 10)
    assert (found["logits"].argmax(1) == labels).float().mean() >= 0.97
    pool = found["pool"]
    assert pool.shape == (364, 48)
    centres = torch.stack([pool[labels == label].mean(0) for label in range(10)])
    inside = (pool - centres[labels]).square().sum()
    assert inside / (pool - pool.mean(0)).square().sum() < 0.25  # classes lie apart
    assert torch.linalg.matrix_rank(pool.double().T.cov()) == 48  # no feature is dead
    coloured = network.features(images.expand(-1, 3, -1, -1))  # as pipelines draw them
    torch.testing.assert_close(coloured, found)
    with pytest.raises(ValueError, match="images of 8x16 for a classifier fitted on 16x16; draw"):
        network.features(images[:, :, :8])


def test_every_process_fits_the_same_classifier(monkeypatch) -> None:
    """However many threads it has, and whatever it drew before."""
    monkeypatch.setattr("elit.networks.classifier._STEPS", 10)
    threads = torch.get_num_threads()
    found = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.rand(count)
            found.add(load_network("classifier", dataset=load_dataset("digits")).checksum)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
