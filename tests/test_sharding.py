"""Shards: updates, rollouts, loading and export with FSDP2 are those of one process that has everything."""

import inspect
import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launcher import launch
from safetensors.torch import save_file
from tiny import DEVICE, make_groups, random_policy, shift, tied_and_untied
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

import model as model_module
import rl
from common import UserError, start_processes
from demo.synthetic import synthetic
from model import Dialogue, token_log_probs
from scale.pick import load_weights
from scale.sharding import load_sharded, make_mesh
from training.checkpoints import load_policy, save_policy
from training.environment import run_environment
from training.weights import MasterWeights, rows_of

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, and random checkpoints, whose embedding and head are one tensor, and are not, with a reference
    each."""
    folder = tmp_path_factory.mktemp("place")
    synthetic(folder, 10, 5, seed=3)
    for name, policy in tied_and_untied():
        save_policy(policy, folder / name)
        with torch.no_grad():
            for p in policy.parameters():
                p += 0.02 * p.std() * torch.randn_like(p)
        save_policy(policy, folder / f"{name}-reference")
    return folder


def weights_of(config, device, with_reference=False):
    return load_weights(config.model, config, run_environment(config.model, config), device, with_reference)


def whole(tensor):
    """A copy of a tensor, or of all of a shard's, on the host."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone().cpu()


# ---------------------------------------------------------------------------------------------------- updates
def forked_update():
    """rl.update as a fork may have it: its loop makes one more pass over the policy, forward and backward."""
    source, line = inspect.getsource(rl.update), "            loss.backward()\n"
    assert source.count(line) == 1
    more = "            (-0.3 * token_log_probs(policy, batch)[0].sum() / tokens).backward()\n"
    names = dict(vars(rl))
    exec(source.replace(line, line + more), names)
    return names["update"]


def updates(folder, out, settings):
    """AdamW steps on the same groups. Writes the gradients, the weights before and after, metrics, and the
    exported checkpoint. Settings, a dict as JSON:

    model, shard. steps: by default three. forked: with `forked_update`. dealt: the process that has each
    group, by default in turn.
    max_mismatches: one an update; old log-probabilities are recomputed, an episode of the first group has a
    mismatch of 20, all of the second group, which the second of two processes has alone, one of 10."""
    folder, out, settings = Path(folder), Path(out), json.loads(settings)
    rank, world, device = start_processes(DEVICE.type)
    config = rl.Config(model=str(folder / settings["model"]), batch_size=3, mini_batch_size=3,
                       max_grad_norm=0.1,
                       max_tokens_per_pass=900, kl_weight=0.1, entropy_weight=0.1, shard=settings["shard"],
                       dtype="float32", gradient_checkpointing=True)
    weights = weights_of(config, device)
    other = weights_of(replace(config, model=f"{config.model}-reference"), device, with_reference=True)
    weights.reference = other.reference
    weights.policy.train()
    groups = make_groups(load_policy(config.model, device), folder, 3)
    max_mismatches = settings.get("max_mismatches")
    if max_mismatches:
        shift(groups[0][0], 20)
        for e in groups[1]:
            shift(e, 10)
    dealt = settings.get("dealt", [number % world for number in range(3)])
    groups = [group for group, to in zip(groups, dealt) if to == rank or world == 1]
    update = forked_update() if settings.get("forked") else rl.update
    optimizer = torch.optim.AdamW(weights.parameters, lr=1e-3, eps=1e-3, weight_decay=0.0, fused=True)
    before = {name: whole(p) for name, p in weights.master_weights.items()}
    gradients, metrics = [], []
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append({name: whole(p.grad) for name, p in weights.master_weights.items()}))
    for number in range(settings.get("steps", 3)):
        if max_mismatches:
            config = replace(config, old_log_probs="recomputed", max_mismatch=max_mismatches[number])
        metrics.append(update(weights, groups, optimizer, config, rank, device))
    after = {name: whole(p) for name, p in weights.master_weights.items()}
    weights.save(out / "export")
    if rank == 0:
        torch.save({"gradients": gradients, "before": before, "after": after, "metrics": metrics},
                   out / "result.pt")


def results_of(place, out, processes=1, nodes=1, **settings):
    flags = [place, out, json.dumps(settings)]
    if processes == 1 and settings["shard"] == "none":
        updates(*flags)
    else:
        launch(processes, "test_sharding:updates", flags, nodes).wait(timeout_s=90)
    return torch.load(out / "result.pt")


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
    """What updates come to in one process without shards, each made once."""
    made = {}

    def updated(**settings):
        key = json.dumps(settings)
        if key not in made:
            made[key] = results_of(place, tmp_path_factory.mktemp("alone"), shard="none", **settings)
        return made[key]

    return updated


# with shards a weight begins at another address, for which a GPU may have another kernel, and the gradients
# of the embedding are added up in no fixed order
TOLERANCE = {"gradient": 1e-5, "weight": 1e-6} if DEVICE.type == "cpu" else {"gradient": 1e-4, "weight": 1e-5}


def assert_same_updates(result, expected):
    for name, g in expected["gradients"][0].items():
        off = (result["gradients"][0][name] - g).norm()
        assert off <= TOLERANCE["gradient"] * g.norm() and g.norm() > 0, name
    moved = 0
    for name, after in expected["after"].items():
        assert (result["after"][name] - after).abs().max() <= TOLERANCE["weight"], name
        moved = max(moved, (after - expected["before"][name]).abs().max())
    assert moved > 1e-4
    for mine, theirs in zip(result["metrics"], expected["metrics"], strict=True):
        for key in theirs:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("model, processes, nodes, shard", [
    ("tied", 2, 1, "all"), slow("tied", 1, 1, "all"), slow("untied", 1, 1, "all"),
    slow("untied", 1, 1, "node"), slow("untied", 3, 1, "all"), slow("untied", 4, 2, "node")])
def test_updates_are_those_of_one_process(place, alone, tmp_path, model, processes, nodes, shard):
    """Gradients, weights after three steps, metrics; what is exported is what was trained."""
    result = results_of(place, tmp_path, processes, nodes, model=model, shard=shard)
    assert_same_updates(result, alone(model=model))
    policy = load_policy(tmp_path / "export")
    tied = policy.head.weight is policy.language_model.embed_tokens.weight
    assert tied == (model == "tied")
    for name, p in policy.named_parameters():
        if name in result["after"]:
            assert torch.equal(p, result["after"][name]), name


@pytest.mark.parametrize("processes, dealt", [(2, [0, 0, 0]), slow(2, [1, 1, 0]), slow(1, [0, 0, 0])])
def test_a_fork_adds_a_pass_to_the_loop(place, alone, tmp_path, processes, dealt):
    """Two processes have unequal numbers of batches, one of them perhaps none: nothing hangs, and the updates
    are those of one process, which are others than without the pass."""
    settings = dict(model="tied", forked=True, steps=1)
    result = results_of(place, tmp_path, processes, shard="all", dealt=dealt, **settings)
    expected = alone(**settings)
    assert_same_updates(result, expected)
    plain = alone(model="tied")["gradients"][0]
    assert all((g - plain[name]).norm() > 0.01 * g.norm() for name, g in expected["gradients"][0].items())


@pytest.mark.slow
@pytest.mark.parametrize("shard, processes", [("none", 2), ("all", 2), ("all", 1)])
def test_episodes_left_out_are_those_of_one_process(place, alone, tmp_path, shard, processes):
    """All of them at first, then one, then all that the second process has: nothing hangs, the updates are
    the same."""
    # the policy is farther off after each update
    settings = dict(model="tied", max_mismatches=[0.0, 15.0, 5.0])
    result = results_of(place, tmp_path, processes, shard=shard, **settings)
    expected = alone(**settings)
    assert [m["episodes_left_out"] for m in expected["metrics"]] == [9, 1, 4]
    assert len(expected["gradients"]) == 2
    assert all(m["mismatch_max"] > 5 for m in expected["metrics"])
    assert_same_updates(result, expected)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs a GPU for each process")
def test_two_machines(place, alone, tmp_path):
    """Two torchrun agents that meet at an address, as the README has it; replicas across."""
    script = tmp_path / "run.py"
    script.write_text(f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                      "import common, test_sharding\n"
                      "common.run_main(lambda: test_sharding.updates(*sys.argv[1:]))\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
               "--rdzv_id=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}",
               "--local_addr=127.0.0.1", script, place, tmp_path,
               json.dumps({"model": "tied", "shard": "node"})]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    agents = [subprocess.Popen([*map(str, command)], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env=variables) for _ in range(2)]
    said = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)[-4000:]
    assert_same_updates(torch.load(tmp_path / "result.pt"), alone(model="tied"))


class MorePasses(MasterWeights):
    """MasterWeights of a process that waits for another one, which has more batches."""

    def passes(self, batches):
        yield from batches
        untrained = Dialogue()
        untrained.add([self.policy.im_end])
        yield [[untrained]]
        yield [[untrained]]


def test_a_batch_without_a_trained_token_changes_nothing(place):
    """Its gradients are there, and 0; an update with it is the same to the bit, however the loss is
    averaged. (On a GPU nearly: the gradients of the embedding are added up in no fixed order.)"""
    policy = random_policy(layers=2).train()
    untrained = Dialogue()
    untrained.add([policy.im_end])
    policy.checkpoint_layers()
    log_probs, entropies = token_log_probs(policy, [[untrained]], entropy=True)
    assert log_probs.shape == entropies.shape == (0,)
    (log_probs.sum() + entropies.sum()).backward()
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and not p.grad.any() for p in trained)
    groups = make_groups(policy, place, 1)
    for loss_mean in ("token", "episode"):
        config = rl.Config(batch_size=1, mini_batch_size=1, kl_weight=0.1, entropy_weight=0.1,
                           loss_mean=loss_mean)
        found = []
        for kind in (MasterWeights, MorePasses):
            weights = kind(random_policy(layers=2), random_policy(seed=1, layers=2))
            optimizer = torch.optim.SGD(weights.parameters, lr=1.0)
            metrics = rl.update(weights, groups, optimizer, config, 0, DEVICE)
            found.append((metrics, [p.detach() for p in weights.parameters]))
        (metrics, weights), (metrics_with, weights_with) = found
        if DEVICE.type == "cpu":
            assert metrics_with == metrics and all(map(torch.equal, weights_with, weights)), loss_mean
        else:
            assert metrics_with == pytest.approx(metrics, rel=1e-4, abs=1e-6), loss_mean
            torch.testing.assert_close(weights_with, weights, rtol=1e-4, atol=1e-4)


def random_splits(folder, out, seed, cases):
    """Updates whose groups are dealt to the processes at random, some with none: as they are without
    shards."""
    folder, rng = Path(folder), random.Random(int(seed))
    rank, world, device = start_processes(DEVICE.type)
    for case in range(int(cases)):
        tokens, mini, steps = rng.choice([1, 500, 900, 2000]), rng.choice([1, 2, 3]), rng.choice([1, 2])
        update = rng.choice([rl.update, forked_update()])
        dealt = [rng.randrange(world) for _ in range(3)]
        every = make_groups(load_policy(folder / "tied", device), folder, 3)
        groups = [group for group, to in zip(every, dealt) if to == rank]
        results = []
        for shard in ("all", "none"):
            config = rl.Config(model=str(folder / "tied"), batch_size=3, mini_batch_size=mini, kl_weight=0.1,
                               max_tokens_per_pass=tokens, shard=shard, gradient_checkpointing=False,
                               dtype="float32")
            weights = weights_of(config, device, with_reference=True)
            weights.policy.train()
            optimizer = torch.optim.AdamW(weights.parameters, lr=1e-3, eps=1e-3, fused=True)
            for _ in range(steps):
                metrics = update(weights, groups, optimizer, config, rank, device)
            results.append(metrics)
        assert results[0] == pytest.approx(results[1], rel=1e-4, abs=1e-5), (case, results)
    Path(out, f"{rank}.done").touch()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 1])
def test_unequal_numbers_of_passes_do_not_hang(place, tmp_path, processes, times):
    runs = launch(processes, "test_sharding:random_splits", [place, tmp_path, 0, 5 * times])
    runs.wait(timeout_s=300 * times)
    assert len(list(tmp_path.glob("*.done"))) == processes


# --------------------------------------------------------------------------------------------------- rollouts
def rollouts(folder, shard, out):
    """What is said at temperature 0, question by question, by the processes that have them; after one
    update."""
    folder = Path(folder)
    rank, world, device = start_processes(DEVICE.type)
    config = rl.Config(model=str(folder / "untied"), batch_size=3, mini_batch_size=3, shard=shard,
                       cache_gb=1.0, max_turn_tokens=12, max_response_tokens=200, temperature=0.0,
                       gradient_checkpointing=False, dtype="float32", compile=False)
    weights = weights_of(config, device)
    rows, said = [json.loads(line) for line in open(folder / "train.jsonl")], []
    groups = make_groups(load_policy(config.model, device), folder, 3)[rank::world]
    optimizer = torch.optim.AdamW(weights.parameters, lr=1e-3, eps=1e-3, fused=True)
    to_train = replace(config, temperature=1.0)
    for _ in range(2):
        weights.policy.eval()
        engine = rl.Engine(weights.player, 2, config)
        with weights.gathered(), profile(activities=[ProfilerActivity.CPU]) as seen:
            played, _ = engine.play(rows[rank:4:world], folder)
        assert not [e.key for e in seen.key_averages() if e.key.startswith("c10d::")]
        assert shard == "none" or all(p.untyped_storage().nbytes() == 0 for p in weights.whole)  # released
        said.append({group[0].env.question["id"]: [e.dialogue.ids for e in group] for group in played})
        weights.policy.train()
        rl.update(weights, groups, optimizer, to_train, rank, device)
    torch.save(said, Path(out) / f"{shard}{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 1])
def test_rollouts_are_those_of_one_process(place, tmp_path, processes):
    """At temperature 0, token for token, before and after an update, without a collective."""
    launch(processes, "test_sharding:rollouts", [place, "all", tmp_path]).wait()
    rollouts(place, "none", tmp_path)
    alone = torch.load(tmp_path / "none0.pt")
    parts = [torch.load(tmp_path / f"all{rank}.pt") for rank in range(processes)]
    for number, expected in enumerate(alone):
        assert len(expected) == 4
        assert {question: ids for part in parts for question, ids in part[number].items()} == expected
    assert alone[0] != alone[1]


# ------------------------------------------------------------------------------------- memory and collectives
class CountBytes(TorchDispatchMode):
    """The most bytes of storages that operations made and that were alive together."""

    def __init__(self):
        super().__init__()
        self.peak, self.storages = 0, {}  # place: (reference, bytes)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {place: found for place, found in self.storages.items() if not found[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


def held(folder, out):
    """What a process of several holds: while a policy is loaded in shards, afterwards, and in an optimizer
    step; and the collectives of a pass with 1 and with 8 chunks of the head."""
    rank, world, device = start_processes(DEVICE.type)
    config = rl.Config(model=f"{folder}/untied", shard="all", dtype="bfloat16", gradient_checkpointing=False)
    env_config, mesh, counted = run_environment(config.model, config), make_mesh("all", device), CountBytes()
    with counted:
        policy = load_sharded(config.model, device, torch.bfloat16, env_config, mesh, True, config)
    kept = sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in policy.parameters())
    plain = load_policy(config.model, device)
    found = {"peak": counted.peak, "kept": kept + 2 * sum(buffer.nbytes for buffer in policy.buffers()),
             "largest": max(p.numel() for p in policy.parameters()) * 4,
             "same buffers": all(map(torch.equal, policy.buffers(), plain.buffers())),
             "shares": [p.to_local().numel() / p.numel() for p in policy.parameters() if p.requires_grad]}
    # a step
    weights = weights_of(config, device, with_reference=True)
    found["reference"] = {p.dtype for p in weights.reference.parameters()}
    optimizer = torch.optim.AdamW(weights.parameters, lr=1e-3, fused=True)
    dialogue = make_groups(plain, Path(folder), 1)[0][0].dialogue
    gradients = []
    optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.to_local() for p in weights.parameters))
    for batch in weights.passes([[[dialogue]]] * (rank if world > 1 else 1)):
        token_log_probs(weights.policy, batch)[0].sum().backward()
    weights.step(optimizer, 1.0)
    states = [x for state in optimizer.state.values() for what, x in state.items() if what != "step"]
    parts = [*gradients, *(x.to_local() for x in (*weights.parameters, *states))]
    found |= {"dtypes": {x.dtype for x in parts}, "bytes": sum(x.nbytes for x in parts),
              "parameters": sum(p.numel() for p in weights.parameters), "collectives": []}
    # passes
    for chunks in (1, 8):
        model_module.LOGIT_CHUNK = -(-sum(dialogue.trained) // chunks)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            token_log_probs(weights.policy, [[dialogue]])[0].sum().backward()
        counts = {e.key: e.count for e in seen.key_averages() if e.key.startswith("c10d::")}
        found["collectives"].append(counts)
    torch.save(found, Path(out) / f"{rank}.pt")


@pytest.mark.parametrize("processes", [2, slow(3), slow(1)])
def test_what_a_process_holds_and_sends(place, tmp_path, processes):
    launch(processes, "test_sharding:held", [place, tmp_path]).wait()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(processes)]
    for one in found:
        # loading needs what is kept, of which FSDP fills up unequal parts, and one tensor more
        assert one["kept"] * 0.9 < one["peak"] <= 1.01 * one["kept"] + one["largest"], one
        assert one["same buffers"]
        assert one["reference"] == {torch.bfloat16} and one["dtypes"] == {torch.float32}
        assert all(share < 1.04 / processes for share in one["shares"])
        # 16 bytes a parameter, over the processes
        assert one["bytes"] <= 1.02 * 16 * one["parameters"] / processes
        # two layers and the root are gathered once a pass, the layers once more backward, and reduced each,
        # however many chunks the head takes; one process has all of them
        for counts in one["collectives"]:
            gathered = sum(n for op, n in counts.items() if "gather" in op)
            reduced = sum(n for op, n in counts.items() if "reduce_scatter" in op)
            assert gathered <= 2 * 2 + 1 and reduced == (2 + 1 if processes > 1 else 0), counts
            assert gathered + reduced == sum(counts.values()), counts
    assert sum(one["bytes"] for one in found) == 16 * found[0]["parameters"]


def test_a_rank_keeps_sixteen_bytes_a_parameter_over_the_ranks():
    """Master weights, gradients, two moments of 3B's shapes, on the meta device: at most 1.02 x 16 / N."""
    config = AutoConfig.from_pretrained(ROOT / "tests/configs/qwen2.5-vl-3b")
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config).model.language_model
    shapes = [p.shape for p in model.parameters()]
    total = sum(shape.numel() for shape in shapes)
    assert 3.0e9 < total < 3.5e9
    for processes in (8, 16):
        for rank in range(processes):
            parts = [rows_of(shape[0], rank, processes) for shape in shapes]
            held = sum((stop - start) * shape[1:].numel() for (start, stop), shape in zip(parts, shapes))
            assert held <= 1.02 * total / processes


def gradients_in_bfloat16(folder, shard, chunks, out):
    """Float32 gradients of one pass of each process, computed in bfloat16 or float32, with so many head
    chunks."""
    rank, world, device = start_processes(DEVICE.type)
    groups = make_groups(load_policy(f"{folder}/untied", device), Path(folder), 2)
    dialogues = [e.dialogue for group in groups for e in group]
    positions = sum(sum(d.trained) for d in dialogues[rank::world])
    found = {}
    for dtype in ("bfloat16", "float32"):
        config = rl.Config(model=f"{folder}/untied", shard=shard, dtype=dtype, gradient_checkpointing=False)
        weights = weights_of(config, device)
        model_module.LOGIT_CHUNK = -(-positions // int(chunks))
        log_probs, _ = token_log_probs(weights.policy, [[d] for d in dialogues[rank::world]])
        log_probs.sum().backward()
        weights.sum_gradients()
        found[dtype] = {name: whole(p.grad) for name, p in weights.master_weights.items()}
    if rank == 0:
        torch.save(found, Path(out) / f"{shard}{chunks}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 1])
def test_gradients_in_bfloat16_are_the_same_with_shards_and_for_any_chunks(place, tmp_path, processes):
    """Shards: 1e-5. 64 chunks of the head are at most 1.5 times as far from float32 as one is."""
    for shard, chunks in (("none", 1), ("none", 64), ("all", 64)):
        launch(processes, "test_sharding:gradients_in_bfloat16", [place, shard, chunks, tmp_path]).wait()
    one, many, sharded = (torch.load(tmp_path / f"{name}.pt") for name in ("none1", "none64", "all64"))
    for name, g in many["bfloat16"].items():
        assert (sharded["bfloat16"][name] - g).norm() <= 1e-5 * g.norm(), name
    head = next(name for name in many["float32"] if name.endswith("lm_head.weight"))
    off = [(found["bfloat16"][head] - found["float32"][head]).norm() / found["float32"][head].norm()
           for found in (one, many)]
    assert 0 < off[1] <= 1.5 * off[0]


def wrong_files(folder):
    """Weights that are missing, not finite, of another shape, or in no safetensors files."""
    policy, folder = random_policy(layers=1), Path(folder)
    name = "model.language_model.norm.weight"
    tensors = {key: tensor.clone() for key, tensor in policy.hf.state_dict().items()}
    del tensors["lm_head.weight"]  # which is the embedding
    without = {key: tensor for key, tensor in tensors.items() if key != name}
    cases = {"lacks the weights": without,
             "not finite": without | {name: torch.full_like(tensors[name], torch.nan)},
             "does not have the shape": without | {name: torch.ones(1)}, "no safetensors files": None}
    save_policy(policy, folder)
    for file in folder.glob("model*"):
        file.unlink()
    for words, case in cases.items():
        if case is None:
            (folder / "model.safetensors").unlink()
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            save_file(case, folder / "model.safetensors")
        with pytest.raises(UserError, match=words):
            weights_of(rl.Config(model=str(folder), shard="all"), DEVICE)


@pytest.mark.slow
def test_what_is_wrong_with_files_is_one_line(tmp_path):
    launch(1, "test_sharding:wrong_files", [tmp_path]).wait()
