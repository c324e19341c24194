"""The gap between sampling and training: |log pi_train - log pi_sampled| of each sampled token.

Before a step's first update both are of the same policy, so what parts them is rounding, or a mistake. In
bfloat16 that is no longer small, and it can grow from turn to turn. Metrics: `gap` and `gap_max`, mean and
largest over the sampled tokens, and `gap_turn_1`, `gap_max_turn_1`, .. of each turn of the assistant. A mean
is 0 where no episode came to a turn; a largest one is inf where a log-probability is nan.

    --old_log_probs sampled      log pi_old in the loss is what was noted while sampling
    --old_log_probs recomputed   it is what a pass without gradient says before the first update
    --max_gap X                  with it: an episode whose mean gap a token is above X (or nan) is left out of
                                 the loss and of the number of tokens. Its reward still counted in its group's
                                 mean and spread: the advantages of the others stay as they are
"""

import math
from itertools import accumulate

import torch
import torch.distributed as dist

from common import UserError, sum_over_processes
from model import split_by_tokens, token_log_probs


def check_flags(config):
    """Raises UserError for settings that do not go together."""
    if config.old_log_probs not in ("sampled", "recomputed"):
        raise UserError(f"--old_log_probs must be sampled or recomputed, not {config.old_log_probs}")
    if config.max_gap is not None and config.old_log_probs == "sampled":
        raise UserError("--max_gap needs --old_log_probs recomputed: else gaps are known after the loss")


class Gap:
    """Adds gaps up by turn, pass after pass.

    num_turns: that are told apart, the same on all processes; the last one holds all later ones, too.
    left_out: episodes of this process that are not trained."""

    def __init__(self, num_turns):
        zeros = torch.zeros(num_turns, dtype=torch.float64)
        self.sums, self.tokens, self.largest, self.left_out = zeros, zeros.clone(), zeros.clone(), 0

    def add(self, log_probs, dialogues):
        """Takes what `token_log_probs` says of the dialogues, (N,). Returns the gap of each token, (N,)."""
        now, sampled = log_probs.detach().cpu().double(), [p for d in dialogues for p in d.sampled_log_probs]
        known = torch.tensor([p is not None for p in sampled])  # one that was appended has no gap
        sampled = torch.tensor([0.0 if p is None else p for p in sampled], dtype=torch.float64)
        gaps = torch.where(known, (now - sampled).abs(), now * 0)  # nan stays nan
        turns = torch.tensor([turn for d in dialogues for turn in turns_of(d)], dtype=torch.long)
        turns = turns.clamp(max=len(self.sums) - 1)
        self.sums.index_add_(0, turns, gaps)
        self.tokens.index_add_(0, turns, known.double())
        self.largest.scatter_reduce_(0, turns, gaps.nan_to_num(nan=math.inf, posinf=math.inf), "amax")
        return gaps

    def metrics(self, device):
        """Of all processes, each of which has to call it."""
        turns = range(1, len(self.sums) + 1)
        sums = dict(zip([f"gap_turn_{t}" for t in turns], self.sums.tolist()))
        tokens = dict(zip([f"tokens_turn_{t}" for t in turns], self.tokens.tolist()))
        total = sum_over_processes(sums | tokens | {"left_out": self.left_out}, device)
        largest = max_over_processes({f"gap_max_turn_{t}": self.largest[t - 1].item() for t in turns}, device)
        # of all turns, and of each
        count = sum(total[key] for key in tokens)
        metrics = {"gap": sum(total[key] for key in sums) / max(1, count), "gap_max": max(largest.values())}
        for t in turns:
            metrics[f"gap_turn_{t}"] = total[f"gap_turn_{t}"] / max(1, total[f"tokens_turn_{t}"])
            metrics[f"gap_max_turn_{t}"] = largest[f"gap_max_turn_{t}"]
        return metrics | {"episodes_left_out": total["left_out"]}


def turns_of(dialogue):
    """The turn, from 0, of each sampled token: those of a turn stand one behind the other, and between two
    turns there are others."""
    before = [False, *dialogue.trained]
    turns = accumulate(now and not last for last, now in zip(before, dialogue.trained))  # turns begun so far
    return [turn - 1 for turn, trained in zip(turns, dialogue.trained) if trained]


def max_over_processes(values, device):
    """A dict of numbers, of each the largest of all processes; all of them must have the same keys."""
    most = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return dict(zip(values, most.tolist()))


@torch.no_grad()
def find_old_log_probs(weights, groups, config, gap):
    """log pi_old of the loss, before anything has moved.

    Args:
        weights: MasterWeights. groups: lists of Episode, of this process; all processes have to call this.
        config: with old_log_probs and max_gap. gap: a Gap, which measures the pass if there is one.
    Returns: (groups, {id(dialogue): log-probabilities of its sampled tokens}); the groups lack the episodes
        that are left out, and keep their places, even if nothing is left of one."""
    if config.old_log_probs == "sampled":
        return groups, {id(e.dialogue): e.dialogue.sampled_log_probs for g in groups for e in g}
    # one pass over all of them
    old, mean_gap = {}, {}
    batches = split_by_tokens([[e.dialogue for e in g] for g in groups], config.max_tokens_per_pass)
    for batch in weights.passes(batches, backward=False):
        dialogues = [d for group in batch for d in group]
        lengths = [len(d.sampled_log_probs) for d in dialogues]
        log_probs, _ = token_log_probs(weights.policy, batch, config.temperature)
        gaps = gap.add(log_probs, dialogues)
        for d, said, differs in zip(dialogues, log_probs.split(lengths), gaps.split(lengths)):
            known = sum(p is not None for p in d.sampled_log_probs)
            old[id(d)], mean_gap[id(d)] = said.tolist(), differs.sum().item() / max(1, known)
    # without the episodes that sampling and training see too differently, or as nan
    if config.max_gap is not None:
        kept = [[e for e in g if mean_gap[id(e.dialogue)] <= config.max_gap] for g in groups]
        gap.left_out += sum(map(len, groups)) - sum(map(len, kept))
        groups = kept
    return groups, old
