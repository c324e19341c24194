"""Shards: an update, rollouts, loading and export with FSDP2 are those of one process that has everything."""

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
from test_rl import make_groups, shift
from tiny import tied_and_untied
from torch.multiprocessing.reductions import StorageWeakRef
from torch.distributed.tensor import DTensor
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

import model as model_module
import rl
from common import start_processes
from demo.synthetic import synthetic
from model import token_log_probs
from training.checkpoints import load_policy
from training.checkpoints import save_policy
from training.weights import rows_of
from scale.sharding import load_sharded, load_weights, make_mesh

ROOT = Path(__file__).resolve().parent.parent
MAX_GAPS = 0.0, 15.0, 5.0  # of three updates, after each of which the policy is farther off


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    make_place(folder)
    return folder


def make_place(folder):
    """Data, and two random checkpoints, whose embedding and head are one tensor, and are not."""
    synthetic(folder, 10, 5, seed=3)
    for name, policy in tied_and_untied():
        save_policy(policy, folder / name)
        with torch.no_grad():
            for p in policy.parameters():
                p += 0.02 * p.std() * torch.randn_like(p)
        save_policy(policy, folder / f"{name}-reference")


def three_updates(folder, model, shard, dtype, out, *max_gaps):
    """Three AdamW steps on the same groups, in passes of unequal number. Writes the first gradient, the weights
    before and after, metrics, and the exported checkpoint. With `max_gaps`, one an update, the old log-probabilities are
    recomputed; an episode of the first group has a gap of 20, all of the second one, which the second of two processes has
    alone, of 10."""
    folder, out = Path(folder), Path(out)
    rank, world, device = start_processes("cpu")
    config = rl.Config(model=str(folder / model), batch_size=3, mini_batch_size=3, max_tokens_per_pass=900, max_grad_norm=0.1,
                       kl_weight=0.1, entropy_weight=0.1, shard=shard, dtype=dtype, gradient_checkpointing=True)
    weights = load_weights(config.model, config, device, with_reference=True)
    other = load_weights(str(folder / f"{model}-reference"), config, device, with_reference=True)
    weights.reference = other.reference
    weights.policy.train()
    plain = load_policy(config.model, dtype=weights.policy.dtype)
    groups = make_groups(plain, folder, 3)
    for e, offset in [(groups[0][0], 20), *((e, 10) for e in groups[1])] if max_gaps else []:
        shift(e, offset)
    groups = groups[rank::world]
    whole = lambda tensor: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
    optimizer = torch.optim.AdamW(weights.parameters, lr=1e-3, eps=1e-3, weight_decay=0.0, fused=True)
    gradients, before, metrics = [], {name: whole(p) for name, p in weights.masters.items()}, []
    optimizer.register_step_pre_hook(lambda *_: gradients.append({n: whole(p.grad) for n, p in weights.masters.items()}))
    for number in range(3):
        if max_gaps:
            config = replace(config, old_log_probs="recomputed", max_gap=float(max_gaps[number]))
        metrics.append(rl.update(weights, groups, optimizer, config, rank, device))
    after = {name: whole(p) for name, p in weights.masters.items()}
    weights.save(out / "export")
    if rank == 0:
        torch.save({"gradients": gradients, "before": before, "after": after, "metrics": metrics}, out / "result.pt")


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
    """What three updates come to in one process without shards: {model: result}."""
    results = {}
    for model in ("tied", "untied"):
        out = tmp_path_factory.mktemp("alone")
        launch(1, "test_sharding:three_updates", [place, model, "none", "float32", out]).wait()
        results[model] = torch.load(out / "result.pt")
    return results


def assert_same_updates(result, expected, gradient=1e-5, weights=1e-6):
    for name, g in expected["gradients"][0].items():
        assert (result["gradients"][0][name] - g).norm() <= gradient * g.norm() and g.norm() > 0, name
    moved = 0
    for name, after in expected["after"].items():
        assert (result["after"][name] - after).abs().max() <= weights, name
        moved = max(moved, (after - expected["before"][name]).abs().max())
    assert moved > 1e-4
    for mine, theirs in zip(result["metrics"], expected["metrics"], strict=True):
        for key in theirs:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("processes, nodes, shard", [(1, 1, "all"), (2, 1, "all"), (3, 1, "all"), (4, 2, "node"), (2, 1, "none")])
def test_updates_are_those_of_one_process(place, alone, tmp_path, model, processes, nodes, shard):
    """Float32. Gradients, weights after three steps, metrics; what is exported is what was trained."""
    launch(processes, "test_sharding:three_updates", [place, model, shard, "float32", tmp_path], nodes=nodes).wait()
    result = torch.load(tmp_path / "result.pt")
    assert_same_updates(result, alone[model])
    policy = load_policy(tmp_path / "export")
    tied = policy.head.weight is policy.language_model.embed_tokens.weight
    assert tied == (model == "tied")
    for name, p in policy.named_parameters():
        if name in result["after"]:
            assert torch.equal(p, result["after"][name]), name


def test_two_machines(place, alone, tmp_path):
    """Two torchrun agents that meet at an address, as the README has it; shards within each, replicas across."""
    script = tmp_path / "run.py"
    script.write_text(f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                      "import common, test_sharding\n"
                      "common.run_main(lambda: test_sharding.three_updates(*sys.argv[1:]))\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d",
               f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=1", "--local_addr=127.0.0.1", script, place, "tied", "node",
               "float32", tmp_path]
    agents = [subprocess.Popen([*map(str, command)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in range(2)]
    said = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)[-4000:]
    assert_same_updates(torch.load(tmp_path / "result.pt"), alone["tied"])


def random_splits(folder, out, seed, cases):
    """Updates whose groups are dealt to the processes at random, some with none: as one process makes them."""
    folder, rng = Path(folder), random.Random(int(seed))
    rank, world, device = start_processes("cpu")
    for case in range(int(cases)):
        tokens, mini, steps = rng.choice([1, 500, 900, 2000]), rng.choice([1, 2, 3]), rng.choice([1, 2])
        groups = None
        results = []
        for shard in ("all", "none"):
            config = rl.Config(model=str(folder / "tied"), batch_size=3, mini_batch_size=mini, max_tokens_per_pass=tokens,
                               kl_weight=0.1, shard=shard, gradient_checkpointing=False)
            weights = load_weights(config.model, config, device, with_reference=True)
            weights.policy.train()
            if groups is None:
                dealt = [rng.randrange(world) for _ in range(3)] if case else [0] * 3  # all groups on one process
                every = make_groups(load_policy(config.model), folder, 3)
                groups = [group for group, to in zip(every, dealt) if to == rank]
            optimizer = torch.optim.AdamW(weights.parameters, lr=1e-3, eps=1e-3, fused=True)
            for _ in range(steps):
                metrics = rl.update(weights, groups, optimizer, config, rank, device)
            results.append(metrics)
        assert results[0] == pytest.approx(results[1], rel=1e-4, abs=1e-5), (case, results)
    Path(out, f"{rank}.done").touch()


def test_unequal_numbers_of_passes_do_not_hang(place, tmp_path):
    launch(2, "test_sharding:random_splits", [place, tmp_path, 0, 5]).wait()
    assert len(list(tmp_path.glob("*.done"))) == 2


def rollouts(folder, shard, out):
    """What is said at temperature 0, question by question, by the processes that have them; after one update."""
    folder = Path(folder)
    rank, world, device = start_processes("cpu")
    config = rl.Config(model=str(folder / "untied"), batch_size=3, mini_batch_size=3, shard=shard, max_turn_tokens=12,
                       temperature=0.0, gradient_checkpointing=False)
    weights = load_weights(config.model, config, device)
    rows, said = [json.loads(line) for line in open(folder / "train.jsonl")], []
    groups = make_groups(load_policy(config.model), folder, 3)[rank::world]
    optimizer = torch.optim.AdamW(weights.parameters, lr=1e-3, eps=1e-3, fused=True)
    to_train = replace(config, temperature=1.0)
    for _ in range(2):
        weights.policy.eval()
        engine = rl.Engine(weights.player, 2, config)
        calls, gather = [], torch.distributed.all_gather_into_tensor
        with weights.gathered():
            torch.distributed.all_gather_into_tensor = lambda *a, **k: calls.append(1) or gather(*a, **k)
            played, _ = engine.play(rows[rank:6:world], folder)
            torch.distributed.all_gather_into_tensor = gather
        assert not calls
        assert shard == "none" or all(p.untyped_storage().nbytes() == 0 for p in weights.whole)  # released
        said.append({group[0].env.question["id"]: [e.dialogue.ids for e in group] for group in played})
        weights.policy.train()
        rl.update(weights, groups, optimizer, to_train, rank, device)
    torch.save(said, Path(out) / f"{shard}{rank}.pt")


def test_rollouts_are_those_of_one_process(place, tmp_path):
    """At temperature 0, token for token, before and after an update, without a collective."""
    launch(1, "test_sharding:rollouts", [place, "none", tmp_path]).wait()
    launch(2, "test_sharding:rollouts", [place, "all", tmp_path]).wait()
    alone, parts = torch.load(tmp_path / "none0.pt"), [torch.load(tmp_path / f"all{rank}.pt") for rank in range(2)]
    for number, expected in enumerate(alone):
        assert parts[0][number] | parts[1][number] == expected and len(expected) == 6
    assert alone[0] != alone[1]


def collectives(folder, out):
    """How often anything is gathered, and gradients are cut into shards, in one pass with 1 and 8 chunks of the head."""
    rank, world, device = start_processes("cpu")
    counts = {}
    for model in ("tied", "untied"):
        config = rl.Config(model=f"{folder}/{model}", shard="all", gradient_checkpointing=False)
        weights = load_weights(config.model, config, device)
        dialogue = make_groups(load_policy(config.model), Path(folder), 1)[0][0].dialogue
        for chunks in (1, 8):
            model_module.LOGIT_CHUNK = -(-sum(dialogue.trained) // chunks)
            with profile() as seen:
                token_log_probs(weights.policy, [[dialogue]])[0].sum().backward()
            counts[model, chunks] = {e.key: e.count for e in seen.key_averages() if e.key.startswith("c10d::")}
    torch.save(counts, Path(out) / f"{rank}.pt")


def test_the_head_is_gathered_once_a_pass(place, tmp_path):
    """However many chunks it takes. Layers, two here, forward and backward; one reduce-scatter a layer and the root."""
    launch(2, "test_sharding:collectives", [place, tmp_path]).wait()
    for counts in torch.load(tmp_path / "0.pt").values():
        gathered = sum(n for op, n in counts.items() if "gather" in op)
        reduced = sum(n for op, n in counts.items() if "reduce_scatter" in op)
        assert gathered <= 2 * 2 + 1 and reduced == 2 + 1 and gathered + reduced == sum(counts.values()), counts


def loading(folder, out):
    """The most bytes of tensors that there are while a policy is loaded in shards, and what is kept."""
    rank, world, device = start_processes("cpu")
    config = rl.Config(model=f"{folder}/untied", shard="all", dtype="bfloat16")
    counted = CountBytes()
    mesh = make_mesh("all", device)
    with counted:
        policy = load_sharded(config.model, device, torch.bfloat16, mesh, True, config)
    kept = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in policy.parameters())
    kept += 2 * sum(buffer.nbytes for buffer in policy.buffers())
    largest = max(p.numel() for p in policy.parameters()) * 4
    reference = load_sharded(config.model, device, torch.bfloat16, mesh, False, config)
    plain = load_policy(config.model)
    same = all(torch.equal(a, b) for a, b in zip(policy.buffers(), plain.buffers(), strict=True))
    torch.save({"peak": counted.peak, "kept": kept, "largest": largest, "same_buffers": same,
                "dtypes": {str(p.dtype) for p in reference.parameters()},
                "shares": {name: p.to_local().numel() / p.numel() for name, p in policy.named_parameters() if p.requires_grad}},
               Path(out) / f"{rank}.pt")


class CountBytes(TorchDispatchMode):
    """Bytes of the storages that operations make and that are still alive."""

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


def test_loading_needs_a_shard_and_one_tensor_more(place, tmp_path):
    launch(2, "test_sharding:loading", [place, tmp_path]).wait()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["kept"] * 0.9 < found["peak"] <= found["kept"] + found["largest"] + 256, found  # and some scalars
        assert found["same_buffers"] and found["dtypes"] == {"torch.bfloat16"}
        assert all(share < 0.52 for share in found["shares"].values())


@pytest.mark.parametrize("processes", [8, 16])
def test_a_rank_keeps_sixteen_bytes_a_parameter_over_the_ranks(processes):
    """Masters, gradients, two moments of 3B's shapes, counted on the meta device: at most 1.02 x 16 / N."""
    config = AutoConfig.for_model("qwen2_5_vl")
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size = 2048, 11008, 36, 151_936
    text.num_attention_heads, text.num_key_value_heads = 16, 2
    text.layer_types = ["full_attention"] * 36
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config).model.language_model
    numbers = [p.shape for p in model.parameters()]
    total = sum(shape.numel() for shape in numbers)
    most = 0
    for rank in range(processes):
        rows = [(stop - start) * shape[1:].numel() for shape in numbers for start, stop in [rows_of(shape[0], rank, processes)]]
        most = max(most, sum(rows) * 16)
    assert 3.0e9 < total < 3.5e9 and most <= 1.02 * 16 * total / processes


def bytes_of_a_rank(folder, out):
    """Float32 bytes that a process holds after a step, and the trained parameters of the model."""
    rank, world, device = start_processes("cpu")
    config = rl.Config(model=f"{folder}/untied", shard="all", dtype="bfloat16", max_grad_norm=1.0, gradient_checkpointing=False)
    weights = load_weights(config.model, config, device)
    optimizer = torch.optim.AdamW(weights.parameters, lr=1e-3, fused=True)
    dialogue = make_groups(load_policy(config.model), Path(folder), 1)[0][0].dialogue
    held = {}
    optimizer.register_step_pre_hook(lambda *_: held.update(gradients=sum(p.grad.to_local().nbytes for p in weights.parameters)))
    for batch in weights.passes([[[dialogue]]]):
        token_log_probs(weights.policy, batch)[0].sum().backward()
    weights.step(optimizer, 1.0)
    local = [p.to_local() for p in weights.parameters]
    moments = [x.to_local() for state in optimizer.state.values() for what, x in state.items() if what != "step"]
    assert {x.dtype for x in (*local, *moments)} == {torch.float32}
    torch.save({"bytes": sum(x.nbytes for x in (*local, *moments)) + held["gradients"],
                "parameters": sum(p.numel() for p in weights.parameters)}, Path(out) / f"{rank}.pt")


def test_a_rank_holds_its_share(place, tmp_path):
    launch(3, "test_sharding:bytes_of_a_rank", [place, tmp_path]).wait()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert sum(f["bytes"] for f in found) == 16 * found[0]["parameters"]
    assert max(f["bytes"] for f in found) <= 1.02 * 16 * found[0]["parameters"] / 3


def gradients_in_bfloat16(folder, shard, chunks, out):
    """Float32 gradients of one pass of each process, computed in bfloat16 or float32, with so many head chunks."""
    rank, world, device = start_processes("cpu")
    groups = make_groups(load_policy(f"{folder}/untied"), Path(folder), 2)
    dialogues = [e.dialogue for group in groups for e in group]
    positions = sum(sum(d.trained) for d in dialogues[rank::world])
    found = {}
    for dtype in ("bfloat16", "float32"):
        config = rl.Config(model=f"{folder}/untied", shard=shard, dtype=dtype, gradient_checkpointing=False)
        weights = load_weights(config.model, config, device)
        model_module.LOGIT_CHUNK = -(-positions // int(chunks))
        log_probs, _ = token_log_probs(weights.policy, [[d] for d in dialogues[rank::world]])
        log_probs.sum().backward()
        weights.sum_gradients()
        whole = lambda tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found[dtype] = {name: whole(p.grad).clone() for name, p in weights.masters.items()}
    if rank == 0:
        torch.save(found, Path(out) / f"{shard}{chunks}.pt")


def test_gradients_in_bfloat16_are_the_same_with_shards_and_for_any_chunks(place, tmp_path):
    """Shards: 1e-5. 64 chunks of the head are at most 1.5 times as far from float32 as one is."""
    for shard, chunks in (("none", 1), ("none", 64), ("all", 64)):
        launch(2, "test_sharding:gradients_in_bfloat16", [place, shard, chunks, tmp_path]).wait()
    one, many, sharded = (torch.load(tmp_path / f"{name}.pt") for name in ("none1", "none64", "all64"))
    for name, g in many["bfloat16"].items():
        assert (sharded["bfloat16"][name] - g).norm() <= 1e-5 * g.norm(), name
    head = next(name for name in many["float32"] if name.endswith("lm_head.weight"))
    off = [(found["bfloat16"][head] - found["float32"][head]).norm() / found["float32"][head].norm() for found in (one, many)]
    assert 0 < off[1] <= 1.5 * off[0]


@pytest.fixture(scope="module")
def alone_without_some(place, tmp_path_factory):
    """Updates that leave out all episodes, one, and four of nine."""
    out = tmp_path_factory.mktemp("alone")
    three_updates(place, "tied", "none", "float32", out, *MAX_GAPS)
    result = torch.load(out / "result.pt")
    assert [m["episodes_left_out"] for m in result["metrics"]] == [9, 1, 4] and len(result["gradients"]) == 2
    assert all(m["gap_max"] > 5 for m in result["metrics"])
    return result


@pytest.mark.parametrize("shard", ["none", "all"])
def test_episodes_left_out_are_those_of_one_process(place, alone_without_some, tmp_path, shard):
    """All of them at first, then one, then all that the second process has: nothing hangs, and the updates are the same."""
    launch(2, "test_sharding:three_updates", [place, "tied", shard, "float32", tmp_path, *MAX_GAPS]).wait()
    assert_same_updates(torch.load(tmp_path / "result.pt"), alone_without_some)
