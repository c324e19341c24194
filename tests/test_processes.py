"""What the scripts do as one of several processes: torchrun's variables, one voice, old metrics."""

import json
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from cases import all_hold
from launcher import launch
from tiny import random_policy

import common
import eval as evaluation
import rl
import sft
from demo import synthetic
from training.checkpoints import save_policy
from training.run_folder import move_aside

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}


def test_half_a_process_group_is_one_line(monkeypatch):
    """WORLD_SIZE without RANK would train on half of the data, in silence."""
    monkeypatch.setattr(common, "TIMEOUT", timedelta(seconds=3))

    def is_one_line(variables):
        with monkeypatch.context() as patched:
            for name in VARIABLES:
                patched.delenv(name, raising=False)
            for name, value in variables.items():
                patched.setenv(name, value)
            with pytest.raises(common.UserError) as error:
                common.start_processes("cpu")
        assert "\n" not in str(error.value) and not torch.distributed.is_initialized()

    all_hold(is_one_line, [(variables,) for variables in (
        {"RANK": "0"}, {"WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"},
        VARIABLES | {"RANK": "2"}, VARIABLES | {"RANK": "one"}, VARIABLES | {"WORLD_SIZE": ""},
        VARIABLES | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "no.such.host.invalid"})])


def torchrun(script, *flags):
    """Two processes. Returns (exit status, what they wrote to stderr, seconds)."""
    began = time.time()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = map(str, (script, *flags))
    run = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)
    return run.returncode, run.stderr, time.time() - began


def two_processes(tmp_path, *lines):
    """`torchrun` of a script that joins the process group, then does `lines`."""
    (tmp_path / "run.py").write_text("\n".join([
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r}); import common",
        "rank, world, device = common.start_processes('cpu')", *lines]))
    return torchrun(tmp_path / "run.py")


@pytest.mark.slow
def test_one_process_speaks_and_the_line_stands_last():
    status, said, _ = torchrun(ROOT / "rl.py", "--model", ROOT / "demo/tiny_base", "--group_size", "1")
    lines = [line for line in said.splitlines() if "--group_size must be at least 2" in line]
    assert status != 0 and said.count("rl.py: error:") == 1 and 'rl.py", line' not in said
    assert len(lines) == 2 and "--group_size" in [line for line in said.splitlines() if line.strip("= ")][-1]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_its_name(tmp_path):
    status, said, seconds = two_processes(
        tmp_path, "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)",
        "common.run_main(lambda: common.gather([rank]))")
    assert status != 0 and "rank      : 1" in said and "SIGKILL" in said and seconds < 60
    assert f'{tmp_path / "run.py"}", line' not in said  # the other one misses it, which is no news


@pytest.mark.parametrize("which", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_wrong_input_that_one_process_finds_is_one_line(tmp_path, which):
    """As the first one does that makes a folder or data, while the others wait for it."""
    status, said, seconds = two_processes(
        tmp_path, "def main():", f"    if rank == {which}: raise common.UserError('there is no such folder')",
        "    common.gather([rank])", "common.run_main(main)")
    assert status != 0 and said.count("error: there is no such folder") == 1 and seconds < 60
    assert f'{tmp_path / "run.py"}", line' not in said
    assert "there is no such folder" in [line for line in said.splitlines() if line.strip("= ")][-1]


@pytest.mark.slow
def test_a_bug_in_one_process_is_shown_once(tmp_path):
    status, said, _ = two_processes(
        tmp_path, "def main():", "    common.gather([rank])", "    if rank == 1: raise IndexError('a bug')",
        "    common.gather([rank])", "common.run_main(main)")
    assert status != 0 and said.count("IndexError: a bug") == 1 and "RuntimeError" not in said


def test_each_script_waits_longer_than_nccl_would(tmp_path, monkeypatch):
    """A slow rollout takes more than NCCL's ten minutes."""
    seen = []

    def join(*_, timeout):
        seen.append(timeout)
        raise ZeroDivisionError

    save_policy(random_policy(layers=1), tmp_path)
    monkeypatch.setattr("torch.distributed.init_process_group", join)
    monkeypatch.setattr(sys, "argv", ["script.py", "--model", str(tmp_path), "--device", "cpu"])
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    for script in (sft, rl, evaluation):
        with pytest.raises(ZeroDivisionError):
            script.main()
    assert seen == [timedelta(hours=2)] * 3


def wait(timeout_s):
    """Of one of two processes: the first one waits for the second."""
    common.TIMEOUT = timedelta(seconds=float(timeout_s))
    rank, _, _ = common.start_processes("cpu")
    if rank == 1:
        time.sleep(60)
    common.gather([rank])


def test_a_process_waits_no_longer_than_it_was_told():
    began = time.monotonic()
    with pytest.raises(AssertionError, match="(?s)exit statuses .*1, .*imed out"):
        launch(2, "test_processes:wait", [2]).wait()
    assert time.monotonic() - began < 50


def test_metrics_of_an_earlier_run_are_kept(tmp_path):
    for text in ("first", "second", "third"):
        move_aside(tmp_path.glob("metrics.jsonl"))
        (tmp_path / "metrics.jsonl").write_text(text)
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {
        "metrics.jsonl": "third", "metrics.1.jsonl": "first", "metrics.2.jsonl": "second"}


@pytest.mark.parametrize("script, rows, flags", [
    (sft, "sft.jsonl", ["--epochs", "1"]),
    (rl, "train.jsonl", ["--steps", "1", "--batch_size", "1", "--mini_batch_size", "1", "--max_draws", "1",
                         "--group_size", "2", "--max_turn_tokens", "2"])])
def test_a_second_run_in_a_folder_keeps_the_metrics_of_the_first(tmp_path, monkeypatch, script, rows, flags):
    synthetic.synthetic(tmp_path, 1, 1, seed=2)
    save_policy(random_policy(layers=1), tmp_path / "model")
    command = ["script.py", "--model", "model", "--data", rows, "--out", "out", "--device", "cpu", *flags]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command)
    metrics = tmp_path / "out" / "metrics.jsonl"
    script.main()
    first = metrics.read_text()
    monkeypatch.setattr(sys, "argv", [*command, "--resume", "never"])
    script.main()
    assert (tmp_path / "out" / "metrics.1.jsonl").read_text() == first != metrics.read_text()
    assert [json.loads(line)["step"] for line in metrics.open()] == [1]
