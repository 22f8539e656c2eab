"""Files and folders: paths as they are typed, what is in a folder, and whether it has changed."""

import os
import time
from pathlib import Path

import pytest
from helpers import refuses

from elit import _listing
from elit._files import cache_advice, sha256_of, typed_path
from elit._listing import checksums, files_of


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RUNS", str(tmp_path / "my runs"))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_paths_are_as_a_shell_reads_them(home) -> None:
    assert typed_path("~/a b") == f"{home}/a b"
    assert typed_path("$RUNS/1") == typed_path("${RUNS}/1") == f"{home}/my runs/1"
    for same in ("runs/1", "../x", "", "set[12]", "user/model", "price-5$", "a~b"):
        assert typed_path(same) == same
    assert typed_path(Path("~")) == str(home)


def test_a_name_with_a_dollar_that_is_there_is_that(home) -> None:
    (home / "$NOWHERE").mkdir()
    assert typed_path("$NOWHERE") == "$NOWHERE"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("$NOWHERE/x", r"path \$NOWHERE/x: the variable \$NOWHERE is not set; write"),
        ("a/${NOWHERE}", r"the variable \$\{NOWHERE\} is not set"),
        ("~nobody-of-this-name/x", r"there is no such user"),
    ],
)
def test_paths_that_mean_nothing_are_refused(home, path, message) -> None:
    refuses(message, typed_path, path)


def test_linked_folders_are_read_and_hidden_ones_are_not(tmp_path) -> None:
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "set/b").mkdir(parents=True)
    for name in ("elsewhere/deep/1.png", "set/a.png", "set/b/2.png"):
        (tmp_path / name).touch()
    for name in (".ipynb_checkpoints", ".thumbnails", "__MACOSX", "@eaDir"):
        (tmp_path / "set" / name).mkdir()
        (tmp_path / "set" / name / "a.png").touch()
    (tmp_path / "set/.a.png").touch()
    (tmp_path / "set/c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/d").symlink_to(tmp_path / "elsewhere")  # twice is meant
    (tmp_path / "set/b/round").symlink_to(tmp_path / "set")
    (tmp_path / "set/e.png").symlink_to(tmp_path / "set/a.png")
    found = [str(path.relative_to(tmp_path / "set")) for path in files_of(tmp_path / "set")[0]]
    assert found == ["a.png", "b/2.png", "c/deep/1.png", "d/deep/1.png", "e.png"]


def test_a_change_of_content_is_noticed_under_the_same_size_and_date(home, monkeypatch) -> None:
    files = [home / f"{i}.bmp" for i in range(3)]
    for file in files:
        file.write_bytes(b"one")
        os.utime(file, ns=(10**18, 10**18))
    monkeypatch.setattr(_listing, "_TICK", 0)
    time.sleep(0.05)
    before = checksums(home, files)
    assert before == [sha256_of(file) for file in files]
    files[1].write_bytes(b"two")
    os.utime(files[1], ns=(10**18, 10**18))
    after = checksums(home, files)
    assert after == [sha256_of(file) for file in files]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_what_is_unchanged_is_not_read_again(home, monkeypatch) -> None:
    file = home / "a.bin"
    file.write_bytes(b"one")
    first = checksums(home, [file])
    assert not list((home / "cache").rglob("*.json"))  # it has changed just now
    monkeypatch.setattr(_listing, "_TICK", 0)
    time.sleep(0.05)
    assert checksums(home, [file]) == first
    file.chmod(0)
    file.chmod(0o600)  # its ctime has changed, so it is read again
    assert checksums(home, [file]) == first
    (memory,) = (home / "cache").rglob("*.json")
    memory.write_text(memory.read_text().replace(first[0], "from memory"))
    assert checksums(home, [file]) == ["from memory"]
    memory.write_text("[1, 2]")
    assert checksums(home, [file]) == first


def test_the_variable_that_moves_a_cache_is_named(home, monkeypatch) -> None:
    for name in ("ELIT_CACHE", "HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert "set ELIT_CACHE to a folder" in cache_advice(home / ".cache/elit/references/x")
    assert "set HF_HOME to" in cache_advice(home / ".cache/huggingface/hub")
    assert "set TORCH_HOME to" in cache_advice(home / ".cache/torch/hub")
    assert "set XDG_CACHE_HOME to" in cache_advice(home)
    assert cache_advice(home / "runs") is None
    monkeypatch.setenv("HF_HOME", "/data/hf")
    assert "set HF_HOME to" in cache_advice("/data/hf/hub/models")
    assert "set ELIT_CACHE and TORCH_HOME to" in cache_advice(home / ".cache")
