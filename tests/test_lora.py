"""Adapters: the base stays as it is, what is exported does what was trained, and peft reads it."""

import pytest
import torch
from test_rl import make_groups
from tiny import make_place

import rl
from common import UserError
from model import token_log_probs
from training.checkpoints import load_policy
from scale.lora import LoRALinear, add_adapters, without_adapters
from scale.sharding import load_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("lora"))


def config_of(place, **more):
    return rl.Config(model=str(place / "model"), batch_size=3, mini_batch_size=1, lora_rank=4, kl_weight=0.1,
                     entropy_weight=0.1, **more)


def trained(place, steps=1, lr=1e-2, **more):
    """(weights, groups, metrics) after some updates."""
    torch.manual_seed(0)
    config = config_of(place, **more)
    weights = load_weights(config.model, config, CPU, with_reference=True)
    groups = make_groups(load_policy(config.model), place, 3)
    optimizer = torch.optim.AdamW(weights.parameters, lr=lr, fused=True)
    weights.policy.train()
    metrics = [rl.update(weights, groups, optimizer, config, 0, CPU) for _ in range(steps)]
    weights.policy.eval()
    return weights, groups, metrics


def log_probs(policy, groups):
    with torch.no_grad():
        return token_log_probs(policy, [[e.dialogue for e in group] for group in groups])[0]


def test_at_first_it_is_the_base_and_so_is_the_reference_always(place):
    base = load_policy(place / "model")
    config = config_of(place)
    weights = load_weights(config.model, config, CPU, with_reference=True)
    groups = make_groups(base, place, 2)
    before = log_probs(base, groups)
    torch.testing.assert_close(log_probs(weights.policy, groups), before, rtol=0, atol=1e-5)
    weights, groups, _ = trained(place)
    before = log_probs(base, groups)
    assert torch.equal(log_probs(weights.reference, groups), before)
    assert (log_probs(weights.policy, groups) - before).abs().max() > 1e-3
    mine, theirs = dict(weights.reference.named_parameters()), dict(base.named_parameters())
    assert all(torch.equal(mine[name], p) for name, p in theirs.items())  # bit for bit


def test_the_reference_takes_no_memory(place):
    weights, *_ = trained(place, steps=0)
    own = {p.untyped_storage().data_ptr() for p in weights.policy.parameters()}
    assert all(p.untyped_storage().data_ptr() in own for p in weights.reference.parameters())


def test_the_gradient_is_that_of_the_weights_it_stands_for(place):
    """dL/dB = scale dL/dW A^T at B = 0, by autograd of the plain model."""
    base = load_policy(place / "model")
    groups = make_groups(base, place, 1)
    policy = add_adapters(load_policy(place / "model"), 4, 8.0, ["up_proj"])
    for p in (base, policy):
        token_log_probs(p, [[e.dialogue for e in groups[0]]])[0].sum().backward()
    for plain, layer in zip(base.language_model.layers, policy.language_model.layers):
        adapter = layer.mlp.up_proj
        assert isinstance(adapter, LoRALinear) and adapter.base.weight.grad is None
        torch.testing.assert_close(adapter.lora_B.grad, 2.0 * plain.mlp.up_proj.weight.grad @ adapter.lora_A.T, rtol=1e-4,
                                   atol=1e-6)


def test_what_is_exported_does_what_was_trained(place, tmp_path):
    weights, groups, _ = trained(place, steps=2)
    weights.save(tmp_path / "out")
    merged = load_policy(tmp_path / "out")
    expected = log_probs(weights.policy, groups)
    torch.testing.assert_close(log_probs(merged, groups), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, LoRALinear) for m in merged.modules())
    assert weights.policy.env_config == merged.env_config


def test_peft_reads_the_adapter(place, tmp_path):
    peft = pytest.importorskip("peft")
    weights, groups, _ = trained(place, steps=2)
    weights.save(tmp_path / "out")
    base = load_policy(place / "model")
    base.hf = peft.PeftModel.from_pretrained(base.hf, tmp_path / "out" / "adapter").merge_and_unload()
    torch.testing.assert_close(log_probs(base, groups), log_probs(weights.policy, groups), rtol=1e-4, atol=1e-4)


def test_bfloat16_keeps_small_updates_in_the_masters_and_merging_would_lose_them(place):
    """The gap of sampling unmerged and scoring: none. Merged into bfloat16 first it is larger."""
    weights, groups, _ = trained(place, steps=3, lr=1e-3, dtype="bfloat16")
    assert {p.dtype for p in weights.parameters} == {torch.float32}
    exact = log_probs(without_adapters(weights.policy.float(), lambda name, module: merged_float32(weights, name, module)), groups)
    weights.policy.bfloat16()
    unmerged = (log_probs(weights.policy, groups) - exact).abs().mean()
    merged = without_adapters(weights.policy, lambda name, module: merged_float32(weights, name, module).bfloat16())
    assert unmerged < (log_probs(merged, groups) - exact).abs().mean()


def merged_float32(weights, name, module):
    A, B = (weights.masters[f"hf.{name}.lora_{letter}"].detach() for letter in "AB")
    linear = torch.nn.Linear(module.base.in_features, module.base.out_features, bias=module.base.bias is not None)
    linear.weight.data = module.merged(A, B)
    linear.bias = module.base.bias
    return linear


def test_wrong_names_are_one_line(place):
    config = config_of(place, lora_targets=["q_proj", "x_proj"])
    with pytest.raises(UserError, match="no layer is called x_proj"):
        load_weights(config.model, config, CPU)
