"""GRPO: the objective against NumPy, updates against their definition and however they are split, what is
drawn, and runs from end to end."""

import functools
import itertools
import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from launcher import launch
from tiny import DEVICE, full_copy, make_groups, random_policy, seeded, shift
from tqdm import tqdm

import rl
import training.weights
from common import UserError, start_processes
from demo import synthetic
from model import Dialogue, token_log_probs
from protocols import PROTOCOLS
from training.checkpoints import load_policy, save_policy
from training.environment import load_env_config
from training.metrics import episode_metrics, show_step
from training.mismatch import Mismatch
from training.weights import MasterWeights
from zoom_env import ZoomEnv, overview_times

pytestmark = pytest.mark.device
# Relative, of an update that is computed in another way: where a GPU gets other shapes it adds up in another
# order, and so it does, each time another one, where it adds by atomic operations.
SAME = 1e-5 if DEVICE.type == "cpu" else 1e-4


def numpy_grpo(log_p, old, ref, advantage, clip_low, clip_high, kl_weight):
    """The loss of each token and its derivative by log_p, from the formula, in float64."""
    ratio = np.exp(log_p - old)
    inside = np.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = -np.minimum(ratio * advantage, inside * advantage)
    unclipped = ratio * advantage <= inside * advantage
    gradient = np.where(unclipped, -ratio * advantage, 0.0)
    d = ref - log_p
    kl = np.exp(d) - d - 1
    return loss + kl_weight * np.minimum(kl, 10), gradient + kl_weight * np.where(kl < 10, 1 - np.exp(d), 0.0)


def test_objective_and_gradient_equal_numpy():
    """Positive and negative advantages, inside and outside of the clip range on both sides, k3 clamped and
    not."""
    config = rl.Config(kl_weight=0.1)
    ratios = np.array([0.5, 0.79, 0.81, 1.0, 1.26, 1.28, 2.0])
    log_p = np.log(np.full(14, 0.3))
    old = log_p - np.log(np.concatenate([ratios, ratios]))
    advantage = np.repeat([1.7, -0.6], 7)
    ref = log_p + np.array([*np.linspace(-1, 1, 9), -30, 2.60, 2.62, 15, 200])
    expected, expected_gradient = numpy_grpo(log_p, old, ref, advantage, 0.2, 0.27, 0.1)
    f32 = lambda a: torch.tensor(a, dtype=torch.float32, device=DEVICE)
    x = f32(log_p).requires_grad_()
    episode = torch.tensor([0] * 7 + [1] * 7)  # one with a positive advantage, one with a negative
    loss, stats = rl.grpo_loss(x, f32(old), f32(advantage[[0, 7]]), episode, config, f32(ref))
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach().cpu(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(x.grad.cpu(), expected_gradient, rtol=1e-5, atol=1e-6)
    only_kl = 0.1 * (1 - np.exp(ref - log_p))
    assert (expected_gradient[[5, 6]] == only_kl[[5, 6]]).all()  # clipped: only the KL pulls
    assert stats["clipped_high"] == 2 and stats["clipped_low"] == 2 and stats["kl_clamped"] == 4


def test_entropy_bonus_raises_the_entropy():
    logits = torch.zeros(1, 5, requires_grad=True, device=DEVICE)
    with torch.no_grad():
        logits[0, 0] = 2.0
    log_p = torch.log_softmax(logits, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    advantages, episode = torch.zeros(1, device=DEVICE), torch.zeros(1).long()
    loss, _ = rl.grpo_loss(log_p[:, 0], log_p[:, 0].detach(), advantages, episode,
                           rl.Config(entropy_weight=1.0), None, entropy)
    loss.sum().backward()
    assert logits.grad[0, 0] > 0 and (logits.grad[0, 1:] < 0).all()  # descent makes the peak lower


def test_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.5, 1.5, 1.5, 1.5], [0.1, 1.5, 0.0, 0.4]])
    a = rl.group_advantages(rewards)
    r = rewards[2].double().numpy()
    np.testing.assert_allclose(a[2], (r - r.mean()) / (r.std(ddof=1) + 1e-6), rtol=1e-5)
    assert (a[1] == 0).all() and a[0, 0] == -a[0, 1] > 0
    for reward in (0.1, 0.6, 0.9, 1.4):  # no rounding noise: the mean of 16 equal ones is another float
        assert torch.equal(rl.group_advantages(torch.full((2, 16), reward)), torch.zeros(2, 16))


@pytest.mark.parametrize("kind", ["dr_grpo", "rloo"])
def test_other_advantages_by_a_loop(kind):
    groups = [[1.0, 0.0, 0.0, 1.0], [0.1, 1.5, 0.0, 0.4], [0.9, 0.9, 0.9, 0.9]]
    found = rl.group_advantages(torch.tensor(groups), kind)
    for rewards, advantages in zip(groups, found.tolist()):
        for i, reward in enumerate(rewards):
            others = rewards[:i] + rewards[i + 1:] if kind == "rloo" else rewards
            assert advantages[i] == pytest.approx(reward - sum(others) / len(others), abs=1e-6)
    for reward in (0.1, 0.6, 0.9, 1.4):
        assert torch.equal(rl.group_advantages(torch.full((2, 16), reward), kind), torch.zeros(2, 16))


# ------------------------------------------------------------------------ the same update however it is split
@functools.cache
def made_once(seed):
    return random_policy(seed, layers=2)


def make_policy(seed=0):
    """A random policy that can be trained."""
    policy = full_copy(made_once(seed))
    policy.requires_grad_(True)
    return policy.freeze_vision()


@functools.cache
def groups_of(folder, dtype):
    return make_groups(make_policy().to(dtype), folder, 3)


def copies(groups):
    return [[replace(e, dialogue=e.dialogue.fork()) for e in group] for group in groups]


def one_update(folder, rank=0, world=1, max_tokens_per_pass=100_000, checkpointing=False, dtype=torch.float32,
               prepare=lambda policy, groups: None, lr=1.0, **settings):
    """Master weights' change in one update by plain gradient descent, and the metrics. prepare(policy,
    groups) changes the groups before."""
    policy, reference = make_policy().to(dtype), make_policy(seed=1).to(dtype)
    if checkpointing:
        policy.checkpoint_layers()
    policy.train()
    groups = copies(groups_of(folder, dtype))
    prepare(policy, groups)
    config = replace(UPDATE, max_tokens_per_pass=max_tokens_per_pass, **settings)
    masters = MasterWeights(policy, reference)
    before = torch.cat([p.detach().flatten().clone() for p in masters.parameters])
    optimizer = torch.optim.SGD(masters.parameters, lr=lr)
    metrics = rl.update(masters, groups[rank::world], optimizer, config, rank, DEVICE)
    return torch.cat([p.detach().flatten() for p in masters.parameters]) - before, metrics


UPDATE = rl.Config(batch_size=3, mini_batch_size=3, max_grad_norm=1e9, kl_weight=0.1, entropy_weight=0.1)


def assert_same(a, b, rel=SAME):
    """The same for any split and with packing: 1e-5 relative."""
    assert (a[0] - b[0]).norm() <= rel * a[0].norm() and a[0].norm() > 0
    for key in a[1]:
        assert a[1][key] == pytest.approx(b[1][key], rel=rel, abs=1e-6), key


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    synthetic.synthetic(folder, 10, 5, seed=3)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    return one_update(folder)


def test_an_update_counts_what_was_clamped_and_left_out(whole):
    metrics = whole[1]
    assert metrics["updates"] == 1 and metrics["bad_steps"] == 0
    assert 0 <= metrics["kl_clamped"] < 1 and metrics["kl"] > 0


@pytest.mark.parametrize("loss_mean", ["token", "episode"])
def test_an_update_is_the_gradient_of_the_mean(folder, loss_mean):
    """The definition: each episode scored alone, the mean over all sampled tokens of the mini-batch, or over
    those of each episode and then over episodes; with the reference and the temperature."""
    how = dict(temperature=0.7, loss_mean=loss_mean)
    change, metrics = one_update(folder, max_tokens_per_pass=600, **how)
    policy, reference, config = make_policy(), make_policy(seed=1), replace(UPDATE, **how)
    losses = []
    for e in (e for group in groups_of(folder, torch.float32) for e in group):
        dialogue = [[e.dialogue]]
        log_probs, entropies = token_log_probs(policy, dialogue, 0.7, entropy=True)
        ref_log_probs = token_log_probs(reference, dialogue, 0.7)[0].detach()
        old = torch.tensor(e.dialogue.sampled_log_probs, device=DEVICE)
        advantage = torch.tensor([e.dialogue.advantage], device=DEVICE)
        which = torch.zeros(len(old), dtype=torch.long)
        losses.append(rl.grpo_loss(log_probs, old, advantage, which, config, ref_log_probs, entropies)[0])
    mean = torch.cat(losses).mean()
    if loss_mean == "episode":
        mean = torch.stack([loss.mean() for loss in losses]).mean()
    mean.backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
    assert len(losses) == 9 and (change + gradient).norm() <= 1e-4 * gradient.norm() > 0
    assert metrics["loss"] == pytest.approx(mean.item(), rel=1e-4)
    assert metrics["trained_tokens"] == sum(len(loss) for loss in losses)
    assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)


@pytest.mark.parametrize("loss_mean", ["episode", "token"])
def test_the_ratio_of_a_sequence_is_by_the_plain_formula(folder, loss_mean):
    """GSPO: each episode scored alone, one ratio s = (pi / pi_old)^(1 / T) of its T tokens together, clipped
    as one; the mean of episodes, or with token means each of the weight T. Some are clipped on either side,
    some are not; groups are divided over passes or not."""
    def prepare(policy, groups):
        for sign, group in zip((1, -1, 1), groups):
            for e in group[:2]:
                shift(e, sign * 0.2)

    how = dict(ratio="sequence", loss_mean=loss_mean, clip_low=0.1, clip_high=0.15, kl_weight=0.0,
               entropy_weight=0.0)
    change, metrics = one_update(folder, prepare=prepare, max_tokens_per_pass=600, **how)
    policy, groups, losses, clipped = make_policy(), copies(groups_of(folder, torch.float32)), [], []
    prepare(policy, groups)
    for e in (e for group in groups for e in group):
        log_probs, _ = token_log_probs(policy, [[e.dialogue]])
        old, advantage = torch.tensor(e.dialogue.sampled_log_probs, device=DEVICE), e.dialogue.advantage
        s = (log_probs.sum() - old.sum()).div(len(old)).exp()
        losses.append((len(old), -torch.minimum(s * advantage, s.clamp(0.9, 1.15) * advantage)))
        high, low = s > 1.15 and advantage > 0, s < 0.9 and advantage < 0
        clipped.append((high, low))
    weights = [tokens if loss_mean == "token" else 1 for tokens, _ in losses]
    mean = sum(weight * loss for weight, (_, loss) in zip(weights, losses)) / sum(weights)
    mean.backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
    assert (change + gradient).norm() <= 1e-4 * gradient.norm() > 0
    assert metrics["loss"] == pytest.approx(mean.item(), rel=1e-4)
    highs, lows = (sum(tokens for (tokens, _), sides in zip(losses, clipped) if sides[n]) for n in range(2))
    assert metrics["clipped_high"] == pytest.approx(highs / metrics["trained_tokens"]) and highs > 0
    assert metrics["clipped_low"] == pytest.approx(lows / metrics["trained_tokens"]) and lows > 0
    assert 0 < sum(any(sides) for sides in clipped) < 9
    assert_same((change, metrics), one_update(folder, prepare=prepare, **how))


def test_each_mini_batch_is_an_optimizer_step_of_its_own(folder):
    """Three questions, a step each: as three updates one after the other, of what was sampled before all."""
    change, metrics = one_update(folder, mini_batch_size=1, lr=1e-2)
    policy = make_policy()
    masters, groups = MasterWeights(policy, make_policy(seed=1)), copies(groups_of(folder, torch.float32))
    before = torch.cat([p.detach().flatten().clone() for p in masters.parameters])
    optimizer = torch.optim.SGD(masters.parameters, lr=1e-2)
    for group in groups:
        rl.update(masters, [group], optimizer, replace(UPDATE, batch_size=1, mini_batch_size=1), 0, DEVICE)
    after = torch.cat([p.detach().flatten() for p in masters.parameters]) - before
    assert (change - after).norm() <= SAME * after.norm() > 0 and metrics["updates"] == 3


def test_update_in_bfloat16_goes_the_same_way(folder, whole):
    """Compute weights in bfloat16: nearly the same change of the float32 masters, however it is split."""
    for max_tokens in (100_000, 600):
        change, _ = one_update(folder, dtype=torch.bfloat16, max_tokens_per_pass=max_tokens)
        assert change.dtype == torch.float32
        assert torch.cosine_similarity(change, whole[0], dim=0) > 0.95


@pytest.mark.parametrize("split", [
    dict(max_tokens_per_pass=600), dict(max_tokens_per_pass=1), dict(checkpointing=True)])
def test_update_does_not_depend_on_the_split(folder, whole, split):
    assert_same(whole, one_update(folder, **split))


@pytest.mark.slow
def test_the_mean_over_episodes_is_that_of_updates_on_each_alone(folder):
    """Token means of one episode each, and their mean; the same however it is split."""
    def alone(n):
        def prepare(policy, groups):
            chosen = [e for g in groups for e in g][n:n + 1]
            groups[:] = [chosen]
        return prepare

    changes = [one_update(folder, prepare=alone(n))[0] for n in range(9)]
    together = one_update(folder, loss_mean="episode")
    mean = torch.stack(changes).double().mean(0)
    assert (together[0] - mean).norm() <= 1e-4 * mean.norm() > 0
    assert_same(together, one_update(folder, loss_mean="episode", max_tokens_per_pass=600))
    assert (together[0] - one_update(folder)[0]).norm() > 1e-2 * mean.norm()  # token means are something else


def save_update(folder, out):
    """Of one process of several."""
    rank, world, _ = start_processes("cpu")
    folder = Path(folder)
    in_three = one_update(folder, rank, world, mini_batch_size=1, lr=1e-3)[1]["updates"]
    torch.save((one_update(folder, rank, world), in_three), f"{out}/{rank}.pt")


def test_update_is_the_same_on_two_processes(folder, whole, tmp_path):
    """With unequal numbers of groups and tokens on them. Dealt to three mini-batches, each of these has one
    of the three groups."""
    launch(2, "test_rl:save_update", [folder, tmp_path]).wait()
    for rank in range(2):
        update, in_three = torch.load(tmp_path / f"{rank}.pt")
        assert_same(whole, update)
        assert in_three == 3


def test_steps_without_a_finite_gradient_are_left_out_and_end_the_run(monkeypatch, capsys):
    """A warning names the questions; so many in a row end the run, a good one in between begins anew."""
    weight = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    masters, optimizer = MasterWeights(torch.nn.ParameterList([weight])), torch.optim.SGD([weight], lr=1.0)

    def step(gradient):
        weight.grad = torch.tensor(gradient, device=DEVICE)
        return masters.step(optimizer, 1e9, questions=["q1", "q2"])

    monkeypatch.setattr(training.weights, "MAX_BAD_STEPS", 3)
    for _ in range(2):
        step([0.0, float("nan"), 0.0])
        step([0.0, float("inf"), 1.0])
        assert weight.grad is None or torch.equal(weight.grad.cpu(), torch.zeros(3))
        before = weight.detach().clone()
        assert step([1.0, 0.0, 0.0]) == 1.0 and weight[0] == before[0] - 1
    assert (weight[1:] == 1).all() and capsys.readouterr().err.count("q1, q2") == 4
    step([float("nan")] * 3)
    step([float("nan")] * 3)
    with pytest.raises(UserError, match="q1, q2; 3 such steps in a row"):
        step([float("nan")] * 3)


def test_a_gradient_is_scaled_down_to_the_largest_norm():
    for compute in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter(torch.zeros(2, dtype=compute, device=DEVICE))
        masters = MasterWeights(torch.nn.ParameterList([weight]))
        optimizer = torch.optim.SGD(masters.parameters, lr=1.0)
        for gradient, step in (([3.0, -4.0], [-1.2, 1.6]), ([0.6, 0.8], [-0.6, -0.8])):
            (weight * torch.tensor(gradient, dtype=compute, device=DEVICE)).sum().backward()
            before = masters.parameters[0].detach().clone()
            norm = masters.step(optimizer, 2.0)
            assert norm == pytest.approx(torch.tensor(gradient).norm().item(), rel=1e-2)
            moved = (masters.parameters[0] - before).cpu()
            torch.testing.assert_close(moved, torch.tensor(step), rtol=1e-2, atol=0)


def poison(policy, groups):
    """A nan that was noted while sampling."""
    groups[1][0].dialogue.sampled_log_probs[0] = math.nan


def test_an_update_without_a_finite_gradient_changes_nothing_and_is_counted(folder, capsys):
    change, metrics = one_update(folder, prepare=poison)
    assert metrics["updates"] == metrics["bad_steps"] == 1 and metrics["grad_norm"] == 0 and not change.any()
    said = capsys.readouterr().err
    assert all(json.loads(line)["id"] in said for line in list(open(folder / "train.jsonl"))[:3])


# ------------------------------------------------------------------------------ between sampling and training
@torch.no_grad()
def exact(policy, groups, temperature=1.0):
    """Log-probabilities as if sampling had computed what training does."""
    for e in (e for group in groups for e in group):
        e.dialogue.sampled_log_probs = token_log_probs(policy, [[e.dialogue]], temperature)[0].tolist()


def test_mismatch_is_counted_over_the_tokens_that_were_sampled():
    """Mean and largest by hand; a token that was appended has none; a nan makes the mean nan, the largest
    inf."""
    dialogues = [Dialogue(sampled_log_probs=[-1.0, None, -2.0]), Dialogue(sampled_log_probs=[-1.0])]
    mismatch = Mismatch()
    means = mismatch.add(torch.tensor([-1.5, -9.0, -2.0, -4.0], device=DEVICE), dialogues)
    assert means == pytest.approx([0.25, 3.0])
    found = mismatch.metrics(DEVICE)
    assert found == pytest.approx({"mismatch": 3.5 / 3, "mismatch_max": 3.0, "episodes_left_out": 0})
    mismatch.add(torch.tensor([math.nan], device=DEVICE), dialogues[1:])
    found = mismatch.metrics(DEVICE)
    assert math.isnan(found["mismatch"]) and found["mismatch_max"] == math.inf


@pytest.mark.parametrize("old_log_probs, mini_batch_size", [("sampled", 3), ("recomputed", 1)])
def test_an_update_measures_the_mismatch_before_it(folder, old_log_probs, mini_batch_size):
    """Of noisy log-probabilities, as counted one by one. Recomputed ones tell it of all groups, not only of
    the first mini-batch's."""
    differences = []

    def prepare(policy, groups):
        shift(groups[2][0], 9, 0, 1)
        for e in (e for group in groups for e in group):
            with torch.no_grad():
                trained = token_log_probs(policy, [[e.dialogue]])[0].tolist()
            pairs = zip(trained, e.dialogue.sampled_log_probs, strict=True)
            differences.extend(abs(a - b) for a, b in pairs)

    _, metrics = one_update(folder, prepare=prepare, old_log_probs=old_log_probs,
                            mini_batch_size=mini_batch_size, lr=1e-4, max_tokens_per_pass=600)
    assert metrics["mismatch"] == pytest.approx(sum(differences) / len(differences), rel=1e-4)
    assert metrics["mismatch_max"] == pytest.approx(max(differences), rel=1e-4) and max(differences) > 7


def assert_same_training(a, b, rel=SAME):
    """`assert_same`, but of what is said of the mismatch."""
    trained = lambda metrics: {k: v for k, v in metrics.items()
                               if not k.startswith("mismatch") and k != "episodes_left_out"}
    assert_same((a[0], trained(a[1])), (b[0], trained(b[1])), rel)


@pytest.mark.parametrize("mini_batch_size, lr, rel", [
    (3, 1.0, SAME), pytest.param(1, 1e-3, 10 * SAME, marks=pytest.mark.slow)])
def test_recomputed_old_log_probabilities_are_those_before_the_first_update(folder, mini_batch_size, lr, rel):
    """The update is that of exactly sampled ones, whatever was noted; also where a step has several updates,
    with small steps, which weights in float32 round."""
    how = dict(mini_batch_size=mini_batch_size, lr=lr, max_tokens_per_pass=600, temperature=0.7)
    exactly = partial(exact, temperature=0.7)
    right = one_update(folder, prepare=exactly, **how)
    assert right[1]["updates"] == 3 // mini_batch_size and right[1]["mismatch_max"] < 1e-4
    same = one_update(folder, prepare=exactly, old_log_probs="recomputed", **how)
    assert_same_training(right, same, rel)
    assert same[1]["mismatch_max"] < 1e-4
    noisy, corrected = one_update(folder, **how), one_update(folder, old_log_probs="recomputed", **how)
    assert_same_training(right, corrected, rel)
    assert (noisy[0] - right[0]).norm() > 0.5 * right[0].norm()  # the noise does matter
    assert corrected[1]["mismatch"] > 0.2  # of what was noted, not of what is used


@pytest.mark.parametrize("which", ["an episode", pytest.param("a group", marks=pytest.mark.slow)])
def test_an_episode_above_the_largest_mismatch_is_left_out(folder, which):
    """As if it were not there, from the advantages on. One token far off in another one does not matter: the
    mean does."""
    def far(policy, groups):
        for e in groups[1][:1] if which == "an episode" else groups[1]:
            shift(e, 3)
        shift(groups[2][0], 3, 0, 1)

    def without(policy, groups):
        shift(groups[2][0], 3, 0, 1)
        groups[1][:1 if which == "an episode" else None] = []

    how = dict(old_log_probs="recomputed", max_mismatch=1.0)
    left_out, removed, all_of_them = (one_update(folder, prepare=p, **how) for p in (far, without, exact))
    assert_same_training(left_out, removed)
    numbers = [m["episodes_left_out"] for _, m in (left_out, removed, all_of_them)]
    assert numbers == [1 if which == "an episode" else 3, 0, 0]
    assert left_out[1]["trained_tokens"] < all_of_them[1]["trained_tokens"]
    assert left_out[1]["mismatch"] > 1.1 * removed[1]["mismatch"]  # it is measured all the same
    assert (left_out[0] - all_of_them[0]).norm() > 0.01 * left_out[0].norm()


def test_a_step_that_leaves_all_episodes_out_learns_nothing_and_says_so(folder):
    change, metrics = one_update(folder, old_log_probs="recomputed", max_mismatch=0.0)
    assert not change.any() and metrics["updates"] == metrics["trained_tokens"] == metrics["loss"] == 0
    assert metrics["episodes_left_out"] == 9 and metrics["mismatch"] > 0.2
    said = []
    show_step(metrics | {"step": 1, "groups": 3}, [], rl.Config(), said.append)
    assert "9 episodes" in said[1] and "--max_mismatch" in said[1] and "nothing learned" in said[1]


def test_an_episode_without_a_finite_mismatch_is_left_out(folder):
    change, metrics = one_update(folder, prepare=poison, old_log_probs="recomputed", max_mismatch=1.0)
    assert metrics["episodes_left_out"] == 1 and metrics["bad_steps"] == 0
    assert change.isfinite().all() and change.any()


# ---------------------------------------------------------------------------------------------------- a batch
class PlantedEnv(ZoomEnv):
    """Its rewards do not depend on what is said: those of one question's episodes differ, but for the ids in
    `flat`."""

    flat, next_reward = set(), itertools.count()

    def end(self):
        super().end()
        self.rewards["reward"] = 0.5 if self.question["id"] in self.flat else float(next(self.next_reward))


def draw(folder, monkeypatch, flat, rank=0, world=1, **settings):
    """`play_batch` by the real engine: (questions in the order of their drawing, what it returned)."""
    monkeypatch.setitem(PROTOCOLS, "videozoomer", PlantedEnv)
    rows = [json.loads(line) for line in open(folder / "train.jsonl")]
    monkeypatch.setattr(PlantedEnv, "flat", {rows[n]["id"] for n in flat})
    config = rl.Config(**{"batch_size": 3, "group_size": 2, "max_draws": 2, "max_turn_tokens": 3,
                          "compile": False} | settings)
    policy = make_policy()
    engine = rl.Engine(policy, config.group_size, config, seeded(0))
    return rows, rl.play_batch(engine, iter(rows), config, folder, rank, world, DEVICE, tqdm(disable=True))


def test_groups_without_a_spread_are_dropped_and_new_questions_drawn(folder, monkeypatch):
    """Dynamic sampling: of 3 questions two are flat, so two more are drawn; the episodes of all are reported,
    only the others' are kept, with their advantages, and only their tokens are in the loss's denominator."""
    rows, (kept, episodes, unreadable, drawn) = draw(folder, monkeypatch, flat=(0, 2))
    assert [group[0].env.question["id"] for group in kept] == [rows[n]["id"] for n in (1, 3, 4)]
    assert drawn == 5 and len(episodes) == 10 and not unreadable
    for group in kept:
        assert sum(e.dialogue.advantage for e in group) == pytest.approx(0, abs=1e-6)
        assert all(abs(e.dialogue.advantage) > 0.1 for e in group)
    weights = MasterWeights(make_policy())
    config = rl.Config(batch_size=3, mini_batch_size=3, kl_weight=0.0)
    metrics = rl.update(weights, kept, torch.optim.SGD(weights.parameters, lr=0.0), config, 0, DEVICE)
    assert metrics["trained_tokens"] == sum(sum(e.dialogue.trained) for group in kept for e in group)


def test_without_dynamic_sampling_a_batch_is_what_is_drawn(folder, monkeypatch):
    """Flat groups stay, without advantages; the metric counts them all the same."""
    rows, (kept, episodes, _, drawn) = draw(folder, monkeypatch, flat=(0, 2), dynamic_sampling=False)
    assert [group[0].env.question["id"] for group in kept] == [row["id"] for row in rows[:3]]
    assert drawn == 3 and len(episodes) == 6
    for group, flat in zip(kept, (True, False, True)):
        assert all((e.dialogue.advantage == 0) == flat and e.dialogue.features for e in group)
    metrics = episode_metrics(episodes, len(kept), 2, DEVICE)
    assert metrics["no_spread"] == pytest.approx(2 / 3) and metrics["groups"] == 3


def test_groups_that_are_wrong_alike_are_counted(folder, monkeypatch):
    """Of four groups one has a spread, one is right, one half right, and one nearly all wrong."""
    _, (_, episodes, *_) = draw(folder, monkeypatch, flat=(1, 2, 3), dynamic_sampling=False, batch_size=4,
                                group_size=4)
    for e, right in zip(episodes, [1, 0, 0, 0] + [1] * 4 + [1, 1, 0, 0] + [1, 0, 0, 0], strict=True):
        e.env.rewards["accuracy"] = right
    metrics = episode_metrics(episodes, 4, 4, DEVICE)
    assert metrics["no_spread"] == 0.75 and metrics["no_spread_wrong"] == 0.25


def test_a_process_plays_its_share_of_what_is_drawn(folder, monkeypatch):
    """The second of two: of each draw the second, the fourth, ..."""
    rows, batch = draw(folder, monkeypatch, (), rank=1, world=2, batch_size=4, max_draws=1)
    kept, episodes, _, drawn = batch
    assert [group[0].env.question["id"] for group in kept] == [rows[n]["id"] for n in (1, 3)]
    assert len(episodes) == 4 and drawn == 4


def test_drawing_ends_at_max_draws(folder, monkeypatch):
    """Of 2 x 3 questions: 3 with one that is kept, 2 more for the two that are missing, 1 that is left."""
    rows, (kept, episodes, _, drawn) = draw(folder, monkeypatch, flat=range(1, 10))
    assert [group[0].env.question["id"] for group in kept] == [rows[0]["id"]]
    assert drawn == 6 and len(episodes) == 12
    # nothing will be trained on the others
    assert all(bool(e.dialogue.features) == (e.env.question["id"] == rows[0]["id"]) for e in episodes)


def test_the_frames_of_episodes_that_are_over_are_let_go(folder):
    """At the paper's batch they would be 20 GB; the episodes can still be described."""
    policy = make_policy()
    rows = [json.loads(line) for line in open(folder / "train.jsonl")]
    config = rl.Config(batch_size=2, group_size=3, max_draws=1, max_turn_tokens=6, compile=False)
    engine = rl.Engine(policy, config.group_size, config, seeded(0))
    _, episodes, *_ = rl.play_batch(engine, iter(rows), config, folder, 0, 1, DEVICE, tqdm(disable=True))
    assert len(episodes) == 6 and not any(e.dialogue.frames for e in episodes)
    assert all(frame.image is None for e in episodes for frames in e.env.watched for frame in frames)
    assert "9 frames" in episodes[0].env.describe()


# ------------------------------------------------------------------------------------------------- the script
@pytest.fixture(scope="module")
def start(folder):
    save_policy(made_once(0), folder / "start")
    return folder / "start"


@pytest.mark.slow
@pytest.mark.parametrize("processes, dtype", [(2, "float32"), (2, "bfloat16"), (1, "bfloat16")])
def test_two_steps_from_the_command_line(folder, start, tmp_path, processes, dtype):
    """rl.py as a user runs it: metrics of each step, a checkpoint that loads and has moved."""
    flags = ["--model", start, "--data", folder / "train.jsonl", "--out", tmp_path / "out", "--steps", 2,
             "--batch_size", 2, "--mini_batch_size", 1, "--group_size", 3, "--max_turn_tokens", 8,
             "--lr", 1e-3, "--max_draws", 1, "--format_weight", 0, "--seed", 1, "--device",
             DEVICE.type, "--dtype", dtype]
    launch(processes, "rl.py", flags).wait()
    metrics = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
    assert [m["step"] for m in metrics] == [1, 2]
    for key in ("reward", "accuracy", "format", "tool", "zooms", "invalid", "no_spread", "truncated",
                "response_tokens", "seconds_rollout", "seconds_update"):
        assert key in metrics[0]
    assert metrics[0]["episodes"] == 6
    assert load_policy(tmp_path / "out", dtype="auto").dtype == getattr(torch, dtype)


def run(monkeypatch, folder, start, out, *flags):
    """rl.py with one small step, in this process. Returns its metrics."""
    monkeypatch.setitem(PROTOCOLS, "videozoomer", PlantedEnv)
    flags = ["--model", start, "--data", folder / "train.jsonl", "--out", out, "--steps", 1,
             "--batch_size", 1, "--mini_batch_size", 1, "--group_size", 2, "--max_turn_tokens", 3,
             "--device", DEVICE.type, "--dtype", "float32", "--no-compile", *flags]
    monkeypatch.setattr(sys, "argv", ["rl.py", *map(str, flags)])
    rl.main()
    return json.loads((out / "metrics.jsonl").read_text())


def test_the_learning_rate_rises(folder, start, tmp_path, monkeypatch):
    """By the metrics, and by what it does: at the start of a very long warm-up an optimizer step moves
    nothing."""
    before, moved = load_policy(start).head.weight, {}
    for warmup in (2, 10 ** 12):
        out = tmp_path / str(warmup)
        metrics = run(monkeypatch, folder, start, out, "--lr", 1e-2, "--lr_warmup_steps", warmup)
        assert metrics["lr"] == pytest.approx(1e-2 / warmup) and metrics["grad_norm"] > 0
        moved[warmup] = (load_policy(out).head.weight - before).abs().max()
    assert moved[2] > 1e-3 and moved[10 ** 12] < 1e-8


def test_without_the_tool(folder, start, tmp_path, monkeypatch, capsys):
    """Each episode is one answer to so many frames, in training and for what evaluates the checkpoint."""
    metrics = run(monkeypatch, folder, start, tmp_path, "--max_zooms", 0, "--num_frames", 23)
    assert metrics["frames"] == 23 and metrics["zooms"] == 0 and metrics["turns"] == 1
    assert metrics["grad_norm"] > 0
    trained = load_env_config(tmp_path)
    assert trained.max_zooms == 0
    assert [len(overview_times(duration_s, trained)) for duration_s in (5.0, 5000.0)] == [23, 23]
    assert "overview: 23 frames" in capsys.readouterr().out
