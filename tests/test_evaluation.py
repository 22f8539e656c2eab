"""Evaluation as a whole: the same on any number of processes, after any kill, and honest."""

import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import randomise, refuses, tiny_dit, tiny_elastic
from PIL import Image
from prepared_data import write_prepared
from tiny_clip import save_tiny_clip
from torch import nn

from elit import ElitPipeline, ElitTextPipeline, create_model, load_pipeline, make_scheduler
from elit._process import Process
from elit.choosing.points import OperatingPoint
from elit.cost.flops import CountedCost, forward_flops
from elit.data import load_dataset
from elit.evaluation import parts as parts_module
from elit.evaluation.drawing import Drawing
from elit.evaluation.evaluation import Evaluation, evaluate, save_npz
from elit.evaluation.frechet import Moments, frechet_distance
from elit.evaluation.images import Images, open_images
from elit.evaluation.parts import Parts, part_size
from elit.evaluation.reference import make_reference
from elit.evaluation.scores import clip_score, precision_recall
from elit.evaluation.subjects import open_reference
from elit.evaluation.sweep import Grid, sweep
from elit.networks.feature_network import load_network

ONE = Process()


class Corners(nn.Module):
    """Sixteen numbers of a picture that any change of it changes."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 4).flatten(1)


CORNERS = load_network(Corners(), device="cpu")


def reference_of(images: Images, network=CORNERS, **options):
    """Statistics of real images by one network."""
    (found,) = make_reference(images, [network], ONE, progress=False, **options).values()
    return found


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A pipeline of random weights that draws grey images of 8x8."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    ElitPipeline(tiny_elastic(in_channels=1), make_scheduler("euler")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A folder of 60 noise pictures of 8x8."""
    folder = tmp_path_factory.mktemp("real")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i:02d}.png")
    return folder


def make_evaluation(run: Path, real: Path, home: Path, count: int = 40, **changes) -> Evaluation:
    options = {"batch_size": 4, "seed": 3, "keep_images": False} | changes
    process = options.pop("process", ONE)
    pipeline = load_pipeline(run)
    pipeline.set_progress_bar_config(disable=True)
    drawing = Drawing(pipeline, [CORNERS], count, **options)
    return Evaluation(str(run), drawing, open_images(str(real)), process, home, progress=False)


def without_times(report: dict) -> dict:
    report = json.loads(json.dumps(report))
    for row in report["rows"]:
        for name in ("ms_per_image", "decode_ms_per_image", "drawn_ms_per_image", "front_ms"):
            row.pop(name, None)
    return report


POINT = OperatingPoint(0.5, 3, "ccfg", 2.0, 1 / 16)


# ---- the same on any number of processes ----


def test_any_number_of_processes_gives_the_same(run, real, tmp_path) -> None:
    world = 4
    alone = make_evaluation(run, real, tmp_path / "alone")
    report = evaluate(alone, POINT)
    for rank in reversed(range(world)):
        shared = make_evaluation(run, real, tmp_path / "shared", process=Process(rank, world))
        together = evaluate(shared, POINT)
        assert (together is None) == (rank > 0)
    assert without_times(together) == without_times(report)
    mine, theirs = alone.parts(POINT), shared.parts(POINT)
    assert len(mine) > world
    for name in ("images", "labels", "Corners.pool"):
        assert torch.equal(mine.whole(name), theirs.whole(name))


def test_a_sample_is_what_the_pipeline_draws_from_its_seed(run, real, tmp_path) -> None:
    evaluation = make_evaluation(run, real, tmp_path, count=7, keep_images=True)
    evaluate(evaluation, POINT)
    images = evaluation.parts(POINT).whole("images")
    assert evaluation.parts(POINT).whole("labels").tolist() == [0, 1, 2, 0, 1, 2, 0]
    alone = evaluation.drawing.pipeline(
        [5 % 3], budget=0.5, num_inference_steps=3, guidance=POINT.make_guidance(),
        generator=torch.Generator().manual_seed(3 + 5), output_type="pt",
    ).images  # fmt: skip
    assert ((alone * 255).round() - images[5].float()).abs().max() <= 1  # of another batch


# ---- scores are of what they say ----


def test_scores_are_those_of_the_images_that_were_drawn(run, real, tmp_path) -> None:
    evaluation = make_evaluation(run, real, tmp_path, keep_images=True)
    row = evaluate(evaluation, POINT)["rows"][0]
    drawn = CORNERS.features(evaluation.parts(POINT).whole("images"))["pool"]
    wanted = CORNERS.features(evaluation.images.read(range(60)))["pool"]
    sides = []
    for features in (drawn, wanted):
        moments = Moments()
        moments.update(features)
        sides += [moments.mean, moments.covariance]
    assert row["scores"]["fd"] == pytest.approx(frechet_distance(*sides), rel=1e-9)
    assert row["scores"]["recall"] == precision_recall(wanted, drawn).recall
    assert row["scores_of"]["fd"] == "Corners"


def test_fewer_samples_than_features_is_warned_of(run, real, tmp_path, caplog) -> None:
    evaluate(make_evaluation(run, real, tmp_path, count=12), POINT)
    assert "use at least 17" in caplog.text


def test_a_report_names_all_that_its_scores_depend_on(run, real, tmp_path) -> None:
    evaluation = make_evaluation(run, real, tmp_path)
    report = evaluate(evaluation, POINT)
    settings, model = report["settings"], report["model"]
    assert len(model["weights"]) == 16
    assert settings["samples"] == 40
    assert settings["seed"] == 3
    assert settings["sampler"] == "FlowMatchEulerDiscreteScheduler"
    assert settings["networks"][0]["weights"] == CORNERS.checksum
    assert settings["reference"] == {
        "name": str(real), "digest": evaluation.images.digest, "images": 60,
    }  # fmt: skip
    assert settings["versions"]["torch"] == torch.__version__
    row = report["rows"][0]
    assert row["grid"] == pytest.approx([1, 2 / 3, 1 / 3], abs=1e-6)
    assert (row["budget"], row["guide_budget"], row["scale"]) == (0.5, 1 / 16, 2.0)
    assert row["ms_per_image"] > 0
    (device,) = row["drawn_on"]
    assert torch.__version__ in device
    assert json.loads(json.dumps(report)) == report


# ---- texts and clips ----


def noise_images(*shape: int, count: int = 24) -> Images:
    """Real images, or clips, of noise."""
    pixels = torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(1))
    pixels = pixels.to(torch.uint8)
    return Images("noise", "n", count, shape, lambda numbers: pixels[list(numbers)])


def test_texts_are_compared_with_what_was_drawn_of_them(tmp_path) -> None:
    save_tiny_clip(tmp_path / "clip")
    network = load_network("clip", weights=tmp_path / "clip")
    model = randomise(create_model("elit-mmdit-tiny/2", 16, in_channels=3), std=0.05)
    pipeline = ElitTextPipeline(model, make_scheduler("euler"))
    pipeline.set_progress_bar_config(disable=True)
    texts = ("a red disc", "a blue disc", "blue")
    drawing = Drawing(pipeline, [network], 7, batch_size=4, texts=texts, keep_images=True)
    evaluation = Evaluation(
        "texts", drawing, noise_images(3, 16, 16), ONE, tmp_path, progress=False
    )
    report = evaluate(evaluation, OperatingPoint(0.5, 2))
    images = evaluation.parts(OperatingPoint(0.5, 2)).whole("images")
    wanted = clip_score(
        network.features(images)["pool"], network.text_features([texts[i % 3] for i in range(7)])
    )
    assert report["rows"][0]["scores"] == {"clip": pytest.approx(wanted, rel=1e-5)}
    assert report["settings"]["drawn"].startswith("3 texts, ")
    refuses("give prompts", Drawing, pipeline, [network], 7)
    classes = ElitPipeline(tiny_elastic(in_channels=1), make_scheduler("euler"))
    refuses("clip compares images with texts", Drawing, classes, [network], 7)


def test_a_network_of_images_sees_each_frame_of_a_clip(tmp_path) -> None:
    model = tiny_elastic(sample_size=(2, 4, 4), group=(1, 2, 2), in_channels=3)
    pipeline = ElitPipeline(model, make_scheduler("euler"))
    pipeline.set_progress_bar_config(disable=True)
    point = OperatingPoint(0.5, 2)
    drawing = Drawing(pipeline, [CORNERS], 10, batch_size=4)
    assert drawing.image_shape() == (3, 2, 4, 4)
    real = noise_images(3, 2, 4, 4)
    evaluation = Evaluation("clips", drawing, real, ONE, tmp_path, progress=False)
    report = evaluate(evaluation, point)
    parts = evaluation.parts(point)
    assert parts.whole("images").shape == (10, 3, 2, 4, 4)
    frames = parts.whole("images").transpose(1, 2).flatten(0, 1)
    assert torch.equal(parts.whole("Corners.pool"), CORNERS.features(frames)["pool"])
    assert report["rows"][0]["scores"]["fd"] > 0
    with pytest.raises(ValueError, match="has 4x4, but clips draws 2x4x4"):
        Evaluation("clips", drawing, noise_images(3, 4, 4), ONE, tmp_path)


# ---- cost ----


@pytest.fixture(scope="module")
def costs() -> Drawing:
    pipeline = ElitPipeline(tiny_elastic(in_channels=1), make_scheduler("euler"))
    pipeline.set_progress_bar_config(disable=True)
    return Drawing(pipeline, [], 1)


@pytest.fixture(scope="module")
def counted(costs) -> Callable[[int], int]:
    """Flops of a forward at a number of latents, each counted once."""
    model = costs.pipeline.transformer
    return CountedCost(type(model), model.config).flops


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm-solver"])
@pytest.mark.parametrize(
    "point",
    [
        OperatingPoint(1.0, 3),
        OperatingPoint(0.5, 4, "cfg", 2.0),
        OperatingPoint(0.5, 4, "cfg", 2.0, None, (0.3, 0.8)),
        OperatingPoint(1.0, 4, "ag", 2.0, 0.25),
        OperatingPoint(0.25, 4, "ccfg", 2.0, 1 / 16, (0.5, 1.0)),
    ],
)
def test_the_cost_is_that_of_the_forwards_that_run(sampler, point, costs, counted) -> None:
    pipeline, seen = costs.pipeline, []
    pipeline.scheduler = make_scheduler(sampler)

    def see(_, args: tuple, kwargs: dict) -> None:
        kept, count = kwargs["num_latents"], len(args[0])
        mixed = Counter(kept) if isinstance(kept, tuple) else {kept: count}
        seen.extend(mixed.items())

    hook = pipeline.transformer.register_forward_pre_hook(see, with_kwargs=True)
    pipeline(
        [0, 1], budget=point.budget, num_inference_steps=point.steps,
        guidance=point.make_guidance(), output_type="latent",
    )  # fmt: skip
    hook.remove()
    told = [(n, 2 * times) for call in costs.calls(point) for n, times in call]
    assert told == seen
    assert costs.flops(point) == sum(counted(n) * rows // 2 for n, rows in seen)


def test_a_plain_model_costs_its_forwards() -> None:
    pipeline = ElitPipeline(tiny_dit(in_channels=1), make_scheduler("euler"))
    cost = Drawing(pipeline, [], 1)
    full = forward_flops(pipeline.transformer)
    assert cost.flops(OperatingPoint(1.0, 5)) == 5 * full
    assert cost.flops(OperatingPoint(1.0, 5, "cfg", 2.0)) == 10 * full


# ---- sweeps ----

GRID = Grid([1.0, 0.25], [2, 3], ["none", "ccfg"], [1.5, 2.0], [1 / 16])


def test_a_grid_has_each_point_once() -> None:
    model = tiny_elastic()
    points = Grid([1, 0.99, 0.5, 1 / 16], [4, 4], ["none", "cfg", "ag", "ccfg"], [2.0]).points(
        model
    )
    assert len(points) == len(set(points))
    # 1 and 0.99 are both 16 latents; at 1/16 the guides ag and ccfg have nothing lower.
    assert len(points) == 4 + 4 + 2
    assert {p.guide_budget for p in points if p.guidance == "ag"} == {1 / 16}
    plain = Grid([1.0], [2, 3], ["none", "cfg"], [2.0, 3.0]).points(tiny_dit())
    assert len(plain) == 2 * 3


def test_a_sweep_marks_what_nothing_beats(run, real, tmp_path) -> None:
    report = sweep(make_evaluation(run, real, tmp_path, count=16), GRID, tmp_path / "out")
    rows = report["rows"]
    assert len(rows) == 2 * 2 * 3
    assert report["ranked_by"] == "fd"
    for row in rows:
        beaten = any(
            o["gflops_per_image"] <= row["gflops_per_image"]
            and o["scores"]["fd"] < row["scores"]["fd"]
            for o in rows
        )
        assert row["front_flops"] != beaten
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == report


def test_a_sweep_that_was_stopped_gives_the_same_file(run, real, tmp_path) -> None:
    grid = Grid([1.0, 0.25], [2], ["none", "ccfg"], [2.0], [1 / 16])
    whole = make_evaluation(run, real, tmp_path / "a", count=16)
    sweep(whole, grid, tmp_path / "a")
    broken = make_evaluation(run, real, tmp_path / "b", count=16)
    points = grid.points(broken.drawing.pipeline.transformer)
    draws = []

    class Stop(Exception):
        pass

    def stop(*_) -> None:
        draws.append(1)
        if len(draws) == 20:
            raise Stop

    handle = broken.drawing.pipeline.transformer.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        sweep(broken, grid, tmp_path / "b")
    handle.remove()
    made = sum(len(broken.parts(p)) - len(broken.parts(p).missing()) for p in points)
    assert 0 < made < sum(len(broken.parts(p)) for p in points)
    sweep(broken, grid, tmp_path / "b")
    files = [(tmp_path / x / "sweep.json").read_bytes() for x in "ab"]
    assert files[0] == files[1]  # times too: they are measured once for a device


def test_a_sweep_grows_by_another_grid(run, real, tmp_path) -> None:
    evaluation = make_evaluation(run, real, tmp_path)
    first = sweep(evaluation, Grid([1.0], [2], ["none"]), tmp_path)
    both = sweep(evaluation, Grid([0.5], [2], ["none"]), tmp_path)
    assert [row["budget"] for row in both["rows"]] == [1.0, 0.5]
    assert both["rows"][0] | {"front_flops": 0, "front_ms": 0} == first["rows"][0] | {
        "front_flops": 0, "front_ms": 0,
    }  # fmt: skip


def test_a_sweep_of_other_settings_is_not_mixed_in(run, real, tmp_path) -> None:
    grid = Grid([1.0], [2], ["none"])
    sweep(make_evaluation(run, real, tmp_path), grid, tmp_path)

    def refused(message: str, **changes) -> None:
        refuses(message, sweep, make_evaluation(run, real, tmp_path, **changes), grid, tmp_path)

    refused("other samples", count=20)
    refused("other seed", seed=4)
    content = json.loads((tmp_path / "sweep.json").read_text())
    content["model"]["config"] = "of other settings"
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    refused("other settings of the model")
    (tmp_path / "sweep.json").write_text('{"rows": ')
    refused(r"sweep\.json is not JSON")


def test_other_weights_or_levels_are_other_samples(run, real, tmp_path) -> None:
    copy = tmp_path / "trained"
    shutil.copytree(run, copy)
    before = make_evaluation(copy, real, tmp_path).parts(POINT).folder
    pipeline = load_pipeline(copy)
    with torch.no_grad():
        next(pipeline.transformer.parameters()).add_(1)
    pipeline.save_pretrained(copy)
    trained = make_evaluation(copy, real, tmp_path).parts(POINT).folder
    scheduler = pipeline.scheduler
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, shift=3.0)
    pipeline.save_pretrained(copy)
    shifted = make_evaluation(copy, real, tmp_path).parts(POINT).folder
    assert len({before, trained, shifted}) == 3


# ---- real images ----


def test_a_reference_is_made_once_and_again_where_it_is_damaged(real, tmp_path, caplog) -> None:
    read = []
    images = open_images(str(real))
    counted = replace(images, read=lambda numbers: read.append(numbers) or images.read(numbers))
    first = reference_of(counted)
    assert read
    assert first.count == len(first.features) == 60
    read.clear()
    (file,) = tmp_path.glob("cache/references/*/statistics.safetensors")
    left = file.parent / "parts" / "part-00000.safetensors"  # of a job that was killed
    left.write_bytes(b"any")
    second = reference_of(counted)
    assert not read
    assert not left.exists()
    assert torch.equal(first.covariance, second.covariance)
    distance = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    assert distance < 1e-9
    file.write_bytes(file.read_bytes()[:-20])
    assert torch.equal(first.covariance, reference_of(counted).covariance)
    assert "is made anew" in caplog.text
    read.clear()
    reference_of(counted, replace(CORNERS, checksum="another"))
    assert read, "weights of another network must not share the statistics"


def test_one_picture_of_many_that_was_replaced_makes_another_reference(tmp_path) -> None:
    """In place, under its size and date, where only some contents used to be looked at."""
    for i in range(2002):
        Image.new("RGB", (2, 2), (i % 256, 0, 0)).save(tmp_path / f"{i:04d}.bmp")
    before = open_images(str(tmp_path)).digest
    assert open_images(str(tmp_path)).digest == before
    picture, date = tmp_path / "0001.bmp", (tmp_path / "0001.bmp").stat().st_mtime_ns
    size = picture.stat().st_size
    Image.new("RGB", (2, 2), (0, 9, 0)).save(picture)
    os.utime(picture, ns=(date, date))
    assert picture.stat().st_size == size
    assert open_images(str(tmp_path)).digest != before


def test_hidden_pictures_are_none_and_linked_folders_are_read(real, tmp_path) -> None:
    folder = tmp_path / "pictures"
    for name in (".ipynb_checkpoints", ".thumbnails", "__MACOSX"):
        shutil.copytree(real, folder / name)
    refuses("has no pictures in it", open_images, str(folder))
    (folder / "class").symlink_to(real)
    assert open_images(str(folder)).count == 60


def test_prepared_data_that_was_changed_is_no_reference(tmp_path) -> None:
    write_prepared(tmp_path / "p", kind="images", parts=(30, 12), channels=3)
    open_images(str(tmp_path / "p"))
    shard = tmp_path / "p" / "train-00001-32x32.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00001.* is damaged: its checksum is wrong; run"):
        open_images(str(tmp_path / "p"))


def test_another_scale_of_the_autoencoder_draws_anew(tmp_path) -> None:
    run, keys = tmp_path / "run", []
    model = tiny_elastic(in_channels=4)
    ElitPipeline(model, make_scheduler("euler"), tiny_vae(0)).save_pretrained(run)
    config = run / "vae" / "config.json"
    for scale in (0.18215, 0.5):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": scale}))
        drawing = Drawing(load_pipeline(run), [CORNERS], 4)
        evaluation = Evaluation(
            str(run), drawing, noise_images(3, 16, 16), ONE, tmp_path, progress=False
        )
        keys.append(evaluation.parts(POINT).folder.name)
    assert keys[0] != keys[1]


def test_mirrored_samples_are_no_more_images(tmp_path) -> None:
    write_prepared(tmp_path / "p", kind="images", parts=(30, 12), channels=3, flips=True)
    images = open_images(str(tmp_path / "p"))
    both = load_dataset("prepared", path=tmp_path / "p")  # some are held out
    assert (2 * images.count, images.shape) == (len(both), (3, 32, 32))


def tiny_vae(seed: int) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        scaling_factor=0.5, shift_factor=0.25,  # as `write_prepared` has them
    )  # fmt: skip


def test_parts_that_another_job_removes_are_told(tmp_path) -> None:
    parts = Parts(tmp_path, 4, 2)
    for look in (parts.origins, lambda: parts.whole("x")):
        refuses(r"part-00000\.safetensors is damaged", look)


def test_a_folder_is_not_the_data_of_its_name(run, real, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(real, "digits")
    pipeline = load_pipeline(run)
    assert open_reference(pipeline, "digits").name == "digits"
    images = open_reference(pipeline, trained_on=("digits", {}))
    assert (images.name, images.shape) == ("digits, train", (1, 16, 16))
    options = {"fit_to": (8, 8), "trained_on": ("digits", {})}
    refuses("--fit is of a folder", open_reference, pipeline, **options)


def test_one_image_is_no_reference(tmp_path) -> None:
    refuses("holds one image", reference_of, open_images(str(folder_of(tmp_path, (8, 8)))))


def test_two_jobs_make_one_reference(real, monkeypatch) -> None:
    """The second is through with its parts when the first one removes all."""
    monkeypatch.setattr(parts_module, "PATIENCE", 2.0)
    images = open_images(str(real))
    first_read, both = threading.Event(), []

    def slowly(numbers):
        first_read.set()
        time.sleep(0.05)
        return images.read(numbers)

    def job(read) -> None:
        both.append(reference_of(replace(images, read=read), batch_size=4))

    jobs = [threading.Thread(target=job, args=(read,)) for read in (slowly, slowly)]
    jobs[0].start()
    first_read.wait()
    jobs[1].start()
    for thread in jobs:
        thread.join(60)
    assert len(both) == 2
    assert torch.equal(both[0].mean, both[1].mean)


def test_the_decoder_is_part_of_a_reference_s_digest(tmp_path) -> None:
    write_prepared(tmp_path / "p", kind="latents", parts=(8,), sizes=((8, 8),), scale=2)
    vaes = [tiny_vae(seed) for seed in (0, 1)]
    digests = {open_images(str(tmp_path / "p"), vae=vae).digest for vae in vaes}
    assert len(digests) == 2
    refuses("no VAE to decode", open_images, str(tmp_path / "p"))


def test_a_reference_from_an_npz_of_images(real, tmp_path) -> None:
    folder = open_images(str(real))
    pixels = folder.read(range(60)).movedim(1, -1).numpy()
    np.savez(tmp_path / "plain.npz", arr_0=pixels)
    np.savez_compressed(tmp_path / "packed.npz", pixels)
    for name in ("plain", "packed"):
        images = open_images(str(tmp_path / f"{name}.npz"))
        assert (images.count, images.shape) == (60, (3, 8, 8))
        for numbers in ([0, 1, 2], [3, 4], [50, 51], [7], [59, 3]):
            assert torch.equal(images.read(numbers), folder.read(numbers))


def test_statistics_alone_serve_the_network_that_they_are_of(tmp_path) -> None:
    inception = replace(CORNERS, name="inception")
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    images = open_images(str(tmp_path / "adm.npz"))
    found = reference_of(images, inception)
    assert found.features is None
    assert torch.equal(found.covariance, torch.eye(2048, dtype=torch.float64))
    refuses("Corners needs images", reference_of, images)
    np.savez(tmp_path / "dino.npz", mu=np.zeros(1024), sigma=np.eye(1024))
    images = open_images(str(tmp_path / "dino.npz"))
    refuses("1024 features, but inception.pool has 2048", reference_of, images, inception)


def odd_npz(folder: Path, **arrays) -> Path:
    np.savez(folder / "x.npz", **arrays)
    return folder / "x.npz"


def broken_npz(folder: Path) -> Path:
    path = odd_npz(folder, arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def npy_of_another_name(folder: Path) -> Path:
    with (folder / "x.npz").open("wb") as file:
        np.save(file, np.zeros((9, 8, 8, 3), np.uint8))
    return folder / "x.npz"


def folder_of(folder: Path, *sizes: tuple[int, int]) -> Path:
    home = folder / "pictures"
    home.mkdir()
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(home / f"{i}.png")
    return home


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: folder_of(f), "no pictures"),
        (lambda f: f / "nowhere", "no folder, no .npz file and no data set"),
        (lambda f: "digitz", "did you mean digits"),
        (lambda f: f / "nowhere.npz", "there is no"),
        (broken_npz, "cannot be read as .npz"),
        (lambda f: odd_npz(f, labels=np.zeros(3)), "holds labels: give a file with images"),
        (lambda f: odd_npz(f, arr_0=np.zeros((9, 8, 8, 3))), "give uint8"),
        (lambda f: odd_npz(f, mu=np.zeros(3), sigma=np.eye(4)), "don't fit each other"),
        (lambda f: odd_npz(f, mu=np.array(["a"]), sigma=np.eye(1)), "no floating-point numbers"),
        (lambda f: odd_npz(f, mu=np.full(3, np.nan), sigma=np.eye(3)), "not finite"),
        (lambda f: odd_npz(f, arr_0=np.asfortranarray(np.zeros((9, 8, 8, 3), np.uint8))), "of C"),
        (lambda f: odd_npz(f, arr_0=np.uint8(3)), "give uint8"),
        (npy_of_another_name, "cannot be read as .npz"),
    ],
)
def test_what_is_no_reference_is_refused(make, message, tmp_path) -> None:
    refuses(message, lambda: open_images(str(make(tmp_path))))


def test_pictures_of_several_sizes_are_refused_or_fitted(tmp_path) -> None:
    home = folder_of(tmp_path, (8, 8), (8, 8), (12, 8))
    refuses(r"2.png has 8x12 pixels", lambda: open_images(str(home)).read([1, 2]))
    assert open_images(str(home), fit_to=(4, 4)).read([0, 1, 2]).shape == (3, 3, 4, 4)
    (home / "3.png").write_bytes(b"no picture")
    refuses(r"3.png cannot be read", lambda: open_images(str(home)).read([3]))


def test_another_resolution_is_refused(run, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"has 8x16, but .* draws 8x8"):
        make_evaluation(run, folder_of(tmp_path, (16, 8)), tmp_path)


def test_built_in_data_is_read_as_bytes() -> None:
    images = open_images("digits", "validation")
    assert (images.count, images.shape) == (364, (1, 16, 16))
    assert images.read([0, 5]).dtype == torch.uint8
    assert images.digest != open_images("digits").digest


# ---- what goes wrong on the way ----


def test_a_point_that_diverges_is_told_and_the_others_go_on(run, real, tmp_path) -> None:
    evaluation = make_evaluation(run, real, tmp_path)
    grid = Grid([1.0], [2], ["none", "cfg"], [2.0, 1e38])
    report = sweep(evaluation, grid, tmp_path)
    by_scale = {row["scale"]: row for row in report["rows"]}
    assert by_scale[1e38]["scores"] == {}
    assert "no longer finite" in by_scale[1e38]["warnings"][0]
    assert not by_scale[1e38]["front_flops"]
    assert by_scale[2.0]["scores"]["fd"] > 0
    assert without_times(sweep(evaluation, grid, tmp_path)) == without_times(report)
    refuses("no longer finite", lambda: evaluate(evaluation, OperatingPoint(1.0, 2, "cfg", 1e38)))


def test_weights_without_a_folder_are_told_apart_too(run, real, tmp_path) -> None:
    first = replace(make_evaluation(run, real, tmp_path), run="user/repo")
    second = replace(make_evaluation(run, real, tmp_path), run="user/repo")
    assert first.model == second.model
    assert len(first.model["weights"]) == 16
    other = make_evaluation(run, real, tmp_path)
    with torch.no_grad():
        next(other.drawing.pipeline.transformer.parameters()).add_(1)
    assert replace(other, run="user/repo").parts(POINT).folder != first.parts(POINT).folder


# ---- parts ----


def test_a_damaged_part_is_named(run, real, tmp_path) -> None:
    evaluation = make_evaluation(run, real, tmp_path)
    evaluate(evaluation, POINT)
    parts = evaluation.parts(POINT)
    (parts.folder / "scores.json").unlink()
    parts.path(2).write_bytes(parts.path(2).read_bytes()[:100])
    refuses(r"part-00002.safetensors is damaged", evaluate, evaluation, POINT)
    parts.path(2).unlink()
    assert evaluate(evaluation, POINT) is not None


@pytest.mark.parametrize("count", [1, 7, 40, 1000, 50_000])
@pytest.mark.parametrize("batch_size", [1, 32, 100, 5000])
def test_parts_hold_each_sample_once(tmp_path, count, batch_size) -> None:
    parts = Parts(tmp_path, count, part_size(count, batch_size))
    samples = [i for number in range(len(parts)) for i in parts.samples(number)]
    assert samples == list(range(count))
    assert parts.size % batch_size == 0
    assert parts.todo() == count


def test_samples_as_other_tools_read_them(run, real, tmp_path) -> None:
    evaluation = make_evaluation(run, real, tmp_path, keep_images=True)
    evaluate(evaluation, POINT)
    parts = evaluation.parts(POINT)
    save_npz(parts, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as file:
        wanted = parts.whole("images").movedim(1, -1).expand(-1, -1, -1, 3)
        assert np.array_equal(file["arr_0"], wanted.numpy())  # grey too is written in colour
