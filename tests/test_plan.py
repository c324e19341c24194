"""A memory plan counts what PyTorch's memory trackers see, and its allocator on a GPU, and says what fits."""

import gc
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from bench.bench_plan import CONFIGS, compare, make_dialogue, make_policy, quick, read_config
from tiny import DEVICE, random_policy
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

import rl
import sft
from common import UserError
from generation import KVCache
from model import token_log_probs
from scale import estimates
from scale.lora import LoRAWeights
from scale.offload import OffloadedWeights
from scale.plan import LOWER, make_plan, read_model_config
from training.weights import MasterWeights
from zoom_env import EnvConfig

THREE, SEVEN = "qwen2.5-vl-3b", "qwen2.5-vl-7b"
TRAINED = 7_615_616_512  # parameters of the language model of 7B


def plan_of(stage, model, gpus, gpu_gb, host_gb=1000, **settings):
    config, model_config = stage.Config(**settings), read_config(model)
    return make_plan(stage.__name__, config, model_config, EnvConfig(), gpus, gpu_gb * 1e9, host_gb * 1e9)


def test_the_public_models_have_the_sizes_of_their_cards():
    three, seven = (estimates.sizes_of(read_config(name)) for name in (THREE, SEVEN))
    assert (round(three.total / 1e9, 2), round(seven.total / 1e9, 2)) == (3.75, 8.29)
    assert (round(three.trained / 1e9, 2), seven.trained) == (3.09, TRAINED)


# ------------------------------------------------------- against PyTorch's trackers, and a GPU's allocator
def check_update(stage, model, flags, gpus, tokens):
    """Two layers of the true widths; bench/bench_plan.py has all of them."""
    if DEVICE.type == "cuda":
        return check_update_on_a_gpu(stage, model, flags, tokens)
    found = compare(model, stage.Config(**flags), gpus, tokens, layers=2)
    passing = [found.pop(what) for what in ("gathered", "activations") if what in found]
    for what, (planned, seen) in found.items():
        assert planned == pytest.approx(seen, rel=0.01), what
    assert sum(planned for planned, _ in passing) == pytest.approx(sum(seen for _, seen in passing), rel=0.15)


def check_update_on_a_gpu(stage, model, flags, tokens):
    """What the trackers count of fake tensors, its allocator counts of true ones: at the peak within 15%."""
    config = replace(stage.Config(**flags), max_tokens_per_pass=tokens)
    model_config = read_config(model, layers=2)
    plan = make_plan(stage.__name__, config, model_config, EnvConfig(), 1, 1e15, 1e15).update
    kept = ("compute weights", "master weights", "reference", "gradients", "moments")
    passing = ("activations", "logits", "passing gradients")
    planned = [sum(plan.get(part, 0) for part in parts) for parts in (kept, kept + passing)]
    gc.collect()
    others = torch.cuda.memory_allocated()
    seen = [bytes_ - others for bytes_ in bytes_of_an_update(config, model, model_config, tokens)]
    assert planned[0] == pytest.approx(seen[0], rel=0.05)
    assert planned[1] == pytest.approx(seen[1], rel=0.15)


def bytes_of_an_update(config, model, model_config, tokens):
    """As bench_plan.track: after an update, and at the peak of a pass like the second one of another update.
    The weights are what was in their memory."""
    in_rl = hasattr(config, "kl_weight")
    with DEVICE:
        policy = make_policy(model_config, torch.bfloat16, torch.bfloat16).freeze_vision()
    if config.gradient_checkpointing:
        policy.checkpoint_layers()
    if "optimizer" in config.offload:
        weights = OffloadedWeights(policy, lambda name: policy.get_parameter(name).detach())
    elif config.lora_rank:
        weights = LoRAWeights(policy, model, config, in_rl)
    else:
        weights = MasterWeights(policy, policy.frozen_copy() if in_rl else None)
    optimizer = torch.optim.AdamW(weights.parameters, lr=1e-6, fused=True)
    policy.train()

    def one_pass(length):
        with DEVICE:
            batch = [[make_dialogue(policy, length)]]
        log_probs, entropies = token_log_probs(policy, batch, 1.0, in_rl)
        if weights.reference is not None:
            with torch.no_grad():
                token_log_probs(weights.reference, batch)
        (log_probs.sum() + (entropies.sum() if in_rl else 0)).backward()

    one_pass(256)
    if not config.offload:
        optimizer.step()
        weights.cast()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one_pass(tokens)
    return before, torch.cuda.max_memory_allocated()


def test_an_update_in_shards_holds_what_the_plan_says():
    check_update(sft, SEVEN, {"shard": "all"}, 16, 4096)


def device_test(*values):
    return pytest.param(*values, marks=pytest.mark.device)


@pytest.mark.slow
@pytest.mark.parametrize("stage, model, flags, gpus, tokens", [
    device_test(rl, SEVEN, {}, 1, 16_384),
    (rl, THREE, {"dtype": "float32"}, 1, 4096),
    device_test(sft, SEVEN, {"gradient_checkpointing": False}, 1, 4096),
    (rl, THREE, {"shard": "all"}, 8, 16_384),
    (rl, SEVEN, {"shard": "node"}, 16, 4096),
    (rl, SEVEN, {"offload": ["optimizer", "reference"]}, 1, 4096),
    device_test(sft, THREE, {"offload": ["optimizer"]}, 1, 4096),
    device_test(rl, THREE, {"lora_rank": 16}, 1, 8192)],
    ids=lambda value: getattr(value, "__name__", str(value)))
def test_an_update_holds_what_the_plan_says(stage, model, flags, gpus, tokens):
    check_update(stage, model, flags, gpus, tokens)


@contextmanager
def above(*there):
    """A list that gets the most bytes that there are on DEVICE at one time within it, beyond what was there
    before: modules, `there`, for PyTorch's tracker, or whatever a GPU's allocator has."""
    most = []
    with torch.no_grad():
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield most
            most.append(torch.cuda.max_memory_allocated() - before)
            return
        tracker = quick(MemTracker)()
        tracker.track_external(*there)
        with tracker:
            before = tracker.begin().get("Total", 0)
            yield most
            most.append(tracker.numbers("peak")["Total"] - before)


# of what one pass makes: a GPU's libraries have some memory of their own beside it
CLOSE = {"prefill": 0.05, "vision": 0.1} if DEVICE.type == "cpu" else {"prefill": 0.15, "vision": 0.15}


@pytest.mark.device
@pytest.mark.slow
def test_a_prefill_holds_what_the_plan_says():
    fake = FakeTensorMode(allow_non_fake_inputs=True) if DEVICE.type == "cpu" else nullcontext()
    with fake, DEVICE:
        policy = make_policy(read_config(SEVEN, layers=2), torch.bfloat16, torch.bfloat16)
        dialogue = make_dialogue(policy, 16_384)
        ids, positions = torch.tensor([dialogue.ids]), torch.tensor(dialogue.positions).T[:, None]
        with above(policy.requires_grad_(False)) as most:
            policy.hidden_states(ids, positions, lambda layer, q, k, v: q.transpose(1, 2).contiguous())
    sizes = estimates.sizes_of(read_config(SEVEN))
    planned = estimates.forward_activations(sizes, 16_384, 2)
    assert planned == pytest.approx(most[0], rel=CLOSE["prefill"])


@pytest.mark.device
@pytest.mark.slow
def test_frames_through_the_vision_tower_hold_what_the_plan_says():
    """True widths and two layers, one of which attends in windows; true tensors, as it looks at numbers."""
    config = read_config(SEVEN).vision_config
    config.depth, config.fullatt_block_indexes, config._attn_implementation = 2, [1], "sdpa"
    tower = Qwen2_5_VisionTransformerPretrainedModel(config).to(DEVICE, torch.bfloat16).requires_grad_(False)
    frames = 4 if DEVICE.type == "cpu" else 64
    pixels = torch.zeros(frames * 512, 1176, dtype=torch.bfloat16, device=DEVICE)
    grid = torch.tensor([[1, 16, 32]] * frames, device=DEVICE)
    with above(tower) as most:
        tower(pixels, grid_thw=grid)
    planned = estimates.vision_activations(estimates.sizes_of(read_config(SEVEN)), 128, 2) * frames / 64
    assert planned == pytest.approx(most[0] + 512 * frames * 1176 * 6, rel=CLOSE["vision"])


@pytest.mark.device
def test_the_cache_of_a_token_is_that_of_the_engine():
    policy = random_policy()
    cache, sizes = KVCache(policy, 8, 1e6), estimates.sizes_of(policy.hf.config)
    assert cache.max_tokens == 1e6 // estimates.cache_token(sizes, policy.dtype.itemsize)


# --------------------------------------------------------------------------------------------- what is where
def test_features_of_a_full_step_on_one_gpu():
    """128 questions x 16 episodes of 7B: 64 frames of each question, two zooms of 16 of each episode."""
    plan = plan_of(rl, SEVEN, 1, 80)
    assert plan.update["features"] == 128 * (64 + 16 * 32) * 128 * 3584 * 2
    assert plan_of(rl, SEVEN, 8, 80).update["features"] == plan.update["features"] / 8
    elsewhere = plan_of(rl, SEVEN, 1, 80, offload=["features"])
    assert elsewhere.update["features"] == 0
    assert elsewhere.host["features on the host"] == plan.update["features"]
    assert 0 < elsewhere.rollout["features"] < plan.rollout["features"] / 10  # of what is played


def test_master_weights_and_moments_go_to_the_host():
    given = plan_of(rl, SEVEN, 1, 80, batch_size=16)
    moved = plan_of(rl, SEVEN, 1, 80, batch_size=16, offload=["optimizer", "reference"])
    assert (given.update["master weights"], given.update["moments"]) == (4 * TRAINED, 8 * TRAINED)
    assert not {"master weights", "moments"} & (moved.update | moved.rollout).keys()
    assert 12 * TRAINED < moved.host["master weights and moments on the host"] < 12.6 * TRAINED
    assert moved.update["gradients"] == 4 * TRAINED and "gradients" not in moved.rollout
    assert moved.host["exporting"] < 2.3e9  # a file at a time, while they stay
    reference = moved.host["reference on the host"] + moved.update["reference"]
    assert reference == pytest.approx(2 * TRAINED, rel=0.07)


def test_a_run_of_rl_plays_with_the_whole_policy_and_trains_on_shards():
    plan = plan_of(rl, SEVEN, 8, 80)  # several processes in bfloat16: shards
    assert plan.rollout["gathered weights"] == 2 * TRAINED > plan.update["gathered weights"] > 0
    shares = {"master weights": 4, "gradients": 4, "moments": 8, "reference": 2}
    assert {part: plan.update[part] * 8 / TRAINED for part in shares} == shares
    assert plan.rollout["cache"] == 16e9 and "cache" not in plan.update
    assert "reference" not in plan_of(rl, SEVEN, 8, 80, kl_weight=0.0).update
    assert not plan_of(sft, SEVEN, 8, 80).rollout  # nothing is played, but for held-out questions
    assert plan_of(sft, SEVEN, 8, 80, val="questions.jsonl").rollout["cache"] == 16e9
    # in float32, or where the flags say so, all weights in each
    whole = plan_of(rl, SEVEN, 8, 80, dtype="float32")
    assert whole.update["compute weights"] > 4 * TRAINED and "master weights" not in whole.update
    assert plan_of(rl, SEVEN, 8, 80, shard="none").update["master weights"] == 4 * TRAINED
    assert plan_of(rl, SEVEN, 32, 80, shard="node").update["master weights"] == 4 * TRAINED / 8


def test_the_cache_takes_what_is_left():
    settings = dict(lora_rank=16, batch_size=16, cache_gb="auto")
    plan = plan_of(rl, THREE, 1, 24, **settings)
    assert sum(plan.rollout.values()) == pytest.approx(24e9)
    # never less than one episode of the longest needs
    small = plan_of(rl, THREE, 1, 10, **settings)
    assert small.rollout["cache"] > 32_768 * 2 * 36 * 256 * 2 and not small.fits


# what lowers a part: (its name, GPUs, settings with which there is much, the flag, settings with less of it)
ADVICE = [
    ("compute weights", 8, {"shard": "none"}, "shard", {"shard": "all"}),
    ("master weights", 1, {}, "offload", {"offload": ["optimizer"]}),
    ("moments", 1, {}, "lora_rank", {"lora_rank": 16}),
    ("gradients", 8, {"shard": "none"}, "shard", {"shard": "all"}),
    ("reference", 1, {}, "offload", {"offload": ["optimizer", "reference"]}),
    ("features", 1, {}, "offload", {"offload": ["features"]}),
    ("features", 1, {}, "batch_size", {"batch_size": 16}),
    ("activations", 1, {}, "max_tokens_per_pass", {"max_tokens_per_pass": 8192}),
    ("activations", 1, {"gradient_checkpointing": False}, "gradient_checkpointing", {}),
    ("cache", 1, {}, "cache_gb", {"cache_gb": 4.0}),
    ("master weights and moments on the host", 1, {"offload": ["optimizer"]}, "lora_rank", {"lora_rank": 16}),
    ("features on the host", 1, {"offload": ["features"]}, "batch_size",
     {"offload": ["features"], "batch_size": 32}),
    ("images", 8, {}, "max_rows", {"max_rows": 16}),
    ("loading", 8, {"shard": "none"}, "shard", {"shard": "all"})]


@pytest.mark.slow
def test_the_flags_that_are_named_lower_the_part():
    for part, gpus, much, flag, little in ADVICE:
        before, after = (plan_of(rl, SEVEN, gpus, 80, **settings) for settings in (much, little))
        sizes = [(plan.rollout | plan.update | plan.host).get(part, 0) for plan in (before, after)]
        assert sizes[1] < sizes[0] and f"--{flag}" in LOWER[part], (part, flag, sizes)
    assert {part for part, *_ in ADVICE} == {*LOWER}


# ----------------------------------------------------------------------------------------------- the command
def run(monkeypatch, capsys, line):
    """(exit status, what it says)."""
    script, *flags = line.split()
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as ended:
        {"rl.py": rl, "sft.py": sft}[script].main()
    return ended.value.code, capsys.readouterr().out


# the table of docs/scale.md: a command, and whole GB of a GPU at rollout and at update, and of a host;
# CONFIGS stands for tests/configs
TABLE = """
sft.py --plan 16x80 --model CONFIGS/qwen2.5-vl-7b --shard node                                     0 44 34
sft.py --plan 8x80 --model CONFIGS/qwen2.5-vl-7b                                                   0 45 36
sft.py --plan 1x80 --model CONFIGS/qwen2.5-vl-7b --offload optimizer                               0 73 103
rl.py --plan 16x80 --model CONFIGS/qwen2.5-vl-7b --shard node                                      58 50 38
rl.py --plan 8x80 --model CONFIGS/qwen2.5-vl-7b                                                    62 54 38
rl.py --plan 1x80 --model CONFIGS/qwen2.5-vl-7b --batch_size 16 --offload optimizer reference      50 79 115
rl.py --plan 1x80 --model CONFIGS/qwen2.5-vl-7b --batch_size 16 --lora_rank 16                     48 46 21
rl.py --plan 1x24 --model CONFIGS/qwen2.5-vl-3b --batch_size 16 --lora_rank 16 --cache_gb auto \
    --offload features                                                                              24 21 16
"""


def test_the_table_of_plans(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for row in TABLE.replace("CONFIGS", str(CONFIGS)).strip().splitlines():
        line, *expected = row.rsplit(maxsplit=3)
        status, said = run(monkeypatch, capsys, line)
        assert status == 0 and said.endswith("\nfits\n"), said
        found = []
        for where in ("a GPU at rollout: ", "a GPU at update: ", "the host of a machine: "):
            found.append(round(float(said.partition(where)[2].split()[0])) if where in said else 0)
        assert found == [int(number) for number in expected], line
    assert not [*tmp_path.iterdir()] and not dist.is_initialized() and not torch.cuda.is_initialized()


def test_what_does_not_fit_ends_with_status_1_and_names_flags(monkeypatch, capsys):
    line = f"sft.py --plan 1x80 --model {CONFIGS / SEVEN}"
    status, said = run(monkeypatch, capsys, line)
    assert status == 1 and said.endswith("\ndoes not fit\n") and "rollout:" not in said
    assert "what lowers moments: " in said and "--offload optimizer on one GPU" in said
    # a host's memory is judged where it is given
    assert run(monkeypatch, capsys, f"{line} --offload optimizer")[0] == 0
    status, said = run(monkeypatch, capsys, f"{line.replace('1x80', '1x80x64')} --offload optimizer")
    assert status == 1 and "the host of a machine: 103.4 of 64 GB" in said
    assert run(monkeypatch, capsys, f"{line.replace('1x80', '1x80x103.5')} --offload optimizer")[0] == 0


def test_what_is_no_plan_is_said_in_one_line(monkeypatch, tmp_path):
    """What is no size of machines, and what a run refuses, too."""
    sizes = "8 8x x80 0x80 8x80x 8x80x9x9 8x-80 eightx80 8xnan 8.5x80 8x1e3 8x80GB".split()
    wrong = {f"--plan {size}": "--plan must be" for size in sizes}
    wrong |= {"--plan 2x80 --offload optimizer": "one process",
              "--plan 8x80 --lora_rank 8 --shard all": "without --shard",
              "--plan 8x80 --offload refrence": "must be some of",
              "--plan 8x80 --shard some": "must be one of",
              "--plan 8x80 --dtype float16": "--dtype must be"}
    missed = []
    for flags, words in wrong.items():
        monkeypatch.setattr(sys, "argv", ["rl.py", "--model", str(CONFIGS / SEVEN), *flags.split()])
        try:
            rl.main()
            missed.append(flags)
        except UserError as error:
            if words not in str(error) or "\n" in str(error):
                missed.append(f"{flags}: {error}")
    assert not missed
    # what is no model
    with pytest.raises(UserError, match="config.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="llama"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="git lfs pull"):
        read_model_config(tmp_path)
