"""Adapters: the base stays as it is, what is exported does what was trained, and peft reads it."""

from pathlib import Path

import pytest
import torch
from launcher import launch
from tiny import DEVICE, make_groups, make_place

import rl
from common import start_processes
from model import token_log_probs
from scale.lora import LoRALinear, add_adapters, merge
from scale.pick import load_weights
from training.checkpoints import load_policy
from training.environment import run_environment

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("lora"), layers=2)


def trained(place, steps=1, lr=1e-2, dtype="float32", rank=0, world=1):
    """(weights, groups, metrics) after some updates; the groups are those of all processes."""
    torch.manual_seed(0)
    config = rl.Config(model=str(place / "model"), batch_size=3, mini_batch_size=3, max_tokens_per_pass=2000,
                       lora_rank=4, kl_weight=0.1, entropy_weight=0.1, dtype=dtype)
    env_config = run_environment(config.model, config)
    weights = load_weights(config.model, config, env_config, DEVICE, with_reference=True)
    groups = make_groups(load_policy(config.model, DEVICE), place, 3)
    optimizer = torch.optim.AdamW(weights.parameters, lr=lr, fused=True)
    weights.policy.train()
    metrics = [rl.update(weights, groups[rank::world], optimizer, config, rank, DEVICE) for _ in range(steps)]
    weights.policy.eval()
    return weights, groups, metrics


@pytest.fixture(scope="module")
def twice(place):
    """After two updates."""
    return trained(place, steps=2)


def log_probs(policy, groups):
    with torch.no_grad():
        return token_log_probs(policy, [[e.dialogue for e in group] for group in groups])[0]


def test_at_first_it_is_the_base_and_so_is_the_reference_always(place, twice):
    base = load_policy(place / "model", DEVICE)
    untrained, groups, _ = trained(place, steps=0)
    before = log_probs(base, groups)
    torch.testing.assert_close(log_probs(untrained.policy, groups), before, rtol=0, atol=1e-5)
    weights, groups, _ = twice
    assert torch.equal(log_probs(weights.reference, groups), before)
    assert (log_probs(weights.policy, groups) - before).abs().max() > 1e-3
    mine, theirs = dict(weights.reference.named_parameters()), dict(base.named_parameters())
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], p) for name, p in theirs.items())
    # and it takes no memory
    own = {p.untyped_storage().data_ptr() for p in weights.policy.parameters()}
    assert all(p.untyped_storage().data_ptr() in own for p in weights.reference.parameters())


def test_the_gradient_is_that_of_the_weights_it_stands_for(place):
    """dL/dB = scale dL/dW A^T at B = 0, by autograd of the plain model, in each linear layer of the language
    model."""
    base = load_policy(place / "model", DEVICE)
    groups = make_groups(base, place, 1)
    policy = add_adapters(load_policy(place / "model", DEVICE), 4, 8.0)
    for p in (base, policy):
        token_log_probs(p, [[e.dialogue for e in groups[0]]])[0].sum().backward()
    adapters = {name: module for name, module in policy.named_modules() if isinstance(module, LoRALinear)}
    assert len(adapters) == 7 * len(base.language_model.layers)
    # values of up to 50, whose sums over all tokens are rounded to 1e-5: a GPU adds them up in no fixed order
    atol = 1e-5 if DEVICE.type == "cpu" else 1e-4
    for name, adapter in adapters.items():
        gradient = base.get_submodule(name).weight.grad
        assert adapter.base.weight.grad is None and gradient.any()
        torch.testing.assert_close(adapter.lora_B.grad, 2.0 * gradient @ adapter.lora_A.T, rtol=1e-4,
                                   atol=atol)


def test_what_is_exported_does_what_was_trained(twice, tmp_path):
    weights, groups, _ = twice
    weights.save(tmp_path / "out")
    merged = load_policy(tmp_path / "out", DEVICE)
    torch.testing.assert_close(log_probs(merged, groups), log_probs(weights.policy, groups), rtol=1e-4,
                               atol=1e-4)
    assert not any(isinstance(m, LoRALinear) for m in merged.modules())
    assert weights.policy.env_config == merged.env_config


@pytest.mark.slow
def test_peft_reads_the_adapter(place, twice, tmp_path):
    peft = pytest.importorskip("peft")
    weights, groups, _ = twice
    weights.save(tmp_path / "out")
    base = load_policy(place / "model", DEVICE)
    base.hf = peft.PeftModel.from_pretrained(base.hf, tmp_path / "out" / "adapter").merge_and_unload()
    torch.testing.assert_close(log_probs(base, groups), log_probs(weights.policy, groups), rtol=1e-4,
                               atol=1e-4)


def test_bfloat16_keeps_small_updates_and_merging_would_lose_them(place):
    """The weights' change by the adapters: nearly the master weights' in the compute dtype, where rollouts use it
    unmerged; far off once it is added to a weight in bfloat16."""
    weights, _, _ = trained(place, steps=3, lr=1e-3, dtype="bfloat16")
    assert {p.dtype for p in weights.parameters} == {torch.float32}
    assert {p.dtype for p in weights.policy.parameters()} == {torch.bfloat16}
    unmerged, merged = [], []
    for name, module in weights.policy.named_modules():
        if isinstance(module, LoRALinear):
            A, B = (weights.master_weights[f"{name}.lora_{letter}"].detach() for letter in "AB")
            change = module.scale * (B @ A)
            off = lambda other: ((other - change).norm() / change.norm()).item()
            unmerged.append(off(module.scale * (module.lora_B.detach().float() @ module.lora_A.detach().float())))
            base = module.base.weight.float()
            merged.append(off((base + change).bfloat16().float() - base))
    assert len(merged) == 14 and max(unmerged) < 0.01 and min(merged) > 5 * max(unmerged), (unmerged, merged)


def on_two_processes(folder, out):
    rank, world, _ = start_processes(DEVICE.type)
    weights, _, metrics = trained(Path(folder), 2, rank=rank, world=world)
    torch.save((weights.master_weights, metrics), Path(out) / f"{rank}.pt")


@pytest.mark.slow
def test_updates_of_two_processes_are_those_of_one(place, twice, tmp_path):
    launch(2, "test_lora:on_two_processes", [place, tmp_path]).wait()
    weights, _, metrics = twice
    for rank in range(2):
        master_weights, theirs = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for mine, other in zip(metrics, theirs):
            assert other == pytest.approx(mine, rel=1e-3, abs=1e-5)
        for name, p in weights.master_weights.items():
            assert (master_weights[name] - p).norm() <= 0.01 * p.norm(), name
