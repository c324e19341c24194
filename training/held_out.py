"""Held-out questions that are played while a run trains: is it getting better at what it does not see?"""

import time
from dataclasses import replace

from common import sum_over_processes
from rollout import Engine
from training.decoder_check import check_decoder


def make_player(policy, config, generator=None):
    """An Engine that plays one episode a question, as eval.py does too; its decode step is checked."""
    engine = Engine(policy, 1, config, generator)
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
    return total | {"seconds_val": time.time() - began}
