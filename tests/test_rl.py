"""GRPO: the objective against NumPy, updates that do not depend on how they are split, and a run from end to end."""

import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from launcher import launch
from tqdm import tqdm

from tiny import random_policy as make_policy

import rl
import training.weights
from common import UserError, start_processes
from demo import synthetic
from model import Dialogue, Sampled, encode, fill_features, token_log_probs
from training.checkpoints import load_policy
from rollout import Episode
from training.checkpoints import save_policy
from training.mismatch import Mismatch
from training.weights import MasterWeights
from training.metrics import show_step
from protocols import PROTOCOLS
from zoom_env import EnvConfig, Message, ZoomEnv

ROOT = Path(__file__).resolve().parent.parent


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
    """Positive and negative advantages, inside and outside of the clip range on both sides, k3 clamped and not."""
    config = rl.Config(kl_weight=0.1)
    ratios = np.array([0.5, 0.79, 0.81, 1.0, 1.26, 1.28, 2.0])
    log_p = np.log(np.full(14, 0.3))
    old = log_p - np.log(np.concatenate([ratios, ratios]))
    advantage = np.repeat([1.7, -0.6], 7)
    ref = log_p + np.array([*np.linspace(-1, 1, 9), -30, 2.60, 2.62, 15, 200])
    expected, expected_gradient = numpy_grpo(log_p, old, ref, advantage, 0.2, 0.27, 0.1)
    x = torch.tensor(log_p, dtype=torch.float32, requires_grad=True)
    f32 = lambda a: torch.tensor(a, dtype=torch.float32)
    episode = torch.tensor([0] * 7 + [1] * 7)  # one with a positive advantage, one with a negative
    loss, stats = rl.grpo_loss(x, f32(old), f32(advantage[[0, 7]]), episode, config, f32(ref))
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(x.grad, expected_gradient, rtol=1e-5, atol=1e-6)
    assert (expected_gradient[[5, 6]] == 0.1 * (1 - np.exp(ref - log_p))[[5, 6]]).all()  # clipped: only the KL pulls
    assert stats["clipped_high"] == 2 and stats["clipped_low"] == 2 and stats["kl_clamped"] == 4


def test_entropy_bonus_raises_the_entropy():
    logits = torch.zeros(1, 5, requires_grad=True)
    with torch.no_grad():
        logits[0, 0] = 2.0
    log_p = torch.log_softmax(logits, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss, _ = rl.grpo_loss(log_p[:, 0], log_p[:, 0].detach(), torch.zeros(1), torch.zeros(1).long(),
                           rl.Config(entropy_weight=1.0), None, entropy)
    loss.sum().backward()
    assert logits.grad[0, 0] > 0 and (logits.grad[0, 1:] < 0).all()  # descent makes the peak lower


def test_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.5, 1.5, 1.5, 1.5], [0.1, 1.5, 0.0, 0.4]])
    a = rl.group_advantages(rewards)
    r = rewards[2].double().numpy()
    np.testing.assert_allclose(a[2], (r - r.mean()) / (r.std(ddof=1) + 1e-6), rtol=1e-5)
    assert (a[1] == 0).all() and a[0, 0] == -a[0, 1] > 0
    assert torch.equal(rl.group_advantages(torch.full((1, 3), 0.1)), torch.zeros(1, 3))  # no rounding noise


# --------------------------------------------------------------------------- the same update however it is split
def make_groups(policy, folder, num_groups):
    """Groups of episodes of unequal length with right and wrong answers, and old log-probabilities off by some noise."""
    questions = [json.loads(line) for line in open(folder / "train.jsonl")][:num_groups]
    noise = torch.Generator().manual_seed(5)
    groups = []
    for k, question in enumerate(questions):
        group, start = [], ZoomEnv(question, policy.env_config, folder)
        prompt = encode(policy, start.reset())
        for letter in "ABCD"[: 2 + k % 3]:
            episode = Episode(prompt.fork(), env=start.fork())
            zooms = "BD".find(letter) + 1
            for text in ['<think>look</think><video_zoom>{"segment": [10, 14], "fps": 1}</video_zoom>'] * zooms + \
                    [f"<think>{'so ' * (k + 1)}</think><answer>{question['answer'] if zooms else letter}</answer>"]:
                ids = policy.tokenizer.encode(text) + ([] if "zoom>" in text else [policy.im_end])
                encode(policy, [Message("assistant", [Sampled(ids, [0.0] * len(ids))])], episode.dialogue)
                encode(policy, episode.env.step(text), episode.dialogue)
            assert episode.env.done
            group.append(episode)
        fill_features(policy, [e.dialogue for e in group])
        with torch.no_grad():
            for e in group:
                log_probs, _ = token_log_probs(policy, [[e.dialogue]])
                e.dialogue.sampled_log_probs = (log_probs + 0.3 * torch.randn(len(log_probs), generator=noise)).tolist()
        assert rl.set_advantages(group)
        groups.append(group)
    return groups


def one_update(folder, rank=0, world=1, max_tokens_per_pass=100_000, checkpointing=False, dtype=torch.float32,
               prepare=lambda policy, groups: None, lr=1.0, **settings):
    """Master weights' change in one update by plain gradient descent, and the metrics. prepare(policy, groups) changes the
    groups before."""
    policy, reference = make_policy().to(dtype), make_policy(seed=1).to(dtype)
    if checkpointing:
        policy.checkpoint_layers()
    policy.train()
    groups = make_groups(policy, folder, 3)
    prepare(policy, groups)
    settings = {"mini_batch_size": 3} | settings
    config = rl.Config(batch_size=3, max_tokens_per_pass=max_tokens_per_pass, max_grad_norm=1e9, kl_weight=0.1,
                       entropy_weight=0.1, **settings)
    masters = MasterWeights(policy, reference)
    before = torch.cat([p.detach().flatten().clone() for p in masters.parameters])
    optimizer = torch.optim.SGD(masters.parameters, lr=lr)
    metrics = rl.update(masters, groups[rank::world], optimizer, config, rank, torch.device("cpu"))
    return torch.cat([p.detach().flatten() for p in masters.parameters]) - before, metrics


def assert_same(a, b, rel=1e-5):
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
    assert metrics["updates"] == 1 and metrics["bad_steps"] == 0 and 0 <= metrics["kl_clamped"] < 1 and metrics["kl"] > 0


def test_update_in_bfloat16_goes_the_same_way(folder, whole):
    """Compute weights in bfloat16: nearly the same change of the float32 masters, however it is split."""
    changes = [one_update(folder, dtype=torch.bfloat16, max_tokens_per_pass=n)[0] for n in (100_000, 600)]
    for change in changes:
        assert change.dtype == torch.float32 and torch.cosine_similarity(change, whole[0], dim=0) > 0.95


@pytest.mark.parametrize("split", [dict(max_tokens_per_pass=600), dict(max_tokens_per_pass=1), dict(checkpointing=True)])
def test_update_does_not_depend_on_the_split(folder, whole, split):
    assert_same(whole, one_update(folder, **split))


def test_the_mean_over_episodes_is_that_of_updates_on_each_alone(folder):
    """Token means of one episode each, and their mean; the same however it is split."""
    counts = []

    def alone(n):
        def prepare(policy, groups):
            counts[:] = [len(g) for g in groups]
            chosen = [e for g in groups for e in g][n:n + 1]
            groups[:] = [chosen]
        return prepare

    first = one_update(folder, prepare=alone(0))
    changes = [first[0]] + [one_update(folder, prepare=alone(n))[0] for n in range(1, sum(counts))]
    together = one_update(folder, loss_mean="episode")
    mean = torch.stack(changes).double().mean(0)
    assert (together[0] - mean).norm() <= 1e-4 * mean.norm() > 0 and len(changes) > 3
    assert_same(together, one_update(folder, loss_mean="episode", max_tokens_per_pass=600))
    assert (together[0] - one_update(folder)[0]).norm() > 1e-2 * mean.norm()  # token means are something else


def save_update(folder, out):
    """Of one process of several."""
    rank, world, _ = start_processes("cpu")
    torch.save(one_update(Path(folder), rank, world), f"{out}/{rank}.pt")


def test_update_is_the_same_on_two_processes(folder, whole, tmp_path):
    """With unequal numbers of groups and tokens on them."""
    launch(2, "test_rl:save_update", [folder, tmp_path]).wait()
    for rank in range(2):
        assert_same(whole, torch.load(tmp_path / f"{rank}.pt"))


def test_steps_without_a_finite_gradient_are_left_out_and_end_the_run(monkeypatch, capsys):
    """A warning names the questions; so many in a row end the run, a good one in between begins anew."""
    weight = torch.nn.Parameter(torch.ones(3))
    masters, optimizer = MasterWeights(torch.nn.ParameterList([weight])), torch.optim.SGD([weight], lr=1.0)

    def step(gradient):
        weight.grad = torch.tensor(gradient)
        return masters.step(optimizer, 1e9, questions=["q1", "q2"])

    monkeypatch.setattr(training.weights, "MAX_BAD_STEPS", 3)
    for _ in range(2):
        step([0.0, float("nan"), 0.0])
        step([0.0, float("inf"), 1.0])
        assert torch.equal(weight.grad if weight.grad is not None else torch.zeros(3), torch.zeros(3))
        before = weight.detach().clone()
        assert step([1.0, 0.0, 0.0]) == 1.0 and weight[0] == before[0] - 1
    assert (weight[1:] == 1).all() and capsys.readouterr().err.count("q1, q2") == 4
    step([float("nan")] * 3)
    step([float("nan")] * 3)
    with pytest.raises(UserError, match="q1, q2; 3 such steps in a row"):
        step([float("nan")] * 3)


def test_an_update_without_a_finite_gradient_changes_nothing_and_is_counted(folder, monkeypatch, capsys):
    def poisoned(*args):
        groups = make(*args)
        groups[1][0].dialogue.sampled_log_probs[0] = math.nan
        return groups

    make = make_groups
    monkeypatch.setattr(sys.modules[__name__], "make_groups", poisoned)
    change, metrics = one_update(folder)
    assert metrics["updates"] == metrics["bad_steps"] == 1 and metrics["grad_norm"] == 0 and not change.any()
    said = capsys.readouterr().err
    assert all(json.loads(line)["id"] in said for line in list(open(folder / "train.jsonl"))[:3])


# ------------------------------------------------------------------------------------------ between sampling and training
@torch.no_grad()
def exact(policy, groups, temperature=1.0):
    """Log-probabilities as if sampling had computed what training does."""
    for e in (e for group in groups for e in group):
        e.dialogue.sampled_log_probs = token_log_probs(policy, [[e.dialogue]], temperature)[0].tolist()


def shift(episode, offset, start=0, stop=None):
    said = episode.dialogue.sampled_log_probs
    said[start:stop] = [p + offset for p in said[start:stop]]


def test_mismatch_is_counted_over_the_tokens_that_were_sampled():
    """Mean and largest by hand; a token that was appended has none; a nan makes the mean nan, the largest inf."""
    dialogues = [Dialogue(sampled_log_probs=[-1.0, None, -2.0]), Dialogue(sampled_log_probs=[-1.0])]
    mismatch = Mismatch()
    means = mismatch.add(torch.tensor([-1.5, -9.0, -2.0, -4.0]), dialogues)
    assert means == pytest.approx([0.25, 3.0])
    found = mismatch.metrics(torch.device("cpu"))
    assert found == pytest.approx({"mismatch": 3.5 / 3, "mismatch_max": 3.0, "episodes_left_out": 0})
    mismatch.add(torch.tensor([math.nan]), dialogues[1:])
    found = mismatch.metrics(torch.device("cpu"))
    assert math.isnan(found["mismatch"]) and found["mismatch_max"] == math.inf


@pytest.mark.parametrize("old_log_probs, mini_batch_size", [("sampled", 3), ("recomputed", 1)])
def test_an_update_measures_the_mismatch_before_it(folder, old_log_probs, mini_batch_size):
    """Of noisy log-probabilities, as counted one by one. Recomputed ones tell it of all groups, not only of the first
    mini-batch's."""
    differences = []

    def prepare(policy, groups):
        shift(groups[2][0], 9, 0, 1)
        for e in (e for group in groups for e in group):
            with torch.no_grad():
                trained = token_log_probs(policy, [[e.dialogue]])[0].tolist()
            differences.extend(abs(a - b) for a, b in zip(trained, e.dialogue.sampled_log_probs, strict=True))

    _, metrics = one_update(folder, prepare=prepare, old_log_probs=old_log_probs, mini_batch_size=mini_batch_size, lr=1e-4,
                            max_tokens_per_pass=600)
    assert metrics["mismatch"] == pytest.approx(sum(differences) / len(differences), rel=1e-4)
    assert metrics["mismatch_max"] == pytest.approx(max(differences), rel=1e-4) and max(differences) > 7


def assert_same_training(a, b, rel=1e-5):
    """`assert_same`, but of what is said of the mismatch."""
    trained = lambda metrics: {k: v for k, v in metrics.items()
                               if not k.startswith("mismatch") and k != "episodes_left_out"}
    assert_same((a[0], trained(a[1])), (b[0], trained(b[1])), rel)


@pytest.mark.parametrize("mini_batch_size, lr, rel", [(3, 1.0, 1e-5), (1, 1e-3, 1e-4)])
def test_recomputed_old_log_probabilities_are_those_before_the_first_update(folder, mini_batch_size, lr, rel):
    """The update is that of exactly sampled ones, whatever was noted; also where a step has several updates, with small
    steps, which weights in float32 round."""
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


@pytest.mark.parametrize("which", ["an episode", "a group"])
def test_an_episode_above_the_largest_mismatch_is_left_out(folder, which):
    """As if it were not there, from the advantages on. One token far off in another one does not matter: the mean does."""
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
    assert [m["episodes_left_out"] for _, m in (left_out, removed, all_of_them)] == [1 if which == "an episode" else 3, 0, 0]
    assert left_out[1]["trained_tokens"] < all_of_them[1]["trained_tokens"]
    assert left_out[1]["mismatch"] > 1.1 * removed[1]["mismatch"]  # it is measured all the same
    assert (left_out[0] - all_of_them[0]).norm() > 0.01 * left_out[0].norm()


def test_a_step_that_leaves_all_episodes_out_learns_nothing_and_says_so(folder):
    change, metrics = one_update(folder, old_log_probs="recomputed", max_mismatch=0.0)
    assert not change.any() and metrics["updates"] == metrics["trained_tokens"] == metrics["loss"] == 0
    assert metrics["episodes_left_out"] == 9 and metrics["mismatch"] > 0.2
    said = []
    show_step(metrics | {"step": 1, "groups": 3}, [], rl.Config(), EnvConfig(), said.append)
    assert "9 episodes" in said[1] and "--max_mismatch" in said[1] and "nothing learned" in said[1]


def test_an_episode_without_a_finite_mismatch_is_left_out(folder):
    """A nan that was noted while sampling."""
    def poisoned(policy, groups):
        groups[1][0].dialogue.sampled_log_probs[0] = math.nan

    change, metrics = one_update(folder, prepare=poisoned, old_log_probs="recomputed", max_mismatch=1.0)
    assert metrics["episodes_left_out"] == 1 and metrics["bad_steps"] == 0 and change.isfinite().all() and change.any()


class PlantedEnv(ZoomEnv):
    """Its rewards do not depend on what is said: those of one question's episodes differ, but for the ids in `flat`."""

    flat, next_reward = set(), itertools.count()

    def end(self):
        super().end()
        self.rewards["reward"] = 0.5 if self.question["id"] in self.flat else float(next(self.next_reward))


def draw(folder, monkeypatch, flat, **settings):
    """`play_batch` by the real engine: (questions in the order of their drawing, what it returned)."""
    monkeypatch.setitem(PROTOCOLS, "videozoomer", PlantedEnv)
    rows = [json.loads(line) for line in open(folder / "train.jsonl")]
    monkeypatch.setattr(PlantedEnv, "flat", {rows[n]["id"] for n in flat})
    config = rl.Config(**{"batch_size": 3, "group_size": 2, "max_draws": 2, "max_turn_tokens": 3} | settings)
    policy = make_policy()
    engine = rl.Engine(policy, config.group_size, config, torch.Generator().manual_seed(0))
    return rows, rl.play_batch(engine, iter(rows), config, folder, 0, 1, torch.device("cpu"), tqdm(disable=True))


def test_groups_without_a_spread_are_dropped_and_new_questions_drawn(folder, monkeypatch):
    """Dynamic sampling: of 3 questions two are flat, so two more are drawn; the episodes of all are reported, only the
    others' are kept, with their advantages, and only their tokens are in the loss's denominator."""
    rows, (kept, episodes, unreadable, drawn) = draw(folder, monkeypatch, flat=(0, 2))
    assert [group[0].env.question["id"] for group in kept] == [rows[n]["id"] for n in (1, 3, 4)]
    assert drawn == 5 and len(episodes) == 10 and not unreadable
    for group in kept:
        assert sum(e.dialogue.advantage for e in group) == pytest.approx(0, abs=1e-6)
        assert all(abs(e.dialogue.advantage) > 0.1 for e in group)
    weights = MasterWeights(make_policy())
    config = rl.Config(batch_size=3, mini_batch_size=3, kl_weight=0.0)
    metrics = rl.update(weights, kept, torch.optim.SGD(weights.parameters, lr=0.0), config, 0, torch.device("cpu"))
    assert metrics["trained_tokens"] == sum(sum(e.dialogue.trained) for group in kept for e in group)


def test_drawing_ends_at_max_draws(folder, monkeypatch):
    _, (kept, episodes, _, drawn) = draw(folder, monkeypatch, flat=range(10))
    assert kept == [] and drawn == 6 and len(episodes) == 12
    assert not any(e.dialogue.features for e in episodes)  # nothing will be trained on them


def test_the_frames_of_episodes_that_are_over_are_let_go(folder):
    """At the paper's batch they would be 20 GB; the episodes can still be described."""
    policy = make_policy()
    rows = [json.loads(line) for line in open(folder / "train.jsonl")]
    config = rl.Config(batch_size=2, group_size=3, max_draws=1, max_turn_tokens=6)
    engine = rl.Engine(policy, config.group_size, config, torch.Generator().manual_seed(0))
    _, episodes, *_ = rl.play_batch(engine, iter(rows), config, folder, 0, 1, torch.device("cpu"), tqdm(disable=True))
    assert len(episodes) == 6 and not any(e.dialogue.frames for e in episodes)
    assert all(frame.image is None for e in episodes for frames in e.env.watched for frame in frames)
    assert "9 frames" in episodes[0].env.describe()


# ------------------------------------------------------------------------------------------------------- the script
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_steps_on_two_processes(folder, tmp_path, dtype):
    """rl.py from the command line: metrics of each step, a checkpoint that loads and has moved."""
    policy = make_policy()
    save_policy(policy, tmp_path / "start")
    flags = ["--model", tmp_path / "start", "--data", folder / "train.jsonl", "--out", tmp_path / "out", "--steps", 2,
             "--batch_size", 2, "--mini_batch_size", 1, "--group_size", 3, "--max_turn_tokens", 8, "--lr", 1e-3,
             "--max_draws", 1, "--format_weight", 0, "--seed", 1, "--device", "cpu", "--dtype", dtype]
    launch(2, "rl.py", flags).wait()
    metrics = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
    assert [m["step"] for m in metrics] == [1, 2]
    for key in ("reward", "accuracy", "format", "tool", "zooms", "invalid", "no_spread", "truncated", "response_tokens",
                "seconds_rollout", "seconds_update"):
        assert key in metrics[0]
    assert metrics[0]["episodes"] == 6
    assert load_policy(tmp_path / "out", dtype="auto").dtype == getattr(torch, dtype)


def test_the_learning_rate_rises(folder, tmp_path, monkeypatch):
    """By the metrics, and by what it does: at the start of a very long warm-up an optimizer step moves nothing."""
    monkeypatch.setitem(PROTOCOLS, "videozoomer", PlantedEnv)
    save_policy(make_policy(), tmp_path / "start")
    start = load_policy(tmp_path / "start").head.weight
    moved = {}
    for warmup in (2, 10 ** 12):
        flags = ["--model", tmp_path / "start", "--data", folder / "train.jsonl", "--out", tmp_path / str(warmup), "--steps", 1,
                 "--batch_size", 1, "--mini_batch_size", 1, "--group_size", 2, "--max_turn_tokens", 3, "--lr", 1e-2,
                 "--lr_warmup_steps", warmup, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["rl.py", *map(str, flags)])
        rl.main()
        metrics = json.loads((tmp_path / str(warmup) / "metrics.jsonl").read_text())
        assert metrics["lr"] == pytest.approx(1e-2 / warmup) and metrics["grad_norm"] > 0
        moved[warmup] = (load_policy(tmp_path / str(warmup)).head.weight - start).abs().max()
    assert moved[2] > 1e-3 and moved[10 ** 12] < 1e-8
