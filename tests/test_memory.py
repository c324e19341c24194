"""Memory in a run: --cache_gb auto, and what is said when memory runs out."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from launcher import launch
from tiny import make_place, random_policy
from transformers import Qwen2_5_VLForConditionalGeneration

import rl
from common import run_main, start_processes
from rollout import Engine, RolloutConfig
from scale import memory
from scale.devices import free_bytes
from scale.pick import cache_gb, load_weights
from training.memory import out_of_memory
from training.weights import MasterWeights
from zoom_env import EnvConfig

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--steps", 2, "--batch_size", 2, "--mini_batch_size", 1, "--group_size", 2, "--max_turn_tokens", 4, "--max_draws", 1,
         "--save_every", 1, "--preset", "demo", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("memory"))


def run(monkeypatch, place, out, *flags):
    """rl.py in this process."""
    line = ["--model", place / "model", "--data", place / "train.jsonl", "--out", out, *FLAGS, *flags]
    monkeypatch.setattr(sys, "argv", ["rl.py", *map(str, line)])
    run_main(rl.main, out_of_memory)


# -------------------------------------------------------------------------------------------------- --cache_gb auto
def test_auto_takes_what_is_free(monkeypatch):
    """A byte more or less of what is free is one of the cache, but for what a decode step needs of it."""
    policy, config = random_policy(), RolloutConfig(cache_gb="auto", max_rows=10_000)
    sizes = []
    for free_gb in (9, 10, 11):
        monkeypatch.setattr(memory, "free_bytes", lambda device: free_gb * 1e9)
        sizes.append(cache_gb(policy, config))
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], abs=0.02) and 0.1 < sizes[1] - sizes[0] <= 1
    assert sizes[2] < 11
    # a run that trains leaves room for AdamW's moments and for a step's features
    train, weights = rl.Config(cache_gb="auto", max_rows=10_000, batch_size=64), MasterWeights(policy)
    moments = 8 * sum(p.numel() for p in policy.parameters() if p.requires_grad)
    features = 64 * (64 + 16 * 32) * 128 * 64 * 4  # questions, frames, tokens, hidden size, bytes
    lacking = [sizes[2] - cache_gb(policy, replace(train, offload=offload), weights) for offload in ((), ("features",))]
    share = sizes[1] - sizes[0]  # of a byte
    assert lacking == pytest.approx([(moments + features) / 1e9 * share, moments / 1e9 * share], rel=0.01)
    # no more than all rows can fill, no less than one needs
    few = cache_gb(policy, replace(config, max_rows=2, max_response_tokens=100))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    none = cache_gb(policy, replace(config, max_rows=2, max_response_tokens=100))
    assert few == pytest.approx(2 * none) and none > 0
    assert Engine(policy, 1, replace(config, cache_gb=none)).cache.max_tokens > config.max_response_tokens
    assert cache_gb(policy, replace(config, cache_gb=3.0)) == 3.0


@pytest.mark.slow
def test_auto_is_found_once_and_used_again(place, tmp_path, monkeypatch):
    """It decides how many rows play at a time, and so which random numbers a row gets."""
    sizes = []

    class Watched(Engine):
        def __init__(self, policy, group_size, config, generator):
            super().__init__(policy, group_size, config, generator)
            sizes.append(config.cache_gb)

    def interrupt(metrics, *_):
        if metrics["step"] == 2:
            raise InterruptedError

    monkeypatch.setattr(rl, "Engine", Watched)
    with monkeypatch.context() as first:
        first.setattr(rl, "show_step", interrupt)
        with pytest.raises(InterruptedError):
            run(monkeypatch, place, tmp_path, "--cache_gb", "auto")
    free = free_bytes(torch.device("cpu"))
    monkeypatch.setattr(memory, "free_bytes", lambda device: free / 3)  # as on a machine with other memory
    run(monkeypatch, place, tmp_path, "--cache_gb", "auto")
    assert len(sizes) == 2 and sizes[0] == sizes[1] > 0
    run(monkeypatch, place, tmp_path, "--cache_gb", "auto", "--resume", "never")
    assert sizes[2] < sizes[1]


def smallest(model, out, shard):
    """Of a process of several that see other amounts."""
    rank, _, device = start_processes("cpu")
    memory.free_bytes = lambda device: (20 - 5 * rank) * 1e9
    config = rl.Config(shard=shard, cache_gb="auto", max_rows=100_000)
    weights = load_weights(model, config, EnvConfig(), device)
    Path(out, f"{rank}").write_text(str(cache_gb(weights.player, config, weights)))


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "all"])
def test_auto_is_the_smallest_of_all_processes(place, tmp_path, monkeypatch, shard):
    """What is still to come counts as much as a process has of it: moments, half of a step's features, and in
    shards the weights that are gathered."""
    launch(2, "test_memory:smallest", [place / "model", tmp_path, shard]).wait()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 15e9)
    policy = random_policy()
    policy.env_config = EnvConfig()
    config = rl.Config(cache_gb="auto", max_rows=100_000, batch_size=64)
    expected = cache_gb(policy, config, MasterWeights(policy))
    trained = 4 * sum(p.numel() for p in policy.parameters() if p.requires_grad)
    if shard == "all":  # half of the moments, which are twice as much, and the whole language model
        assert trained < 0.01e9
    found = [float((tmp_path / f"{rank}").read_text()) for rank in range(2)]
    assert found == [pytest.approx(expected, abs=0.006)] * 2


@pytest.mark.slow
def test_a_process_without_questions_is_not_waited_for(place, tmp_path):
    """In evaluation each finds its own size: one of two has nothing to play."""
    flags = ["--model", place / "model", "--data", place / "test.jsonl", "--out", tmp_path / "out", "--device", "cpu",
             "--max_questions", 1, "--max_turn_tokens", 4, "--cache_gb", "auto"]
    launch(2, "eval.py", flags).wait(timeout_s=60)


def test_what_is_free_on_a_cpu_is_the_machines():
    assert 0 < free_bytes(torch.device("cpu")) < 1e15


# -------------------------------------------------------------------------------------------------- when it runs out
def too_much(*_, **__):
    torch.empty(10 ** 15)


# what the run does: (whose function asks for too much, its name)
PLACES = {"loading": (Qwen2_5_VLForConditionalGeneration, "from_pretrained"), "rollout": (Engine, "admit"),
          "update": (torch.optim.AdamW, "step"), "saving": (MasterWeights, "export")}


def check_line(what, place, out, monkeypatch, capsys):
    owner, name = PLACES[what]
    monkeypatch.setattr(owner, name, too_much)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, place, out)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2
    assert last.startswith(f"rl.py: error: out of memory at {what}, where 4000000000000000 bytes more were asked for; lower --")
    assert "--plan" in last


def test_memory_that_runs_out_at_loading_is_one_line(place, tmp_path, monkeypatch, capsys):
    check_line("loading", place, tmp_path, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["rollout", "update", "saving"])
def test_memory_that_runs_out_is_one_line(what, place, tmp_path, monkeypatch, capsys):
    check_line(what, place, tmp_path, monkeypatch, capsys)


LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
import rl
from training.memory import out_of_memory
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {more},) * 2)
rl.run_main(rl.main, out_of_memory)
"""


@pytest.mark.slow
def test_memory_that_really_runs_out(place, tmp_path):
    """In a process that may have little more than it has."""
    script = tmp_path / "rl.py"
    script.write_text(LIMITED.format(root=str(ROOT), more=10 ** 9))
    flags = ["--model", place / "model", "--data", place / "train.jsonl", "--out", tmp_path / "out", "--device", "cpu",
             "--batch_size", 40, "--group_size", 60, "--max_rows", 2400, "--max_turn_tokens", 100]
    run = subprocess.run([sys.executable, str(script), *map(str, flags)], capture_output=True, text=True, timeout=200)
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr[-2000:]
    assert "rl.py: error: out of memory at rollout" in last and "lower --" in last


def test_what_counts_as_memory_that_ran_out():
    ran_out = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has .."), MemoryError(),
               RuntimeError("CUDA error: out of memory")]
    for allocate in (torch.empty, np.empty):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate(10 ** 15)
        ran_out.append(caught.value)
    lines = [out_of_memory(error) for error in ran_out]
    assert all(line.startswith("out of memory at update") and "\n" not in line for line in lines), lines
    assert [part in line for part, line in zip(("2.50 GiB", "4000000000000000 bytes", "7.11 PiB"), [lines[0], *lines[3:]])] == [True] * 3
    for error in (RuntimeError("shapes do not match"), ValueError("can't allocate memory"), KeyboardInterrupt()):
        assert out_of_memory(error) is None
