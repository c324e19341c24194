"""Shards: an update, rollouts, loading and export with FSDP2 are those of one process that has everything."""

from pathlib import Path

import pytest
import torch
from launcher import launch
from test_rl import make_groups
from tiny import random_policy

import rl
from common import start_processes
from demo.synthetic import synthetic
from model import load_policy
from scale.checkpoints import save_policy
from scale.sharding import load_weights

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, and two random checkpoints, whose embedding and head are one tensor, and are not."""
    folder = tmp_path_factory.mktemp("place")
    synthetic(folder, 10, 5, seed=3)
    for name in ("tied", "untied"):
        policy = random_policy(layers=2)
        text = policy.hf.config.text_config
        text.num_hidden_layers, text.layer_types = 2, text.layer_types[:2]
        if name == "untied":
            policy.hf.lm_head.weight = torch.nn.Parameter(torch.randn_like(policy.head.weight) * 0.02)
            policy.hf.config.tie_word_embeddings = text.tie_word_embeddings = False
        save_policy(policy, folder / name)
        with torch.no_grad():
            for p in policy.parameters():
                p += 0.02 * p.std() * torch.randn_like(p)
        save_policy(policy, folder / f"{name}-reference")
    return folder


def three_updates(folder, model, shard, dtype, out):
    """Three AdamW steps on the same groups, in passes of unequal number. Writes the first gradient, the weights
    before and after, metrics, and the exported checkpoint."""
    folder, out = Path(folder), Path(out)
    rank, world, device = start_processes("cpu")
    config = rl.Config(model=str(folder / model), batch_size=3, mini_batch_size=3, max_tokens_per_pass=900, max_grad_norm=0.1,
                       kl_weight=0.1, entropy_weight=0.1, shard=shard, dtype=dtype, gradient_checkpointing=True)
    weights = load_weights(config.model, config, device, with_reference=True)
    other = load_weights(str(folder / f"{model}-reference"), config, device, with_reference=True)
    weights.reference = other.reference
    weights.policy.train()
    plain = load_policy(config.model, dtype=weights.policy.dtype)
    groups = make_groups(plain, folder, 3)[rank::world]
    whole = lambda tensor: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
    optimizer = torch.optim.AdamW(weights.parameters, lr=1e-3, eps=1e-3, weight_decay=0.0, fused=True)
    gradients, before, metrics = [], {name: whole(p) for name, p in weights.masters.items()}, []
    optimizer.register_step_pre_hook(lambda *_: gradients.append({n: whole(p.grad) for n, p in weights.masters.items()}))
    for _ in range(3):
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
