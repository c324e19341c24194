"""Masters and moments in host memory: updates, checkpoints and the reference are those without it."""

import json
import random
import time
import weakref
from functools import partial

import pytest
import torch
from test_rl import make_groups
from test_training import lines, make_place, metrics, start, wait_for
from tiny import random_policy, tied_and_untied

import rl
from common import UserError
from model import token_log_probs
from training.checkpoints import load_policy
from scale import offload
from training.checkpoints import save_policy
from training.run_checkpoints import run_folders
from training.weights import MasterWeights
from scale.offload import OffloadedWeights, reference_of
from scale.sharding import WeightFiles, load_weights
from training.run import TrainingRun

CPU = torch.device("cpu")
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, and random checkpoints, whose embedding and head are one tensor, and are not, in float32 and bfloat16."""
    folder = tmp_path_factory.mktemp("offload")
    make_place(folder)
    for name, policy in tied_and_untied():
        save_policy(policy, folder / name)
        save_policy(policy.bfloat16(), folder / f"{name}-bfloat16")
    return folder


def config_of(place, model="tied", **more):
    settings = dict(batch_size=2, mini_batch_size=2, max_tokens_per_pass=900, kl_weight=0.1, entropy_weight=0.1, offload=True)
    return rl.Config(**settings | dict(model=str(place / model)) | more)


class Updated:
    """Weights after some updates with AdamW, the first one's gradients, which were clipped, and masters before."""

    def __init__(self, config, place, steps=3, device=CPU):
        self.weights = weights = load_weights(config.model, config, device, with_reference=True)
        weights.policy.train()
        self.optimizer = torch.optim.AdamW(weights.parameters, lr=1e-3, eps=1e-3, weight_decay=0.0, fused=True)
        weights.adopt(self.optimizer)
        self.before = {name: p.detach().clone() for name, p in weights.masters.items()}
        self.gradients, self.stepped_together, self.buffers = {}, [], []
        self.optimizer.register_step_pre_hook(self.look)
        groups = make_groups(load_policy(config.model, device, weights.policy.dtype), place, 2)
        self.metrics = [rl.update(weights, groups, self.optimizer, config, 0, device) for _ in range(steps)]

    def look(self, *_):
        now = {name: p.grad for name, p in self.weights.masters.items() if p.grad is not None}
        self.stepped_together.append(list(now))
        self.gradients = {name: g.clone() for name, g in now.items()} | self.gradients
        self.buffers += [weakref.ref(g) for g in getattr(self.weights, "gradients", {}).values()]

    def assert_like(self, plain, gradient=1e-5, master=1e-6):
        assert {*self.gradients} == {*plain.gradients} == {*plain.weights.masters} == {*self.weights.masters}
        for name, g in plain.gradients.items():
            assert (self.gradients[name].to(g) - g).norm() <= gradient * g.norm() and g.norm() > 0, name
        for name, p in plain.weights.masters.items():
            assert (self.weights.masters[name].to(p) - p).abs().max() <= master, name
        moved = [(p - plain.before[name]).abs().max() for name, p in plain.weights.masters.items()]
        assert max(moved) > 1e-4 and min(moved) > 1e-5


@pytest.fixture(scope="module")
def plain(place):
    """Updates of plain master weights, each made once."""
    made = {}

    def updated(**settings):
        key = tuple(settings.items())
        if key not in made:
            made[key] = Updated(config_of(place, offload=False, **settings), place)
        return made[key]

    return updated


@pytest.mark.parametrize("max_grad_norm", [0.05, 1e9])
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_updates_are_those_without(place, plain, model, max_grad_norm, tmp_path):
    """Float32. Gradients as they are clipped, masters, metrics; what is exported is what was trained."""
    same = dict(model=model, max_grad_norm=max_grad_norm)
    mine, theirs = Updated(config_of(place, on_host=["reference"], **same), place), plain(**same)
    mine.assert_like(theirs)
    for a, b in zip(mine.metrics, theirs.metrics, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6) and b["kl"] >= 0
    assert theirs.metrics[2]["kl"] > 1e-6  # of the reference
    norm = torch.nn.utils.get_total_norm(mine.gradients.values())
    assert mine.metrics[0]["grad_norm"] > 0.1 and (max_grad_norm > 1 or norm == pytest.approx(max_grad_norm, rel=1e-3))
    mine.weights.save(tmp_path)
    exported = dict(load_policy(tmp_path).named_parameters())
    assert all(torch.equal(exported[name], master) for name, master in mine.weights.masters.items())


def test_in_bfloat16_the_masters_are_those_without_and_what_the_weights_are_cast_from(place, plain):
    same = dict(model="untied-bfloat16", dtype="bfloat16", max_grad_norm=0.05)
    mine = Updated(config_of(place, **same), place)
    mine.assert_like(plain(**same), gradient=1e-5, master=1e-6)
    for name, p in mine.weights.compute.items():
        master = mine.weights.masters[name]
        assert p.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(p, master.bfloat16()) and not torch.equal(master, master.bfloat16().float())


def test_masters_are_what_the_files_say(place):
    """Float32 files, bfloat16 weights: not the rounded values."""
    weights = load_weights(place / "tied", config_of(place, dtype="bfloat16"), CPU)
    files = WeightFiles(place / "tied")
    for name, master in weights.masters.items():
        assert torch.equal(master, files.read(name.removeprefix("hf."))), name
        assert torch.equal(weights.compute[name], master.bfloat16())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_take_memory_only_within_an_update(place, dtype):
    done = Updated(config_of(place, dtype=dtype, gradient_checkpointing=False), place, steps=1)
    weights = done.weights
    assert len(done.buffers) >= len(weights.masters) and not weights.gradients
    assert not [ref for ref in done.buffers if ref() is not None]
    assert all(p.grad is None for p in (*weights.policy.parameters(), *weights.parameters))
    # and in the step one group's stand on the host
    layers = len(weights.policy.language_model.layers)
    assert len(done.stepped_together) == layers + 2  # the embedding, which is the head, and the last norm
    assert sorted(sum(done.stepped_together, [])) == sorted(weights.masters)


def test_masters_and_moments_take_twelve_bytes_a_parameter(place):
    done = Updated(config_of(place, dtype="bfloat16"), place, steps=1)
    weights, state = done.weights, done.optimizer.state
    trained = sum(p.numel() for p in weights.compute.values())
    assert 12 * trained <= weights.held_bytes <= 1.05 * 12 * trained
    held = [p for master in weights.parameters for p in (master, state[master]["exp_avg"], state[master]["exp_avg_sq"])]
    assert {p.dtype for p in held} == {torch.float32} and all(p.any() for p in held)
    assert {p.untyped_storage().data_ptr() for p in held} == {slab.data_ptr() for slab in weights.slabs}
    assert len({p.data_ptr() for p in held}) == 3 * len(weights.masters)


def log_probs(policy, dialogues):
    with torch.no_grad():
        return token_log_probs(policy, dialogues)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_reference_on_the_host_says_the_same_to_the_bit(place, layers, dtype):
    """Pass after pass, whatever the policy has become; its layers take the room of two, its vision tower none."""
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
    assert on_host.visual is on_device.visual is policy.visual
    places = {p.untyped_storage().data_ptr() for p in on_host.language_model.layers.parameters()}
    assert len(places) == min(2, layers)


def test_a_gradient_that_is_not_finite_changes_nothing(place, capsys):
    done = Updated(config_of(place, dtype="bfloat16"), place, steps=1)
    weights, state = done.weights, done.optimizer.state
    look = lambda: [x.detach().clone() for x in (*weights.parameters, *weights.compute.values(),
                                                 *(x for p in weights.parameters for x in state[p].values()))]
    before = look()
    for number in range(3):
        parts = [p.float().sum() for p in weights.compute.values()]
        parts[number] = parts[number] * float("nan")
        sum(parts).backward()
        assert len(weights.gradients) == len(weights.masters)
        if number < 2:
            assert not weights.step(done.optimizer, 1.0, 3, ["q7"]) < 1e9
        else:
            with pytest.raises(UserError, match="q7; 3 such steps in a row"):
                weights.step(done.optimizer, 1.0, 3, ["q7"])
        assert all(map(torch.equal, before, look()))
        assert (number == 2) == bool(weights.gradients)  # the run has ended
    weights.free_gradients(done.optimizer)
    assert capsys.readouterr().err.count("this step is left out") == 2
    sum(p.float().sum() for p in weights.compute.values()).backward()
    assert weights.step(done.optimizer, 1.0) > 0 and not any(map(torch.equal, before, map(torch.detach, weights.parameters)))


def test_a_tensor_without_a_gradient_stays(place):
    done = Updated(config_of(place), place, steps=1)
    weights, before = done.weights, {name: p.detach().clone() for name, p in done.weights.masters.items()}
    only = [name for name in before if "layers.1." in name]
    sum(weights.compute[name].sum() for name in only).backward()
    weights.step(done.optimizer, 1.0)
    assert [name for name, p in weights.masters.items() if not torch.equal(p, before[name])] == only
    assert {int(done.optimizer.state[p]["step"]) for n, p in weights.masters.items() if n not in only} == {1}


class LateCopies:
    """Copies that are made as late as they may be: when somebody waits for them, or for one that was begun later. (Others
    are made at once; what is right with both is right whenever a GPU makes them.)"""

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
    same = dict(model="untied", max_grad_norm=0.05)
    mine = Updated(config_of(place, on_host=["reference"], **same), place)
    mine.assert_like(plain(**same))
    assert mine.weights.copies.made == len(mine.weights.copies.begun) > 3 * 2 * 4
    assert all(torch.equal(mine.weights.compute[name], master) for name, master in mine.weights.masters.items())
    assert [m["kl"] for m in mine.metrics] == pytest.approx([m["kl"] for m in plain(**same).metrics], rel=1e-4, abs=1e-7)


# ----------------------------------------------------------------------------------------------------- runs
def killed(place, out, script, after_lines, *more):
    runs = start(place, out, script, "none", 1, *more)
    wait_for(runs, lambda: len(lines(out)) >= after_lines and run_folders(out))
    time.sleep(random.random() / 5)
    runs.kill()
    return len(lines(out))


def test_a_killed_run_goes_on_as_if_nothing_had_been(place, tmp_path):
    """Metrics and exported weights to the bit."""
    more = ["--offload", "--on_host", "reference", "--kl_weight", 0.1, "--dtype", "bfloat16"]
    start(place, tmp_path / "whole", "rl.py", "none", 1, *more).wait()
    killed(place, tmp_path / "killed", "rl.py", 2, *more)
    assert "goes on after step" in start(place, tmp_path / "killed", "rl.py", "none", 1, *more).wait()
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    mine, theirs = (load_policy(tmp_path / name).state_dict() for name in ("killed", "whole"))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_sft_goes_the_same_way_with_it(place, tmp_path):
    for name, more in (("mine", ["--offload"]), ("theirs", [])):
        start(place, tmp_path / name, "sft.py", "none", 1, "--epochs", 1, *more).wait()
    mine, theirs = metrics(tmp_path / "mine"), metrics(tmp_path / "theirs")
    assert len(mine) == len(theirs) == 3 and mine[0]["loss"] - mine[2]["loss"] > 0.1
    for a, b in zip(mine, theirs):
        assert a == pytest.approx(b, rel=1e-4)


def state_of(run, place, **settings):
    """What a run that goes on has before its first step: {name: master, moments}, counts of steps."""
    saved = json.loads((run / "run.json").read_text())["settings"]
    known = {f: saved[f] for f in saved if f in rl.Config.__dataclass_fields__}
    config = rl.Config(**known | dict(out=str(run), data=f"{place}/train.jsonl", model=f"{place}/model", device="cpu") | settings)
    training = TrainingRun("rl", config, {"model": config.model, "questions": config.data}, 0, 1, CPU)
    weights = load_weights(config.model, config, CPU)
    optimizer = torch.optim.AdamW(weights.parameters, lr=1.0, fused=True)
    training.start(weights, optimizer, 5, {"step": 0}, torch.Generator())
    return weights, {name: list(optimizer.state[p].values()) + [p.detach()] for name, p in weights.masters.items()}


def test_a_run_goes_on_with_and_without(place, tmp_path):
    """Masters, moments and counts are bit-equal either way; with it they are read into the slabs."""
    out = tmp_path / "run"
    killed(place, out, "rl.py", 2, "--offload")
    offloaded, mine = state_of(out, place, offload=True)
    plain, theirs = state_of(out, place, offload=False)
    assert type(offloaded) is OffloadedWeights and type(plain) is MasterWeights and {*mine} == {*theirs}
    for name, tensors in theirs.items():
        assert len(tensors) == 4 and all(map(torch.equal, tensors, mine[name])) and tensors[0] > 0, name
        assert torch.equal(offloaded.compute[name], plain.compute[name])
        assert [x.untyped_storage().data_ptr() for x in mine[name][1:]] == \
            [offloaded.slabs[number].data_ptr() for number in (1, 2, 0)]
    for more in ([], ["--offload"]):  # without it for a while, then with it to the end
        there = len(lines(out))
        runs = start(place, out, "rl.py", "none", 1, *more)
        if not more:
            wait_for(runs, lambda: len(lines(out)) > there)
            runs.kill()
    runs.wait()
    assert [m["step"] for m in metrics(out)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("settings, world, words", [
    (dict(offload=True), 2, "--shard all"), (dict(offload=True, shard="all"), 1, "--shard all"),
    (dict(offload=True, shard="node"), 8, "--shard all"), (dict(offload=True, lora_rank=4), 1, "--offload .* --lora_rank"),
    (dict(lora_rank=4, shard="all"), 2, "--lora_rank goes without --shard"), (dict(on_host=["reference"]), 1, "--offload"),
    (dict(on_host=["frames", "features"]), 1, "--on_host must be some of reference features, not frames")])
def test_what_does_not_go_together_is_one_line_before_anything_is_written(tmp_path, settings, world, words):
    with pytest.raises(UserError, match=words):
        TrainingRun("rl", rl.Config(out=str(tmp_path / "out"), **settings), {}, 0, world, CPU)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ a GPU
@ON_GPU
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_copies_beside_other_work_change_nothing(place, dtype):
    device = torch.device("cuda", 0)
    same = dict(model="untied-bfloat16", dtype=dtype, max_grad_norm=0.05)
    theirs = Updated(config_of(place, offload=False, **same), place, device=device)
    mine = Updated(config_of(place, on_host=["reference"], **same), place, device=device)
    tolerance = dict(gradient=1e-3, master=1e-5) if dtype == "float32" else dict(gradient=0.05, master=1e-3)
    mine.assert_like(theirs, **tolerance)  # the GPU adds up in no fixed order
    weights = mine.weights
    assert all(slab.is_pinned() and slab.device == CPU for slab in (*weights.slabs, *weights.staging))
    assert {p.device.type for p in weights.policy.parameters()} == {"cuda"}
    for name, p in weights.compute.items():
        assert torch.equal(p.cpu(), weights.masters[name].detach().to(p.dtype))
    assert not weights.gradients and not [ref for ref in mine.buffers if ref() is not None]
    weights.policy.eval()
    dialogues = [[e.dialogue for e in group] for group in make_groups(weights.policy, place, 2)]
    copied = weights.policy.frozen_copy()
    streamed = reference_of(weights.policy, on_host=True)
    for _ in range(20):
        assert torch.equal(log_probs(streamed, dialogues), log_probs(copied, dialogues))


@ON_GPU
def test_loading_holds_nothing_of_float32_on_the_gpu(place):
    torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    config = config_of(place, dtype="bfloat16", on_host=["reference"])
    weights = load_weights(config.model, config, torch.device("cuda", 0), with_reference=True)
    compute = sum(p.nbytes for p in weights.policy.parameters())
    assert torch.cuda.max_memory_allocated() - before < 2.2 * compute
