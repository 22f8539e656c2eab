"""Formats of exported models: what each needs, how it is written, how it is run."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from elit._extras import missing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SUFFIXES = {"onnx": ".onnx", "aoti": ".aoti.pt2", "torch-export": ".pt2"}
"""Ends of the files' names, by format."""


def check_format(name: str, device: str, dtype: str) -> None:
    """Raise a ValueError unless a format can be written here; imports torch for aoti alone."""
    if name == "onnx":
        if device not in ("auto", "cpu") or dtype != "fp32":
            raise ValueError(
                f"onnx on {device} in {dtype} is not made here; leave --device and --dtype out: "
                f"the file is float32, and what runs it chooses the device"
            )
        for package in ("onnxruntime", "onnxscript"):
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ValueError(
                    missing(f"--format onnx needs {package}", "export", "take --format aoti")
                ) from error
    if name == "aoti":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ValueError(
                "--format aoti needs a C++ compiler; install g++ or clang, or set CXX to one, or "
                "take --format torch-export"
            ) from error


def write_program(
    name: str, program: torch.export.ExportedProgram, inputs: Sequence[str], path: Path
) -> None:
    """Write an exported program whose inputs have these names in a format."""
    import torch

    with _quiet():
        if name == "onnx":
            written = torch.onnx.export(
                program, verbose=False, input_names=inputs, output_names=["velocity"]
            )
            assert written is not None
            written.save(path)  # weights of 2 GB and more go into a second file
        elif name == "aoti":
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        else:
            torch.export.save(program, path)


def open_exported(name: str, inputs: Sequence[str], path: Path) -> Callable[..., Tensor]:
    """What a file of a format computes, of tensors in the order of its inputs' names."""
    import torch

    if name == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])

        def run(*given: Tensor) -> Tensor:
            arrays = (value.numpy() for value in given)
            (velocity,) = session.run(None, dict(zip(inputs, arrays, strict=True)))
            return torch.from_numpy(velocity)

        return run
    if name == "aoti":
        return torch._inductor.aoti_load_package(str(path))
    return torch.export.load(path).module()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of packages that are not needed, and of themselves."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
