"""What is said where the Hugging Face hub gives nothing, and that nothing else is printed."""

import json
import subprocess
import sys

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from elit._hub import hub_reason, not_fetched
from elit.networks.weights import _from_hub
from elit.pipelines.folder import loading_error
from elit.pipelines.load import load_pipeline
from elit.pipelines.text_encoder import encoder_settings
from elit.preparation.autoencoder import _hub_config, load_vae
from elit.preparation.settings import PrepareSettings
from elit.preparation.source import open_source
from elit.training.finetune import fetch_base


def behind(error: Exception, *, raised_from: bool) -> OSError:
    """The OSError that a library makes of an error of the hub's."""
    try:
        try:
            raise error
        except type(error) as caught:
            if raised_from:
                raise OSError("a/b does not appear to have a file named config.json.") from caught
            raise OSError("a/b does not appear to have a file named config.json.")  # noqa: B904
    except OSError as made:
        return made


def answered(kind: type) -> Exception:
    """An error that the hub answered, without the answer, whose class differs by the version."""
    error = type(kind.__name__, (kind,), {"__init__": Exception.__init__})("no")
    assert isinstance(error, kind)
    return error


@pytest.mark.parametrize("raised_from", [True, False])
def test_an_unreachable_hub_is_no_missing_file(monkeypatch, raised_from) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    error = behind(LocalEntryNotFoundError("cannot find it"), raised_from=raised_from)
    assert hub_reason(error) == "it could not be reached"
    text = not_fetched("a/b", error)
    assert text.startswith("a/b is neither a folder nor can it be fetched from the Hugging Face")
    assert "does not appear" not in text
    assert "check its spelling and the network" in text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_reason(error) == "HF_HUB_OFFLINE is set"


@pytest.mark.parametrize("kind", [RepositoryNotFoundError, GatedRepoError])
def test_an_unknown_repository_is_no_unreachable_hub(kind) -> None:
    error = behind(answered(kind), raised_from=True)
    assert hub_reason(error) == "it knows no such repository, or does not show it to you"


def test_a_cache_that_cannot_be_written_names_its_variable(monkeypatch) -> None:
    monkeypatch.setenv("HF_HOME", "/home/of/nobody/hf")
    error = behind(PermissionError(13, "Permission denied", "/home/of/nobody"), raised_from=True)
    assert "Permission denied; set HF_HOME to a folder" in not_fetched("a/b", error)


def test_what_the_hub_did_not_say_is_told_as_it_came() -> None:
    error = behind(answered(EntryNotFoundError), raised_from=False)
    assert hub_reason(error) is None
    assert "(a/b does not appear to have a file named config.json);" in not_fetched("a/b", error)


def test_a_pipeline_that_cannot_be_loaded_says_what_to_try(tmp_path) -> None:
    advice = "Weights of another kind need variant='fp16' or use_safetensors=False"
    for missing in ("model.safetensors", "files of variant fp16"):
        assert advice in str(loading_error("a/b", OSError(f"there are no {missing}")))
    assert advice not in str(loading_error("a/b", OSError("no")))
    long = ValueError("It is of\n another size (8). More that nobody reads.")
    message = str(loading_error(str(tmp_path), long))
    assert message.startswith(f"{tmp_path} cannot be loaded: It is of another size (8); give the")


@pytest.mark.parametrize("ask", [
    load_pipeline, load_vae, fetch_base, encoder_settings,
    lambda name: open_source(PrepareSettings(name, "out")),
    lambda name: _from_hub(name, "weights.pt", "inception"),
])  # fmt: skip
def test_all_that_ask_the_hub_say_so(ask, tmp_path, monkeypatch) -> None:
    """The tests are offline."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no/such.*(HF_HUB_OFFLINE is set|not be reached)"):
        ask("no/such")


def test_a_fetched_pipeline_s_autoencoder_is_found_offline(tmp_path, monkeypatch) -> None:
    import diffusers

    home = tmp_path / "models--some--pipe"
    folder = home / "snapshots" / "abc" / "vae"
    folder.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    config, subfolder = _hub_config(diffusers, "some/pipe")
    assert (config["_class_name"], subfolder) == ("AutoencoderKL", "vae")


def test_the_command_line_keeps_the_hub_s_retries_to_itself() -> None:
    code = """
import logging
from elit.cli.main import main
main(["sample", "nowhere"])
import huggingface_hub.utils.logging
logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
