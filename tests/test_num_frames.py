"""--num_frames: one number for a whole run, or one of several for each question."""

import json
import sys
from collections import Counter
from dataclasses import replace

import pytest
from tiny import make_place

import rl
from common import RunConfig, UserError, parse_flags
from protocols import make_env
from training.environment import (largest_environment, load_env_config, run_environment, with_chosen_frames,
                                  with_num_frames)
from zoom_env import ANY_FPS

QUESTIONS = [{"id": f"q{n}", "video": "v.mp4"} for n in range(300)]
QUESTIONS[1]["num_frames"] = 7


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("frames"), layers=1, test=1)


def numbers(config, questions=QUESTIONS):
    return [question.get("num_frames") for question in with_num_frames(questions, config)]


def test_one_number_is_the_runs(place):
    """In its environment, which the checkpoint keeps; a question's own number gives way."""
    config = RunConfig(num_frames=[23])
    env_config = run_environment(place / "model", config)
    assert (env_config.overview_max_frames, env_config.overview_fps) == (23, ANY_FPS)
    assert numbers(config) == [None, 23] + [None] * 298 and numbers(RunConfig()) == [None, 7] + [None] * 298
    assert with_chosen_frames(QUESTIONS, config)[0][1]["num_frames"] == 23 and QUESTIONS[1]["num_frames"] == 7


def test_of_several_each_question_gets_one(place):
    """About as often each, the same in another file, another with another seed; the environment is as the
    checkpoint has it, and memory is planned for the largest."""
    config = RunConfig(num_frames=[5, 17, 9])
    drawn = numbers(config)
    assert set(drawn) == {5, 9, 17} and min(Counter(drawn).values()) > 70
    assert numbers(config, QUESTIONS[::-1]) == drawn[::-1]
    other = numbers(replace(config, seed=1))
    assert 60 < sum(a == b for a, b in zip(drawn, other)) < 140
    plain = load_env_config(place / "model")
    assert run_environment(place / "model", config) == plain
    assert largest_environment(plain, config) == replace(plain, overview_max_frames=17, overview_fps=ANY_FPS)
    assert largest_environment(plain, RunConfig(num_frames=[23])) is plain
    for wrong in ([0], [5, 0]):
        with pytest.raises(UserError, match="--num_frames must be at least 1, not 0"):
            run_environment(place / "model", RunConfig(num_frames=wrong))


def test_they_are_flags(capsys):
    assert parse_flags(RunConfig, "", (), argv=["--num_frames", "5", "9", "17"]).num_frames == [5, 9, 17]
    assert parse_flags(RunConfig, "", (), argv=["--num_frames", "5"]).num_frames == [5]
    with pytest.raises(SystemExit):
        parse_flags(RunConfig, "", (), argv=["--num_frames", "5", "-1"])
    assert "--num_frames must be at least 0, not -1" in capsys.readouterr().err


@pytest.mark.parametrize("max_zooms", [4, 0])
def test_an_overview_has_as_many_frames_as_were_drawn(place, max_zooms):
    """With the tool and without."""
    config = RunConfig(num_frames=[3, 12], max_zooms=max_zooms)
    questions = [json.loads(line) for line in open(place / "train.jsonl")]
    seen = set()
    for question in with_chosen_frames(questions, config)[0].values():
        env = make_env(question, run_environment(place / "model", config), place)
        env.reset()
        assert env.frames_shown == len(env.watched[0]) == question["num_frames"]
        seen.add(env.frames_shown)
    assert seen == {3, 12}


def test_rl_plays_them(place, tmp_path, monkeypatch):
    """A batch of both, in training and of held-out questions; the checkpoint says what it said before."""
    data, out = place / "train.jsonl", tmp_path / "run"
    flags = ["--model", place / "model", "--data", data, "--val", data, "--out", out, "--steps", 1,
             "--batch_size", 10, "--mini_batch_size", 10, "--group_size", 2, "--max_draws", 1,
             "--max_turn_tokens", 1, "--device", "cpu", "--dtype", "float32", "--no-compile",
             "--num_frames", 3, 12]
    monkeypatch.setattr(sys, "argv", ["rl.py", *map(str, flags)])
    rl.main()
    metrics = json.loads((out / "metrics.jsonl").read_text())
    questions = [json.loads(line) for line in open(data)]
    drawn = numbers(RunConfig(num_frames=[3, 12]), questions)
    assert metrics["frames"] == metrics["val_frames"] == sum(drawn) / 10 and 3 < metrics["frames"] < 12
    trained = load_env_config(place / "model")
    assert load_env_config(out) == replace(trained, max_turn_tokens=1)
