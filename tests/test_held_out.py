"""Held-out questions while training: the figures of plain episodes, over all processes; what is trained is not touched."""

import gc
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from launcher import launch
from tiny import ScriptedEnv, chatty, random_policy, restless

import rollout as rollouts
from common import start_processes
from generation import KVCache
from protocols import PROTOCOLS
from rollout import RolloutConfig, play, rollout
from training.held_out import held_out
from zoom_env import ZoomEnv

CPU, CONFIG = torch.device("cpu"), RolloutConfig(temperature=1.0, max_turn_tokens=24)


def figures(policy, rows, root, rank=0, world=1, config=CONFIG):
    result = held_out(policy, rows, root, config, rank, world, CPU)
    assert result.pop("seconds_val") > 0
    return result


def test_figures_are_those_of_plain_episodes_at_temperature_0(policy, data, monkeypatch):
    folder, rows, _ = data
    monkeypatch.setitem(PROTOCOLS, ZoomEnv.protocol, ScriptedEnv)
    policy, rows = restless(policy), rows[:6]
    envs = [play(policy, row, RolloutConfig(temperature=0.0, max_turn_tokens=24), folder).env for row in rows]
    mean = lambda values: sum(values) / len(rows)
    expected = {"val_accuracy": mean([env.rewards["accuracy"] for env in envs]),
                "val_zooms": mean([env.num_calls() for env in envs]),
                "val_frames": mean([env.frames_shown for env in envs]), "val_skipped": 0}
    assert figures(policy, rows, folder) == expected
    assert 0 < expected["val_accuracy"] < 1 and expected["val_zooms"] > 0 and expected["val_frames"] > 9


def test_what_is_right_by_degree_counts_from_a_half(policy, data, monkeypatch):
    folder, rows, _ = data
    step = ZoomEnv.step
    monkeypatch.setattr(ZoomEnv, "step", lambda env, text: step(env, "<think>t</think><answer>10 to 20</answer>"))
    rows = [rows[0] | {"options": None, "answer_type": "segment", "answer": segment}
            for segment in ([10, 26], [12, 20], [10, 100])]  # 0.63, 0.8 and 0.11 right
    assert figures(policy, rows, folder)["val_accuracy"] == 2 / 3


def test_questions_whose_video_cannot_be_read_are_counted(policy, data, tmp_path):
    folder, rows, _ = data
    (tmp_path / "damaged.mp4").write_bytes(b"no video" * 1000)
    bad = [rows[0] | {"id": "bad", "video": name} for name in ("missing.mp4", str(tmp_path / "damaged.mp4"))]
    good = figures(policy, rows[:3], folder)
    assert figures(policy, [bad[0], *rows[:3], bad[1]], folder) == good | {"val_skipped": 2}
    assert figures(policy, bad, folder) == {"val_accuracy": None, "val_zooms": None, "val_frames": None, "val_skipped": 2}


def on_processes(folder, numbers, out):
    """Writes the figures of some questions on one of several processes; the last video cannot be read."""
    rank, world, _ = start_processes("cpu")
    result = of_questions(folder, json.loads(numbers), rank, world)
    Path(out, f"{rank}.json").write_text(json.dumps(result))


def of_questions(folder, numbers, rank, world):
    rows = [json.loads(line) for line in open(Path(folder) / "train.jsonl")]
    rows[-1]["video"] = "missing.mp4"
    PROTOCOLS[ZoomEnv.protocol] = ScriptedEnv
    return figures(restless(random_policy()), [rows[i] for i in numbers], folder, rank, world)


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, -1], [0]])
def test_the_figures_are_of_all_processes(data, tmp_path, monkeypatch, numbers):
    """Two, with unequal shares; with one question one of them has nothing to play."""
    folder, _, _ = data
    monkeypatch.setitem(PROTOCOLS, ZoomEnv.protocol, ScriptedEnv)
    launch(2, "test_held_out:on_processes", [folder, json.dumps(numbers), tmp_path]).wait()
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1] == pytest.approx(of_questions(folder, numbers, 0, 1))


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_is_trained_after_it_is_the_same(policy, data, training):
    """The next rollouts, everything that could be drawn, gradients so far, the policy's mode."""
    folder, rows, _ = data

    def run(between):
        policy = chatty(random_policy()).train(training).requires_grad_(True)
        policy.head.weight.grad = torch.ones_like(policy.head.weight)
        generator, said = torch.Generator().manual_seed(3), []
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        for _ in range(2):
            groups, _ = rollout(policy, rows[:2], 3, CONFIG, root=folder, generator=generator)
            said += [e.dialogue.ids for group in groups for e in group]
            between(policy)
        assert policy.training == training and (policy.head.weight.grad == 1).all()
        return said, torch.rand(3).tolist(), random.random(), np.random.rand()

    assert run(lambda policy: figures(policy, rows, folder)) == run(lambda policy: None)


def test_its_cache_is_freed_and_the_mode_comes_back_after_an_error(policy, data, monkeypatch):
    folder, rows, _ = data
    caches = lambda: [x for x in gc.get_objects() if type(x) is KVCache]
    gc.collect()
    gc.disable()
    try:
        before = len(caches())
        figures(policy, rows, folder)
        assert len(caches()) == before
    finally:
        gc.enable()
    monkeypatch.setattr(rollouts.Engine, "play", lambda *args, **how: 1 // 0)
    policy.train()
    with pytest.raises(ZeroDivisionError):
        figures(policy, rows, folder)
    assert policy.training
    policy.eval()
