"""Memory in a run: what the plan leaves to the flags and what it decides, --cache_gb auto, and what is said when memory runs
out."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launcher import launch
from tiny import make_place, random_policy

import rl
from common import start_processes
from rollout import Engine, RolloutConfig
from scale import memory
from scale.devices import free_bytes, host_here
from scale.memory import auto_cache_gb, auto_cache_of_run, explain, held, plan_run, ran_out
from scale.sharding import load_weights

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CONFIGS = ROOT / "tests" / "configs"
FLAGS = ["--steps", 1, "--batch_size", 2, "--mini_batch_size", 1, "--group_size", 2, "--max_turn_tokens", 4, "--max_draws", 1,
         "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("memory"))


@pytest.fixture(autouse=True)
def nothing_planned():
    memory.RUNS.clear()
    yield
    memory.RUNS.clear()


def config_of(**more):
    return rl.Config(model=str(CONFIGS / "qwen2.5-vl-7b"), dtype="bfloat16", cache_gb="auto", **more)


@pytest.mark.parametrize("world, gpu_gb, host_gb, more, expected", [
    (1, 300, 500, {}, {"offload": None}),
    (1, 80, 500, {"batch_size": 16, "max_tokens_per_pass": 8192}, {"offload": True}),
    (8, 200, 1000, {}, {"shard": "none"}),
    (8, 80, 1000, {}, {"shard": "all"}),
    (16, 80, 1000, {}, {"shard": "node"}),
    (1, 80, 500, {"batch_size": 16, "offload": False}, {"offload": False}),  # --no-offload is said, too
    (1, 80, 500, {"batch_size": 16}, {"offload": True, "on_host": ["reference"]}),
    (1, 60, 200, {"lora_rank": 16}, {"offload": None, "on_host": ["features"]}),
    (8, 200, 1000, {"shard": "all"}, {"shard": "all"})])  # what is said stays
def test_the_plan_decides_what_the_flags_leave_open(world, gpu_gb, host_gb, more, expected):
    config, line = plan_run("rl", config_of(gpu_gb=gpu_gb, host_gb=host_gb, **more), CONFIGS / "qwen2.5-vl-7b", world, CPU)
    assert {name: getattr(config, name) for name in expected} == expected, line
    assert line.startswith("memory: ") and f"of {gpu_gb} GB" in line
    assert ("may not fit" in line) == (config.offload is False)


def test_a_cpu_is_left_as_it_is():
    config = config_of()
    assert plan_run("rl", config, CONFIGS / "qwen2.5-vl-7b", 8, CPU) == (config, None)


def test_the_line_stands_at_the_start_of_a_run(place, tmp_path):
    flags = ["--model", place / "model", "--data", place / "train.jsonl", "--out", tmp_path / "out", *FLAGS]
    said = launch(1, "rl.py", [*flags, "--gpu_gb", 40, "--host_gb", 8]).wait()
    assert said.count("memory: all weights on each GPU") == 1
    # what never fits is said, and tried all the same
    said = launch(1, "rl.py", [*flags[:5], tmp_path / "other", *FLAGS, "--gpu_gb", 0.01]).wait()
    assert "it may not fit: see rl.py --plan" in said and (tmp_path / "other" / "config.json").exists()


# -------------------------------------------------------------------------------------------------- --cache_gb auto
def test_auto_takes_what_is_free(monkeypatch):
    """A byte more or less of what is free is one of the cache, but for what a decode step needs of it."""
    policy, config = random_policy(), RolloutConfig(cache_gb="auto", max_rows=10_000)
    sizes = []
    for free_gb in (9, 10, 11):
        monkeypatch.setattr(memory, "free_bytes", lambda device: free_gb * 1e9)
        sizes.append(auto_cache_gb(policy, config))
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], abs=0.02) and 0.1 < sizes[1] - sizes[0] <= 1
    assert sizes[2] < 11
    later = auto_cache_gb(policy, config, later=1e9)
    assert later == pytest.approx(sizes[1], abs=0.02)
    # no more than all rows can fill, no less than one needs
    few = auto_cache_gb(policy, replace(config, max_rows=2, max_response_tokens=100))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    none = auto_cache_gb(policy, replace(config, max_rows=2, max_response_tokens=100))
    assert few == pytest.approx(2 * none, rel=0.01) and none > 0
    assert Engine(policy, 1, config).cache.max_tokens > config.max_response_tokens


def test_auto_is_found_once_and_used_again(place, tmp_path):
    """It decides how many rows play at a time, and so which random numbers a row gets."""
    out = tmp_path / "out"
    flags = ["--model", place / "model", "--data", place / "train.jsonl", "--out", out, "--cache_gb", "auto", *FLAGS,
             "--save_every", 1]
    flags[flags.index("--steps") + 1] = 3
    run = launch(1, "rl.py", flags)
    step = out / "checkpoints" / "step_1"
    while not step.exists():
        assert run.poll() == [None], run.said()
    run.kill()
    folder = max((out / "checkpoints").glob("step_[0-9]"), key=lambda path: path.name)
    index = json.loads((folder / "checkpoint.json").read_text())
    found = index["state"]["cache_gb"]
    assert f"--cache_gb auto is {found}" in run.said()
    index["state"]["cache_gb"] = 0.123  # as on a machine with other memory
    (folder / "checkpoint.json").write_text(json.dumps(index))
    said = launch(1, "rl.py", flags).wait()
    assert "goes on after step" in said and "--cache_gb auto is 0.123" in said


def smallest(model, out, shard):
    """Of a process of several that see other amounts."""
    rank, _, device = start_processes("cpu")
    memory.free_bytes = lambda device: (20 - 5 * rank) * 1e9
    weights = load_weights(model, rl.Config(shard=shard), device)
    Path(out, f"{rank}").write_text(str(auto_cache_of_run(weights, RolloutConfig(max_rows=100_000))))


@pytest.mark.parametrize("shard", ["none", "all"])
def test_auto_is_the_smallest_of_all_processes(place, tmp_path, monkeypatch, shard):
    """What is still to come, AdamW's moments, counts as much as a process has of it."""
    launch(2, "test_memory:smallest", [place / "model", tmp_path, shard]).wait()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 15e9)
    policy = random_policy()
    later = 8 * sum(p.numel() for p in policy.freeze_vision().parameters() if p.requires_grad) // (2 if shard == "all" else 1)
    expected = auto_cache_gb(policy, RolloutConfig(max_rows=100_000), later)
    assert [float((tmp_path / f"{rank}").read_text()) for rank in range(2)] == [pytest.approx(expected, abs=0.006)] * 2


def test_a_process_without_questions_is_not_waited_for(place, tmp_path):
    """In evaluation each finds its own size: one of two has nothing to play."""
    flags = ["--model", place / "model", "--data", place / "test.jsonl", "--out", tmp_path / "out", "--device", "cpu",
             "--max_questions", 1, "--max_turn_tokens", 4, "--cache_gb", "auto"]
    launch(2, "eval.py", flags).wait(timeout_s=60)


# -------------------------------------------------------------------------------------------------- when it runs out
LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
import {script} as script
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {more},) * 2)
script.run_main(script.main)
"""


def test_memory_that_runs_out_is_one_line(place, tmp_path):
    """In a process that may have little more than it has."""
    script = tmp_path / "rl.py"
    script.write_text(LIMITED.format(root=str(ROOT), script="rl", more=10 ** 9))
    flags = ["--model", place / "model", "--data", place / "train.jsonl", "--out", tmp_path / "out", "--device", "cpu",
             "--batch_size", 40, "--group_size", 60, "--max_rows", 2400, "--max_turn_tokens", 100, "--gpu_gb", 40]
    run = subprocess.run([sys.executable, str(script), *map(str, flags)], capture_output=True, text=True, timeout=200)
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr[-2000:]
    assert "rl.py: error: out of memory" in last and " at rollout: " in last and "lower first: --" in last


@pytest.mark.parametrize("error, expected", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB."), True), (MemoryError(), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes."),
     True), (RuntimeError("shapes do not match"), False), (ValueError("can't allocate memory"), False)])
def test_what_counts_as_memory_that_ran_out(error, expected):
    assert ran_out(error) == expected


def test_it_says_what_was_above_the_plan_and_what_to_lower(place, monkeypatch):
    """A cache far above the plan's at the rollout; features at the update."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..")
    assert "have a --plan" in explain(error) and "2.50 GiB" in explain(error)
    config = rl.Config(dtype="bfloat16", gpu_gb=80, host_gb=128, batch_size=16, offload=True, on_host=["reference"])
    plan_run("rl", config, CONFIGS / "qwen2.5-vl-7b", 1, CPU)
    engine = Engine(random_policy(), 2, RolloutConfig())
    engine.cache.reserve(4, 1000)
    assert held(CPU)["cache"] >= sum(t.nbytes for t in engine.cache.tensors()) > 0
    engine.release()
    before = held(CPU)["cache"]
    monkeypatch.setattr(memory, "held", lambda device: {"cache": 30e9, "features": 0, "gradients": 0})
    monkeypatch.setattr(Engine, "admit", lambda *_: 1 / 0)  # in a rollout
    questions = [json.loads(line) for line in open(place / "train.jsonl")][:1]
    with pytest.raises(ZeroDivisionError) as caught:
        engine.play(questions, place)
    error.__traceback__ = caught.value.__traceback__
    assert "at rollout: cache took 30.00 GB where the plan had 16.00; lower first: --" in explain(error)
    error.__traceback__ = None
    monkeypatch.setattr(memory, "held", lambda device: {"cache": 0, "features": 90e9, "gradients": 0})
    assert "at update: features took 90.00 GB" in explain(error) and "\n" not in explain(error)
    assert before == 0


def raised(function, error):
    """The error, come out of a function of that name."""
    code = f"def {function}():\n    raise error.with_traceback(None)\n"
    names = {"error": error, "__name__": "somewhere"}
    exec(code, names)
    try:
        names[function]()
    except BaseException as caught:
        return caught


def test_passes_are_what_pytorch_has_beside_the_rest(monkeypatch):
    """At the moment of the error, not the most there ever was; and what the host lacks is said of the host."""
    config = rl.Config(dtype="bfloat16", gpu_gb=80, host_gb=128, batch_size=16, offload=True, on_host=["reference"])
    plan_run("rl", config, CONFIGS / "qwen2.5-vl-7b", 1, CPU)
    plan = memory.make_plan(*memory.RUNS[0][1])
    fixed = sum(size for part, size in plan.update.items() if part not in ("activations", "logits", "reserve"))
    said = "CUDA out of memory. Tried to allocate 2.50 GiB. Of the allocated memory {:.2f} GiB is allocated by PyTorch, and"
    monkeypatch.setattr(memory, "held", lambda device: {"cache": 0, "features": plan.update["features"],
                                                        "gradients": plan.update["gradients"]})
    passing = plan.update["activations"] + plan.update.get("logits", 0)
    over = raised("update", torch.OutOfMemoryError(said.format((fixed + passing + 5e9) / 2 ** 30)))
    under = raised("update", torch.OutOfMemoryError(said.format((fixed + passing - 5e9) / 2 ** 30)))
    took = float(explain(over).split("activations took ")[1].split()[0])
    assert took == pytest.approx(passing / 1e9 + 5, abs=0.02) and f"the plan had {passing / 1e9:.2f}; lower first: --" in explain(over)
    assert "no category is above the plan" in explain(under)
    # where it came from
    assert "at loading: " in explain(raised("load_weights", over)) and "at exporting: " in explain(raised("_save", over))
    # of a run on a GPU
    memory.RUNS[0] = torch.device("cuda", 0), memory.RUNS[0][1]
    lacking = explain(raised("load_weights", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                                                          "30460000000 bytes. Error code 12")))
    assert "on the host at loading" in lacking and f"masters and moments {plan.host['masters and moments'] / 1e9:.1f}" in lacking
    assert "lower first: --" in lacking and "\n" not in lacking


def test_memory_of_the_machine():
    total = host_here()
    assert 1e9 < total and 0 < free_bytes(CPU) <= total * 1.01
