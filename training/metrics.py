"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases, and a bar with the time left.

    metrics = Metrics(out, total_steps, "rl", config.tensorboard, config.wandb, done, rank)
    metrics.write({"step": 1, "loss": 0.5, ...})        once a step
    metrics.print("...")                                a line above the bar
    metrics.close()

A run that goes on after step N calls `Metrics.cut(out, N)` first and gives N as `done`: then each step stands
once in metrics.jsonl, and TensorBoard hides what is made again. In Weights & Biases the run keeps its id, and
what the server has of later steps stays there. Offline, a run that goes on writes the steps from N + 1 on
into a folder of its own, beside that of before, which may lack the last ones before a kill or have some after
N: only metrics.jsonl has each once.
"""

import json
import math
import os
import secrets
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from common import UserError, first_line, gather, sum_over_processes, write_json
from zoom_env import REWARD_PARTS

SHOW_EVERY = 5  # steps between printed episodes
FILES = r"metrics\.jsonl|tensorboard|wandb|wandb_run\.json"  # that it writes


class Metrics:
    """Writes a run's numbers; does nothing but on the first process.

    Args:
        out: the run's folder: metrics.jsonl, tensorboard/, wandb/ and wandb_run.json are in it.
        total_steps: of the whole run.
        name: of the bar, and of the run in Weights & Biases.
        tensorboard: whether to write for TensorBoard, too.
        wandb: project in Weights & Biases, or None. WANDB_MODE=offline writes into `out` alone.
        done: steps that are there already.
    Raises UserError where Weights & Biases refuses; the packages are there (`check_installed`)."""

    def __init__(self, out, total_steps, name, tensorboard=False, wandb=None, done=0, rank=0):
        self.out, self.rank, self.board, self.run = Path(out), rank, None, None
        if rank == 0 and tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            # later steps of before, which a run that goes on makes again, are not shown
            self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=done + 1)
        if rank == 0 and wandb is not None:
            self.run = begin_wandb(self.out, wandb, name, done)
        self.bar = tqdm(total=total_steps, initial=done, desc=name, unit="step", dynamic_ncols=True,
                        disable=rank > 0)

    def write(self, metrics):
        """The numbers of a step: a dict with "step". What is no number goes to metrics.jsonl alone, as null
        if it is nan."""
        if self.rank > 0:
            return
        path = self.out / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({key: finite(value) for key, value in metrics.items()}) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        step = metrics["step"]
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and k != "step"}
        if self.board:
            for key, value in numbers.items():
                self.board.add_scalar(key, value, step)
            self.board.flush()
        if self.run:
            self.run.log(numbers, step=step)
        shown = {key: f"{numbers[key]:.4f}" for key in ("loss", "reward") if key in numbers}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def print(self, text):
        """A line, or several, above the bar; of the first process."""
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()

    def written(self):
        """The numbers of the steps that are done, of the first process; none of the others."""
        path = self.out / "metrics.jsonl"
        if self.rank > 0 or not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def close(self):
        """The run has ended."""
        self.bar.close()
        if self.board:
            self.board.close()
        if self.run:
            self.run.finish()

    @staticmethod
    def cut(out, step):
        """Takes the lines after `step` out of metrics.jsonl, and those that a kill or a power cut damaged.
        All other bytes stay; the file is never seen half written."""
        path = Path(out) / "metrics.jsonl"
        if not path.exists():
            return
        *lines, _ = path.read_bytes().split(b"\n")  # what follows the last end of a line is cut off
        kept = [line + b"\n" for line in lines if step_of(line) <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(kept))
        os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------ the parts
def finite(value):
    """None in place of nan and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def step_of(line):
    """The step of a line of metrics.jsonl; infinity of one that is damaged."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf


def check_installed(tensorboard, wandb):
    """Raises UserError where a package that a flag needs is missing."""
    for package, wanted in (("tensorboard", tensorboard), ("wandb", wandb is not None)):
        if wanted and find_spec(package) is None:
            raise UserError(f"--{package} needs the package {package}: pip install {package}")


def begin_wandb(out, project, name, done):
    """Begins a run in Weights & Biases, or goes on with the one of wandb_run.json where `done` is above 0.
    Raises UserError."""
    import wandb
    path, run_id = out / "wandb_run.json", secrets.token_hex(4)
    if done and path.exists():  # else it is a new run, or the flag is new
        run_id = json.loads(path.read_text(encoding="utf-8"))["id"]
    write_json(path, {"id": run_id})
    try:
        return wandb.init(project=project, name=name, id=run_id, resume="allow" if done else None,
                          dir=str(out), settings=wandb.Settings(console="off"))
    except Exception as error:  # of many types: no key, no network, a name that it refuses
        reason = first_line(error)
        raise UserError(f"--wandb {project}: {reason}; wandb login, or set WANDB_MODE=offline") from None


# -------------------------------------------------------------------------------- what rl.py says of a step
def episode_metrics(episodes, num_kept, group_size, device):
    """Means over the episodes of all processes. episodes: group after group. num_kept: groups to train on."""
    keys = ("reward", *REWARD_PARTS, "zooms", "invalid", "turns", "truncated", "frames", "response_tokens",
            "sampled_tokens")  # the same on all processes, in the same order
    sums = Counter(dict.fromkeys(keys, 0), episodes=len(episodes), groups_kept=num_kept, spread=0, stuck=0)
    for first in range(0, len(episodes), group_size):
        rewards = [e.env.rewards for e in episodes[first:first + group_size]]
        totals = [r["reward"] for r in rewards]
        if max(totals) - min(totals) > 1e-6:
            sums["spread"] += 1
        elif sum(r["accuracy"] for r in rewards) < len(rewards) / 2:
            sums["stuck"] += 1
    for e in episodes:
        sums.update(e.env.rewards)
        invalid = e.env.num_invalid() if e.env.config.max_zooms else 0  # without a tool there are no calls
        sums.update(zooms=e.env.num_calls(), invalid=invalid, turns=len(e.env.turns),
                    truncated=e.truncated, frames=e.env.frames_shown, sampled_tokens=sum(e.dialogue.trained),
                    response_tokens=len(e.dialogue.ids) - e.dialogue.prompt_length)
    total = sum_over_processes(sums, device)
    count = max(1.0, total.pop("episodes"))
    groups, invalid = total.pop("groups_kept"), total.pop("invalid")
    spread, stuck = total.pop("spread"), total.pop("stuck")
    return {k: v / count for k, v in total.items()} | {
        "invalid": invalid / max(1.0, invalid + total["zooms"]), "no_spread": 1 - spread * group_size / count,
        "no_spread_wrong": stuck * group_size / count,  # ... where fewer than half of the answers are right
        "groups": groups, "episodes": count}


PER_TOKEN = "loss", "clipped_low", "clipped_high", "kl", "kl_clamped", "entropy"


class UpdateMetrics:
    """What rl.py's update reports: means over the trained tokens of all processes.

    updates: optimizer steps so far. bad_steps: those left out as their gradient's norm was not finite."""

    def __init__(self, device):
        self.device, self.updates, self.bad_steps, self.norm_sum, self.tokens = device, 0, 0, 0.0, 0
        self.sums, self.totals = Counter(), Counter()  # of this process since the last update, of all of them

    def add_pass(self, sums):
        """Sums over the tokens of a pass."""
        self.sums.update(sums)

    def end_update(self, tokens, norm):
        """After an optimizer step on `tokens` of all processes, whose gradient had this norm."""
        names = dict.fromkeys((*PER_TOKEN, *gather(list(self.sums))))  # the same on all processes
        self.totals.update(sum_over_processes({name: self.sums[name] for name in names}, self.device))
        self.sums.clear()
        self.tokens += tokens
        self.updates += 1
        if math.isfinite(norm):
            self.norm_sum += norm
        else:
            self.bad_steps += 1

    def means(self):
        names = dict.fromkeys((*PER_TOKEN, *self.totals))
        return {name: self.totals[name] / max(1, self.tokens) for name in names} | {
            "updates": self.updates, "bad_steps": self.bad_steps, "trained_tokens": self.tokens,
            "grad_norm": self.norm_sum / max(1, self.updates - self.bad_steps)}


def show_step(metrics, episodes, config, say):
    """One line a step, and an episode now and then."""
    m = Counter(metrics)
    parts = ", ".join(f"{part} {m[part]:.2f}" for part in REWARD_PARTS)
    say(f"step {m['step']}/{config.steps}  reward {m['reward']:.3f} ({parts})  zooms {m['zooms']:.2f}  "
        f"invalid {m['invalid']:.1%}  no spread {m['no_spread']:.0%}  clipped {m['clipped_low']:.2%}/"
        f"{m['clipped_high']:.2%}  KL {m['kl']:.4f}  entropy {m['entropy']:.3f}  "
        f"tokens {m['sampled_tokens']:.0f}  truncated {m['truncated']:.1%}  mismatch {m['mismatch']:.0e}  "
        f"{m['seconds_rollout']:.1f} + {m['seconds_update']:.1f} s")
    if not m["groups"]:
        say("  no group had a spread of rewards: nothing learned in this step")
    if m["episodes_left_out"]:
        say(f"  {m['episodes_left_out']:.0f} episodes of a mismatch above --max_mismatch left out"
            + ", all there were: nothing learned in this step" * (not m["updates"]))
    if episodes and (m["step"] - 1) % SHOW_EVERY == 0:
        say(f"{episodes[0].env.describe()}\n  reward {episodes[0].env.rewards}")
