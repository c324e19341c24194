"""A memory plan counts what PyTorch's memory trackers see, and says what fits."""

import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from bench_plan import CONFIGS, compare, make_dialogue, make_policy, quick, read_config
from tiny import random_policy
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

import rl
import sft
from common import UserError
from generation import KVCache
from scale import estimates
from scale.plan import as_flags, choose, make_plan, read_settings, remedies
from zoom_env import EnvConfig

THREE, SEVEN = (CONFIGS / f"qwen2.5-vl-{size}" for size in ("3b", "7b"))


def plan_of(stage, model, gpus, gpu_gb, host_gb=1000, **settings):
    config = (rl if stage == "rl" else sft).Config(**settings)
    return make_plan(stage, config, read_config(model.name), EnvConfig(), gpus, gpu_gb * 1e9, host_gb * 1e9)


def test_the_public_models_have_the_sizes_of_their_cards():
    three, seven = (estimates.sizes_of(AutoConfig.from_pretrained(folder)) for folder in (THREE, SEVEN))
    assert (round(three.total / 1e9, 2), round(seven.total / 1e9, 2)) == (3.75, 8.29)
    assert (round(three.trained / 1e9, 2), round(seven.trained / 1e9, 2)) == (3.09, 7.62)


# ------------------------------------------------------------------------------------ against PyTorch's trackers
@pytest.mark.parametrize("stage, model, flags, gpus, tokens", [
    (sft, THREE, {"shard": "none"}, 1, 4096),
    (rl, SEVEN, {"shard": "none"}, 1, 32_768),
    (rl, THREE, {"shard": "none", "dtype": "float32"}, 1, 4096),
    (sft, SEVEN, {"shard": "none", "gradient_checkpointing": False}, 1, 4096),
    (rl, THREE, {"shard": "all"}, 8, 32_768),
    (sft, SEVEN, {"shard": "all"}, 16, 4096),
    (rl, SEVEN, {"shard": "node"}, 16, 32_768),
    (rl, THREE, {"shard": "none", "lora_rank": 16}, 1, 32_768),
    (rl, SEVEN, {"shard": "none", "lora_rank": 64, "lora_targets": ["q_proj", "down_proj"]}, 1, 4096)],
    ids=lambda value: getattr(value, "__name__", getattr(value, "name", str(value))))
def test_an_update_holds_what_the_plan_says(stage, model, flags, gpus, tokens):
    """Three layers of the true widths; bench/bench_plan.py has all of them."""
    found = compare(model.name, stage.Config(**flags), gpus, tokens, layers=3)
    passing = [found.pop(what) for what in ("gathered", "activations") if what in found]
    for what, (planned, seen) in found.items():
        assert planned == pytest.approx(seen, rel=0.01), what
    assert sum(planned for planned, _ in passing) == pytest.approx(sum(seen for _, seen in passing), rel=0.15)


@pytest.mark.parametrize("on_host", [[], ["reference"]])
def test_an_update_with_masters_on_the_host_holds_what_the_plan_says(on_host):
    pytest.importorskip("scale.offload")
    found = compare(SEVEN.name, rl.Config(shard="none", offload=True, on_host=on_host), 1, 4096, layers=3)
    activations = found.pop("activations")
    for what, (planned, seen) in found.items():
        assert planned == pytest.approx(seen, rel=0.01), what
    assert activations[0] == pytest.approx(activations[1], rel=0.15)


@contextmanager
def above(tracker):
    """A list that gets the most that there is at one time within it, beyond what was there before."""
    most = []
    with torch.no_grad(), tracker:
        before = tracker.begin().get("Total", 0)
        yield most
        most.append(tracker.numbers("peak")["Total"] - before)


def test_a_prefill_holds_what_the_plan_says():
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy = make_policy(read_config(SEVEN.name, layers=2), torch.bfloat16, torch.bfloat16)
        dialogue, tracker = make_dialogue(policy, 16_384), quick(MemTracker)()
        tracker.track_external(policy.requires_grad_(False))
        ids, positions = torch.tensor([dialogue.ids]), torch.tensor(dialogue.positions).T[:, None]
        with above(tracker) as most:
            policy.hidden_states(ids, positions, lambda layer, q, k, v: q.transpose(1, 2).contiguous())
    sizes = estimates.sizes_of(read_config(SEVEN.name))
    assert estimates.forward_activations(sizes, 16_384, 2) == pytest.approx(most[0], rel=0.05)


def test_frames_through_the_vision_tower_hold_what_the_plan_says():
    """True widths and two layers, one of which attends in windows; no fake tensors, as it looks at numbers."""
    config = read_config(SEVEN.name).vision_config
    config.depth, config.fullatt_block_indexes, config._attn_implementation = 2, [1], "sdpa"
    tower = Qwen2_5_VisionTransformerPretrainedModel(config).to(torch.bfloat16).requires_grad_(False)
    frames, tracker = 4, quick(MemTracker)()
    pixels, grid = torch.zeros(frames * 512, 1176, dtype=torch.bfloat16), torch.tensor([[1, 16, 32]] * frames)
    tracker.track_external(tower)
    with above(tracker) as most:
        tower(pixels, grid_thw=grid)
    planned = estimates.vision_activations(estimates.sizes_of(read_config(SEVEN.name)), 128, 2) * frames / 64
    assert planned == pytest.approx(most[0] + 512 * frames * 1176 * 6, rel=0.1)


def test_the_cache_of_a_token_is_that_of_the_engine():
    policy = random_policy()
    cache, sizes = KVCache(policy, 8, 1e6), estimates.sizes_of(policy.hf.config)
    assert cache.max_tokens == 1e6 // estimates.cache_token(sizes, policy.dtype.itemsize)


def test_features_of_a_full_step_on_one_gpu():
    """128 questions x 16 episodes of 7B: 64 frames of each question, two zooms of 16 frames of each episode."""
    plan = plan_of("rl", SEVEN, 1, 80)
    assert plan.update["features"] == 128 * (64 + 16 * 32) * 128 * 3584 * 2
    assert plan_of("rl", SEVEN, 8, 80).update["features"] == plan.update["features"] / 8
    elsewhere = plan_of("rl", SEVEN, 1, 80, on_host=["features"])
    assert elsewhere.update["features"] == 0 and elsewhere.host["features"] == plan.update["features"]
    assert 0 < elsewhere.rollout["features"] < plan.rollout["features"] / 10  # of what is played


# ------------------------------------------------------------------------------------------------ what is where
def test_masters_and_moments_go_to_the_host():
    given, trained = plan_of("rl", SEVEN, 1, 80, batch_size=16), 7_615_616_512
    moved = plan_of("rl", SEVEN, 1, 80, batch_size=16, offload=True, on_host=["reference"])
    assert (given.update["masters"], given.update["moments"]) == (4 * trained, 8 * trained)
    assert moved.update["masters"] == moved.update["moments"] == moved.rollout["moments"] == 0
    assert 12 * trained < moved.host["masters and moments"] < 12.6 * trained
    assert moved.update["gradients"] == 4 * trained and "gradients" not in moved.rollout
    assert moved.host["exporting"] < 2.3e9  # a file at a time, while masters and moments stay
    assert moved.host["reference"] + moved.update["reference"] == pytest.approx(2 * trained, rel=0.07)


def test_a_run_of_rl_plays_with_the_whole_policy_and_trains_on_shards():
    plan, trained = plan_of("rl", SEVEN, 8, 80), 7_615_616_512
    assert plan.rollout["gathered weights"] == 2 * trained > plan.update["gathered weights"] > 0
    assert [plan.update[what] * 8 / trained for what in ("masters", "gradients", "moments", "reference")] == [4, 4, 8, 2]
    assert plan.rollout["cache"] == 16e9 and "cache" not in plan.update
    assert "reference" not in {k for k, v in plan_of("rl", SEVEN, 8, 80, kl_weight=0.0).update.items() if v}
    assert not plan_of("sft", SEVEN, 8, 80).rollout


def test_the_cache_takes_what_is_left():
    plan = plan_of("rl", THREE, 1, 24, lora_rank=16, batch_size=16, cache_gb="auto")
    assert sum(plan.rollout.values()) == pytest.approx(24e9)
    # never less than one episode of the longest needs
    small = plan_of("rl", THREE, 1, 10, lora_rank=16, batch_size=16, cache_gb="auto")
    assert small.rollout["cache"] > 32_768 * 2 * 36 * 256 * 2 and not small.fits


# -------------------------------------------------------------------------------------------------- the command
def run(monkeypatch, capsys, stage, line):
    """(exit status, what it says)."""
    monkeypatch.setattr(sys, "argv", [f"{stage.__name__}.py", "--plan", *line.split()])
    with pytest.raises(SystemExit) as ended:
        stage.main()
    return ended.value.code, capsys.readouterr().out


@pytest.mark.parametrize("line", [
    f"--model {SEVEN} --gpus 16 --gpu_gb 80 --host_gb 1000", f"--model {SEVEN} --gpus 8 --gpu_gb 80 --host_gb 1000",
    f"--model {SEVEN} --gpus 1 --gpu_gb 80 --host_gb 128 --offload --batch_size 16 --on_host reference",
    f"--model {SEVEN} --gpus 1 --gpu_gb 80 --host_gb 128 --lora_rank 16 --batch_size 16",
    f"--model {THREE} --gpus 1 --gpu_gb 24 --host_gb 64 --lora_rank 16 --batch_size 16 --cache_gb auto "
    "--max_tokens_per_pass 16384",
    f"--model {THREE} --gpus 1 --gpu_gb 24 --host_gb 64 --lora_rank 16 --batch_size 16 --cache_gb 6 --max_tokens_per_pass 16384"],
    ids=["16x80", "8x80", "offload", "adapters", "24, what is left for the cache", "24"])
def test_runs_that_fit(line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, said = run(monkeypatch, capsys, rl, line)
    assert status == 0 and said.endswith("fits\n")
    assert not [*tmp_path.iterdir()] and not dist.is_initialized() and not torch.cuda.is_initialized()


@pytest.mark.parametrize("flags", ["--host_gb 1000", "--host_gb 64 --offload", "--host_gb 128 --offload"])
def test_runs_that_do_not_fit_say_what_would(flags, monkeypatch, capsys):
    line = f"--model {SEVEN} --gpus 1 --gpu_gb 80 {flags}"
    status, said = run(monkeypatch, capsys, rl, line)
    assert status == 1 and "does not fit" in said
    offered = [words.strip() for words in said.split("It would fit with")[1].splitlines() if words.startswith("  --")]
    assert offered and any("lora_rank" in words for words in offered)
    for words in offered:  # ... and so it is
        if "auto" not in words:
            without = flags.replace("--offload", "") if "lora_rank" in words or "gpus" in words else flags
            assert run(monkeypatch, capsys, rl, f"--model {SEVEN} --gpus 1 --gpu_gb 80 {without} {words}")[0] == 0, words


def test_sft_has_a_plan_too_within_a_second(monkeypatch, capsys):
    began = time.perf_counter()
    status, said = run(monkeypatch, capsys, sft, f"--model {SEVEN} --gpus 1 --gpu_gb 80 --host_gb 128")
    assert time.perf_counter() - began < 1
    assert status == 1 and "--offload" in said and "rollout" not in said.splitlines()[1]


def test_masters_on_the_host_are_for_one_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rl.py", "--plan", "--model", str(SEVEN), "--gpus", "2", "--gpu_gb", "80", "--offload"])
    with pytest.raises(UserError, match="one process"):
        rl.main()


@pytest.mark.parametrize("flags, words", [("--on_host reference", "goes with --offload"), ("--on_host refrence", "must be some of"),
                                          ("--offload --lora_rank 8", "goes without"), ("--shard all --lora_rank 8", "without --shard")])
def test_what_a_run_refuses_the_plan_refuses(flags, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rl.py", "--plan", "--model", str(SEVEN), "--gpu_gb", "80", *flags.split()])
    with pytest.raises(UserError, match=words):
        rl.main()


def test_what_is_no_model_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        read_settings(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="llama"):
        read_settings(tmp_path)


# --------------------------------------------------------------------------------------------------- the choice
@pytest.mark.parametrize("model, gpus, host_gb, settings, expected", [
    (THREE, 8, 1000, {"kl_weight": 0.0}, {"shard": "none"}), (SEVEN, 8, 1000, {}, {"shard": "all"}),
    (SEVEN, 16, 1000, {}, {"shard": "node"}),
    (SEVEN, 1, 128, {"batch_size": 16}, {"offload": True, "on_host": ["reference"]}),
    (THREE, 1, 128, {"batch_size": 16}, {"on_host": ["features"]}),
    (THREE, 1, 128, {"batch_size": 32}, {"on_host": ["features"]}),
    (SEVEN, 1, 128, {"batch_size": 16, "lora_rank": 16}, {}), (SEVEN, 8, 1000, {"shard": "none"}, {"shard": "none", "on_host": ["features"]})])
def test_who_holds_the_weights_where_the_flags_do_not_say(model, gpus, host_gb, settings, expected):
    config, given = rl.Config(**settings), (read_config(model.name), EnvConfig(), gpus, 80e9, host_gb * 1e9)
    chosen, line = choose("rl", config, *given)
    assert replace(config, **expected) == replace(chosen, on_host=[*chosen.on_host]) or chosen == replace(config, **expected)
    plan = make_plan("rl", chosen, *given)
    sums = [f"{sum(part.values()) / 1e9:.0f}" for part in (plan.update, plan.rollout)]
    assert f"{sums[0]} of 80 GB a GPU at update, {sums[1]} at rollout" in line
    assert plan.fits == ("may not fit" not in line)


def test_what_costs_least_comes_first():
    config = rl.Config(batch_size=16, offload=True)
    given = config, read_config(SEVEN.name), EnvConfig(), 1, 80e9, 128e9
    assert [as_flags(changes) for changes, _ in remedies("rl", *given)][0] == "--on_host reference"
    assert make_plan("rl", replace(config, on_host=["reference"]), *given[1:]).fits
