"""Held-out questions while training: the figures of plain episodes, over all processes; what is trained is not touched."""

import gc
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import all_hold
from launcher import launch
from tiny import DEVICE, ScriptedEnv, chatty, random_policy, restless, seeded

import rl
import rollout as rollouts
import sft
from common import run_main, start_processes
from generation import KVCache
from protocols import PROTOCOLS
from rollout import RolloutConfig, play, rollout
from training.checkpoints import save_policy
from training.held_out import held_out
from zoom_env import ZoomEnv

CONFIG = RolloutConfig(temperature=1.0, max_turn_tokens=24, compile=False)


def figures(policy, rows, root, rank=0, world=1, config=CONFIG):
    result = held_out(policy, rows, root, config, rank, world, DEVICE)
    assert result.pop("seconds_val") > 0
    return result


@pytest.mark.device
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_figures_are_those_of_plain_episodes_at_temperature_0(data, monkeypatch, capsys, compiled):
    """And nothing is drawn, not where a step is captured either, for which the generator is set back."""
    folder, rows, _ = data
    torch._dynamo.reset()
    monkeypatch.setitem(PROTOCOLS, ZoomEnv.protocol, ScriptedEnv)
    policy = restless(random_policy(layers=2))
    rows = [row | {"answer": letter} for row, letter in zip(rows, "ABABAB")]  # it says A
    envs = [play(policy, row, RolloutConfig(temperature=0.0, max_turn_tokens=24), folder).env for row in rows]
    mean = lambda values: sum(values) / len(rows)
    expected = {"val_accuracy": mean([env.rewards["accuracy"] for env in envs]),
                "val_zooms": mean([env.num_calls() for env in envs]),
                "val_frames": mean([env.frames_shown for env in envs]), "val_skipped": 0}
    torch.manual_seed(1)
    next_ones = torch.rand(3, device=DEVICE).tolist()
    torch.manual_seed(1)
    assert figures(policy, rows, folder, config=replace(CONFIG, compile=compiled)) == expected
    assert torch.rand(3, device=DEVICE).tolist() == next_ones
    assert "warning" not in capsys.readouterr().err  # that it runs uncompiled
    assert 0 < expected["val_accuracy"] < 1 and expected["val_zooms"] > 0 and expected["val_frames"] > 9


@pytest.mark.device
def test_what_is_right_by_degree_counts_from_a_half(policy, data, monkeypatch):
    folder, rows, _ = data
    step = ZoomEnv.step
    monkeypatch.setattr(ZoomEnv, "step", lambda env, text: step(env, "<think>t</think><answer>10 to 20</answer>"))
    rows = [rows[0] | {"options": None, "answer_type": "segment", "answer": segment}
            for segment in ([10, 26], [12, 20], [10, 100])]  # 0.63, 0.8 and 0.11 right
    assert figures(policy, rows, folder)["val_accuracy"] == 2 / 3


@pytest.mark.device
def test_questions_whose_video_cannot_be_read_are_counted(policy, data, tmp_path):
    folder, rows, _ = data
    (tmp_path / "damaged.mp4").write_bytes(b"no video" * 1000)
    bad = [rows[0] | {"id": "bad", "video": name} for name in ("missing.mp4", str(tmp_path / "damaged.mp4"))]
    good = figures(policy, rows[:3], folder)
    assert figures(policy, [bad[0], *rows[:3], bad[1]], folder) == good | {"val_skipped": 2}
    assert figures(policy, bad, folder) == {"val_accuracy": None, "val_zooms": None, "val_frames": None, "val_skipped": 2}


@pytest.fixture
def said_of(data, tmp_path, monkeypatch, capsys):
    """(status, what is said on standard error) of a training script with this --val, before a model loads."""
    folder, _, _ = data
    save_policy(random_policy(layers=1), tmp_path / "policy")

    class Begun(Exception):
        pass

    def begin(*what):
        raise Begun

    def call(script, path):
        file = {"sft": "sft.jsonl", "rl": "train.jsonl"}[script.__name__]
        flags = ["--model", tmp_path / "policy", "--data", folder / file, "--val", path, "--out",
                 tmp_path / "out", "--device", "cpu"]
        monkeypatch.setattr(script, "TrainingRun", begin)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        status = None
        try:
            run_main(script.main)
        except Begun:
            status = 0
        except SystemExit as end:
            status = end.code
        assert not (tmp_path / "out").exists()
        return status, capsys.readouterr().err

    return call


def test_a_val_file_of_which_nothing_can_be_played_is_refused_before_a_run(data, tmp_path, said_of):
    """Whatever the reason and the format."""
    folder, rows, _ = data
    (tmp_path / "damaged.mp4").write_bytes(b"no video" * 1000)
    (tmp_path / "bad.png").write_bytes(b"no image")
    there = str(folder / rows[0]["video"])
    with_image = lambda name: rows[0] | {"video": there, "images": [name], "question": "<image> Which?"}
    released = {"videos": ["away.mp4"], "problem": "<image>What is it?\nA. a\nB. b", "solution": "A"}
    files = {
        "missing.jsonl": [row | {"video": "away.mp4"} for row in rows], "missing.json": [released],
        "damaged.jsonl": [row | {"video": name} for row in rows for name in ("damaged.mp4", "away.mp4")],
        "image.jsonl": [with_image("away.png"), with_image("bad.png")], "empty.jsonl": [], "empty.json": []}

    def is_refused(script, name, words):
        path = tmp_path / name
        write = json.dumps if path.suffix == ".json" else lambda rows: "\n".join(map(json.dumps, rows))
        path.write_text(write(files[name]))
        status, said = said_of(script, path)
        assert status == 2 and said.count("\n") == 1 and name in said and words in said, said

    cases = [("missing.jsonl", "away.mp4: no such file"), ("missing.json", "away.mp4: no such file"),
             ("damaged.jsonl", "damaged.mp4: not a video"), ("image.jsonl", "away.png: no such file"),
             ("empty.jsonl", "no rows"), ("empty.json", "no rows")]
    all_hold(is_refused, [(script, *case) for script in (sft, rl) for case in cases])


def test_a_val_file_of_which_some_cannot_be_played_is_warned_of(data, tmp_path, said_of):
    folder, rows, _ = data
    rows = [row | {"video": str(folder / row["video"])} for row in rows]
    whole = "".join(json.dumps(row) + "\n" for row in rows * 50)

    def is_warned(added, words):
        (tmp_path / "val.jsonl").write_text(added + whole)
        for script in (sft, rl):
            status, said = said_of(script, tmp_path / "val.jsonl")
            assert status == 0 and ("warning" in said) == bool(words) and words in said, said

    missing = json.dumps(rows[0] | {"id": "one", "video": "away.mp4"}) + "\n"
    all_hold(is_warned, [
        ("", ""), (missing, "1 of 501 questions are not played (one: "),
        (missing * 2, "2 of 502"), ("no row\n", "1 of 501 questions are not played (line 1: "),
        ("no row\n" + missing, "2 of 502 questions are not played (line 1: ")])


def test_held_out_questions_that_can_no_longer_be_played_are_said(policy, data, capsys):
    folder, rows, _ = data
    figures(policy, [rows[0] | {"video": "away.mp4"}], folder)
    assert "warning: none of the 1 held-out questions" in capsys.readouterr().err


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


@pytest.mark.device
@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, -1], [0]])
def test_the_figures_are_of_all_processes(data, tmp_path, monkeypatch, numbers):
    """Two, with unequal shares; with one question one of them has nothing to play."""
    folder, _, _ = data
    monkeypatch.setitem(PROTOCOLS, ZoomEnv.protocol, ScriptedEnv)
    launch(2, "test_held_out:on_processes", [folder, json.dumps(numbers), tmp_path]).wait()
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1] == pytest.approx(of_questions(folder, numbers, 0, 1))


@pytest.mark.device
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_is_trained_after_it_is_the_same(policy, data, training):
    """The next rollouts, everything that could be drawn, gradients so far, the policy's mode."""
    folder, rows, _ = data

    def run(between):
        policy = chatty(random_policy()).train(training).requires_grad_(True)
        policy.head.weight.grad = torch.ones_like(policy.head.weight)
        generator, said = seeded(3), []
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        for _ in range(2):
            groups, _ = rollout(policy, rows[:2], 3, CONFIG, root=folder, generator=generator)
            said += [e.dialogue.ids for group in groups for e in group]
            between(policy)
        assert policy.training == training and (policy.head.weight.grad == 1).all()
        drawn = torch.rand(3).tolist(), torch.rand(3, device=DEVICE).tolist()
        return said, drawn, random.random(), np.random.rand()

    assert run(lambda policy: figures(policy, rows, folder)) == run(lambda policy: None)


@pytest.mark.device
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
