"""The examples for clusters: they parse, call what there is, and requeue what was stopped."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from elit.cli.main import command_parser
from elit.training.config_files import load_config

EXAMPLES = Path(__file__).parents[1] / "examples"
DOCS = Path(__file__).parents[1] / "docs"


def check_torchrun(words: list[str]) -> None:
    """torchrun's own parser takes its flags, ours what comes behind `-m elit`."""
    assert words[0] == "torchrun"
    args = get_args_parser().parse_args(words[1:])
    assert (args.module, args.training_script) == (True, "elit")
    name, *rest = args.training_script_args
    config = command_parser(name).parse_args(rest).config
    loaded = load_config(config, {})
    nodes, processes = int(args.nnodes.partition(":")[0]), int(args.nproc_per_node)
    assert loaded.data.batch_size % (nodes * processes * loaded.train.accumulation) == 0


def test_kubernetes() -> None:
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = container["args"][0].removeprefix("exec ").replace('"$JOB_COMPLETION_INDEX"', "0")
    words = shlex.split(command)
    check_torchrun(words)
    args = get_args_parser().parse_args(words[1:])
    assert int(args.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(args.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(args.shutdown_timeout) < pod["terminationGracePeriodSeconds"]
    names = {service["metadata"]["name"], pod["subdomain"], job["metadata"]["name"]}
    assert names == {service["spec"]["selector"]["job-name"]}
    assert args.master_addr == "elit-train-0.elit-train"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_torchrun_of_several_machines_in_the_docs() -> None:
    lines = (DOCS / "cluster.md").read_text().splitlines()
    found = [shlex.split(line) for line in lines if line.startswith("torchrun")]
    assert len(found) == 3
    for words in found:
        check_torchrun(words)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (130, True), (2, False)])
def test_slurm_requeues_what_was_stopped(tmp_path: Path, code: int, requeued: bool) -> None:
    """With stand-ins for Slurm's programs: two processes of one machine."""
    programs = {
        "srun": """
            while [[ "$1" == -* ]]; do shift; done
            worst=0
            for SLURM_PROCID in 0 1; do
                export SLURM_PROCID SLURM_LOCALID=$SLURM_PROCID
                "$@"; code=$?; [ $code -gt $worst ] && worst=$code
            done
            exit $worst""",
        "scontrol": 'if [ "$1" = show ]; then echo node7; else echo "$@" >> requeued; fi',
        "elit": 'echo "$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR" "$@" >> ran; exit $CODE',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code), "SLURM_JOB_ID": "41",
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
    }  # fmt: skip
    line = ["bash", str(EXAMPLES / "slurm.sh"), "digits", "--output_dir", "a folder"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")
    ran = (tmp_path / "ran").read_text().splitlines()
    assert ran == [f"{n}/2 {n} node7 train digits --output_dir a folder" for n in (0, 1)]
    assert (tmp_path / "requeued").exists() is requeued
