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
equal has no advantages, so no policy gradient: it is dropped, and new questions are drawn until the batch is
full (dynamic sampling).

Other algorithms differ from that in one place each. With n episodes in a group, T_i sampled tokens in
episode i, and s_i in place of the ratio of each of its tokens:

    --advantage dr_grpo      A_i = r_i - mean(r)                                (Dr. GRPO, arXiv 2503.20783)
    --advantage rloo         A_i = r_i - mean of the other n - 1 rewards, with one update a step that of RLOO
                             (arXiv 2402.14740), which has the KL in the reward and no mean over tokens
    --ratio sequence         s_i = exp(1/T_i * sum over its tokens of (log pi - log pi_old)), clipped as one;
                             GSPO (arXiv 2507.18071) has --loss_mean episode, and clips of some 3e-4 and 4e-4
    --loss_mean episode      1/E * sum over the E episodes of 1/T_i * sum over the tokens of episode i,
                             in place of 1/N * sum over tokens: GRPO as first published
    --no-dynamic_sampling    a batch is batch_size questions, groups of equal rewards among them: they have
                             A_i = 0 and count in N, and their tokens have the KL and entropy terms

Dr. GRPO has no 1/T_i either, so it goes with the default --loss_mean token, in which each token of a
mini-batch has the same weight; where it divides by a constant, N here is the mini-batch's own.

Metrics `mismatch`, `mismatch_max`: |log pi - log pi as sampled| before a step's first update, see
training/mismatch.py. --old_log_probs recomputed: pi_old is scored in a pass then, not noted while sampling.
A line that begins with "alarm" says what goes wrong, and why it may (training/alarms.py).

    torchrun --standalone --nproc_per_node=2 rl.py           the demo: goes on from runs/sft, minutes on a CPU
    torchrun --standalone --nproc_per_node=8 rl.py --model runs/sft-3b --data questions.jsonl

Writes to --out: the checkpoint (Hugging Face format), metrics.jsonl, skipped.jsonl, and checkpoints/, from
which the same command goes on when it was stopped.

From the paper: group 16, batch 128 and mini-batch 32 questions, clip 0.2 / 0.27, KL 0.001 (k3), entropy
0.001, learning rate 1e-6, temperature 1, reward 0.9 accuracy + 0.1 format + 0.5 tool bonus. Departures: log
pi_old is noted while sampling, not computed in a second pass (the same to 1e-4 in float32, tested); k3 is
clamped at 10 (above d = 2.61 its gradient is 0, where one token's would be thousands); drawing stops at
`max_draws` batches; std is unbiased (n - 1); the vision encoder is frozen; AdamW has betas 0.9 / 0.95 and
no weight decay; a turn has at most 1,024 tokens.
"""

import math
import random
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from common import UserError, check_bad, gather, run_main, start_processes, sum_over_processes
from model import split_by_tokens, token_log_probs
from rollout import Engine, RolloutConfig
from scale.pick import cache_gb, check_flags, load_weights, show_plan
from sources.read import read_questions
from training.alarms import Alarms
from training.decoder_check import check_decoder
from training.environment import run_environment, with_chosen_frames, with_num_frames
from training.held_out import check_held_out
from training.memory import out_of_memory
from training.metrics import UpdateMetrics, episode_metrics, show_step
from training.mismatch import Mismatch, check_old_log_probs, set_old_log_probs
from training.run import TrainConfig, TrainingRun, make_optimizer, parse_training_flags
from zoom_env import RewardWeights

MAX_KL = 10.0  # k3 of a token counts up to this


@dataclass(frozen=True)
class Config(RolloutConfig, RewardWeights, TrainConfig):
    model: str = "runs/sft"  # checkpoint to start from, and the reference
    data: str = "runs/data/train.jsonl"  # questions
    out: str = "runs/rl"  # folder for the checkpoint and the metrics
    steps: int = 70  # batches
    batch_size: int = 128  # questions a step whose groups have a spread of rewards, over all processes
    mini_batch_size: int = 32  # questions an optimizer step
    group_size: int = 16  # episodes a question
    max_draws: int = 4  # draw at most this many times batch_size questions a step
    dynamic_sampling: bool = True  # groups without a spread of rewards are dropped, and others drawn
    advantage: str = "grpo"  # of an episode: grpo, dr_grpo (not divided by std), rloo (against the others)
    ratio: str = "token"  # to the policy that played: of each token, or sequence, one of each episode
    lr: float = 1e-6  # learning rate of AdamW, constant
    lr_warmup_steps: int = 0  # steps in which the learning rate rises
    clip_low: float = 0.2  # the ratio is clipped below 1 - clip_low
    clip_high: float = 0.27  # ... and above 1 + clip_high
    kl_weight: float = 0.001  # of the KL to the reference; 0 skips the reference's pass
    entropy_weight: float = 0.001  # of the entropy bonus
    loss_mean: str = "token"  # over all sampled tokens, or over those of each episode, then over episodes
    old_log_probs: str = "sampled"  # log pi_old: as sampled, or recomputed by a pass before the first update
    max_mismatch: float | None = None  # with recomputed: an episode of a larger mean mismatch is left out
    max_turn_tokens: int | None = None  # an assistant turn is cut off here; else as trained


CHOICES = {"advantage": ("grpo", "dr_grpo", "rloo"), "ratio": ("token", "sequence"),
           "loss_mean": ("token", "episode")}
PRESETS = {
    "paper": {},
    "demo": dict(steps=24, batch_size=16, mini_batch_size=8, group_size=8, max_draws=2, lr=1e-4,
                 max_response_tokens=1500, max_rows=128, max_tokens_per_pass=4096,
                 gradient_checkpointing=False)}


# ------------------------------------------------------------------------------------------------- rollouts
def play_batch(engine, questions, config, root, rank, world, device, bar):
    """Rollouts of a full batch (dynamic sampling): draws from the iterator `questions` until batch_size
    groups of all processes have rewards that are not all equal, at most max_draws batches of questions.

    Returns (this process's groups that are kept, all its episodes, [(id, reason)] of unreadable videos,
    number of questions drawn over all processes)."""
    kept, episodes, unreadable = [], [], []
    missing, drawn, most = config.batch_size, 0, config.max_draws * config.batch_size

    def on_end(episode):
        episode.forget_images()
        bar.update()

    while missing > 0 and drawn < most:
        draw = [next(questions) for _ in range(min(missing, most - drawn))]  # the same on all processes
        drawn += len(draw)
        # each process plays its share
        groups, bad = engine.play(draw[rank::world], root, on_end=on_end)
        unreadable += bad
        for group in groups:
            episodes += group
            has_spread = group and set_advantages(group, config.advantage)
            if has_spread or group and not config.dynamic_sampling:
                kept.append(group)
            else:  # the rewards are all equal: the paper's dynamic sampling drops the group
                for episode in group:
                    episode.forget_frames()
        missing = config.batch_size - round(sum_over_processes({"kept": len(kept)}, device)["kept"])
    return kept, episodes, unreadable, drawn


# ------------------------------------------------------------------------------------------ advantages, loss
def set_advantages(group, kind="grpo"):
    """Gives each episode of a group its advantage. Returns whether their rewards differ."""
    rewards = torch.tensor([[episode.env.rewards["reward"] for episode in group]])
    advantages = group_advantages(rewards, kind)[0].tolist()
    for episode, advantage in zip(group, advantages):
        episode.dialogue.advantage = advantage
    return (rewards.max() - rewards.min()).item() > 1e-6


def group_advantages(rewards, kind="grpo"):
    """Advantages (G, n) of rewards (G, n) in each group, 0 where all are equal: (r - mean) / (std + 1e-6), or
    by another `kind`, see above."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    spread = (rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True)) > 1e-6
    if kind == "dr_grpo":
        return torch.where(spread, centred, 0.0)
    if kind == "rloo":  # r - (sum - r) / (n - 1)
        return torch.where(spread, centred * rewards.shape[1] / (rewards.shape[1] - 1), 0.0)
    return torch.where(spread, centred / (rewards.std(dim=1, keepdim=True) + 1e-6), 0.0)


def grpo_loss(log_probs, old_log_probs, advantages, episode, config, ref_log_probs=None, entropies=None):
    """The loss of each token, (N,), and a dict of sums over tokens for the metrics. `advantages` (E,) are of
    the episodes, `episode` (N,) is the episode of each token; the others are (N,)."""
    # the clipped policy gradient
    log_ratio = log_probs - old_log_probs
    if config.ratio == "sequence":  # the mean over an episode's tokens, for each of them
        own = episode.to(log_ratio.device)
        sums = torch.zeros_like(advantages).index_add(0, own, log_ratio)
        log_ratio = (sums / torch.bincount(own, minlength=len(sums)).clamp(min=1))[own]
    advantages = advantages[episode]  # (N,)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    stats = {"clipped_low": ((ratio < 1 - config.clip_low) & (advantages < 0)).sum(),
             "clipped_high": ((ratio > 1 + config.clip_high) & (advantages > 0)).sum()}
    # the KL to the reference
    if ref_log_probs is not None:
        d = (ref_log_probs - log_probs).clamp(max=20)  # beyond, exp and its gradient could be infinite
        kl = (d.exp() - d - 1).clamp(max=MAX_KL)
        loss = loss + config.kl_weight * kl
        stats |= {"kl": kl.sum(), "kl_clamped": (kl == MAX_KL).sum()}
    # the entropy bonus
    if entropies is not None:
        loss = loss - config.entropy_weight * entropies
        stats["entropy"] = entropies.sum()
    return loss, {name: value.item() for name, value in stats.items()}


# ----------------------------------------------------------------------------------------------- the update
def update(weights, groups, optimizer, config, rank, device):
    """One pass over this process's groups, in mini-batches: an optimizer step for each. Each process deals
    its groups to the mini-batches round-robin, starting at its rank, so that all of them are of about the
    same size. Returns metrics over all processes."""
    policy, reference = weights.policy, weights.reference
    num_batches = math.ceil(config.batch_size / config.mini_batch_size)  # the same on all processes
    metrics, mismatch = UpdateMetrics(device), Mismatch()
    groups = set_old_log_probs(weights, groups, config, mismatch)
    for m in range(num_batches):
        mini = groups[(m + rank) % num_batches::num_batches]
        # the loss's denominator: the trained tokens of the mini-batch, over all processes
        lengths = [sum(e.dialogue.trained) for group in mini for e in group]
        counts = sum_over_processes({"tokens": sum(lengths), "episodes": len(lengths)}, device)
        tokens, episodes = counts["tokens"], counts["episodes"]
        if not tokens:
            continue
        batches = split_by_tokens([[e.dialogue for e in group] for group in mini], config.max_tokens_per_pass)
        for batch in weights.passes(batches):
            # log pi_old and the advantages
            dialogues = [d for group in batch for d in group]
            old = torch.tensor([p for d in dialogues for p in d.old_log_probs], device=device)
            advantages = torch.tensor([d.advantage for d in dialogues], device=device)
            episode = torch.tensor([i for i, d in enumerate(dialogues) for _ in d.old_log_probs],
                                   dtype=torch.long)
            # what policy and reference say now
            log_probs, entropies = token_log_probs(policy, batch, config.temperature,
                                                   entropy=config.entropy_weight != 0)
            ref_log_probs = None
            if reference is not None:
                with torch.no_grad():
                    ref_log_probs, _ = token_log_probs(reference, batch, config.temperature)
            # this pass's part of the loss, whose gradient is added to that of the passes before
            loss, stats = grpo_loss(log_probs, old, advantages, episode, config, ref_log_probs, entropies)
            if config.loss_mean == "episode":  # each token's weight is 1 / its episode's tokens / episodes
                own_tokens = torch.bincount(episode)[episode].to(device)
                loss = loss * tokens / episodes / own_tokens
            loss = loss.sum() / tokens
            loss.backward()
            metrics.add_pass(stats | {"loss": loss.item() * tokens})
            if metrics.updates == 0 and config.old_log_probs == "sampled":  # the policy has not moved yet
                mismatch.add(log_probs, dialogues)
        # one optimizer step on the gradients of all processes
        ids = [group[0].env.question["id"] for group in mini if group]
        norm = weights.step(optimizer, config.max_grad_norm, ids)
        metrics.end_update(tokens, norm)
    return metrics.means() | mismatch.metrics(device)


# --------------------------------------------------------------------------------------------------- the loop
def endless(rows, seed):
    """The rows in a new random order for each pass, for ever."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(rows, len(rows))


def train(weights, rows, config, run, rank, world, device, val):
    policy, optimizer = weights.policy, make_optimizer(weights, config)
    generator = torch.Generator(device).manual_seed(config.seed * 1000 + rank)
    progress = run.start(weights, optimizer, config.steps, {"step": 0, "drawn": 0, "skipped": []},
                         generator, val)
    engine = Engine(weights.player, config.group_size, config, generator)
    with weights.gathered():
        check_decoder(engine.decoder)
    weights.gather_metrics()  # that of the check does not count
    alarms = Alarms(config, weights.player, run.metrics.written())
    if rank == 0:
        print(f"rl: rollouts in {policy.dtype}, decode step {engine.decoder.path}")
    root, skipped, total_drawn = Path(config.data).parent, progress["skipped"], progress["drawn"]
    questions = islice(endless(rows, config.seed), total_drawn, None)
    for step in range(progress["step"] + 1, config.steps + 1):
        began = time.time()
        lr = config.lr * min(1.0, step / max(1, config.lr_warmup_steps))
        optimizer.param_groups[0]["lr"] = lr
        # rollouts
        policy.eval()
        with tqdm(desc=f"step {step} rollout", unit="episode", dynamic_ncols=True, disable=rank > 0,
                  leave=False) as bar, weights.gathered():
            kept, episodes, bad, drawn = play_batch(engine, questions, config, root, rank, world, device, bar)
            engine.release()  # its memory is the update's now
        played = time.time()
        total_drawn += drawn
        skipped = skipped + gather(bad)
        check_bad(skipped, max(len(rows), total_drawn), config.max_bad, config.data)
        # the update
        policy.train()
        metrics = {"step": step} | episode_metrics(episodes, len(kept), config.group_size, device)
        if metrics["groups"]:
            metrics |= update(weights, kept, optimizer, config, rank, device)
        metrics |= {"seconds_rollout": played - began, "seconds_update": time.time() - played,
                    "seconds": time.time() - began, "lr": lr, "skipped": len(skipped)}
        show_step(metrics, episodes, config, run.metrics.print)
        for line in alarms.look(metrics):
            run.metrics.print(line)
        run.end_step(metrics, {"step": step, "drawn": total_drawn, "skipped": skipped})
    return skipped


def main():
    config = parse_training_flags(Config, __doc__, PRESETS, (
        "steps", "batch_size", "mini_batch_size", "max_draws", "max_turn_tokens", "max_response_tokens",
        "max_rows"))
    if config.plan:
        show_plan("rl", config)
    rank, world, device = start_processes(config.device)
    # all that can be wrong, before a model loads
    check_flags(config, world)
    if config.group_size < 2:
        raise UserError("--group_size must be at least 2: advantages compare the episodes of a question")
    for flag, known in CHOICES.items():
        if getattr(config, flag) not in known:
            raise UserError(f"--{flag} must be {' or '.join(known)}, not {getattr(config, flag)}")
    if not config.temperature > 0:
        raise UserError("--temperature must be above 0: at 0 all episodes of a question are the same")
    rows, bad = read_questions(config.data, config.max_bad)
    chosen, without = with_chosen_frames(rows, config)
    rows = list(chosen.values())
    env_config = run_environment(config.model, config)
    check_old_log_probs(config, env_config)
    val_rows = None
    if config.val:
        val_rows = check_held_out(*read_questions(config.val, config.max_bad), config.val, env_config)
        val_rows = with_num_frames(val_rows, config)
    run = TrainingRun("rl", config, {"model": config.model, "questions": config.data}, rank, world, device)
    if run.finished:
        return
    # the policy and the reference
    torch.manual_seed(config.seed)
    weights = load_weights(config.model, config, env_config, device, with_reference=config.kl_weight > 0)
    size_gb = run.once("cache_gb", lambda: cache_gb(weights.player, config, weights))
    config = replace(config, cache_gb=size_gb, max_turn_tokens=env_config.max_turn_tokens)
    val = None
    if config.val:
        val = val_rows, Path(config.val).parent, config
    if rank == 0:
        print(f"rl: {len(rows)} questions from {config.data}, model {config.model}, {weights.describe()}, "
              f"{world} process(es) on {device}; a step is {config.batch_size} questions x "
              f"{config.group_size} episodes, learning rate {config.lr}")
    run.finish(bad + without + train(weights, rows, config, run, rank, world, device, val))


if __name__ == "__main__":
    run_main(main, out_of_memory)
