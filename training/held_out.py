"""Held-out questions that are played while a run trains: is it getting better at what it does not see?"""

import os
import time
from dataclasses import replace
from pathlib import Path

from common import UserError, sum_over_processes, warn
from protocols import make_env
from rollout import Engine
from training.decoder_check import check_decoder
from video import VideoError


# ------------------------------------------------------------------------------------- what can be played
def missing_file(question, root):
    """Why a question's video or one of its images is not there, or None; what else is wrong with them shows
    when they are read."""
    for name in (question["video"], *(question.get("images") or [])):
        path = Path(root, name)
        try:
            os.fsencode(path)
        except UnicodeEncodeError:
            return f"{path}: this locale has no such letters; set PYTHONUTF8=1"
        if not os.path.isfile(path):
            hint = '; "\\" is part of a name here, write "/"' if "\\" in name and os.sep == "/" else ""
            return f"{path}: no such file{hint}"
    return None


def unplayable(question, env_config, root):
    """Why a question cannot be played, or None: reads what an episode shows first."""
    if reason := missing_file(question, root):
        return reason
    try:
        make_env(question, env_config, root).reset()
    except VideoError as error:
        return str(error)
    return None


def check_held_out(rows, bad, path, env_config):
    """Before a run: returns the question rows of the file `path`, and warns of those whose files are missing
    and of the `bad` ones, [(line, reason)], that were left out. Raises UserError where none can be played."""
    root = Path(path).parent
    reason = unplayable(rows[0], env_config, root)
    if reason and all(unplayable(row, env_config, root) for row in rows[1:]):
        raise UserError(f"--val {path}: none of its {len(rows)} questions can be played ({rows[0]['id']}: "
                        f"{reason})")
    left_out = bad + [(row["id"], reason) for row in rows if (reason := missing_file(row, root))]
    if left_out:
        where, reason = left_out[0]
        warn(f"--val {path}: {len(left_out)} of {len(bad) + len(rows)} questions are not played ({where}: "
             f"{reason})")
    return rows


# ------------------------------------------------------------------------------------------------- playing
def make_player(policy, config, generator=None, group_size=1):
    """An Engine that plays a question's episodes, one by default, as eval.py does too; its decode step is
    checked."""
    engine = Engine(policy, group_size, config, generator)
    check_decoder(engine.decoder)
    return engine


def held_out(policy, rows, root, config, rank, world, device):
    """Plays each question once, at temperature 0, the way eval.py does; each process plays its share.

    Nothing is drawn at random, and the policy is left in the mode in which it came, so what is trained after
    that is the same with and without. The cache of its engine is gone afterwards.

    Args:
        rows: question rows, the same on all processes, their videos relative to `root`.
        config: RolloutConfig, or one that inherits from it.
    Returns: over all processes and all questions that could be played, {"val_accuracy": share right (0.5 and
        more of what is graded by degree), "val_zooms" and "val_frames": means a question}, None where none
        could be played; "val_skipped": how many could not, as their video cannot be read; "seconds_val"."""
    began, training = time.time(), policy.training
    policy.eval()
    try:
        player = make_player(policy, replace(config, temperature=0.0))
        groups, skipped = player.play(rows[rank::world], root, on_end=lambda e: e.forget_frames())
    finally:
        policy.train(training)
    envs = [e.env for group in groups for e in group]
    total = sum_over_processes({
        "val_accuracy": sum(env.rewards["accuracy"] >= 0.5 for env in envs),
        "val_zooms": sum(env.num_calls() for env in envs),
        "val_frames": sum(env.frames_shown for env in envs),
        "played": len(envs), "val_skipped": len(skipped)}, device)
    played = total.pop("played")
    for name in ("val_accuracy", "val_zooms", "val_frames"):
        total[name] = total[name] / played if played else None
    if skipped and not played:
        warn(f"none of the {len(rows)} held-out questions can be played any more ({skipped[0][1]})")
    return total | {"seconds_val": time.time() - began}
