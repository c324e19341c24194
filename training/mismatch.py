"""The train-inference mismatch: |log pi - log pi as sampled| of each sampled token, before a step's first
optimizer step.

Both are of the same policy, so what parts them is rounding, or a mistake. In bfloat16 it is no longer small.
Metrics: `mismatch` and `mismatch_max`, mean and largest over the sampled tokens of all processes; the largest
is inf where a log-probability is nan.

    --old_log_probs sampled      log pi_old in the loss is what was noted while sampling
    --old_log_probs recomputed   it is what a pass without gradient says before the first update
    --max_mismatch X             with it: an episode whose mean mismatch a token is above X (or nan) is left
                                 out of the loss and of the number of tokens. Its reward still counted in its
                                 group's mean and spread: the advantages of the others stay as they are
"""

import math

import torch

from common import UserError, gather, sum_over_processes
from model import split_by_tokens, token_log_probs
from protocols import protocol_of


def check_old_log_probs(config, env_config):
    """Raises UserError for settings of the old log-probabilities that do not go together."""
    if config.old_log_probs not in ("sampled", "recomputed"):
        raise UserError(f"--old_log_probs must be sampled or recomputed, not {config.old_log_probs}")
    if config.max_mismatch is not None and config.old_log_probs == "sampled":
        raise UserError("--max_mismatch needs --old_log_probs recomputed: else it is known after the loss")
    if config.old_log_probs == "sampled" and protocol_of(env_config).trains_appended_end:
        raise UserError(f"the protocol {env_config.protocol} trains an appended end token, which has no "
                        "log-probability of sampling: add --old_log_probs recomputed")


class Mismatch:
    """Adds mismatches up, pass after pass. left_out: episodes of this process that are not trained."""

    def __init__(self):
        self.sum, self.tokens, self.largest, self.left_out = 0.0, 0, 0.0, 0

    def add(self, log_probs, dialogues):
        """Takes what `token_log_probs` says of the dialogues, (N,). Returns each dialogue's mean mismatch."""
        now = log_probs.detach().cpu().double()
        means = []
        for dialogue, said in zip(dialogues, now.split([len(d.sampled_log_probs) for d in dialogues])):
            was_sampled = [p is not None for p in dialogue.sampled_log_probs]  # an appended end token was not
            sampled = [p for p in dialogue.sampled_log_probs if p is not None]
            differences = (said[was_sampled] - torch.tensor(sampled, dtype=torch.float64)).abs()
            total = differences.sum().item()
            self.sum += total
            self.tokens += len(sampled)
            self.largest = max([self.largest, *differences.nan_to_num(nan=math.inf).tolist()])
            means.append(total / max(1, len(sampled)))
        return means

    def metrics(self, device):
        """Of all processes, each of which has to call it."""
        sums = sum_over_processes({"sum": self.sum, "tokens": self.tokens, "left out": self.left_out}, device)
        return {"mismatch": sums["sum"] / max(1, sums["tokens"]), "mismatch_max": max(gather([self.largest])),
                "episodes_left_out": sums["left out"]}


@torch.no_grad()
def set_old_log_probs(weights, groups, config, mismatch):
    """Sets log pi_old of each episode's dialogue, before anything has moved.

    Args:
        weights: MasterWeights. groups: lists of Episode, of this process; all processes have to call this.
        config: with old_log_probs and max_mismatch. mismatch: a Mismatch, to which the pass is added.
    Returns the groups without the episodes that are left out; they keep their places, even if nothing is left
    of one."""
    if config.old_log_probs == "sampled":
        for group in groups:
            for e in group:
                e.dialogue.old_log_probs = e.dialogue.sampled_log_probs
        return groups
    # one pass over all of them
    dialogues = [[e.dialogue for e in group] for group in groups]
    for batch in weights.passes(split_by_tokens(dialogues, config.max_tokens_per_pass)):
        batch_dialogues = [d for group in batch for d in group]
        log_probs, _ = token_log_probs(weights.policy, batch, config.temperature)
        means = mismatch.add(log_probs, batch_dialogues)
        lengths = [len(d.sampled_log_probs) for d in batch_dialogues]
        for d, said, mean in zip(batch_dialogues, log_probs.split(lengths), means):
            d.old_log_probs, d.mismatch = said.tolist(), mean
    # without the episodes that sampling and training see too differently, or as nan
    if config.max_mismatch is not None:
        kept = [[e for e in group if e.dialogue.mismatch <= config.max_mismatch] for group in groups]
        mismatch.left_out += sum(map(len, groups)) - sum(map(len, kept))
        groups = kept
    return groups
