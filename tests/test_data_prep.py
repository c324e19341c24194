"""Rows, chosen frames and commands: what is wrong is named, in one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import data_prep
from common import UserError
from sources.read import read_questions, read_trajectories
from sources.rows import question_error, trajectory_error
from training.environment import use_overview
from zoom_env import EnvConfig

ROOT = Path(data_prep.__file__).parent
GOOD = {"id": "q1", "video": "clips/1.mp4", "question": "What is red?\nLook closely.",
        "options": ["a car", "a bus"], "answer": "B", "answer_type": "multiple_choice", "source": "mine",
        "evidence": [[12, 15.5]], "meta": {}}
TRAJECTORY = {"question": GOOD, "kind": "exemplar", "turns": ["x", "y"], "learn": [False, True],
              "provenance": {"teacher": "scripted", "seed": 0}}


def without(row, key):
    return {k: v for k, v in row.items() if k != key}


# ------------------------------------------------------------------------------------------------------ rows
@pytest.mark.parametrize("change", [
    {}, {"answer": "a"},
    {"answer_type": "open_ended", "answer": "the bus", "options": None},
    {"answer_type": "number", "answer": 7}, {"answer_type": "number", "answer": "-1.5"},
    {"answer_type": "segment", "answer": [12, 15.5]},
    {"evidence": None, "meta": None, "source": None}, {"overview_frames": [0, 24]},
])
def test_a_row_of_each_answer_type_is_good(change):
    assert question_error(GOOD | change) is None
    assert trajectory_error(TRAJECTORY | {"question": GOOD | change}) is None


@pytest.mark.parametrize("row, named", [
    ("text", "JSON object"), ([GOOD], "JSON object"),
    *((without(GOOD, key), f'"{key}"') for key in ("id", "video", "question", "answer", "answer_type")),
    (GOOD | {"question": " \n"}, "question"), (GOOD | {"video": 3}, "video"),
    (GOOD | {"answer_type": "letter"}, "answer_type 'letter'"),
    (GOOD | {"options": None}, "2 to 26 options"), (GOOD | {"options": ["a car"], "answer": "A"}, "2 to 26"),
    (GOOD | {"options": [str(n) for n in range(27)]}, "2 to 26 options"),
    (GOOD | {"options": ["a car", 3]}, "option"), (GOOD | {"options": ["a car", "a car"]}, "option"),
    (GOOD | {"answer": "C"}, "answer 'C'"),
    (GOOD | {"answer_type": "number", "answer": "few"}, "answer 'few'"),
    (GOOD | {"answer_type": "segment", "answer": [3, 2]}, r"answer '\[3, 2\]'"),
    (GOOD | {"answer_type": "segment", "answer": 3}, "answer '3'.*segment"),
    (GOOD | {"answer_type": "open_ended", "answer": "?!"}, r"answer '\?!'.*open_ended"),
    (GOOD | {"evidence": [[15.5, 12]]}, "evidence"), (GOOD | {"evidence": "12-15"}, "evidence"),
    (GOOD | {"overview_frames": ["first"]}, "overview_frames"), (GOOD | {"meta": "none"}, "meta"),
])
def test_what_is_wrong_with_a_question_is_named(row, named):
    assert re.search(named, question_error(row))
    assert trajectory_error(TRAJECTORY | {"question": row}) == question_error(row)


@pytest.mark.parametrize("row, named", [
    ("text", "JSON object"), (TRAJECTORY | {"turns": []}, "turns"),
    (TRAJECTORY | {"turns": ["x", 3]}, "turns"),
    (without(TRAJECTORY, "turns"), "turns"), (TRAJECTORY | {"learn": [True]}, "learn"),
    (TRAJECTORY | {"learn": [1, 1]}, "learn"), (without(TRAJECTORY, "learn"), "learn"),
    (TRAJECTORY | {"provenance": "me"}, "provenance"),
    (TRAJECTORY | {"provenance": {"max_zooms": -1}}, "max_zooms"),
])
def test_what_is_wrong_with_a_trajectory_is_named(row, named):
    assert trajectory_error(TRAJECTORY) is None
    assert named in trajectory_error(row)


def test_the_documented_rows_are_good():
    """The two examples in data_prep's docstring, with the dots filled in."""
    question, trajectory = re.findall(r"\n    (\{.*?\})\n\n", data_prep.__doc__, re.DOTALL)
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
        rows, left_out = read(path, 0.25)
        assert rows == [good] * 3 and [where for where, _ in left_out] == ["line 2"]
        with pytest.raises(UserError, match=rf"{name}: 1 of 4 rows.*line 2.*--max_bad"):
            read(path, 0.24)


# -------------------------------------------------------------------------------------------------- overview
@pytest.mark.parametrize("name", ["uniform", "nearest_keyframe", "auto"])
def test_a_way_of_the_overview_is_set_by_name(name):
    config, questions, bad = use_overview(EnvConfig(overview="uniform", max_zooms=2), [GOOD], name, 0)
    assert config == EnvConfig(overview=name, max_zooms=2) and questions == [GOOD] and not bad


def test_without_a_flag_the_overview_is_the_checkpoints():
    config = EnvConfig(overview="nearest_keyframe")
    assert use_overview(config, [GOOD], None, 0) == (config, [GOOD], [])


@pytest.mark.parametrize("name", ["keyframes", "", "frames.txt"])
def test_an_unknown_way_is_refused_and_the_known_ones_named(name):
    with pytest.raises(UserError, match=r"--overview must be auto, uniform or nearest_keyframe.*\.json"):
        use_overview(EnvConfig(), [GOOD], name, 0)


def test_chosen_frames_reach_the_question_with_that_file_name_and_first_line(tmp_path):
    path = tmp_path / "frames.json"
    chosen = [
        {"video_name": "elsewhere/1.mp4", "question": "What is red?\nA. a car", "frame_idx": [4, "9"]},
        {"video_name": "1.mp4", "question": "What is blue?", "frame_idx": [1]},
        {"video_name": "2.mp4", "question": "What is red?", "frame_idx": []},
    ]
    path.write_text(json.dumps(chosen))
    questions = [dict(GOOD), dict(GOOD, id="q2", video="2.mp4"),
                 dict(GOOD, id="q3", question="What is green?")]
    config, known, bad = use_overview(EnvConfig(), questions, str(path), 0.7)
    assert config == EnvConfig() and [(q["id"], q["overview_frames"]) for q in known] == [("q1", [4.0, 9.0])]
    assert [where for where, _ in bad] == ["q2", "q3"] and not any(map(question_error, known))
    with pytest.raises(UserError, match=r"frames.json: 2 of 3 rows.*q2.*q3.*--max_bad"):
        use_overview(EnvConfig(), questions, str(path), 0.6)


@pytest.mark.parametrize("text", [
    None, "", "[", "3", '[3]', '[{"question": "x", "frame_idx": [1]}]',
    '[{"video_name": "1.mp4", "question": " ", "frame_idx": [1]}]',
    '[{"video_name": "1.mp4", "question": "x", "frame_idx": ["first"]}]',
])
def test_a_file_of_frames_that_cannot_be_read_is_one_line(tmp_path, text):
    path = tmp_path / "frames.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="cannot read .*frames.json") as raised:
        use_overview(EnvConfig(), [GOOD], str(path), 1)
    assert len(str(raised.value).splitlines()) == 1


# -------------------------------------------------------------------------------------------------- commands
@pytest.mark.parametrize("flags, named", [
    ("", "command"), ("demo", "demo"), ("synthetic --train 0", "--train"), ("synthetic --test -1", "--test"),
    ("synthetic --train 3x", "--train"), ("synthetic --tests 5 --epochs 1", "--epochs"),
    ("tiny_base --steps 0", "--steps"), ("tiny_base --init", "--init"),
])
def test_a_wrong_flag_ends_with_one_line_and_status_2(tmp_path, monkeypatch, capsys, flags, named):
    out = tmp_path / "made"
    flags = flags.split() + (["--out", str(out)] if flags else [])
    monkeypatch.setattr(sys, "argv", ["data_prep.py", *flags])
    with pytest.raises(SystemExit) as raised:
        data_prep.run_main(data_prep.main)
    message = capsys.readouterr().err
    assert raised.value.code == 2 and named in message
    assert len(message.splitlines()) == 1 and message.startswith("data_prep.py: error: ")
    assert not out.exists()


def test_the_shell_sees_status_2(tmp_path):
    out = tmp_path / "made"
    flags = ["synthetic", "--train", "x", "--out", str(out)]
    run = subprocess.run([sys.executable, str(ROOT / "data_prep.py"), *flags], capture_output=True, text=True,
                         timeout=120)
    assert run.returncode == 2 and not run.stdout and not out.exists()
    assert len(run.stderr.splitlines()) == 1 and "--train" in run.stderr
