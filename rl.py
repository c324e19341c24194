"""Stage 2, reinforcement learning: GRPO written out (paper, section 3.3).

For each question the policy plays a group of n episodes with rewards r_1 .. r_n:

    A_i   = (r_i - mean(r)) / (std(r) + 1e-6)                 one advantage for all tokens of episode i
    ratio = exp(log pi(token) - log pi_old(token))
    d     = log pi_ref(token) - log pi(token)
    loss  = 1/N * sum over sampled tokens of
            - min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
            + kl_weight * min(exp(d) - d - 1, 10) - entropy_weight * H(pi)

pi_old is the policy that played the episodes, pi_ref the SFT model, H the entropy. N counts the sampled
tokens of a mini-batch over all processes: not the prompt, tool text and frames. A group whose rewards are all
equal teaches nothing and is dropped; new questions are drawn until the batch is full.

Metrics `gap`, `gap_max`, `gap_turn_1`, ..: |log pi - log pi as sampled| before a step's first update, by turn
(scale/gap.py). --old_log_probs recomputed: pi_old is scored in a pass then, not noted while sampling.
--max_gap: an episode of a larger mean gap is left out of the loss and of N, not of its group's mean.
--loss_mean episode: the mean over an episode's tokens comes first, then the one over episodes.

    torchrun --standalone --nproc_per_node=2 rl.py           the demo: goes on from runs/sft, minutes on a CPU
    torchrun --standalone --nproc_per_node=8 rl.py --model runs/sft-3b --data questions.jsonl

Writes to --out: the checkpoint (Hugging Face format), metrics.jsonl, skipped.jsonl, and checkpoints/, from
which the same command goes on when it was stopped.

From the paper: group 16, batch 128 and mini-batch 32 questions, clip 0.2 / 0.27, KL 0.001 (k3), entropy
0.001, learning rate 1e-6, temperature 1, reward 0.9 accuracy + 0.1 format + 0.5 tool bonus. Departures: log
pi_old is noted while sampling, not computed in a second pass (the same to 1e-4 in float32, tested); k3 is
clamped at 10 (above d = 2.61 its gradient is 0, where one token's would be thousands); drawing stops at
`max_draws` batches; std is the sample's (n - 1); the vision encoder is frozen; AdamW has betas 0.9 / 0.95 and
no weight decay; a turn has at most 1,024 tokens.
"""

import math
import random
import time
from collections import Counter
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from common import UserError, check_bad, gather, parse_flags, run_main, start_processes, sum_over_processes
from data_prep import read_questions
from model import split_by_tokens, token_log_probs
from rollout import Engine, RolloutConfig
from scale.first_day import check_decoder
from scale.gap import Gap, check_flags, find_old_log_probs
from scale.metrics import episode_metrics, show_step
from scale.plan import plan_main
from scale.sharding import load_weights
from scale.training import AT_LEAST_ONE, TrainConfig, TrainingRun
from sources.overview import use_overview
from sources.protocols import check_end_tokens, use_protocol
from zoom_env import RewardWeights

MAX_KL = 10.0  # k3 of a token counts up to this
PER_TOKEN = "loss", "clipped_low", "clipped_high", "kl", "kl_clamped", "entropy"  # metrics of an update


@dataclass(frozen=True)
class Config(RolloutConfig, RewardWeights, TrainConfig):
    model: str | None = None  # checkpoint to start from, and the reference; without it, runs/sft
    data: str = "runs/data/train.jsonl"  # questions
    out: str = "runs/rl"  # folder for the checkpoint and the metrics
    steps: int = 70  # batches
    batch_size: int = 128  # questions a step whose groups have a spread of rewards, over all processes
    mini_batch_size: int = 32  # questions an optimizer step
    group_size: int = 16  # episodes a question
    max_draws: int = 4  # draw at most this many times batch_size questions a step
    lr: float = 1e-6  # learning rate of AdamW, constant
    lr_warmup_steps: int = 0  # steps in which the learning rate rises
    clip_low: float = 0.2  # the ratio counts down to 1 - clip_low
    clip_high: float = 0.27  # ... and up to 1 + clip_high
    kl_weight: float = 0.001  # of the KL to the reference; 0 skips the reference's pass
    entropy_weight: float = 0.001  # of the entropy bonus
    loss_mean: str = "token"  # over all sampled tokens, or over those of each episode, then over episodes
    old_log_probs: str = "sampled"  # log pi_old: as sampled, or recomputed by a pass before the first update
    max_gap: float | None = None  # with recomputed: an episode of a larger mean gap a token is left out
    on_host: list[str] = ()  # of reference and features, what is kept in host memory between uses
    max_zooms: int | None = None  # zooms in an episode; without it, as the checkpoint was trained
    show_every: int = 10  # steps between printed episodes


DEMO = dict(model="runs/sft", steps=24, batch_size=16, mini_batch_size=8, group_size=8, max_draws=2, lr=1e-4,
            max_turn_tokens=160, max_response_tokens=1500, max_rows=128, max_tokens_per_pass=4096,
            gradient_checkpointing=False, show_every=5)


# --------------------------------------------------------------------------------- rollouts, advantages, loss
def play_batch(engine, questions, config, root, rank, world, device, bar,
               play=None, total=sum_over_processes):
    """Rollouts of a full batch: draws from the iterator `questions` until batch_size groups of all processes
    have a spread of rewards, at most max_draws batches of them. Returns (this process's groups with a spread,
    all its episodes, [(id, reason)] of unreadable videos, number of questions drawn over all processes)."""
    kept, episodes, skipped, play = [], [], [], play or engine.play
    missing, drawn = config.batch_size, 0
    while missing > 0 and drawn < config.max_draws * config.batch_size:
        draw = [next(questions) for _ in range(min(missing, config.max_draws * config.batch_size - drawn))]
        drawn += len(draw)  # the same on all processes

        def ended(e):
            e.dialogue.frames, e.env.watched = [], e.env.when_watched()  # features are there: images can go
            bar.update()

        # each process plays its share, and keeps the groups with a spread
        groups, bad = play(draw[rank::world], root, on_end=ended)
        skipped += bad
        for group in groups:
            episodes += group
            if group and set_advantages(group):
                kept.append(group)
            else:
                for e in group:
                    e.dialogue.features = []  # no longer needed
        missing = config.batch_size - round(total({"kept": len(kept)}, device)["kept"])
    return kept, episodes, skipped, drawn


def set_advantages(group):
    """Gives each episode of a group its advantage. Returns whether any is not 0."""
    advantages = group_advantages(torch.tensor([[e.env.rewards["reward"] for e in group]]))[0].tolist()
    for e, advantage in zip(group, advantages):
        e.dialogue.advantage = advantage
    return any(advantages)


def group_advantages(rewards):
    """Advantages (G, n) of rewards (G, n): (r - mean) / (std + 1e-6) in each group, 0 where all are equal."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    spread = (rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True)) > 1e-6
    return torch.where(spread, centred / (rewards.std(dim=1, keepdim=True) + 1e-6), 0.0)


def grpo_loss(log_probs, old_log_probs, advantages, episode, config, ref_log_probs=None, entropies=None):
    """The loss of each token, (N,), and a dict of sums over tokens for the metrics. `advantages` (E,) are of
    the episodes, `episode` (N,) is the episode of each token; the others are (N,)."""
    # the clipped policy gradient
    advantages = advantages[episode]  # (N,)
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    stats = {"clipped_low": ((ratio < 1 - config.clip_low) & (advantages < 0)).sum(),
             "clipped_high": ((ratio > 1 + config.clip_high) & (advantages > 0)).sum(),
             "kl": torch.zeros(()), "kl_clamped": torch.zeros(()), "entropy": torch.zeros(())}
    # the KL to the reference, and the entropy bonus
    if ref_log_probs is not None:
        d = (ref_log_probs - log_probs).clamp(max=20)  # beyond, exp and its gradient could be infinite
        kl = (d.exp() - d - 1).clamp(max=MAX_KL)
        loss, stats["kl"], stats["kl_clamped"] = loss + config.kl_weight * kl, kl.sum(), (kl == MAX_KL).sum()
    if entropies is not None:
        loss, stats["entropy"] = loss - config.entropy_weight * entropies, entropies.sum()
    return loss, {k: v.item() for k, v in stats.items()}


def update(weights, groups, optimizer, config, rank, device, total=sum_over_processes):
    """One pass over this process's groups, in mini-batches: an optimizer step for each. Each process deals
    its groups to the mini-batches in turn, starting at its rank, so that all of them are of about the same
    size. Returns metrics over all processes."""
    num_batches = math.ceil(config.batch_size / config.mini_batch_size)  # the same on all processes
    metrics, updates, policy, reference = Counter(), 0, weights.policy, weights.reference
    gap = Gap(policy.env_config.max_zooms + 1)
    groups, old_log_probs = find_old_log_probs(weights, groups, config, gap)
    for m in range(num_batches):
        mini = groups[(m + rank) % num_batches::num_batches]
        lengths = [sum(e.dialogue.trained) for g in mini for e in g]
        tokens, episodes = total({"t": sum(lengths), "e": len(lengths)}, device).values()
        if not tokens:
            continue
        sums = Counter(dict.fromkeys(PER_TOKEN, 0.0))
        batches = split_by_tokens([[e.dialogue for e in g] for g in mini], config.max_tokens_per_pass)
        for batch in weights.passes(batches):
            # log pi_old and the advantages
            dialogues = [d for group in batch for d in group]
            old = torch.tensor([p for d in dialogues for p in old_log_probs[id(d)]], device=device)
            advantages = torch.tensor([d.advantage for d in dialogues], device=device)
            episode = torch.tensor([i for i, d in enumerate(dialogues) for _ in old_log_probs[id(d)]])
            # what policy and reference say now
            temperature, with_entropy, ref = config.temperature, config.entropy_weight != 0, None
            log_probs, entropies = token_log_probs(policy, batch, temperature, with_entropy)
            if reference is not None:
                with torch.no_grad():
                    ref, _ = token_log_probs(reference, batch, temperature)
            # this pass's part of the loss, whose gradient is added to that of the passes before
            loss, stats = grpo_loss(log_probs, old, advantages, episode, config, ref, entropies)
            if config.loss_mean == "episode":
                loss = loss * tokens / episodes / torch.bincount(episode)[episode].to(device)
            loss = loss.sum() / tokens
            loss.backward()
            stats["loss"] = loss.item() * tokens
            if updates == 0 and config.old_log_probs == "sampled":  # the policy has not moved yet
                gap.add(log_probs, dialogues)
            sums.update(stats)
        # one optimizer step on the gradients of all processes
        ids = [g[0].env.question["id"] for g in mini if g]
        norm = weights.step(optimizer, config.max_grad_norm, config.max_bad_steps, ids)
        metrics["grad_norm" if math.isfinite(norm) else "bad_steps"] += norm if math.isfinite(norm) else 1
        updates += 1
        metrics.update(sum_over_processes(sums, device) | {"tokens": tokens})
    bad_steps = metrics["bad_steps"]
    return {k: metrics[k] / max(1, metrics["tokens"]) for k in PER_TOKEN} | {
        "updates": updates, "bad_steps": bad_steps, "trained_tokens": metrics["tokens"],
        "grad_norm": metrics["grad_norm"] / max(1, updates - bad_steps)} | gap.metrics(device)


# --------------------------------------------------------------------------------------------------- the loop
def endless(rows, seed):
    """The rows in a new random order for each pass, for ever."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(rows, len(rows))


def train(weights, rows, config, run, rank, world, device, val):
    policy, rewards = weights.policy, {f.name: getattr(config, f.name) for f in fields(RewardWeights)}
    max_zooms = policy.env_config.max_zooms if config.max_zooms is None else config.max_zooms
    policy.env_config = replace(policy.env_config, max_zooms=max_zooms, **rewards)
    optimizer = torch.optim.AdamW(weights.parameters, lr=config.lr, betas=(config.beta1, config.beta2),
                                  weight_decay=config.weight_decay, fused=True)
    generator = torch.Generator(device).manual_seed(config.seed * 1000 + rank)
    progress = run.start(weights, optimizer, config.steps, {"step": 0, "drawn": 0, "skipped": []},
                         generator, val)
    engine = Engine(weights.player, config.group_size, run.config, generator)  # the cache's size is found
    with weights.gathered():
        check_decoder(engine.decoder)
    weights.gather_metrics()  # that of the check does not count
    if rank == 0:
        print(f"rl: rollouts in {policy.dtype}, decode step {engine.decoder.path}")
    root, skipped, total_drawn = Path(config.data).parent, progress["skipped"], progress["drawn"]
    questions = islice(endless(rows, config.seed), total_drawn, None)
    for step in range(progress["step"] + 1, config.steps + 1):
        began = time.time()
        lr = optimizer.param_groups[0]["lr"] = config.lr * min(1.0, step / max(1, config.lr_warmup_steps))
        # rollouts
        policy.eval()
        with tqdm(desc=f"step {step} rollout", unit="episode", dynamic_ncols=True, disable=rank > 0,
                  leave=False) as bar, weights.gathered():
            kept, episodes, bad, drawn = play_batch(engine, questions, config, root, rank, world, device, bar,
                                                    run.interruptible(engine.play, ([], [])), run.total)
            engine.release()  # its memory is the update's now
        played, total_drawn = time.time(), total_drawn + drawn
        skipped = skipped + gather(bad)
        check_bad(skipped, max(len(rows), total_drawn), config.max_bad, config.data)
        # the update
        policy.train()
        metrics = {"step": step} | episode_metrics(episodes, len(kept), config.group_size, device)
        if metrics["groups"]:
            metrics |= update(weights, kept, optimizer, config, rank, device, run.total)
        metrics |= {"seconds_rollout": played - began, "seconds_update": time.time() - played,
                    "seconds": time.time() - began, "lr": lr, "skipped": len(skipped)}
        show_step(metrics, episodes, config, run.metrics.print)
        run.end_step(metrics, {"step": step, "drawn": total_drawn, "skipped": skipped})
    return skipped


def main():
    config = parse_flags(Config, __doc__, DEMO, (
        "steps", "batch_size", "mini_batch_size", "max_draws", "max_turn_tokens", "max_response_tokens",
        "max_rows", "show_every", *AT_LEAST_ONE))
    if config.plan:
        return plan_main("rl", config)
    rank, world, device = start_processes(config.device, config.timeout_min)
    if config.group_size < 2:
        raise UserError("--group_size must be at least 2: advantages compare the episodes of a question")
    if config.loss_mean not in ("token", "episode"):
        raise UserError(f"--loss_mean must be token or episode, not {config.loss_mean}")
    if not config.temperature > 0:
        raise UserError("--temperature must be above 0: at 0 all episodes of a question are the same")
    check_flags(config)
    if config.model == DEMO["model"] and not Path(config.model).exists():
        raise UserError("no runs/sft yet: run python sft.py first, or name a checkpoint with --model")
    rows, bad = read_questions(config.data, config.max_bad)
    val = config.val and (read_questions(config.val, config.max_bad)[0], Path(config.val).parent, config)
    run = TrainingRun("rl", config, {"model": config.model, "questions": config.data}, rank, world, device)
    if run.finished:
        return
    config = run.config  # with what was left to the memory plan
    torch.manual_seed(config.seed)
    weights = load_weights(config.model, config, device, with_reference=config.kl_weight > 0)
    policy = weights.policy
    policy.env_config = use_protocol(policy.env_config, config, config.model)
    check_end_tokens(config, policy.env_config)
    policy.env_config, rows, without = use_overview(policy.env_config, rows, config.overview, config.max_bad)
    if rank == 0:
        print(f"rl: {len(rows)} questions from {config.data}, model {config.model}, {weights.describe()}, "
              f"{world} process(es) on {device}; a step is {config.batch_size} questions x "
              f"{config.group_size} episodes, learning rate {config.lr}")
    run.finish(bad + without + train(weights, rows, config, run, rank, world, device, val))


if __name__ == "__main__":
    run_main(main)
