"""Master weights and moments in host memory: updates, checkpoints and the reference are those without it."""

import json
import re
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from launcher import launch
from tiny import DEVICE, make_groups, make_place, random_policy, tied_and_untied

import rl
from common import UserError
from model import token_log_probs
from scale import offload
from scale.devices import pin_memory
from scale.offload import OffloadedWeights, reference_of
from scale.pick import check_flags, load_weights
from training.checkpoints import load_policy, save_policy
from training.environment import run_environment
from training.run import TrainingRun
from training.run_folder import disown_folder
from training.weights import MAX_BAD_STEPS, MasterWeights

pytestmark = pytest.mark.device
HOST = torch.device("cpu")
ON_GPU = pytest.mark.skipif(DEVICE.type != "cuda", reason="host and device are one on a CPU")
# of gradients, relative, and of weights after three updates. A GPU adds up in no fixed order, and rounds in
# AdamW otherwise than the CPU; in bfloat16 what is added up otherwise is rounded otherwise
TOLERANCE = {"float32": (1e-5, 1e-6), "bfloat16": (1e-5, 1e-6)}
if DEVICE.type != "cpu":
    TOLERANCE = {"float32": (1e-4, 1e-5), "bfloat16": (0.05, 1e-3)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, and random checkpoints, whose embedding and head are one tensor, and are not, in float32 and
    bfloat16."""
    folder = make_place(tmp_path_factory.mktemp("offload"), layers=2)
    for name, policy in tied_and_untied():
        save_policy(policy, folder / name)
        save_policy(policy.bfloat16(), folder / f"{name}-bfloat16")
    return folder


def config_of(place, model="tied", **more):
    settings = dict(batch_size=2, mini_batch_size=2, max_tokens_per_pass=900, kl_weight=0.1,
                    entropy_weight=0.1, offload=["optimizer"], model=str(place / model), dtype="float32")
    return rl.Config(**settings | more)


def weights_of(config):
    return load_weights(config.model, config, run_environment(config.model, config), DEVICE,
                        with_reference=True)


class Updated:
    """Weights after some updates with AdamW, the first one's gradients, which were clipped, and the weights
    before."""

    def __init__(self, config, place, steps=3):
        self.weights = weights = weights_of(config)
        weights.policy.train()
        self.optimizer = torch.optim.AdamW(weights.parameters, lr=1e-3, eps=1e-3, weight_decay=0.0,
                                           fused=True)
        weights.adopt(self.optimizer)
        self.before = {name: p.detach().clone() for name, p in weights.master_weights.items()}
        self.gradients, self.stepped_together, self.buffers = {}, [], []
        self.optimizer.register_step_pre_hook(self.look)
        groups = make_groups(load_policy(config.model, DEVICE, weights.policy.dtype), place, 2)
        self.metrics = [rl.update(weights, groups, self.optimizer, config, 0, DEVICE) for _ in range(steps)]

    def look(self, *_):
        now = {name: p.grad for name, p in self.weights.master_weights.items() if p.grad is not None}
        self.stepped_together.append(list(now))
        self.gradients = {name: g.clone() for name, g in now.items()} | self.gradients
        self.buffers += [weakref.ref(g) for g in getattr(self.weights, "gradients", {}).values()]

    def assert_like(self, plain):
        gradient, weight = TOLERANCE[str(self.weights.policy.dtype).removeprefix("torch.")]
        names = {*plain.weights.master_weights}
        assert {*self.gradients} == {*plain.gradients} == {*self.weights.master_weights} == names
        for name, g in plain.gradients.items():
            assert (self.gradients[name].to(g) - g).norm() <= gradient * g.norm() and g.norm() > 0, name
        moved = []
        for name, p in plain.weights.master_weights.items():
            assert (self.weights.master_weights[name].to(p) - p).abs().max() <= weight, name
            moved.append((p - plain.before[name]).abs().max())
        assert max(moved) > 1e-4 and min(moved) > 1e-5


@pytest.fixture(scope="module")
def plain(place):
    """Updates of plain MasterWeights, each made once."""
    made = {}

    def updated(**settings):
        key = json.dumps(settings)
        if key not in made:
            made[key] = Updated(config_of(place, offload=[], **settings), place)
        return made[key]

    return updated


@pytest.fixture(scope="module")
def once(place):
    """One update in bfloat16, of bfloat16 weights from float32 files."""
    return Updated(config_of(place, dtype="bfloat16"), place, steps=1)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# ---------------------------------------------------------------------------------------------------- updates
@pytest.mark.parametrize("model, max_grad_norm", [("tied", 0.05), slow("untied", 0.05), slow("tied", 1e9)])
def test_updates_are_those_without(place, plain, model, max_grad_norm, tmp_path):
    """Float32. Gradients as they are clipped, master weights, metrics; what is exported is what was
    trained."""
    same = dict(model=model, max_grad_norm=max_grad_norm)
    mine, theirs = Updated(config_of(place, offload=["optimizer", "reference"], **same), place), plain(**same)
    mine.assert_like(theirs)
    for a, b in zip(mine.metrics, theirs.metrics, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6) and b["kl"] >= 0
    assert theirs.metrics[2]["kl"] > 1e-6  # of the reference
    norm = torch.nn.utils.get_total_norm(mine.gradients.values())
    assert mine.metrics[0]["grad_norm"] > 0.1
    assert max_grad_norm > 1 or norm == pytest.approx(max_grad_norm, rel=1e-3)
    mine.weights.save(tmp_path)
    exported = dict(load_policy(tmp_path).named_parameters())
    assert all(torch.equal(exported[name], p) for name, p in mine.weights.master_weights.items())


@pytest.mark.slow
def test_updates_in_bfloat16_are_those_without(place, plain):
    same = dict(model="untied-bfloat16", dtype="bfloat16", max_grad_norm=0.05)
    mine = Updated(config_of(place, **same), place)
    mine.assert_like(plain(**same))


def test_master_weights_are_what_the_files_say_and_the_policy_is_cast_from_them(place, once):
    """Float32 files, bfloat16 weights: not the rounded values."""
    in_float32 = dict(load_policy(place / "tied").named_parameters())
    for name, before in once.before.items():
        assert torch.equal(before, in_float32[name]), name
        master, p = once.weights.master_weights[name], once.weights.compute[name]
        assert p.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(p.cpu(), master.bfloat16()) and not torch.equal(master, master.bfloat16().float())


def test_memory_of_master_weights_moments_and_gradients(once):
    """The first two take 12 bytes a parameter, in the slabs; gradients are there only within an update."""
    weights, state = once.weights, once.optimizer.state
    trained = sum(p.numel() for p in weights.compute.values())
    assert 12 * trained <= sum(slab.nbytes for slab in weights.slabs) <= 1.05 * 12 * trained
    held = [p for master in weights.parameters
            for p in (master, state[master]["exp_avg"], state[master]["exp_avg_sq"])]
    assert {p.dtype for p in held} == {torch.float32} and all(p.any() for p in held)
    assert {p.untyped_storage().data_ptr() for p in held} == {slab.data_ptr() for slab in weights.slabs}
    assert len({p.data_ptr() for p in held}) == 3 * len(weights.master_weights)
    assert len(once.buffers) >= len(weights.master_weights) and not weights.gradients
    assert not [ref for ref in once.buffers if ref() is not None]
    assert all(p.grad is None for p in (*weights.policy.parameters(), *weights.parameters))
    # in the step one group's stand on the host: a layer, the embedding, which is the head, the last norm
    assert len(once.stepped_together) == len(weights.policy.language_model.layers) + 2
    assert sorted(sum(once.stepped_together, [])) == sorted(weights.master_weights)


def test_a_gradient_that_is_not_finite_or_not_there(place, capsys):
    """The first changes nothing, and ends the run if it comes again and again; a weight without one stays."""
    done = Updated(config_of(place, dtype="bfloat16"), place, steps=1)
    weights, state = done.weights, done.optimizer.state

    def look():
        moments = [x for p in weights.parameters for x in state[p].values()]
        return [x.detach().clone() for x in (*weights.parameters, *weights.compute.values(), *moments)]

    before = look()
    for number in range(MAX_BAD_STEPS):
        parts = [p.float().sum() for p in weights.compute.values()]
        parts[number] = parts[number] * float("nan")
        sum(parts).backward()
        assert len(weights.gradients) == len(weights.master_weights)
        if number < MAX_BAD_STEPS - 1:
            assert not weights.step(done.optimizer, 1.0, ["q7"]) < 1e9
        else:
            with pytest.raises(UserError, match=f"q7; {MAX_BAD_STEPS} such steps in a row"):
                weights.step(done.optimizer, 1.0, ["q7"])
        assert all(map(torch.equal, before, look()))
    weights.free_gradients(done.optimizer)
    assert capsys.readouterr().err.count("this step is left out") == MAX_BAD_STEPS - 1
    before = {name: p.detach().clone() for name, p in weights.master_weights.items()}
    only = [name for name in before if "layers.1." in name]
    sum(weights.compute[name].float().sum() for name in only).backward()
    assert weights.step(done.optimizer, 1.0) > 0 and weights.bad_steps == 0
    assert [name for name, p in weights.master_weights.items() if not torch.equal(p, before[name])] == only
    counts = {name: int(state[p]["step"]) for name, p in weights.master_weights.items()}
    assert counts == {name: 1 + (name in only) for name in before}


class LateCopies:
    """Copies that are made as late as they may be: when somebody waits for them, or for one that was begun
    later. (Others are made at once; what is right with both is right whenever a GPU makes them.)"""

    def __init__(self, device):
        self.begun, self.made = [], 0

    def begin(self, targets, sources):
        self.begun.append(list(zip(targets, sources, strict=True)))
        return partial(self.make, len(self.begun))

    def make(self, up_to):
        for number in range(self.made, up_to):
            for target, source in self.begun[number]:
                target.copy_(source)
            self.begun[number] = None
        self.made = max(self.made, up_to)

    def join(self):
        self.make(len(self.begun))


def test_copies_are_waited_for(place, plain, monkeypatch):
    monkeypatch.setattr(offload, "Copies", LateCopies)
    same = dict(model="tied", max_grad_norm=0.05)
    mine = Updated(config_of(place, offload=["optimizer", "reference"], **same), place)
    mine.assert_like(plain(**same))
    assert mine.weights.copies.made == len(mine.weights.copies.begun) > 3 * 2 * 3
    for name, p in mine.weights.master_weights.items():
        assert torch.equal(mine.weights.compute[name].cpu(), p), name
    kls = [m["kl"] for m in plain(**same).metrics]
    assert [m["kl"] for m in mine.metrics] == pytest.approx(kls, rel=1e-4, abs=1e-7)


# -------------------------------------------------------------------------------------------------- reference
def log_probs(policy, dialogues):
    with torch.no_grad():
        return token_log_probs(policy, dialogues)[0]


@pytest.mark.parametrize("layers, dtype",
                         [(3, torch.float32), slow(1, torch.bfloat16), slow(2, torch.bfloat16)])
def test_a_reference_on_the_host_says_the_same_to_the_bit(place, layers, dtype):
    """Pass after pass, whatever the policy has become; its layers take the room of two, its vision tower
    none."""
    policy = random_policy(layers=layers).to(dtype)
    dialogues = [[e.dialogue for e in group] for group in make_groups(policy, place, 1)]
    plain, on_device, on_host = policy.frozen_copy(), reference_of(policy), reference_of(policy, on_host=True)
    expected = log_probs(plain, dialogues)
    with torch.no_grad():
        for p in policy.language_model.parameters():
            p.mul_(1.5)
    policy.train()
    for _ in range(2):
        assert torch.equal(log_probs(on_host, dialogues), expected)
        assert torch.equal(log_probs(on_device, dialogues), expected)
    assert not torch.equal(log_probs(policy, dialogues), expected)
    assert not any(p.requires_grad for p in on_host.parameters())
    assert plain.visual is on_host.visual is on_device.visual is policy.visual
    places = {p.untyped_storage().data_ptr() for p in on_host.language_model.layers.parameters()}
    assert len(places) == min(2, layers)


# ------------------------------------------------------------------------------------------------------- runs
def steps_of_a_run(place, out, first, last, *offload):
    """Makes some updates of a run of three as rl.py does, and saves each. Returns the weights and the
    optimizer."""
    place = Path(place)
    config = config_of(place, offload=list(offload), out=str(out), data=f"{place}/train.jsonl", steps=3,
                       save_every=1, device=DEVICE.type)
    inputs = {"model": config.model, "questions": config.data}
    run = TrainingRun("rl", config, inputs, 0, 1, DEVICE)
    weights = weights_of(config)
    optimizer = torch.optim.AdamW(weights.parameters, lr=1e-3, fused=True)
    progress = run.start(weights, optimizer, 3, {"step": 0}, torch.Generator())
    assert progress["step"] + 1 == int(first)
    groups = make_groups(load_policy(config.model, DEVICE), place, 2)
    for step in range(int(first), int(last) + 1):
        metrics = rl.update(weights, groups, optimizer, config, 0, DEVICE)
        run.end_step({"step": step} | metrics, {"step": step})
    return weights, optimizer


def state_of(weights, optimizer):
    """{name: master weight, moments and count}, copied to the host."""
    found = {}
    for name, p in weights.master_weights.items():
        state = optimizer.state[p]
        tensors = [p.detach(), *(state[what] for what in sorted(state))]
        found[name] = [tensor.clone().cpu() for tensor in tensors]
    return found


def test_a_run_goes_on_with_and_without(place, tmp_path):
    """Master weights, moments and counts are bit-equal either way; with it they are read into the slabs."""
    launch(1, "test_offload:steps_of_a_run", [place, tmp_path / "whole", 1, 3, "optimizer"]).wait()
    whole = load_policy(tmp_path / "whole").state_dict()
    launch(1, "test_offload:steps_of_a_run", [place, tmp_path / "run", 1, 1, "optimizer"]).wait()
    weights, optimizer = steps_of_a_run(place, tmp_path / "run", 2, 1)
    assert type(weights) is MasterWeights
    theirs = state_of(weights, optimizer)
    weights, optimizer = steps_of_a_run(place, tmp_path / "run", 2, 1, "optimizer")
    assert type(weights) is OffloadedWeights
    mine = state_of(weights, optimizer)
    assert {*mine} == {*theirs}
    for name, tensors in theirs.items():
        master = weights.master_weights[name]
        assert len(tensors) == 4 and all(map(torch.equal, tensors, mine[name])) and master.any(), name
        places = [x.untyped_storage().data_ptr() for x in (master, optimizer.state[master]["exp_avg"],
                                                           optimizer.state[master]["exp_avg_sq"])]
        assert places == [slab.data_ptr() for slab in weights.slabs]
    disown_folder(tmp_path / "run")  # this process stopped in the middle of it
    launch(1, "test_offload:steps_of_a_run", [place, tmp_path / "run", 2, 3, "optimizer"]).wait()
    resumed, before = (load_policy(folder).state_dict() for folder in (tmp_path / "run", place / "tied"))
    for name, tensor in whole.items():
        # a GPU adds up in no fixed order, and AdamW's first steps are as long for the smallest gradients
        most = 0 if DEVICE.type == "cpu" else 0.1 * (tensor - before[name]).norm()
        assert (resumed[name] - tensor).norm() <= most, name


def flags(place, out, *more):
    """Three steps of rl.py that change the weights a lot."""
    return ["--model", place / "model", "--data", place / "train.jsonl", "--out", out, "--device",
            DEVICE.type, "--dtype", "float32", "--no-compile", "--steps", 3, "--batch_size", 2,
            "--mini_batch_size", 1, "--group_size", 3, "--max_turn_tokens", 6, "--max_rows", 8,
            "--max_draws", 2, "--temperature", 4, "--lr", 1e-4, "--cache_gb", 0.2, *more]


def metrics_of(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


@pytest.mark.slow
def test_runs_with_it_are_those_without(place, tmp_path):
    """rl.py and sft.py, all in one process on the host."""
    run = "bench/planted_rl.py"
    launch(1, run, flags(place, tmp_path / "plain")).wait()
    launch(1, run, flags(place, tmp_path / "host", "--offload", "optimizer", "reference", "features")).wait()
    sft = ["--model", place / "model", "--data", place / "sft.jsonl", "--device", DEVICE.type, "--dtype",
           "float32", "--lr", 1e-3, "--batch_size", 8]
    launch(1, "sft.py", [*sft, "--out", tmp_path / "sft"]).wait()
    launch(1, "sft.py", [*sft, "--out", tmp_path / "sft_host", "--offload", "optimizer"]).wait()
    # a GPU adds up in no fixed order, and AdamW's first steps are as long for the smallest gradients
    tolerance = dict(rel=1e-3, abs=1e-5) if DEVICE.type == "cpu" else dict(rel=1e-2, abs=1e-3)
    for name in ("plain", "host"), ("sft", "sft_host"):
        theirs, mine = (metrics_of(tmp_path / out) for out in name)
        assert len(mine) == len(theirs) >= 2 and all(m["grad_norm"] > 0 for m in mine)
        for a, b in zip(mine, theirs):
            assert a == pytest.approx(b, **tolerance)


@pytest.mark.slow
def test_features_on_the_host_beside_shards_change_nothing(place, tmp_path):
    run, shards = "bench/planted_rl.py", ["--shard", "all", "--dtype", "bfloat16"]
    launch(2, run, flags(place, tmp_path / "shards", *shards)).wait()
    launch(2, run, flags(place, tmp_path / "shards_host", *shards, "--offload", "features")).wait()
    assert metrics_of(tmp_path / "shards") == metrics_of(tmp_path / "shards_host")


def test_what_does_not_go_together_is_one_line():
    cases = [(dict(offload=["optimizer"]), 2, "--shard all"),
             (dict(offload=["optimizer"], shard="all"), 1, "--shard all"),
             (dict(offload=["optimizer"], shard="node"), 8, "--shard all"),
             (dict(offload=["optimizer"], lora_rank=4), 1, "--offload .* --lora_rank"),
             (dict(lora_rank=4, shard="all"), 2, "--lora_rank goes without --shard"),
             (dict(offload=["reference"]), 1, "--offload optimizer reference"),
             (dict(shard="some"), 1, "--shard must be one of none, all, node, not some"),
             (dict(offload=["frames", "features"]), 1,
              "--offload must be some of optimizer reference features, not frames")]
    wrong = []
    for settings, processes, words in cases:
        try:
            check_flags(rl.Config(**settings), processes)
            wrong.append(settings)
        except UserError as error:
            if not re.search(words, str(error)):
                wrong.append((settings, str(error)))
    assert not wrong
    for settings, processes in ((dict(offload=["features"], shard="all"), 2), (dict(lora_rank=4), 2),
                                (dict(offload=["optimizer", "reference", "features"]), 1),
                                (dict(offload=["features"], lora_rank=4), 1)):
        check_flags(rl.Config(**settings), processes)


# ----------------------------------------------------------------------------------------- beside other work
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_beside_other_work_change_nothing(place, dtype):
    """On a GPU from and to memory that is pinned."""
    same = dict(model="untied-bfloat16", dtype=dtype, max_grad_norm=0.05)
    theirs = Updated(config_of(place, offload=[], **same), place)
    mine = Updated(config_of(place, offload=["optimizer", "reference"], **same), place)
    mine.assert_like(theirs)
    weights = mine.weights
    for slab in (*weights.slabs, *weights.staging):
        assert slab.device == HOST and slab.is_pinned() == (DEVICE.type == "cuda")
    assert {p.device.type for p in weights.policy.parameters()} == {DEVICE.type}
    for name, p in weights.compute.items():
        assert torch.equal(p.cpu(), weights.master_weights[name].detach().to(p.dtype))
    assert not weights.gradients and not [ref for ref in mine.buffers if ref() is not None]
    weights.policy.eval()
    dialogues = [[e.dialogue for e in group] for group in make_groups(weights.policy, place, 2)]
    copied = weights.policy.frozen_copy()
    streamed = reference_of(weights.policy, on_host=True)
    for _ in range(20):
        assert torch.equal(log_probs(streamed, dialogues), log_probs(copied, dialogues))


@ON_GPU
def test_loading_holds_nothing_of_float32_on_the_gpu(place):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weights = weights_of(config_of(place, dtype="bfloat16", offload=["optimizer", "reference"]))
    compute = sum(p.nbytes for p in weights.policy.parameters())
    assert torch.cuda.max_memory_allocated() - before < 2.2 * compute


@ON_GPU
def test_memory_is_pinned_as_long_as_its_tensor_is_there():
    memory = np.zeros(1_000_000, dtype=np.float32)
    for _ in range(2):
        tensor = pin_memory(torch.from_numpy(memory), DEVICE)
        assert tensor.is_pinned() and torch.from_numpy(memory).is_pinned()
        del tensor
        assert not torch.from_numpy(memory).is_pinned()
