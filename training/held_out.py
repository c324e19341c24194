"""Held-out questions that are played while a run trains: is it getting better at what it does not see?"""

import time
from dataclasses import replace

from common import sum_over_processes
from rollout import Engine
from training.decoder_check import check_decoder


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
    sums = {"right": 0, "zooms": 0, "frames": 0, "played": 0, "skipped": 0}

    def ended(e):
        sums["right"] += e.env.rewards["accuracy"] >= 0.5
        sums["zooms"] += e.env.num_calls()
        sums["frames"] += e.env.frames_shown
        sums["played"] += 1
        e.forget_frames()

    policy.eval()
    try:
        engine = Engine(policy, 1, replace(config, temperature=0.0))
        check_decoder(engine.decoder)
        _, skipped = engine.play(rows[rank::world], root, on_end=ended)
    finally:
        policy.train(training)
    sums["skipped"] = len(skipped)
    total = sum_over_processes(sums, device)
    mean = lambda key: total[key] / total["played"] if total["played"] else None
    return {"val_accuracy": mean("right"), "val_zooms": mean("zooms"), "val_frames": mean("frames"),
            "val_skipped": total["skipped"], "seconds_val": time.time() - began}
