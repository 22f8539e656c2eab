"""What every test runs under: one quiet thread, no network, the same random numbers each time."""

import os

# Read once, when torch is first imported: so they stand before any other import.
os.environ["OMP_NUM_THREADS"] = "1"  # pytest-xdist runs two processes; more threads only fight
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"  # a spinning thread starves the other process
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gc
import math
import random

import numpy as np
import pytest
from hypothesis import settings

from elit.cli import waiting

settings.register_profile("elit", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("elit")

waiting.PATIENCE = math.inf  # on a loaded machine any command takes long
gc.disable()  # what is imported and collected stays: looking through it takes a fifth of the time


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000, 20, 20)  # what tests make is small, and looking for garbage is not


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seeds each test alike, so that its outcome doesn't hang on the tests before it."""
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries draw from the global generator)
    torch.manual_seed(0)
