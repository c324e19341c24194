"""Alarms of a run of RL: one line when something begins to go wrong, with its likely cause and the flag.

    alarms = Alarms(config, policy, rows)     rows: of metrics.jsonl, where a run goes on
    alarms.look(metrics)                      after each step: the lines to print

Each alarm is a row of ALARMS: a metric, a side, and a limit that is computed from the run's own start: the
best value of the first START steps, so that a run that breaks in its second step does not hide it. It is said
after IN_A_ROW steps beyond the limit, as one step of a small batch may be bad luck, and once in a run. The
metrics are all that it depends on, so a run that goes on knows from metrics.jsonl what was said before.

What the limits come from: of the demo's good run (24 steps, seed 0), which ends with 98% right, the values at
the start and at their worst are

    metric             start, worst      limit          why there
    zooms              1.68, 0.91        0.34           one look where there were four (0.25) may be learned;
                                                        0.05 where it never zoomed
    format             0.98, 0.95        0.69           slips of some percent are of sampling
    no_spread_wrong    0, 0.03           start + 0.3,   groups that are all right teach nothing, either, and
                                         0.8 at most    are no fault: only wrong ones count, and data may
                                                        begin with many
    truncated          0, 0.004          0.1            start + 0.1: a limit that begins to bind; 0.5 at most
    entropy, low       0.020, 0.004      0.002          a tenth, and only while more than a tenth is wrong: a
                                                        policy that is right may be sure
    entropy, high      0.017, 0.020      0.085          five times: it says what it never said at the start
    kl                 2e-4, 0.01        0.2            begins at 0, so 20 times the start is bounded by 0.2
                                                        below (seed 1 reaches 0.08), and by 0.5 above: far
                                                        from the reference on nearly every token, also where
                                                        that began at once
    mismatch           1e-7, 1e-7        1e-5           ten times; rounding may be 1e-5 in any case, and never
                                                        1e-4 in float32 or 0.1 in bfloat16 (docs/precision.md)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

START, IN_A_ROW = 3, 2  # steps
OF_UPDATES = "entropy", "kl"  # metrics that are 0 in a step without an optimizer step


@dataclass(frozen=True)
class Alarm:
    """A row of ALARMS. start: the metric's value at the run's start. run: an Alarms."""

    metric: str
    side: int  # -1: below the limit is bad, 1: above
    limit: Callable  # (run, start) -> number
    says: str  # what has begun
    cause: Callable  # (run, start, metrics) -> what it may come from, and the flag
    silent: Callable = lambda run: False  # whether the run cannot do otherwise
    counts: Callable = lambda metrics: True  # whether a step with these metrics can be bad at all


class Alarms:
    """What a run has seen and said so far.

    Args:
        config: rl.py's. policy: what plays, with its env_config and dtype.
        rows: metrics of the steps that were done before, of which nothing is said again."""

    def __init__(self, config, policy, rows=()):
        self.config, self.env_config, self.dtype = config, policy.env_config, policy.dtype
        self.alarms = [alarm for alarm in ALARMS if not alarm.silent(self)]
        self.seen = [[] for _ in self.alarms]  # of each alarm, the values of its first steps
        self.in_a_row = [0] * len(self.alarms)
        self.said = [False] * len(self.alarms)
        for metrics in rows:
            self.look(metrics)

    def look(self, metrics):
        """The lines that a step's metrics give reason for: a list, nearly always empty."""
        lines = []
        for i, alarm in enumerate(self.alarms):
            value = value_of(alarm, metrics)
            if value is None:
                continue
            # the start is the best of the first values
            if len(self.seen[i]) < START:
                self.seen[i].append(value)
            start = alarm.side * min(alarm.side * value for value in self.seen[i])
            # beyond the limit, and not for the first time
            limit = alarm.limit(self, start)
            is_bad = alarm.side * value > alarm.side * limit and alarm.counts(metrics)
            self.in_a_row[i] = self.in_a_row[i] + 1 if is_bad else 0
            if self.in_a_row[i] >= IN_A_ROW and not self.said[i]:
                self.said[i] = True
                lines.append(f"alarm: {alarm.says}: {alarm.metric} {value:.2g} in step {metrics['step']}, "
                             f"{start:.2g} at the start (limit {limit:.2g}): "
                             f"{alarm.cause(self, start, metrics)}")
        return lines


def value_of(alarm, metrics):
    """A step's value, or None where the step has none. What is not finite is infinitely bad."""
    without_updates = alarm.metric in OF_UPDATES and not metrics.get("updates")
    if alarm.metric not in metrics or without_updates:
        return None
    value = metrics[alarm.metric]  # null in metrics.jsonl where it was not finite
    return value if value is not None and math.isfinite(value) else alarm.side * math.inf


# -------------------------------------------------------------------------------------------------- the table
def large_step(run):
    return f"steps are too large (--lr {run.config.lr:g}, --max_grad_norm, --lr_warmup_steps)"


def why_cut_off(run, start, metrics):
    if start > 0.5:  # from the first step on
        return (f"--max_turn_tokens ({run.env_config.max_turn_tokens}) or --max_response_tokens "
                f"({run.config.max_response_tokens}) is too small for what it has learned to say")
    return f"it no longer ends what it says, as {large_step(run)}, or it needs more (--max_turn_tokens)"


def by_cut_off(cause):
    """A cause, but where most episodes are cut off this goes first."""
    def cause_of(run, start, metrics):
        if metrics["truncated"] > 0.5:
            return "most episodes are cut off (--max_turn_tokens; the alarm of it says more)"
        return cause(run, start, metrics)
    return cause_of


@by_cut_off
def why_few_zooms(run, start, metrics):
    if start < 0.05:
        return "it has never learned the tool; sft.py on trajectories that zoom comes first"
    if run.config.tool_weight == 0:
        return "no zoom is paid for, as --tool_weight is 0"
    return f"questions may need none (--tool_weight, --num_frames), or {large_step(run)}"


@by_cut_off
def why_bad_format(run, start, metrics):
    if run.config.format_weight == 0:
        return "it is not paid for, as --format_weight is 0"
    return f"{large_step(run)}, or --kl_weight is too small"


@by_cut_off
def why_stuck(run, start, metrics):
    return f"--data is too hard for it, --group_size too small, or {large_step(run)}"


def most_mismatch(run, start):
    return min(max(10 * start, 1e-5), 1e-4 if run.dtype == torch.float32 else 0.1)


ALARMS = (
    Alarm("truncated", 1, lambda run, start: min(start + 0.1, 0.5), "episodes are cut off", why_cut_off),
    Alarm("zooms", -1, lambda run, start: max(start / 5, 0.05), "zooms collapse", why_few_zooms,
          silent=lambda run: run.env_config.max_zooms == 0),
    Alarm("format", -1, lambda run, start: 0.7 * start, "the format decays", why_bad_format),
    Alarm("no_spread_wrong", 1, lambda run, start: min(start + 0.3, 0.8),
          "groups are wrong in all answers alike, which teaches nothing", why_stuck),
    Alarm("entropy", -1, lambda run, start: start / 10, "the entropy collapses", lambda run, *_:
          f"it tries nothing new (--entropy_weight, --clip_high, --temperature), or {large_step(run)}",
          silent=lambda run: run.config.entropy_weight == 0,
          counts=lambda metrics: metrics["accuracy"] < 0.9),
    Alarm("entropy", 1, lambda run, start: 5 * start, "the entropy explodes",
          lambda run, *_: f"{large_step(run)}, or --entropy_weight is too large",
          silent=lambda run: run.config.entropy_weight == 0),
    Alarm("kl", 1, lambda run, start: min(max(20 * start, 0.2), 0.5), "the KL runs away",
          lambda run, *_: f"{large_step(run)}, or --kl_weight is too small",
          silent=lambda run: run.config.kl_weight == 0),
    Alarm("mismatch", 1, most_mismatch, "sampling and scoring differ", lambda *_:
          "a fault in what samples or what scores (does --no-compile help?); against rounding there are "
          "--old_log_probs recomputed, --max_mismatch, --dtype float32"),
)
