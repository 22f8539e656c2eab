"""Examples for engines of others, held against what the engines themselves ask for.

vLLM-Omni is not installed by default. With `ELIT_ENGINES=folder[:folder...]`, of wheels of
vllm-omni and vllm that were unpacked, the tests of the plugin run in a process that finds them.
"""

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import randomise, tiny_elastic
from runs import wait_for

from elit import CheapCFG, ElitPipeline, ElitTextPipeline, create_model, make_scheduler

EXAMPLES = Path(__file__).parents[1] / "examples"
PLUGIN = EXAMPLES / "vllm_omni"
ENGINES = os.environ.get("ELIT_ENGINES")


@pytest.fixture
def run(tmp_path) -> Path:
    model = tiny_elastic(in_channels=3)
    ElitPipeline(model, make_scheduler("euler")).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_the_plugin_s_entry_point_is_what_the_engine_looks_for() -> None:
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())
    groups = project["project"]["entry-points"]
    assert groups == {"vllm_omni.general_plugins": {"elit": "elit_vllm_omni:register"}}
    assert project["tool"]["setuptools"]["py-modules"] == ["elit_vllm_omni"]
    source = (PLUGIN / "elit_vllm_omni.py").read_text()
    assert len(source.splitlines()) <= 150
    assert "\ndef register() -> None:" in source
    ours = tomllib.loads((PLUGIN.parents[1] / "pyproject.toml").read_text())
    assert project["project"]["dependencies"] == [ours["project"]["name"]]


@pytest.mark.skipif(
    ENGINES is None or find_spec("vllm_omni") is not None, reason="ELIT_ENGINES is not set"
)
def test_the_plugin_against_unpacked_wheels() -> None:
    """This file in a process of its own that finds the wheels: nothing may be skipped there."""
    paths = os.pathsep.join([ENGINES, os.environ.get("PYTHONPATH", "")])
    words = [__file__, "-q", "-p", "no:cacheprovider", "-n", "0", "-k", "engine_"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-3000:]


@pytest.fixture
def plugin(monkeypatch):
    pytest.importorskip("vllm_omni", reason="vLLM-Omni is not installed; see ELIT_ENGINES")
    monkeypatch.syspath_prepend(str(PLUGIN))
    EntryPoint("elit", "elit_vllm_omni:register", "vllm_omni.general_plugins").load()()
    import elit_vllm_omni

    return elit_vllm_omni


def engine_config(run: Path):
    from vllm_omni.diffusion.data import OmniDiffusionConfig, TransformerConfig

    config = OmniDiffusionConfig(
        model=str(run), model_class_name="ElitPipeline", dtype=torch.float32
    )
    transformer = json.loads((run / "transformer" / "config.json").read_text())
    config.set_tf_model_config(TransformerConfig.from_dict(transformer))
    return config


def engine_request(name: str, prompt="1", **sampling):
    from vllm_omni.diffusion.request import OmniDiffusionRequest
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    sampling = {"num_inference_steps": 3, "seed": 5} | sampling
    return OmniDiffusionRequest(prompt, OmniDiffusionSamplingParams(**sampling), name)


def engine_key(config, request):
    """What the engine's scheduler compares, after the plugin has seen the request."""
    from vllm_omni.diffusion.registry import get_diffusion_pre_process_func
    from vllm_omni.diffusion.sched.request_scheduler import build_request_batch_sampling_params_key

    return build_request_batch_sampling_params_key(get_diffusion_pre_process_func(config)(request))


def test_engine_finds_what_it_needs_of_a_pipeline(plugin, run, monkeypatch) -> None:
    from vllm_omni.diffusion import registry
    from vllm_omni.diffusion.models.interface import SupportsComponentDiscovery

    monkeypatch.setattr(plugin, "get_local_device", lambda: torch.device("cpu"))
    for name in plugin.PIPELINES:
        found = registry.DiffusionModelRegistry._try_load_model_cls(name)
        assert found is plugin.ElitOmniPipeline
    pipeline = registry.initialize_model(engine_config(run))
    assert isinstance(pipeline, torch.nn.Module)
    assert isinstance(pipeline, SupportsComponentDiscovery)
    assert pipeline.supports_request_batch is True
    assert pipeline.load_weights(()) == {name for name, _ in pipeline.named_parameters()}
    assert len(pipeline.load_weights(())) > 10


def test_engine_batches_requests_of_different_budgets(plugin, run) -> None:
    config = engine_config(run)

    def key(**sampling):
        return engine_key(config, engine_request("a", **sampling))

    ccfg = {"guidance": "ccfg", "guide_budget": 0.25}
    one = key(extra_args={"budget": 1.0} | ccfg, guidance_scale=2.0, seed=1)
    assert one == key(extra_args={"budget": 0.25} | ccfg, guidance_scale=2.0, seed=2)
    assert one != key(extra_args=ccfg, guidance_scale=3.0)
    assert one != key(extra_args=ccfg, guidance_scale=2.0, num_inference_steps=4)
    assert one != key(extra_args=ccfg, guidance_scale=2.0, height=16, width=16)
    assert one != key(extra_args=ccfg | {"guide_budget": 0.5}, guidance_scale=2.0)
    assert one != key(extra_args={"guidance": "cfg"}, guidance_scale=2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "a cat"}, r"class label 'a cat' is none of 0\.\.2"),
        ({"prompt": "3"}, r"class label 3 is none of 0\.\.2"),
        ({"extra_args": {"class_label": -1}}, "class label -1 is none of"),
        ({"extra_args": {"class_label": 1.0}}, "class label 1.0 is none of"),
        ({"extra_args": {"class_label": True}}, "class label True is none of"),
        ({"extra_args": {"budget": 0}}, r"budget 0 is not in \(0, 1\]"),
        ({"extra_args": {"budget": float("nan")}}, "budget nan is not"),
        ({"extra_args": {"budget": "1"}}, "budget '1' is not"),
        ({"extra_args": {"bugdet": 0.5}}, r"\['bugdet'\] have no effect; extra arguments are"),
        ({"sigmas": [1.0]}, r"\['sigmas'\] have no effect"),
        ({"extra_args": {"guidance": "cgf"}}, "did you mean 'cfg'"),
        ({"prompt": {"prompt": "1", "negative_prompt": "2"}}, "negative_prompt has no effect"),
    ],
)
def test_engine_refuses_a_wrong_request_before_it_joins_a_batch(
    plugin, run, changes, message
) -> None:
    with pytest.raises(ValueError, match=message):
        engine_key(engine_config(run), engine_request("a", **changes))


def test_engine_draws_a_mixed_batch_as_the_pipeline_does(plugin, run, monkeypatch) -> None:
    """Through the engine's own batch, checks of what comes back, post-processing, answers."""
    from vllm_omni.diffusion import registry
    from vllm_omni.diffusion.output_formatter import (
        format_diffusion_outputs,
        normalize_diffusion_postprocess_output,
    )
    from vllm_omni.diffusion.worker.diffusion_model_runner import _normalize_pipeline_outputs
    from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

    monkeypatch.setattr(plugin, "get_local_device", lambda: torch.device("cpu"))
    config = engine_config(run)
    pipeline = registry.initialize_model(config)
    shared = {"guidance_scale": 2.0, "num_outputs_per_prompt": 2}
    cases = [("0", 1.0, 5), ({"prompt": "2"}, 0.25, 9), ("ignored", 0.5, 7)]
    requests = [
        engine_request(
            str(i), prompt, seed=seed, extra_args={"budget": budget, "guidance": "ccfg"}, **shared
        )
        for i, (prompt, budget, seed) in enumerate(cases)
    ]  # fmt: skip
    requests[2].sampling_params.extra_args["class_label"] = 1
    assert len({str(engine_key(config, request)) for request in requests}) == 1
    outputs = _normalize_pipeline_outputs(
        pipeline.forward(DiffusionRequestBatch(requests)),
        expected_count=3, allow_single_output=False, pipeline_name="",
    )  # fmt: skip
    alone = ElitPipeline.from_pretrained(run)
    process = registry.get_diffusion_post_process_func(config)
    for request, output, label, (_, budget, seed) in zip(
        requests, outputs, (0, 2, 1), cases, strict=True
    ):
        expected = alone(
            label, budget, 3, "ccfg", guidance_scale=2.0, seed=seed, num_images_per_prompt=2,
            output_type="pt",
        ).images  # fmt: skip
        torch.testing.assert_close(output.output, expected, rtol=0, atol=1e-5)
        answer = format_diffusion_outputs(
            request=request, od_config=config, diffusion_output=output, output_data=output.output,
            postprocess_output=normalize_diffusion_postprocess_output(process(output.output)),
        )  # fmt: skip
        assert [image.size for image in answer[0].images] == [(8, 8)] * 2


def test_engine_warms_up(plugin, run, monkeypatch) -> None:
    """By a request of its own, whose text and size fit no model of classes."""
    from vllm_omni.diffusion import registry
    from vllm_omni.diffusion.request import DUMMY_DIFFUSION_REQUEST_ID
    from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

    monkeypatch.setattr(plugin, "get_local_device", lambda: torch.device("cpu"))
    config = engine_config(run)
    dummy = engine_request(
        DUMMY_DIFFUSION_REQUEST_ID, {"prompt": "dummy run"}, height=1024, width=1024,
        num_inference_steps=1, guidance_scale=0.0, extra_args={"cfg_text_scale": 1.0},
    )  # fmt: skip
    engine_key(config, dummy)
    (output,) = registry.initialize_model(config).forward(DiffusionRequestBatch([dummy]))
    assert output.output.shape == (1, 3, 8, 8)


def test_the_sglang_request_is_a_call_of_the_pipeline(monkeypatch, capsys) -> None:
    """Its fields under the names that the server's diffusers backend calls with."""
    monkeypatch.setattr(
        "sys.argv", ["", "red circle", "--size", "16x16", "--dry-run", "--steps", "3"]
    )
    runpy.run_path(str(EXAMPLES / "sglang_request.py"), run_name="__main__")
    body = json.loads(capsys.readouterr().out)
    width, height = map(int, body["size"].split("x"))
    model = randomise(create_model("elit-mmdit-tiny/2", 16, in_channels=3), std=0.05)
    pipeline = ElitTextPipeline(model, make_scheduler("euler"))

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(body["seed"])

    drawn = pipeline(
        prompt=body["prompt"], num_inference_steps=body["num_inference_steps"],
        guidance_scale=body["guidance_scale"], height=height, width=width, generator=seeded(),
        output_type="pt", **body["diffusers_kwargs"],
    ).images  # fmt: skip
    expected = pipeline(
        "red circle", 0.25, 3, CheapCFG(2.0), generator=seeded(), output_type="pt"
    ).images
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0)


@pytest.mark.slow  # a cluster of its own
def test_ray_serve_mixes_budgets_and_draws_what_a_request_alone_gets(run, tmp_path) -> None:
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ask(body: object) -> tuple[int, bytes]:
        data = json.dumps(body).encode()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", data, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    command = [sys.executable, str(EXAMPLES / "ray_serve.py"), str(run), "--steps", "2"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
    try:
        wait_for(lambda: ask({})[0] == 200, seconds=120)
        bodies = [{"class_label": i % 3, "budget": (1, 0.25)[i % 2], "seed": i} for i in range(8)]
        with ThreadPoolExecutor(8) as threads:
            together = list(threads.map(ask, bodies))
        assert together == [ask(body) for body in bodies]
        assert {status for status, _ in together} == {200}
        assert len({png for _, png in together}) == 8
        assert ask({"budget": 2}) == (400, b"budget 2 is not in (0, 1]; 0.25 keeps a quarter\n")
        assert ask({"class_label": 3})[0] == ask({"steps": 3})[0] == ask([])[0] == 400
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    text = (tmp_path / "log").read_text()
    mixed = [set(re.findall(r"[\d.]+", one)) for one in re.findall(r"budgets \[(.*)\]", text)]
    assert {"1", "0.25"} in mixed
