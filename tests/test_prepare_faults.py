"""`elit prepare` when it is stopped, killed, shared between processes, or has a full disk."""

import errno
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refuses
from prepare_sources import class_folder, contents, picture, run, shard, tiny_vae

from elit._files import remove_leftovers, write_file, write_json
from elit._process import this_process
from elit.cli.main import main
from elit.data import load_dataset
from elit.preparation import verify
from elit.preparation.images import fit

datasets = pytest.importorskip("datasets")

COUNT, PART = 14, 4


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path) -> Path:
    return class_folder(tmp_path / "images", COUNT, broken=(3,))


@pytest.fixture
def whole(source, tmp_path) -> dict[str, str]:
    """What an undisturbed run of one process writes."""
    run(source, tmp_path / "whole", part_size=PART)
    return contents(tmp_path / "whole")


def test_processes_share_the_work_without_talking(source, tmp_path, monkeypatch) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    run(source, tmp_path / "one", tmp_path / "vae", part_size=PART, flips=True)
    done = []
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        done.append(run(source, tmp_path / "three", tmp_path / "vae", part_size=PART, flips=True))
    assert [result.done for result in done] == [4, 6, 4]  # parts 2, 0 and 3, 1
    assert [result.missing for result in done] == [3, 1, 0]
    assert [result.finished for result in done] == [False, False, True]
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    assert done[-1].std == pytest.approx(run(source, tmp_path / "one", tmp_path / "vae",
                                             part_size=PART, flips=True).std)  # fmt: skip


def together(count: int, tries: int, work: Callable[[int, int], None]) -> None:
    """Call `work(rank, number)` in so many processes, each try at one moment."""
    forked = multiprocessing.get_context("fork")  # with all that is imported
    barrier = forked.Barrier(count)

    def start(rank: int) -> None:
        for number in range(tries):
            barrier.wait(60)
            work(rank, number)

    running = [forked.Process(target=start, args=(rank,)) for rank in range(count)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running] == [0] * count


def test_processes_that_start_at_one_moment(source, tmp_path, whole) -> None:
    """All write the settings, the first of the folder, and one of them the manifest."""

    def work(rank: int, number: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "4"}
        run(source, tmp_path / f"out{number}", part_size=PART)

    together(4, 2, work)
    for number in range(2):
        assert contents(tmp_path / f"out{number}") == whole


def test_of_two_settings_that_start_at_one_moment_one_is_refused(source, tmp_path) -> None:
    def work(flips: int, number: int) -> None:
        told = tmp_path / f"told-{number}-{flips}"
        try:
            run(source, tmp_path / f"out{number}", part_size=1, flips=bool(flips))
            told.touch()
        except ValueError as error:
            told.write_text(str(error))

    together(2, 4, work)
    for flips in (False, True):
        run(source, tmp_path / f"whole-{flips}", part_size=1, flips=flips)
    for number in range(4):
        told = [(tmp_path / f"told-{number}-{flips}").read_text() for flips in (0, 1)]
        assert told.count("") == 1, told
        assert f"was begun with flips={json.dumps(told[1] == '')}, not" in "".join(told)
        assert contents(tmp_path / f"out{number}") == contents(tmp_path / f"whole-{told[1] == ''}")


def test_a_file_that_is_there_may_stay(tmp_path) -> None:
    for number in range(2):
        write_json(tmp_path / "file.json", number, replace=False)
    assert (tmp_path / "file.json").read_text() == "0\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_what_a_killed_process_left_goes_with_the_next_file(tmp_path) -> None:
    forked = multiprocessing.get_context("fork")

    def die(aside: Path) -> None:
        aside.touch()
        (aside.parent / ".tmpXYZ").touch()  # safetensors' own, from which it renames
        os.kill(os.getpid(), signal.SIGKILL)

    process = forked.Process(target=write_file, args=(tmp_path / "file.json", die))
    process.start()
    process.join(60)
    assert len(list(tmp_path.iterdir())) == 1
    write_json(tmp_path / "other.json", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_one_file_written_by_several_at_once(tmp_path) -> None:
    def work(rank: int, number: int) -> None:
        del number
        for _ in range(40):
            write_json(tmp_path / "file.json", [rank] * 1000)

    together(4, 1, work)
    found = json.loads((tmp_path / "file.json").read_text())
    assert found in [[rank] * 1000 for rank in range(4)]
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_leftovers_go_where_nobody_writes_them(tmp_path) -> None:
    kept = [".hidden", ".x.part.json", "x.part"]
    for name in kept:
        (tmp_path / name).touch()
    forked = multiprocessing.get_context("fork")

    def write_and_wait(aside: Path) -> None:
        aside.touch()
        time.sleep(60)

    place = tmp_path / "file.json"
    process = forked.Process(target=write_file, args=(place, write_and_wait))
    process.start()
    while not (found := list(tmp_path.glob(".file.*"))):
        time.sleep(0.01)
    elsewhere = tmp_path / ".y.01234567-1-89abcdef.part.json"  # of another machine
    elsewhere.touch()
    remove_leftovers(tmp_path)
    assert found[0].exists()
    process.kill()
    process.join(60)
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, elsewhere.name}
    os.utime(elsewhere, (0, 0))
    remove_leftovers(tmp_path)
    assert not elsewhere.exists()


STEP = {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"}
NODES = "SLURM_STEP_TASKS_PER_NODE"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "5"}, (0, 1, 1)),  # a batch script runs once
        (STEP, (5, 8, 8)),
        (STEP | {NODES: "4(x2)", "SLURM_NODEID": "1"}, (5, 8, 4)),
        (STEP | {NODES: "3,5", "SLURM_NODEID": "0"}, (5, 8, 3)),
        (STEP | {NODES: "2(x2),4", "SLURM_NODEID": "2"}, (5, 8, 4)),
        (STEP | {NODES: "four"}, "SLURM_STEP_TASKS_PER_NODE is 'four'"),
        (STEP | {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        (STEP | {"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 of WORLD_SIZE=2"),
    ],
)
def test_the_processes_of_slurm_and_torchrun(variables, expected, monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        refuses(expected, this_process)
    else:
        process = this_process()
        assert (process.rank, process.world, process.local_world) == expected


def test_what_is_there_is_not_made_again(source, tmp_path, whole) -> None:
    out = tmp_path / "whole"
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = run(source, out, part_size=PART)
    assert (again.done, again.finished) == (0, True)
    (out / "train-00001.json").unlink()
    (out / "manifest.json").unlink()
    resumed = run(source, out, part_size=PART)
    assert resumed.done == PART
    assert resumed.samples == {"train": COUNT - 1}
    assert contents(out) == whole
    changed = {p.name for p in out.glob("*.saf*") if p.stat().st_mtime_ns != times[p.name]}
    assert changed == {"train-00001-16x16.safetensors"}


def test_damage_is_named_and_mended(source, tmp_path, whole, capsys) -> None:
    out = tmp_path / "whole"
    assert verify(out) == {}
    shards = [out / f"train-0000{n}-16x16.safetensors" for n in range(3)]
    content = bytearray(shards[0].read_bytes())
    content[-1] ^= 1
    shards[0].write_bytes(content)
    shards[1].write_bytes(shards[1].read_bytes()[:-5])
    shards[2].unlink()
    assert main(["prepare", str(out), "--verify"]) == 1
    printed = capsys.readouterr().out
    assert "train-00000-16x16.safetensors: its checksum is wrong" in printed
    assert "train-00001-16x16.safetensors: it has" in printed
    assert "train-00002-16x16.safetensors: it is missing" in printed
    run(source, out, part_size=PART, verify=True)
    assert contents(out) == whole
    assert main(["prepare", str(out), "--verify"]) == 0


def test_other_settings_are_refused(source, tmp_path) -> None:
    out = tmp_path / "out"
    tiny_vae().save_pretrained(tmp_path / "vae")
    run(source, out, tmp_path / "vae", part_size=PART)
    before = contents(out)
    other = tiny_vae()
    with torch.no_grad():
        other.encoder.conv_in.bias[0] += 1
    other.save_pretrained(tmp_path / "other")
    shutil.copytree(tmp_path / "vae", tmp_path / "moved")
    cases = [
        ({"resolution": [32]}, r"resolution=\[16\], not \[32\]"),
        ({"flips": True}, "flips=false, not true"),
        ({"part_size": 8}, "part_size=4, not 8"),
        ({"vae": tmp_path / "other"}, "autoencoder.sha256="),
        ({"vae": None}, r"autoencoder=\{"),
        ({"splits": ["train[:9]"]}, r"source.splits.train.of=.*, and 2 more"),
        ({"store_dtype": "bf16"}, 'store_dtype="fp16", not "bf16"'),
    ]
    for changes, message in cases:
        settings = {"vae": tmp_path / "vae", "part_size": PART} | changes
        refuses(f"was begun with {message}", run, source, out, **settings)
    class_folder(tmp_path / "more", COUNT + 1, broken=(3,))
    refuses(r"source\.splits\.train", run, tmp_path / "more", out, tmp_path / "vae", part_size=PART)
    renamed = class_folder(tmp_path / "renamed", COUNT, broken=(3,))
    (renamed / "cat" / "0002.png").rename(renamed / "cat" / "0003.png")
    message = "begun with other pictures, labels or captions in train than"
    refuses(message, run, renamed, out, tmp_path / "vae", part_size=PART)
    # The same files elsewhere are the same
    run(class_folder(tmp_path / "same", COUNT, broken=(3,)), out, tmp_path / "moved",
        part_size=PART)  # fmt: skip
    assert contents(out) == before


def later(monkeypatch) -> None:
    """Files that were just made count as long unchanged, so that their times are trusted."""
    monkeypatch.setattr("elit._listing._TICK", -(10**12))


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("verify", [True, False])
def test_pictures_replaced_in_place_are_noticed(fresh, verify, tmp_path, monkeypatch) -> None:
    """Also where their sizes and times of change are those of before."""
    if not fresh:
        later(monkeypatch)
    source, out = tmp_path / "images", tmp_path / "out"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.bmp").write_bytes(bmp(number))
    run(source, out, part_size=PART)
    before = contents(out)
    assert run(source, out, part_size=PART, verify=verify).done == 0
    place = source / "5.bmp"
    about = place.stat()
    place.write_bytes(bmp(9))
    os.utime(place, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert (place.stat().st_size, place.stat().st_mtime_ns) == (about.st_size, about.st_mtime_ns)
    with pytest.raises(ValueError, match=r"^5\.bmp of train is another picture than the one that "):
        run(source, out, part_size=PART, verify=verify)
    place.write_bytes(bmp(5))  # other times, the same picture
    assert run(source, out, part_size=PART, verify=verify).finished
    assert contents(out) == before


@pytest.mark.parametrize("kind", ["parquet", "tar", "saved"])
def test_files_of_many_pictures_replaced_in_place(kind, tmp_path) -> None:
    def write(seed: int) -> Path:
        if kind == "tar":
            with tarfile.open(tmp_path / "a.tar", "w") as tar:
                for number in range(2):
                    entry = tarfile.TarInfo(f"{number}.bmp")
                    entry.size = len(bmp(0))
                    tar.addfile(entry, io.BytesIO(bmp(seed + number)))
            return tmp_path / "a.tar"
        shown = [{"bytes": bmp(seed + number), "path": None} for number in range(2)]
        table = datasets.Dataset.from_dict({"image": shown})
        if kind == "saved":
            shutil.rmtree(tmp_path / "saved", ignore_errors=True)
            table.save_to_disk(tmp_path / "saved")
            return tmp_path / "saved"
        table.to_parquet(tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    run(write(0), tmp_path / "one")
    path = write(0)
    assert run(path, tmp_path / "one").done == 0
    time = path.stat().st_mtime_ns
    os.utime(write(5), ns=(time, time))
    run(path, tmp_path / "two")
    found = shard(tmp_path / "two")["images"].movedim(1, -1).numpy()
    assert np.array_equal(found[0], fit(picture(5), (16, 16)))  # nothing of before was kept
    refuses("of train is another picture than the one", run, path, tmp_path / "one")


def test_a_folder_of_an_older_elit_is_trained_on_and_not_gone_on_with(source, tmp_path) -> None:
    out = tmp_path / "out"
    run(source, out, part_size=PART)
    for path in out.glob("train-*.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({k: content[k] for k in (
            "start", "stop", "shards", "skipped", "sums")}))  # fmt: skip
    assert len(load_dataset("prepared", path=out)) > 0
    with pytest.raises(ValueError, match=r"train-00000\.json does not tell .* of an older elit: "):
        run(source, out, part_size=PART)


def bmp(seed: int) -> bytes:
    """A picture whose file is as long as any other's."""
    file = io.BytesIO()
    picture(seed).save(file, "BMP")
    return file.getvalue()


def test_a_folder_with_other_things_is_left_alone(source, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    refuses(r"holds other things, such as thesis\.tex", run, source, tmp_path / "out")
    refuses("is the source and the folder to write", run, source, source)


def test_a_full_disk(source, tmp_path, whole) -> None:
    """A part whose shard does not fit: the limit is on a file's length, the error of one kind."""
    out = tmp_path / "out"
    run(source, out, part_size=PART, splits=["train"])
    for name in ("train-00002-16x16.safetensors", "train-00002.json", "manifest.json"):
        (out / name).unlink()
    before, limits = contents(out), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            run(source, out, part_size=PART)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert contents(out) == before
    assert run(source, out, part_size=PART).done == PART
    assert contents(out) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(number, tmp_path, capsys) -> None:
    source, out = class_folder(tmp_path / "images", 300), tmp_path / "out"

    def end_soon() -> None:
        while not (out / "train-00001.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    # What a shell starts in the background ignores Ctrl-C, and so would this process.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=end_soon, daemon=True).start()
        words = f"prepare {source} {out} --pixels --resolution 16 --workers 1 --part-size 4"
        assert main(words.split()) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "elit: interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not list(out.glob(".*"))
    result = run(source, out, part_size=4)
    assert 0 < result.done < 300
    assert verify(out) == {}
