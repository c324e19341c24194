"""Memory in a run: --cache_gb auto, and what is said when memory runs out."""

import resource
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from launcher import launch
from tiny import DEVICE, make_place, random_policy
from transformers import Qwen2_5_VLForConditionalGeneration

import rl
import sft
from common import run_main, start_processes
from generation import KVCache
from rollout import Engine, RolloutConfig
from scale import memory
from scale.devices import free_bytes
from scale.pick import cache_gb, load_weights
from training.memory import out_of_memory
from training.weights import MasterWeights
from zoom_env import EnvConfig

RL = ["--steps", 2, "--batch_size", 2, "--mini_batch_size", 1, "--group_size", 2, "--max_turn_tokens", 4,
      "--max_draws", 1, "--save_every", 1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("memory"))


def run(monkeypatch, stage, place, out, *flags):
    """rl.py or sft.py in this process."""
    data = place / ("train.jsonl" if stage is rl else "sft.jsonl")
    compiled = ["--no-compile"] if stage is rl else []
    line = ["--model", place / "model", "--data", data, "--out", out, "--device", DEVICE.type, "--dtype",
            "float32", *compiled, *flags]
    monkeypatch.setattr(sys, "argv", [f"{stage.__name__}.py", *map(str, line)])
    run_main(stage.main, out_of_memory)


# ------------------------------------------------------------------------------------------- --cache_gb auto
@pytest.mark.device
def test_auto_takes_what_is_free(monkeypatch):
    """A byte more or less of what is free is one of the cache, but for what a decode step needs of it."""
    policy, sizes = random_policy(), []
    config = RolloutConfig(cache_gb="auto", max_rows=10_000, compile=False)
    policy.env_config = EnvConfig()
    for free_gb in (9, 10, 11):
        monkeypatch.setattr(memory, "free_bytes", lambda device: free_gb * 1e9)
        sizes.append(cache_gb(policy, config))
    share = sizes[1] - sizes[0]  # of a byte
    assert sizes[2] - sizes[1] == pytest.approx(share) and 0.1 < share <= 1 and sizes[2] < 11
    # a run that trains leaves room for AdamW's moments and for a step's features
    train, weights = rl.Config(cache_gb="auto", max_rows=10_000, batch_size=64), MasterWeights(policy)
    moments = 8 * sum(p.numel() for p in policy.parameters() if p.requires_grad)
    frame = 100_352 // policy.frame_unit ** 2 * policy.language_model.config.hidden_size * 4  # bytes
    features = 64 * (64 + 16 * 32) * frame  # of so many questions, with 64 frames each and 32 of each episode
    for offload, taken in (((), moments + features), (("features",), moments)):
        size = cache_gb(policy, replace(train, offload=offload), weights)
        assert sizes[2] - size == pytest.approx(taken / 1e9 * share)
    # no more than all rows can fill, no less than one needs
    config = replace(config, max_rows=2, max_response_tokens=100)
    few = cache_gb(policy, config)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    least = cache_gb(policy, config)
    assert few == pytest.approx(2 * least)
    prompt = policy.env_config.overview_max_frames * 100_352 // policy.frame_unit ** 2
    assert Engine(policy, 1, replace(config, cache_gb=least)).cache.max_tokens >= prompt + 100
    assert cache_gb(policy, replace(config, cache_gb=3.0)) == 3.0


@pytest.mark.device
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
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3.6e9)
    with monkeypatch.context() as first:
        first.setattr(rl, "show_step", interrupt)
        with pytest.raises(InterruptedError):
            run(monkeypatch, rl, place, tmp_path, *RL, "--cache_gb", "auto")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3.5e9)  # as on another machine
    run(monkeypatch, rl, place, tmp_path, *RL, "--cache_gb", "auto")
    assert len(sizes) == 2 and sizes[0] == sizes[1] > 0
    run(monkeypatch, rl, place, tmp_path, *RL, "--cache_gb", "auto", "--resume", "never")
    assert sizes[2] < sizes[1]


def smallest(model, out, shard):
    """Of a process of several that see other amounts."""
    rank, _, device = start_processes("cpu")
    memory.free_bytes = lambda device: (20 - 5 * rank) * 1e9
    config = rl.Config(shard=shard, cache_gb="auto", max_rows=100_000, batch_size=128)
    weights = load_weights(model, config, EnvConfig(), device)
    Path(out, f"{rank}").write_text(str(cache_gb(weights.player, config, weights)))


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "all"])
def test_auto_is_the_smallest_of_all_processes(place, tmp_path, monkeypatch, shard):
    """What is still to come counts as much as a process has of it: a step's features, half of them; AdamW's
    moments, or in shards half of them and the weights that are gathered, which in float32 is as much."""
    launch(2, "test_memory:smallest", [place / "model", tmp_path, shard]).wait()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 15e9)
    policy = random_policy()
    policy.env_config = EnvConfig()
    config = rl.Config(cache_gb="auto", max_rows=100_000, batch_size=64)
    expected = cache_gb(policy, config, MasterWeights(policy))
    found = [float((tmp_path / f"{rank}").read_text()) for rank in range(2)]
    assert found == [pytest.approx(expected, rel=1e-5)] * 2


@pytest.mark.slow
def test_a_process_without_questions_is_not_waited_for(place, tmp_path):
    """In evaluation each finds its own size: one of two has nothing to play."""
    flags = ["--model", place / "model", "--data", place / "test.jsonl", "--out", tmp_path / "out",
             "--device", "cpu", "--max_questions", 1, "--max_turn_tokens", 4, "--cache_gb", "auto"]
    launch(2, "eval.py", flags).wait(timeout_s=60)


@pytest.mark.device
def test_what_is_free_is_the_machines_or_the_gpus():
    assert 0 < free_bytes(DEVICE) < 1e15


@pytest.mark.device
@pytest.mark.skipif(DEVICE.type != "cuda", reason="a machine's memory is others', too")
def test_memory_that_pytorch_keeps_for_itself_is_free():
    torch.cuda.empty_cache()
    before = free_bytes(DEVICE)
    tensor = torch.empty(10 ** 9, dtype=torch.uint8, device=DEVICE)
    assert 0.9e9 < before - free_bytes(DEVICE) < 1.1e9
    del tensor
    assert abs(before - free_bytes(DEVICE)) < 0.1e9


# ------------------------------------------------------------------------------------------ when it runs out
def too_much(*_, **__):
    torch.empty(10 ** 15, device=DEVICE)


ASKED = "4000000000000000 bytes" if DEVICE.type == "cpu" else "3725290.30 GiB"  # as PyTorch says it there


@pytest.mark.device
@pytest.mark.parametrize("what, stage, owner, name", [
    ("loading", rl, Qwen2_5_VLForConditionalGeneration, "from_pretrained"), ("rollout", rl, Engine, "admit"),
    pytest.param("update", sft, torch.optim.AdamW, "step", marks=pytest.mark.slow),
    pytest.param("saving", sft, MasterWeights, "export", marks=pytest.mark.slow)])
def test_memory_that_runs_out_is_one_line(what, stage, owner, name, place, tmp_path, monkeypatch, capsys):
    """`name` of `owner`, which a run calls then, asks for too much."""
    monkeypatch.setattr(owner, name, too_much)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, stage, place, tmp_path, *(RL if stage is rl else []))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2
    words = f".py: error: out of memory at {what}, where {ASKED} more were asked for; lower --"
    assert words in last and "--plan" in last, last


def limit_memory(more):
    """This process may have so many bytes more on DEVICE than it has."""
    if DEVICE.type == "cuda":
        most = torch.cuda.memory_reserved() + more
        torch.cuda.set_per_process_memory_fraction(most / torch.cuda.mem_get_info()[1])
        return
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def limited(place, out):
    """rl.py in a process that, once its cache grows, may have 20 MB more than it has."""
    reserve = KVCache.reserve

    def reserve_with_little(cache, *room):
        limit_memory(20_000_000)
        reserve(cache, *room)

    KVCache.reserve = reserve_with_little
    sys.argv = ["rl.py", "--model", f"{place}/model", "--data", f"{place}/train.jsonl", "--out", out,
                "--device", DEVICE.type, "--dtype", "float32", "--no-compile",
                *"--batch_size 2 --group_size 500 --max_rows 1000".split()]
    run_main(rl.main, out_of_memory)


@pytest.mark.device
@pytest.mark.slow
def test_memory_that_really_runs_out(place, tmp_path):
    said = launch(1, "test_memory:limited", [place, tmp_path / "out"]).wait(statuses=[2])
    assert "rl.py: error: out of memory at rollout, where " in said and "Traceback" not in said


def test_what_counts_as_memory_that_ran_out():
    ran_out = {"2.50 GiB": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 .."),
               "": MemoryError(), "at update;": RuntimeError("CUDA error: out of memory")}
    for allocate, asked in ((torch.empty, "4000000000000000 bytes"), (np.empty, "7.11 PiB")):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate(10 ** 15)
        ran_out[asked] = caught.value
    for asked, error in ran_out.items():
        line = out_of_memory(error)
        assert line.startswith("out of memory at update") and asked in line and "\n" not in line
    others = RuntimeError("shapes do not match"), ValueError("can't allocate memory"), KeyboardInterrupt()
    assert not any(map(out_of_memory, others))
