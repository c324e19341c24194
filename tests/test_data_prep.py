"""Rows, chosen frames and commands: what is wrong is named, in one line."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cases import all_hold

import data_prep
from common import RunConfig, UserError
from sources.read import read_questions, read_trajectories
from sources.rows import question_error, trajectory_error
from training.environment import run_environment, with_chosen_frames

ROOT = Path(data_prep.__file__).parent
GOOD = {"id": "q1", "video": "clips/1.mp4", "question": "What is red?\nLook closely.",
        "options": ["a car", "a bus"], "answer": "B", "answer_type": "multiple_choice", "source": "mine",
        "evidence": [[12, 15.5]], "meta": {}}
TRAJECTORY = {"question": GOOD, "kind": "exemplar", "turns": ["x", "y"], "learn": [False, True],
              "provenance": {"teacher": "scripted", "seed": 0}}


def without(row, key):
    return {k: v for k, v in row.items() if k != key}


# ------------------------------------------------------------------------------------------------------ rows
def test_a_row_of_each_answer_type_is_good():
    def holds(change):
        assert question_error(GOOD | change) is None
        assert trajectory_error(TRAJECTORY | {"question": GOOD | change}) is None

    all_hold(holds, [[change] for change in (
        {}, {"answer": "a"},
        {"answer_type": "open_ended", "answer": "the bus", "options": None},
        {"answer_type": "number", "answer": 7}, {"answer_type": "number", "answer": "-1.5"},
        {"answer_type": "segment", "answer": [12, 15.5]},
        {"evidence": None, "meta": None, "source": None}, {"overview_frames": [0, 24]}, {"num_frames": 5},
    )])


def test_what_is_wrong_with_a_question_is_named():
    def holds(row, named):
        assert re.search(named, question_error(row))
        within = trajectory_error(TRAJECTORY | {"question": row})
        if isinstance(row, dict):
            assert within == question_error(row)
        else:
            assert '"question" is not an object' in within

    all_hold(holds, [
        ("text", "JSON object"), ([GOOD], "JSON object"),
        *((without(GOOD, key), f'"{key}"') for key in ("id", "video", "question", "answer", "answer_type")),
        (GOOD | {"question": " \n"}, "question"), (GOOD | {"video": 3}, "video"),
        (GOOD | {"answer_type": "letter"}, "answer_type 'letter'"),
        (GOOD | {"options": None}, "2 to 26 options"), (GOOD | {"options": ["a car"], "answer": "A"}, "2 to 26"),
        (GOOD | {"options": [str(n) for n in range(27)]}, "2 to 26 options"),
        (GOOD | {"options": ["a car", 3]}, "option"),
        (GOOD | {"options": ["x", ""], "answer_type": "open_ended", "answer": "x"}, "option is empty"),
        (GOOD | {"answer": "C"}, "answer 'C'"),
        (GOOD | {"answer_type": "number", "answer": "few"}, "answer 'few'"),
        (GOOD | {"answer_type": "segment", "answer": [3, 2]}, r"answer '\[3, 2\]'"),
        (GOOD | {"answer_type": "segment", "answer": 3}, "answer '3'.*segment"),
        (GOOD | {"answer_type": "open_ended", "answer": "?!"}, r"answer '\?!'.*open_ended"),
        (GOOD | {"evidence": [[15.5, 12]]}, "evidence"), (GOOD | {"evidence": [[-1, 2]]}, "evidence"), (GOOD | {"evidence": "12-15"}, "evidence"),
        (GOOD | {"num_frames": 0}, "num_frames"), (GOOD | {"num_frames": 2.0}, "num_frames"),
        (GOOD | {"overview_frames": ["first"]}, "overview_frames"), (GOOD | {"meta": "none"}, "meta"),
    ])


def test_what_is_wrong_with_a_trajectory_is_named():
    def holds(row, named):
        assert named in trajectory_error(row)

    assert trajectory_error(TRAJECTORY) is None
    all_hold(holds, [
        ("text", "JSON object"), (TRAJECTORY | {"turns": []}, "turns"),
        (TRAJECTORY | {"turns": ["x", 3]}, "turns"),
        (without(TRAJECTORY, "turns"), "turns"), (TRAJECTORY | {"learn": [True]}, "learn"),
        (TRAJECTORY | {"learn": [1, 1]}, "learn"), (without(TRAJECTORY, "learn"), "learn"),
        (TRAJECTORY | {"provenance": "me"}, "provenance"),
        (TRAJECTORY | {"provenance": {"max_zooms": -1}}, "max_zooms"),
    ])


def test_the_documented_rows_are_good():
    """The first two examples of docs/data.md, with the dots filled in."""
    page = (ROOT / "docs/data.md").read_text()
    question, trajectory, *_ = re.findall(r"\n    (\{.*?\})\n\n", page, re.DOTALL)
    question = json.loads(question)
    assert question_error(question) is None
    trajectory = trajectory.replace("{...}", "null").replace('"<think>...</think><video_zoom>', '"').replace(
        '</video_zoom>", ...', '</video_zoom>", "..."')
    assert trajectory_error(json.loads(trajectory) | {"question": question}) is None


def test_bad_rows_of_a_file_are_named_and_left_out(tmp_path):
    for name, read, good, bad in (
            ("q.jsonl", read_questions, GOOD, GOOD | {"answer": "C"}),
            ("t.jsonl", read_trajectories, TRAJECTORY, TRAJECTORY | {"turns": []})):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in [good, bad, good, good]))
        usable, left_out = read(path, 0.25)
        assert usable == [good] * 3 and [where for where, _ in left_out] == ["line 2"]
        with pytest.raises(UserError, match=rf"{name}: 1 of 4 rows.*line 2.*--max_bad"):
            read(path, 0.24)


# -------------------------------------------------------------------------------------------------- overview
CHECKPOINT = ROOT / "demo" / "tiny_base"


def test_the_overview_is_the_flags_or_else_the_checkpoints():
    trained = run_environment(CHECKPOINT, RunConfig())
    for name in ("uniform", "nearest_keyframe", "auto"):
        assert run_environment(CHECKPOINT, RunConfig(overview=name)) == replace(trained, overview=name)
        assert with_chosen_frames([GOOD], RunConfig(overview=name)) == ({0: GOOD}, [])
    for name in ("keyframes", "", "frames.txt"):
        with pytest.raises(UserError, match="--overview must be auto, uniform or nearest_keyframe"):
            run_environment(CHECKPOINT, RunConfig(overview=name))


def test_chosen_frames_reach_the_question_with_that_file_name_and_first_line(tmp_path):
    path = tmp_path / "frames.json"
    chosen = [
        {"video_name": "elsewhere/1.mp4", "question": "What is red?\nA. a car", "frame_idx": [4, "9"]},
        {"video_name": "1.mp4", "question": "What is blue?", "frame_idx": [1]},
        {"video_name": "2.mp4", "question": "What is red?", "frame_idx": []},
    ]
    path.write_text(json.dumps(chosen))
    questions = [GOOD | {"id": "q2", "video": "2.mp4"}, GOOD, GOOD | {"id": "q3", "question": "What is green?"}]
    config = RunConfig(overview=str(path), max_bad=0.7)
    known, bad = with_chosen_frames(questions, config)
    assert known == {1: GOOD | {"overview_frames": [4.0, 9.0]}} and "overview_frames" not in GOOD
    assert [where for where, _ in bad] == ["q2", "q3"] and not any(map(question_error, known.values()))
    assert run_environment(CHECKPOINT, config) == run_environment(CHECKPOINT, RunConfig())
    with pytest.raises(UserError, match=r"frames.json: 2 of 3 rows.*q2.*q3.*--max_bad"):
        with_chosen_frames(questions, replace(config, max_bad=0.6))


def test_a_file_of_frames_that_cannot_be_read_is_one_line(tmp_path):
    path = tmp_path / "frames.json"

    def holds(text):
        if text is not None:
            path.write_text(text)
        with pytest.raises(UserError, match="cannot read .*frames.json") as raised:
            with_chosen_frames([GOOD], RunConfig(overview=str(path), max_bad=1))
        assert len(str(raised.value).splitlines()) == 1

    all_hold(holds, [[text] for text in (
        None, "", "[", "3", '[3]', '[{"question": "x", "frame_idx": [1]}]',
        '[{"video_name": "1.mp4", "question": " ", "frame_idx": [1]}]',
        '[{"video_name": "1.mp4", "question": "x", "frame_idx": ["first"]}]')])


# -------------------------------------------------------------------------------------------------- commands
def test_a_wrong_flag_ends_with_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    out = tmp_path / "made"

    def holds(flags, named):
        flags = flags.split() + (["--out", str(out)] if flags else [])
        monkeypatch.setattr(sys, "argv", ["data_prep.py", *flags])
        with pytest.raises(SystemExit) as raised:
            data_prep.run_main(data_prep.main)
        message = capsys.readouterr().err
        assert raised.value.code == 2 and named in message
        assert len(message.splitlines()) == 1 and message.startswith("data_prep.py: error: ")
        assert not out.exists()

    all_hold(holds, [
        ("", "command"), ("demo", "demo"), ("synthetic --train 0", "--train"), ("synthetic --test -1", "--test"),
        ("synthetic --train 3x", "--train"), ("synthetic --tests 5 --epochs 1", "--epochs"),
        ("tiny_base --steps 0", "--steps"), ("tiny_base --init", "--init")])
