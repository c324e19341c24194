"""Benchmarks as question files: rows of each format, awkward ones, missing videos; overlap and stats."""

import base64
import copy
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import all_hold
from test_subtitles import SRT

import data_prep
import eval as evaluation
from common import RunConfig, UserError, write_jsonl
from controls import places
from demo.synthetic import write_video
from grading import grade
from sources.benchmarks import FORMATS, Given, convert, open_answer
from sources.files import VIDEOS, FileIndex, read_annotations
from sources.images import place_images
from sources.overlap import overlap
from sources.rows import question_error
from sources.shapes import read_answer, read_options, read_segments, split_options
from sources.stats import stats
from training.environment import with_chosen_frames
from zoom_env import EnvConfig, ZoomEnv

ROOT = Path(data_prep.__file__).parent
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJ"
                       "RU5ErkJggg==")
FPS, SECONDS = 8, 4


def picture(red):
    image = np.full((64, 96, 3), 90, dtype=np.uint8)
    image[:, :, 0] = red
    return image


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, (picture(n * 7) for n in range(FPS * SECONDS)), FPS)
    return path


@pytest.fixture
def videos(clip, tmp_path):
    """A function that puts the clip there under some names; returns the folder."""
    def put(*names):
        for name in names:
            path = tmp_path / "videos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(clip, path)
        return tmp_path / "videos"

    (tmp_path / "videos").mkdir()
    return put


def write(path, value, ascii=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=ascii), encoding="utf-8")
    return path


def run_convert(name, annotations, videos, out, **more):
    """(rows, [(row, reason, kept)]) as they stand in the files."""
    annotations = annotations if isinstance(annotations, list) else [annotations]
    convert(name, annotations, videos, out, **more)
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
    rows, named = read(out), read(out.with_suffix(".skipped.jsonl"))
    assert not any(map(question_error, rows)) and len({row["id"] for row in rows}) == len(rows)
    return rows, [(line["row"], line["reason"], line["kept"]) for line in named]


# ------------------------------------------------------------------------------ a row or two of each format
MANY = ["one", "two", "three", "four"]
RAW = {
    "videomme": [{
        "video_id": "007", "duration": "medium", "domain": "Sports", "sub_category": "Chess",
        "url": "https://x", "videoID": "aB-3_c", "question_id": "007-2", "task_type": "Counting Problem",
        "question": "How many pawns are left?",
        "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."], "answer": "C"}],
    "longvideobench": [{
        "video_id": "qq1", "question": "What does the cook hold?",
        "candidates": ["a pan", "a spoon", "a fork"], "correct_choice": 2, "position": [16, 4],
        "topic_category": "KH", "question_category": "S2O", "level": "L1-Perception", "id": "qq1_0",
        "video_path": "qq1.mp4", "subtitle_path": "qq1_en.json", "duration_group": 600,
        "starting_timestamp_for_subtitles": 10, "duration": 4.0}],
    "mlvu_dev": [
        {"video_name": "ego_7.mp4", "duration": 4.5, "question": "Where is the cup?\n(A) sink\n(B) shelf\n",
         "candidates": ["sink", "shelf"], "answer": "B", "task_type": "ego", "question_id": "Q3"},
        {"video": "sub_1.mp4", "duration": 4, "question": "Describe the storm.", "answer": "It is long.",
         "question_type": "subPlot", "scoring_points": ["long"]}],
    "mlvu_test": [
        {"video": "quiz_2.mp4", "duration": 3.75, "question": "Who wins?", "candidates":
         ["Ann", "Bob", "Cy", "Di", "Ed", "Flo"], "answer": "Flo", "question_type": "sportsQA",
         "question_id": "SQA_1"}],
    "lvbench": [{
        "key": "kK0", "type": "sport", "qa": [
            {"uid": "9", "question": "Who scores first?\n(A) the red team\n(B) the blue team",
             "answer": "B", "question_type": ["event understanding", "reasoning"],
             "time_reference": "00:01-00:02"},
            {"uid": "10", "question": "When?\n(A) early\n(B) late", "answer": "A",
             "question_type": ["temporal grounding"], "time_reference": "33:52-33:46"}],
        "video_info": {"duration_minutes": 0.1, "fps": 8.0}}],
    "videommmu": {"Adaptation": {
        "a": {"id": "dev_Art_Theory_1", "question": "What is <image 1> worth?", "options": MANY,
              "answer": "D", "question_type": "multiple-choice"},
        "b": {"id": "dev_Math_2", "question": "How much is it?", "options": [], "answer": "1,250.5",
              "question_type": "open"}}},
    "videommlu": [{
        "video_id": "lec3", "discipline": "physics", "captions_qa": [{"question": "x", "answer": "y"}],
        "reasoning_qa": [{"question": "Why does it fall?", "answer": "Because of gravity."},
                         {"question": "How fast?", "answer": "9.8 m/s per second"}]}],
    "longvideoreason_train": [{
        "problem": "What happens next?\nA. He runs.\nB. He sits.\nC. He eats.",
        "videos": "longvila_videos/v1.mp4", "reasoning": "...", "answer": "<answer>B</answer>",
        "data_type": "video"}],
    "longvideoreason_eval": [{
        "problem_id": 5, "problem": "Why is she glad?\n\nA. rain\nB. sun\nC. snow\nD. wind",
        "data_type": "video", "problem_type": "goal", "reasoning": "...", "videos": "longvila_videos/v2.webm",
        "answer": "<answer>D</answer>"}],
    "lsdbench": [{
        "question": "What is packed first?", "options": {"B": "a cup", "A": "a hat"}, "correct_answer": "A",
        "original_question": "x", "original_answer": "y", "segment": "00-00",
        "time_range": {"start": "00:00:01", "end": "00:00:03"}, "video_id": "0a-1f"}],
    "video-r1": [
        {"problem_id": 2, "problem": "What is shown?", "data_type": "video",
         "problem_type": "multiple choice", "options": ["A. a dog", "B. a cat"],
         "solution": "<answer>A</answer>", "path": "./STAR/videos/s1.mp4", "data_source": "STAR/a"},
        {"problem_id": 3, "problem": "How many cubes?", "data_type": "video", "problem_type": "numerical",
         "options": [], "solution": "<answer>3</answer>", "path": "./CLEVRER/c1.mp4",
         "data_source": "CLEVRER"},
        {"problem_id": 4, "problem": "What is said?", "data_type": "video", "problem_type": "free-form",
         "options": [], "solution": "<answer>A greeting.</answer>", "path": "./STAR/videos/s1.mp4",
         "data_source": "STAR/a"},
        {"problem_id": 5, "problem": "Read it.", "data_type": "image", "problem_type": "OCR", "options": [],
         "solution": "<answer>x</answer>", "path": "./OCR/1.png", "data_source": "OCR"}],
}
FILES = {"videomme": ["data/aB-3_c.mp4"], "longvideobench": ["qq1.mp4"],
         "mlvu_dev": ["3_ego/ego_7.mp4", "sub_1.mp4"], "mlvu_test": ["quiz_2.mp4"], "lvbench": ["kK0.mp4"],
         "videommmu": ["Art/dev_Art_Theory_1.mp4", "dev_Math_2.mp4"], "videommlu": ["lec3.mp4"],
         "longvideoreason_train": ["longvila_videos/v1.mp4"],
         "longvideoreason_eval": ["longvideo_eval_subset7/v2.webm"],
         "lsdbench": ["0a-1f.mp4"], "video-r1": ["STAR/videos/s1.mp4", "CLEVRER/c1.mp4"]}


def choice(id, video, question, options, answer, source, evidence, meta):
    return {"id": id, "video": f"videos/{video}", "question": question, "options": options, "answer": answer,
            "answer_type": "multiple_choice", "source": source, "evidence": evidence, "meta": meta}


def other(answer_type, id, video, question, answer, source, meta):
    return choice(id, video, question, None, answer, source, None, meta) | {"answer_type": answer_type}


EXPECTED = {
    "videomme": ([choice("007-2", "data/aB-3_c.mp4", "How many pawns are left?",
                         ["One.", "Two.", "Three.", "Four."], "C", "videomme", None,
                         {"domain": "Sports", "sub_category": "Chess", "kind": "Counting Problem",
                          "duration_group": "medium"})], []),
    # frames 4 and 16 of 8 a second, each in its middle
    "longvideobench": ([choice("qq1_0", "qq1.mp4", "What does the cook hold?", ["a pan", "a spoon", "a fork"],
                               "C", "longvideobench", [[0.562, 0.688], [2.062, 2.188]],
                               {"kind": "S2O", "duration_s": 4, "duration_group": 600, "position": [16, 4],
                                "level": "L1-Perception", "topic_category": "KH"})], []),
    "mlvu_dev": ([choice("Q3", "3_ego/ego_7.mp4", "Where is the cup?", ["sink", "shelf"], "B", "mlvu_dev",
                         None, {"kind": "ego", "duration_s": 4.5}),
                  other("open_ended", "sub_1_*", "sub_1.mp4", "Describe the storm.", "It is long.",
                        "mlvu_dev", {"kind": "subPlot", "duration_s": 4, "scoring_points": ["long"],
                                     "judge": True})], []),
    "mlvu_test": ([choice("SQA_1", "quiz_2.mp4", "Who wins?", ["Ann", "Bob", "Cy", "Di", "Ed", "Flo"], "F",
                          "mlvu_test", None, {"kind": "sportsQA", "duration_s": 3.75})], []),
    "lvbench": ([choice("kK0_9", "kK0.mp4", "Who scores first?", ["the red team", "the blue team"], "B",
                        "lvbench", [[1, 2]],
                        {"kind": "event understanding", "kinds": ["event understanding", "reasoning"],
                         "topic": "sport", "duration_s": 6}),
                 choice("kK0_10", "kK0.mp4", "When?", ["early", "late"], "A", "lvbench", None,
                        {"kind": "temporal grounding", "kinds": ["temporal grounding"], "topic": "sport",
                         "duration_s": 6, "time_reference": "33:52-33:46"})],
                [("kK0_10", "a time reference is reversed", True)]),
    "videommmu": ([choice("dev_Art_Theory_1_adaptation", "Art/dev_Art_Theory_1.mp4",
                          "What is <image 1> worth?", MANY, "D", "videommmu", None,
                          {"kind": "Adaptation", "subject": "Art_Theory",
                           "question_type": "multiple-choice"}),
                   other("number", "dev_Math_2_adaptation", "dev_Math_2.mp4", "How much is it?", 1250.5,
                         "videommmu", {"kind": "Adaptation", "subject": "Math", "question_type": "open"})],
                  [("dev_Art_Theory_1_adaptation", "the question's image is not in the file", True)]),
    "videommlu": ([other("open_ended", "lec3_*", "lec3.mp4", question, answer, "videommlu",
                         {"kind": "physics", "judge": True})
                   for question, answer in (("Why does it fall?", "Because of gravity."),
                                            ("How fast?", "9.8 m/s per second"))], []),
    "longvideoreason_train": ([choice("v1_*", "longvila_videos/v1.mp4", "What happens next?",
                                      ["He runs.", "He sits.", "He eats."], "B", "longvideoreason_train",
                                      None, {})], []),
    "longvideoreason_eval": ([choice("5", "longvideo_eval_subset7/v2.webm", "Why is she glad?",
                                     ["rain", "sun", "snow", "wind"], "D", "longvideoreason_eval", None,
                                     {"kind": "goal"})], []),
    "lsdbench": ([choice("0a-1f_*", "0a-1f.mp4", "What is packed first?", ["a hat", "a cup"], "A", "lsdbench",
                         [[1, 3]], {})], []),
    "video-r1": ([choice("2", "STAR/videos/s1.mp4", "What is shown?", ["a dog", "a cat"], "A", "video-r1",
                         None, {"kind": "multiple choice", "subset": "STAR/a"}),
                  other("number", "3", "CLEVRER/c1.mp4", "How many cubes?", 3, "video-r1",
                        {"kind": "numerical", "subset": "CLEVRER"}),
                  other("open_ended", "4", "STAR/videos/s1.mp4", "What is said?", "A greeting.", "video-r1",
                        {"kind": "free-form", "subset": "STAR/a", "judge": True})],
                 [("video-r1.json row 4", "it is not about a video", False)]),
}


def same_but_made_ids(row, expected):
    """Ids that end with * are made of the question, and only their beginning is written by hand."""
    if expected["id"].endswith("*"):
        assert row["id"].startswith(expected["id"][:-1]) and len(row["id"]) == len(expected["id"]) + 9
        row, expected = row | {"id": ""}, expected | {"id": ""}
    assert row == expected


def test_rows_of_each_format_equal_those_written_by_hand(videos, tmp_path, capsys):
    folder = videos(*sum(FILES.values(), []))

    def holds(name):
        path = write(tmp_path / f"{name}.json", RAW[name])
        rows, named = run_convert(name, path, folder, tmp_path / "out.jsonl")
        expected, expected_named = EXPECTED[name]
        assert named == expected_named and len(rows) == len(expected)
        for row, by_hand in zip(rows, expected):
            same_but_made_ids(row, by_hand)
            assert (tmp_path / row["video"]).is_file()
        found = len(expected) + sum(not kept for _, _, kept in expected_named)
        said = capsys.readouterr().out
        assert f"{len(expected)} of {found} questions" in said and f"found {found} / published" in said
        for size in FORMATS[name].sizes:
            assert f"{size} " in said and f"difference {found - size:+d}" in said
        for _, reason, _ in named:
            assert f"{reason} 1" in said

    all_hold(holds, [[name] for name in FORMATS])


@pytest.mark.slow
def test_all_formats_are_played_graded_and_reported_by_kind(videos, tmp_path, monkeypatch, capsys):
    folder, questions = videos(*sum(FILES.values(), [])), []
    for name in FORMATS:
        path = write(tmp_path / f"{name}.json", RAW[name])
        questions += run_convert(name, path, folder, tmp_path / f"{name}.jsonl")[0]
    write_jsonl(tmp_path / "all.jsonl", questions)
    monkeypatch.setattr(sys, "argv", [
        "eval.py", "--model", str(ROOT / "demo" / "tiny_base"), "--data", str(tmp_path / "all.jsonl"),
        "--out", str(tmp_path / "eval"), "--device", "cpu", "--max_turn_tokens", "120", "--num_frames", "4"])
    evaluation.main()
    read = lambda name: [json.loads(line) for line in (tmp_path / "eval" / name).read_text().splitlines()]
    episodes = {row["question"]: row for row in read("episodes.jsonl")}
    assert episodes.keys() == {q["id"] for q in questions} and not read("skipped.jsonl")
    assert sum(row["answer"] is not None for row in episodes.values()) >= 3
    for q in questions:
        episode = episodes[q["id"]]
        graded = None if q["meta"].get("judge") else grade(episode["answer"], q)  # which waits for a judge
        assert episode["right"] == graded and episode["frames"] >= 4
    kinds = [q["meta"].get("kind") or q["source"] for q in questions]
    reported = {row["kind"]: row["num_questions"] for row in read("by_kind.jsonl")}
    assert reported.pop("task mean") and reported == {"all": len(questions)} | {kind: kinds.count(kind) for kind in kinds}
    # right answers are graded as right
    env_config = EnvConfig(max_zooms=1, overview_max_frames=2)
    for question in questions:
        env = ZoomEnv(question, env_config, tmp_path)
        env.reset()
        env.step(f"<think>t</think><answer>{question['answer']}</answer>")
        assert env.rewards["accuracy"] == 1


def test_a_file_of_chosen_frames_fits_the_converted_rows(videos, tmp_path):
    raw = RAW["mlvu_dev"][:1]
    chosen = write(tmp_path / "frames.json", [raw[0] | {"frame_idx": [3.0, 9.0]}])
    rows, _ = run_convert("mlvu_dev", write(tmp_path / "a.json", raw), videos(), tmp_path / "o.jsonl")
    known, bad = with_chosen_frames(rows, RunConfig(overview=str(chosen), max_bad=0))
    assert known[0]["overview_frames"] == [3.0, 9.0] and not bad


# -------------------------------------------------------------------------------------- options and answers
def named_as(reason, function, *arguments):
    with pytest.raises(ValueError, match=reason):
        function(*arguments)


def test_options_in_every_shape():
    def holds(value, options):
        assert read_options(value) == options

    all_hold(holds, [(value, ["red", "blue"]) for value in (
        ["red", "blue"], ["A. red", "B. blue"], ["(A) red", "(B) blue"], ["A) red", "B) blue"],
        ["A.red", "B.blue"], "(a) red\n(b) blue", "(a) red (b) blue", "a. red\nb. blue",
        ["A：red", "B：blue"], ["a. red", "b. blue"], {"A": "red", "B": "blue"},
        {"(B)": "blue", "a.": "red"}, "['red', 'blue']", '["A. red", "B. blue"]', "A. red\nB. blue",
        "(A) red (B) blue", ["red ", " blue\n"])])
    all_hold(holds, [(value, []) for value in (None, [], "", {})])


def test_unclear_options_are_named():
    all_hold(lambda value, reason: named_as(reason, read_options, value), [
        ({"A": "red", "C": "blue"}, "options have other keys"),
        ("(a) red or (c) blue", "options are not a list"),
        ("red or blue", "options are not a list"), (7, "options are not a list"),
        ([{"label": "A", "text": "red"}, {"label": "B", "text": "blue"}], "an option is no text"),
        ([["red"], ["blue"]], "an option is no text"),
        ("['red' 'blue']", "as NumPy prints it"), ("['A. red'\n 'B. blue']", "as NumPy prints it")])


def test_options_without_text_hold_their_place_and_nulls_behind_the_last_fill_a_table():
    def holds(value, options):
        assert read_options(value) == options

    all_hold(holds, [
        (["A. red", "B."], ["red", ""]), (["A. red", "(b)", "C. blue"], ["red", "", "blue"]),
        (["red", ""], ["red", ""]), (["A. red", "", "C. blue"], ["red", "", "blue"]),
        (["", "red"], ["", "red"]), (["", ""], ["", ""]), (["red", None, "blue"], ["red", "", "blue"]),
        (["red", "blue", None, None], ["red", "blue"]), ([None, None], []),
        ({"A": "red", "B": None, "C": "blue", "D": None}, ["red", "", "blue"]),
        ({"A": "red", "B": "N/A", "C": "blue"}, ["red", "N/A", "blue"]),
        (["red", "blue", "N/A"], ["red", "blue", "N/A"]), (["A.", "B."], ["A.", "B."]),
        ("(A) red\n(B)\n(C) blue", ["red", "", "blue"])])


def test_options_that_are_letters_or_numbers_stay():
    assert read_options(["A", "B", "C"]) == ["A", "B", "C"]
    assert read_options([2, 0, 5]) == ["2", "0", "5"]
    assert read_options(["I. and II.", "II. only"]) == ["I. and II.", "II. only"]
    for options in (["A. (a)(b)", "B. (b)(a)"], ["(a)(b)", "(b)(a)"]):
        assert read_options(options) == ["(a)(b)", "(b)(a)"]


def test_answers_in_every_shape():
    def holds(answer):
        assert read_answer(answer, ["a car", "a bus", "a tram"]) == "B"

    all_hold(holds, [[answer] for answer in (
        "B", "b", "B.", "(B)", "B)", "[B]", " B \n", "<answer>B</answer>", "<answer> (B) </answer>", "\\boxed{B}",
        "B. a bus", "(B) a bus", "B：a bus",
        "b. a bus", "(b) a bus", "b) a bus", "（ｂ）", "a bus", "A BUS.", "bus",
        "<answer>a bus</answer>", ["B"])])


def test_no_answer_is_guessed():
    all_hold(lambda answer, options, reason: named_as(reason, read_answer, answer, options), [
        ("D", ["x", "y", "z"], "no right option"), ("", ["x", "y"], "no right option"),
        (None, ["x", "None"], "no right option"), ("@", ["x", "y"], "no right option"),
        (["A", "B"], ["x", "y"], "no right option"), ("red", ["green", "blue"], "no right option"),
        ("B. x", ["x", "y"], "no right option"), ("A or B", ["x", "y"], "no right option"),
        ("B", ["B", "A"], "fits two options"), ("the car", ["a car", "Car!"], "fits two options")])


def test_the_exact_text_wins_and_a_data_set_may_say_that_answers_are_letters():
    assert read_answer("C++", ["C", "C#", "C++"]) == "C"
    assert read_answer("Yes", ["yes", "Yes"]) == "B"
    assert read_answer("2", ["4", "2"]) == "B"
    assert read_answer("B", ["B", "A"], is_letter=True) == "B"
    assert read_answer("a tram", ["a car", "a tram"], is_letter=True) == "B"


def test_of_equal_options_the_letter_or_the_last_one_is_right():
    """As in MLVU's own code: a text names the last option that is the same, also an empty one. Where answers
    are letters, no text is no answer."""
    assert read_answer("A", ["red", "red"], is_letter=True) == read_answer("A", ["red", "red"]) == "A"
    assert read_answer("red", ["red", "blue", "red"]) == "C" and read_answer("B", ["", ""]) == "B"
    assert read_answer("", ["red", "", "blue"]) == "B"
    named_as("no right option", read_answer, None, ["red", "", "blue"])
    named_as("no right option", lambda: read_answer("", ["red", "", "blue"], is_letter=True))


SPLIT = [
    ("Who?\n(A) Ann\n(B) Bob", "Who?", ["Ann", "Bob"]),
    ("Who?\nA. Ann\nB. Bob\n", "Who?", ["Ann", "Bob"]),
    ("Who?\nOptions:\nA) Ann\n\nB) Bob", "Who?", ["Ann", "Bob"]),
    ("Who? (A) Ann (B) Bob", "Who?", ["Ann", "Bob"]),
    ("Who? Options: A. Ann B. Bob C. Cy", "Who?", ["Ann", "Bob", "Cy"]),
    ("Graph\n(A) rises.\nWhy?\n(A) rain\n(B) sun", "Graph\n(A) rises.\nWhy?", ["rain", "sun"]),
    ("谁？\nA、安\nB、鲍勃", "谁？", ["安", "鲍勃"]),
    ("Who is J. A. Smith?", "Who is J. A. Smith?", []),
    ("Is vitamin A. like B. here?", "Is vitamin A. like B. here?", []),
    ("Who?\nC. But the question needs more.", "Who?\nC. But the question needs more.", []),
    ("Who?\nA. Ann\nC. Cy", "Who?\nA. Ann\nC. Cy", []),
    ("Who?\nA. Ann\nor\nB. Bob", "Who?\nA. Ann\nor\nB. Bob", []),
    ("Who?\nA. Ann\nB. Bob\nor\nC. Cy", "Who?\nA. Ann\nB. Bob\nor\nC. Cy", []),
    ("Who?\nA.\nAnn\nB. Bob", "Who?\nA.\nAnn\nB. Bob", []),
    ("Who? A. Ann  B. Bob\nC. Cy  D. Di", "Who?", ["Ann", "Bob", "Cy", "Di"]),
    *((text, text, []) for text in (
        "Who?\n- A. Ann\n- B. Bob\n- C. Cy", "Who?\nOption A: Ann\nOption B: Bob\nOption C: Cy",
        "Who? A. Ann B. Bob C. Cy\nAnswer with the letter.")),
]


def test_options_at_the_end_of_a_question_are_split_off():
    def holds(text, question, options):
        assert split_options(text) == (question, options, "")

    all_hold(holds, SPLIT)


def test_text_behind_the_options_is_not_taken_for_one(videos, tmp_path):
    text = "Who?\nA. Ann\nB. Bob\nAnswer with the letter."
    assert split_options(text) == ("Who?", ["Ann", "Bob"], "Answer with the letter.")
    raw = RAW["longvideoreason_eval"] + [RAW["longvideoreason_eval"][0] | {"problem_id": 6, "problem": text}]
    _, named = run_convert("longvideoreason_eval", write(tmp_path / "a.json", raw), videos("v2.webm"), tmp_path / "o.jsonl")
    assert named == [("a.json row 2", "text follows the options in the question", False)]


def test_time_references():
    def holds(text, segments):
        assert read_segments(text) == segments

    all_hold(holds, [
        ("00:15-00:19", [[15, 19]]), ("1:00:00 - 1:01:30", [[3600, 3690]]), ("61:05–62:00", [[3665, 3720]]),
        ("01:01-01:01", [[61, 61]]),
        ("00:01-00:02, 00:05-00:09", [[1, 2], [5, 9]]), ([["00:00:01", "00:00:03"], [4, 5.5]], [[1, 3], [4, 5.5]])])
    all_hold(lambda text, reason: named_as(reason, read_segments, text), [
        ("33:52-33:46", "reversed"), ("soon", "cannot be read"), ("1-2-3", "cannot"), ([15, 19], "cannot be read")])


def test_several_right_texts_are_kept_and_a_broken_list_is_named():
    given = lambda answer: Given("x.mp4", "Why?", answer, open="number or text")
    meta = {}
    assert open_answer(given("['24/7', '3.43']"), meta) == ("24/7", "open_ended")
    assert meta == {"also_right": ["3.43"]}
    assert open_answer(given("[0, 5]"), {}) == ("[0, 5]", "open_ended")
    for answer, expected in (("-.5", -0.5), ("1,250", 1250), ("-", "-"), ("12,5", "12,5"), ("4 m", "4 m")):
        assert open_answer(given(answer), {})[0] == expected
    for answer, reason in (("['a', 'b]", "list"), ("", "no answer"), (None, "no answer")):
        named_as(reason, open_answer, given(answer), {})


# ---------------------------------------------------------------------------------- rows that are left out
def test_awkward_rows_come_out_or_are_named(videos, tmp_path, capsys):
    good = RAW["videomme"][0]
    raw = [good, good, {k: v for k, v in good.items() if k != "answer"} | {"question_id": "1"},
           good | {"question_id": "2", "answer": "E"},
           good | {"question_id": "3", "options": ["A. x", "B. x"], "answer": "B"},
           good | {"question_id": "9", "options": ["A. x", "B. y", "C. x"], "answer": "B"},
           good | {"question_id": "4", "options": ["A. x"], "answer": "A"}, "text",
           good | {"question_id": "5", "videoID": "gone"}, good | {"question_id": "6", "question": " "},
           good | {"question_id": "7", "options": 7}, good | {"question_id": "8", "question": "cut \ud83d"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in raw) + "{half\n")
    rows, named = run_convert("videomme", path, videos("aB-3_c.mp4"), tmp_path / "o.jsonl")
    assert [row["id"] for row in rows] == ["007-2", "3", "9", "5"] and rows[3]["video"] == "videos/gone.mp4"
    left_out = {where: reason for where, reason, kept in named if not kept}
    number = lambda n: left_out[f"a.jsonl row {n}"]
    assert number(2) == "duplicate id" and number(3) == 'no "answer"' and number(4) == "no right option"
    assert "2 to 26 options" in number(7)
    assert number(8) == "not a row" and number(10) == "no question" and number(11) == "options are not a list"
    assert "cannot be written" in number(12) and number(13) == "not JSON"
    assert [(where, reason) for where, reason, kept in named if kept] == [
        ("3", "two options are the same, and right"), ("5", "video missing")]
    said = capsys.readouterr().out
    assert "4 of 13 questions" in said and "video missing 1" in said and "duplicate id 1" in said


def test_rows_with_equal_or_empty_options_come_out_and_are_graded_by_their_letter(videos, tmp_path, capsys):
    """The shapes of rows of VideoMME, LVBench, MLVU and LSDBench that have them."""
    mlvu = {"video": "ego_7.mp4", "duration": 4.5, "question_type": "ego", "question": "Which?"}
    lvbench = lambda question, answer: {"key": "kK0", "video_info": {"duration_minutes": 0.1}, "qa": [
        {"uid": "1", "question": question, "answer": answer, "time_reference": "00:02-00:02"}]}
    chosen = lambda options, answer: RAW["videomme"][0] | {"options": options, "answer": answer}
    cases = [
        ("videomme", [chosen(["A. x.", "B. x.", "C. y."], "B")], ["x.", "x.", "y."], "B", ["the same"]),
        ("videomme", [chosen(["A. x.", "B. x.", "C. y."], "C")], ["x.", "x.", "y."], "C", []),
        ("videomme", [chosen(["A. x.", "B.", "C. y."], "A")], ["x.", "", "y."], "A", ["empty"]),
        ("videomme", [chosen(["A. x.", "B.", "C. y."], "B")], ["x.", "", "y."], "B", ["empty"]),
        ("lvbench", [lvbench("Who?\n(A) x\n(B) y\n(C) x", "C")], ["x", "y", "x"], "C", ["the same"]),
        ("lvbench", [lvbench("Who?\n(A) x\n(B) \n(C) z", "A")], ["x", "", "z"], "A", ["empty"]),
        *(("mlvu_dev", [mlvu | {"candidates": options, "answer": answer}], options, letter, reasons)
          for options, answer, letter, reasons in (
              (["x", "y", "x"], "x", "C", ["the same"]), (["x", "y", "x"], "A", "A", ["the same"]),
              (["x", "", "z"], "", "B", ["empty"]), (["", "y", "z", ""], "y", "B", ["empty"]))),
        ("lsdbench", [RAW["lsdbench"][0] | {"options": {"A": "x", "B": "x"}}], ["x", "x"], "A", ["the same"])]
    folder = videos(*sum(FILES.values(), []))

    def holds(name, raw, options, answer, reasons):
        rows, named = run_convert(name, write(tmp_path / "a.json", raw), folder, tmp_path / "o.jsonl")
        assert rows[0]["options"] == options and rows[0]["answer"] == answer
        assert len(named) == len(reasons) and all(
            word in reason and kept for word, (_, reason, kept) in zip(reasons, named))
        assert not reasons or f"kept, but: {named[0][1]} 1" in capsys.readouterr().out
        env = ZoomEnv(rows[0], EnvConfig(max_zooms=1, overview_max_frames=2), tmp_path)
        shown = "".join(item for item in env.reset()[1].content if isinstance(item, str))
        assert all(f"\n{letter}. {option}\n" in shown for letter, option in zip("ABCD", options))
        for letter in "ABCD"[:len(options)]:
            assert grade(letter, rows[0]) == grade(f"({letter})", rows[0]) == (letter == answer)

    all_hold(holds, cases)


def test_filling_of_option_columns_is_dropped_behind_the_last_option_only(videos, tmp_path):
    """What LongVideoBench's columns or lists hold, the number of the right one; the options that come out."""
    other, folder = RAW["longvideobench"][0], videos("qq1.mp4")
    base = {key: value for key, value in other.items() if key != "candidates"} | {"id": "base"}
    columns = lambda *texts: {f"option{i}": text for i, text in enumerate(texts)}
    cases = [
        (columns("red", "N/A", "blue", "green", "N/A"), 1, ["red", "N/A", "blue", "green"]),
        (columns("red", "N/A", "blue", "green", "N/A"), 2, ["red", "N/A", "blue", "green"]),
        (columns("red", "blue", "N/A"), 2, ["red", "blue", "N/A"]),
        (columns("red", "blue", "N/A", "N/A", "N/A"), 2, ["red", "blue", "N/A"]),
        (columns("red", "", "blue", "", ""), 2, ["red", "", "blue"]),
        (columns("red", None, "blue", None, None), 0, ["red", "", "blue"]),
        (columns("red", "-", "blue", "n/a", "NA", float("nan"), "nan", "-"), 2, ["red", "-", "blue"]),
        ({"option0": "red", "option2": "blue", "option4": "green"}, 4, ["red", "", "blue", "", "green"]),
        ({"candidates": ["red", "N/A", "blue", "N/A"]}, 1, ["red", "N/A", "blue"]),
        ({"candidates": "['red', 'N/A', 'blue']"}, 2, ["red", "N/A", "blue"]),
        ({"candidates": ["red", "blue", None, None]}, 1, ["red", "blue"]),
        (columns("red", "blue", "N/A"), 3, None), ({"candidates": ["red", "N/A"]}, 5, None)]

    def holds(given, right, options):
        path = write(tmp_path / "a.json", [base | given | {"correct_choice": right}, other])
        rows, named = run_convert("longvideobench", path, folder, tmp_path / "o.jsonl")
        if options is None:
            assert len(rows) == 1 and named == [("a.json row 1", "no right option", False)]
        else:
            assert rows[0]["options"] == options and rows[0]["answer"] == "ABCDE"[right]

    all_hold(holds, cases)


# how a question ends and its answer; the options and the letter, or None of an open question
MARKS = [
    *((text, answer, ["rain", "sun"], "B") for text in (
        "(a) rain\n(b) sun", "a) rain\nb) sun", "a. rain\nb. sun", "a: rain\nb: sun", "[a] rain\n[b] sun",
        "（a）rain\n（b）sun", "（Ａ）rain\n（Ｂ）sun", "ⓐ rain\nⓑ sun", "(A) rain\n(b) sun",
        "Options:\n(a) rain\n(b) sun", "(a) rain (b) sun", "[A] rain\n[B] sun") for answer in (
        "b", "(b)", "b)", "B", "[B]", "（ｂ）", "<answer>(b)</answer>", "b. sun", "(b) sun", "sun")),
    ("(a) Pour.\n(b) Stir.\n(A) (a)(b)\n(B) (b)(a)", "b", ["(a)(b)", "(b)(a)"], "B"),
    ("(a) Pour.\n(b) Stir.", "12.5", None, None),
    ("(a) Pour.\n(b) Stir.", "First pour, then stir.", None, None),
    ("Is it 9 a. m. or 10 p. m.", "a. m.", None, None), ("1. Pour.\n2. Stir.", "2", None, None),
    ("(1) Pour; (2) Stir", "2", None, None), ("A. Pour.\nc. Stir.", "Stir.", None, None)]


def test_marks_of_options_in_any_style_make_a_question_one_of_letters(videos, tmp_path):
    folder = videos("v2.webm")

    def holds(text, answer, options, letter):
        row = RAW["longvideoreason_eval"][0] | {"problem": f"Why?\n{text}", "answer": answer}
        path = write(tmp_path / "a.json", [row])
        rows, named = run_convert("longvideoreason_eval", path, folder, tmp_path / "o.jsonl")
        assert rows[0]["options"] == options and named == []
        if options:
            assert rows[0]["answer"] == letter and "judge" not in rows[0]["meta"]
            assert rows[0]["question"].startswith("Why?") and options[1] not in rows[0]["question"]
        else:
            assert (rows[0]["answer_type"], rows[0]["question"]) == ("open_ended", f"Why?\n{text}")

    all_hold(holds, MARKS)


def test_numbers_mark_options_where_every_question_has_some(videos, tmp_path):
    folder = videos("kK0.mp4")

    def holds(text, answer, options=("rain", "sun")):
        raw = [{"key": "kK0", "qa": [{"uid": "1", "question": f"Why?\n{text}", "answer": answer}]}]
        if isinstance(text, list):
            raw[0]["qa"][0] |= {"question": "Why?", "options": text}
        rows, _ = run_convert("lvbench", write(tmp_path / "a.json", raw), folder, tmp_path / "o.jsonl")
        assert (rows[0]["question"], rows[0]["options"], rows[0]["answer"]) == ("Why?", list(options), "B")

    all_hold(holds, [
        ("1) rain\n2) sun", "2"), ("1. rain\n2. sun", "2. sun"), ("(1) rain (2) sun", "(2)"),
        ("① rain\n② sun", "②"), ("⑴ rain\n⑵ sun", "2"), ("i) rain\nii) sun", "ii"),
        ("I. rain\nII. sun", "II"), ("1. rain\n2. sun", "sun"),
        (["1. rain", "2. sun"], "2"), (["① rain", "② sun"], "②"), (["(1) rain", "(2) sun"], "sun"),
        (["1. rain", "2. sun"], "B", ["1. rain", "2. sun"]), (["1.5", "2.5"], "2.5", ["1.5", "2.5"]),
        (["1. place", "2. place"], "2. place", ["1. place", "2. place"]), (["2", "1"], "1", ["2", "1"])])


ODD = [None, "", 0, -1, 3.5, True, [], {}, ["a"], {"a": 1}, "A", "\0", "x" * 3000, "\ud800", "['a' 'b']",
       "[1,", "\n" * 50, 10**400, 1e308, float("nan"), float("inf"), [None], "00:10", "99:99-1", "<image 1>",
       "B. B", "../../..", {"A": "x", "B": "y"}, "(A) x (B) y", "²"]


def spoil(rng, value):
    """Puts odd values somewhere into a row."""
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.8:
        return spoil(rng, value[key])
    value[key] = copy.deepcopy(rng.choice(ODD))


@pytest.mark.slow
def test_rows_of_any_content_come_out_usable_or_are_named(videos, tmp_path):
    folder, rng, came_out = videos("qq1.mp4", "aB-3_c.mp4"), random.Random(0), 0
    for _ in range(150):
        name = rng.choice(list(FORMATS))
        raw = copy.deepcopy(RAW[name])
        for _ in range(rng.choice([1, 1, 3])):
            spoil(rng, raw)
        try:
            came_out += len(run_convert(name, write(tmp_path / "a.json", raw, True), folder,
                                        tmp_path / "o.jsonl", check_videos=True)[0])
        except UserError as error:
            assert "no row of" in str(error) and len(str(error).splitlines()) == 1
    assert came_out > 50


def test_questions_without_their_options_are_named(videos, tmp_path):
    raw = [row | {"problem_id": n} for n, row in enumerate(RAW["longvideoreason_eval"] * 3)]
    raw[1]["problem"] = "Who is it?\n\n"
    raw[2]["answer"], raw[2]["problem"] = "<answer>It rains.</answer>", "Why?"
    rows, named = run_convert("longvideoreason_eval", write(tmp_path / "a.json", raw), videos("v2.webm"),
                              tmp_path / "o.jsonl")
    assert [row["answer_type"] for row in rows] == ["multiple_choice", "open_ended"]
    assert rows[1]["meta"]["judge"]
    assert named == [("a.json row 2", "no options in its question", False)]


def test_frames_of_a_missing_or_shorter_video_are_no_evidence(videos, tmp_path):
    good = RAW["longvideobench"][0]
    raw = [good, good | {"id": "x", "video_path": "gone.mp4"}, good | {"id": "y", "position": [4, 4000]},
           good | {"id": "z", "correct_choice": -1}]
    rows, named = run_convert("longvideobench", write(tmp_path / "a.json", raw), videos("qq1.mp4"),
                              tmp_path / "o.jsonl")
    assert [bool(row["evidence"]) for row in rows] == [True, False, False]
    assert rows[1]["meta"]["position"] == [16, 4] and ("x", "video missing", True) in named
    assert ("x", "evidence counts frames, and the video is missing", True) in named
    assert ("y", "evidence counts frames that the video does not have", True) in named
    assert ("a.json row 4", "no right option", False) in named and len(named) == 4


def test_tables_and_parquet_give_the_rows_of_json(videos, tmp_path, monkeypatch):
    folder, raw = videos("aB-3_c.mp4", "qq1.mp4"), RAW["videomme"][0]
    expected, _ = run_convert("videomme", write(tmp_path / "a.json", [raw]), folder, tmp_path / "o.jsonl")
    for name, comma in (("a.tsv", "\t"), ("a.csv", ",")):
        texts = ['"' + str(value).replace('"', '""') + '"' for value in raw.values()]
        (tmp_path / name).write_text(comma.join(raw) + "\n" + comma.join(texts) + "\n")
        assert run_convert("videomme", tmp_path / name, folder, tmp_path / "o.jsonl")[0] == expected
    lvb = {k: v for k, v in RAW["longvideobench"][0].items() if k not in ("candidates", "position", "level")}
    lvb |= {"option0": "a pan", "option1": "a spoon", "option2": "a fork", "option3": "N/A", "option4": "N/A"}
    rows, _ = run_convert("longvideobench", write(tmp_path / "b.json", [lvb]), folder, tmp_path / "o.jsonl")
    assert rows[0]["options"] == ["a pan", "a spoon", "a fork"] and rows[0]["answer"] == "C"
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([raw]), tmp_path / "a.parquet")
    assert run_convert("videomme", tmp_path / "a.parquet", folder, tmp_path / "o.jsonl")[0] == expected
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as where it is not installed
    with pytest.raises(UserError, match="pip install pyarrow"):
        list(read_annotations([tmp_path / "a.parquet"]))


def test_ids_are_stable_in_another_order(videos, tmp_path):
    raw = RAW["lsdbench"] + [RAW["lsdbench"][0] | {"question": "And then?"}]
    folder, out = videos("0a-1f.mp4"), tmp_path / "o.jsonl"
    ids = [{row["question"]: row["id"] for row in
            run_convert("lsdbench", write(tmp_path / "a.json", some), folder, out)[0]}
           for some in (raw, raw[::-1])]
    assert ids[0] == ids[1] and len(set(ids[0].values())) == 2


# --------------------------------------------------------------------------- videos, images and subtitles
def test_videos_are_found_by_name_and_two_that_fit_are_named(videos):
    index = FileIndex(videos("a/x.mp4", "b/x.mp4", "b/y.MKV", "c/1_ego/z.mp4", "c/2_plot/z.mp4"), VIDEOS)
    name = lambda *args: (found := index.find(*args)) and found.relative_to(index.folder).as_posix()
    assert name("./b/x.mp4") == "b/x.mp4" and name("elsewhere/a/x") == "a/x.mp4"
    assert name("y.mp4") == name("y") == "b/y.MKV" and name("X") is None
    assert name("z.mp4", "ego") == "c/1_ego/z.mp4"
    with pytest.raises(ValueError, match="two files"):
        index.find("x.mp4")
    (index.folder / "a" / "loop").symlink_to(index.folder)
    (index.folder / "b" / "._y.MKV").write_bytes(b"of a Mac")
    again = FileIndex(index.folder, VIDEOS)
    assert sorted(again.by_stem) == ["x", "y", "z"] and len(again.by_stem["x"]) == 2


def test_a_video_of_two_tasks_is_taken_from_the_rows_own(videos, tmp_path):
    folder = videos("1_plotQA/7.mp4", "9_summary/7.mp4")
    raw = [RAW["mlvu_dev"][1] | {"video": "7.mp4", "question_type": task} for task in ("summary", "ego")]
    rows, named = run_convert("mlvu_dev", write(tmp_path / "a.json", raw), folder, tmp_path / "o.jsonl")
    assert [row["video"] for row in rows] == ["videos/9_summary/7.mp4"]
    assert named == [("a.json row 2", "two files fit its name", False)]


def test_evidence_after_the_end_of_the_video_is_none(videos, tmp_path):
    raw = copy.deepcopy(RAW["lvbench"])
    raw[0]["qa"][0]["time_reference"], raw[0]["qa"][1]["time_reference"] = "00:06-00:08", "0:05-0:08"
    path, folder = write(tmp_path / "a.json", raw), videos("kK0.mp4")
    rows, named = run_convert("lvbench", path, folder, tmp_path / "o.jsonl")
    assert [row["evidence"] for row in rows] == [None, [[5, 8]]]
    assert named == [("kK0_9", "a time reference is after the video's end", True)]


def test_unreadable_videos_are_named_where_they_are_checked(videos, tmp_path):
    folder = videos("aB-3_c.mp4")
    (folder / "broken.mp4").write_bytes(b"no video")
    raw = [RAW["videomme"][0], RAW["videomme"][0] | {"question_id": "2", "videoID": "broken"}]
    path = write(tmp_path / "a.json", raw)
    rows, named = run_convert("videomme", path, folder, tmp_path / "o.jsonl", check_videos=True)
    assert len(rows) == 2 and named == [("2", "video cannot be read", True)]
    assert rows[0]["meta"]["duration_s"] == SECONDS and "duration_s" not in rows[1]["meta"]
    assert run_convert("videomme", path, folder, tmp_path / "o.jsonl")[1] == []


def test_images_of_a_question_are_written_beside_the_rows(videos, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    raw = [{"id": "dev_Art_1", "question": "Is <image 1> old?", "options": ["yes", "no"], "answer": "A",
            "question_type": "multiple-choice", "image": {"bytes": PNG, "path": "1.png"}},
           {"id": "dev_Art_2", "question": "Is it old?", "options": ["yes", "no"], "answer": "B",
            "question_type": "multiple-choice", "image": {"bytes": PNG, "path": "2.png"}},
           {"id": "dev_Art_3", "question": "Is <image 2> old?", "options": ["yes", "no"], "answer": "B",
            "question_type": "multiple-choice", "image": {"bytes": PNG, "path": "3.png"}},
           {"id": "dev_Art_4", "question": "Is <image 1> old?", "options": ["yes", "no"], "answer": "B",
            "question_type": "multiple-choice", "image": {"bytes": b"text", "path": "4.png"}}]
    (tmp_path / "Adaptation").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(raw), tmp_path / "Adaptation" / "test.parquet")
    rows, named = run_convert("videommmu", tmp_path / "Adaptation", videos("dev_Art_1.mp4", "dev_Art_2.mp4"),
                              tmp_path / "o.jsonl")
    assert [row["question"] for row in rows] == ["Is <image> old?", "<image>\nIs it old?"]
    assert rows[0]["images"] == ["o_images/dev_Art_1_adaptation_1.png"]
    assert (tmp_path / rows[0]["images"][0]).read_bytes() == PNG
    assert [(where, reason) for where, reason, _ in named] == [
        ("test.parquet row 3", "an image of the question is missing"),
        ("test.parquet row 4", "an image of the question cannot be read")]


def test_each_mention_of_an_image_is_its_place():
    assert place_images("<image 2> or <image 1>, <image 2>?", {1: "a", 2: "b"}) == (
        "<image> or <image>, <image>?", ["b", "a", "b"], [])


def test_images_and_subtitles_of_a_row_are_checked():
    def holds(change, named):
        reason = question_error(EXPECTED["videomme"][0][0] | change)
        assert reason is None if named is None else named in reason

    all_hold(holds, [
        ({}, None), ({"images": ["a.png"], "question": "What is <image>?"}, None), ({"images": None}, None),
        ({"images": ["a.png"]}, "1 images, and 0 <image>"), ({"images": "a.png"}, "images is not a list"),
        ({"images": [3], "question": "<image>"}, "images is not a list"),
        ({"images": ["a\0"], "question": "<image>"}, "images is not a list"),
        ({"subtitles": [[0, 1.5, "hello"], [1.5, 1.5, "x"]]}, None), ({"subtitles": []}, None),
        ({"subtitles": [[2, 1, "x"]]}, "subtitles"), ({"subtitles": [[0, 1]]}, "subtitles"),
        ({"subtitles": [[0, 1, ""]]}, "subtitles"), ({"subtitles": "hello"}, "subtitles")])


def test_subtitles_reach_their_rows(videos, tmp_path):
    folder = tmp_path / "subs"
    write(folder / "en" / "qq1_en.json", [{"start": "00:00:10.5", "end": "00:00:12", "line": "stir it"}])
    (folder / "aB-3_c.srt").write_bytes(SRT.encode())
    files = videos("qq1.mp4", "aB-3_c.mp4")
    rows, named = run_convert("longvideobench", write(tmp_path / "a.json", RAW["longvideobench"]), files,
                              tmp_path / "o.jsonl", subtitles=folder)
    assert rows[0]["subtitles"] == [[0.5, 2, "stir it"]] and named == []
    raw = RAW["videomme"] + [RAW["videomme"][0] | {"question_id": "2", "videoID": "gone"}]
    rows, named = run_convert("videomme", write(tmp_path / "b.json", raw), files, tmp_path / "o.jsonl",
                              subtitles=folder)
    assert len(rows[0]["subtitles"]) == 2 and "subtitles" not in rows[1]
    assert named == [("2", "video missing", True), ("2", "no subtitles", True)]


# --------------------------------------------------------------------------------------- overlap and stats
def question(id, video, text, **more):
    return {"id": id, "video": video, "question": text, "options": ["x", "y"], "answer": "A",
            "answer_type": "multiple_choice", "source": "mine"} | more


def test_overlap_names_the_same_videos_and_questions(videos, clip, tmp_path, capsys):
    videos("a.mp4", "copy.mp4", "b.mp4", "c.mp4")
    write_video(tmp_path / "videos" / "b.mp4", (picture(200) for _ in range(5)), FPS)
    write_video(tmp_path / "videos" / "other.mp4", (picture(20) for _ in range(9)), FPS)
    write_jsonl(tmp_path / "same_words.jsonl", [question("0", "z.mp4", "Who?", options=["v", "w"])])
    write_jsonl(tmp_path / "one.jsonl", [question("1", "videos/a.mp4", "What is red?"),
                                         question("2", "videos/b.mp4", "Who?"),
                                         question("3", "old/gone.mp4", "When?"),
                                         question("9", "again/gone.mp4", "Whence?")])
    assert not any(overlap(tmp_path / "one.jsonl", tmp_path / "same_words.jsonl").values())
    trajectory = {"question": question("4", "videos/copy.mp4", "what is RED", options=["y", "x"]),
                  "kind": "exemplar", "turns": ["t"], "learn": [True]}
    write_jsonl(tmp_path / "two.jsonl", [trajectory])
    found = overlap(tmp_path / "one.jsonl", tmp_path / "two.jsonl")
    assert {what: len(pairs) for what, pairs in found.items()} == {
        "the same video by content": 1, "the same video by name": 0, "the same question and options": 1}
    assert found["the same question and options"] == [("1", "4")]
    write_jsonl(tmp_path / "three.jsonl", [question("5", "new/gone.webm", "Where?", options=["x", "z"])])
    found = overlap(tmp_path / "one.jsonl", tmp_path / "three.jsonl")
    assert found["the same video by name"] == [("old/gone.mp4", "new/gone.webm")]
    assert not found["the same video by content"] and not found["the same question and options"]
    assert "old/gone.mp4  new/gone.webm" in capsys.readouterr().out


def test_stats_of_questions_and_trajectories(data, videos, tmp_path, capsys):
    videos("a.mp4")
    write_jsonl(tmp_path / "q.jsonl", [
        question("1", "videos/a.mp4", "What?", meta={"kind": "count"}),
        question("2", "videos/gone.mp4", "Who?", answer="B",
                 meta={"kind": "order", "duration_s": 100, "duration_group": "long"}),
        question("3", "videos/a.mp4", "Why?", evidence=[[0, 1]], meta={"kind": "count"}),
        question("4", "videos/b.mp4", "When?", answer="B", meta={"kind": "count", "duration_s": 10}), "no row"])
    found = stats(tmp_path / "q.jsonl")
    assert found["counts"] == {"questions": 4, "rows": 4, "unusable": 1, "videos": 3, "videos missing": 2,
                               "with evidence": 1, "with images": 0, "with subtitles": 0}
    assert found["letters"] == {"A": 2, "B": 2} and found["answer types"] == {"multiple_choice": 4}
    count, order = found["kinds"]
    assert (count["name"], count["n"], count["mean"]) == ("count", 3, (SECONDS + 10) / 2)  # each video once
    assert (order["name"], order["most"]) == ("order", 100) and found["duration groups"][0]["name"] == "long"
    folder, _, trajectories = data
    found = stats(folder / "sft.jsonl", ROOT / "demo" / "tiny_base")
    turns = [len(row["turns"]) for row in trajectories]
    assert found["rounds"] == {n: turns.count(n) for n in sorted(set(turns))}
    tokens, = found["tokens"]
    assert tokens["n"] == len(trajectories) and tokens["least"] > 100
    assert "tokens of a dialogue" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- commands
def run_command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["data_prep.py", *map(str, flags)])
    data_prep.run_main(data_prep.main)


def test_all_flags_of_convert(videos, tmp_path, monkeypatch, capsys):
    (tmp_path / "subs").mkdir()
    (tmp_path / "subs" / "aB-3_c.srt").write_bytes(SRT.encode())
    run_command(monkeypatch, "convert", "--check_videos", "--dataset", "videomme", "--annotations",
                write(tmp_path / "a.json", RAW["videomme"]), "--videos", videos("aB-3_c.mp4"),
                "--out", tmp_path / "new" / "o.jsonl", "--subtitles", tmp_path / "subs")
    assert "found 1 / published 2700" in capsys.readouterr().out
    row, = map(json.loads, (tmp_path / "new" / "o.jsonl").read_text().splitlines())
    assert row["video"] == "../videos/aB-3_c.mp4" and len(row["subtitles"]) == 2
    assert row["meta"]["duration_s"] == SECONDS


def test_the_shell_sees_what_overlaps(tmp_path, monkeypatch, capsys):
    one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    write_jsonl(one, [question("1", "a.mp4", "What?")])
    write_jsonl(two, [question("1", "b.mp4", "Who?")])
    run_command(monkeypatch, "overlap", one, two)
    with pytest.raises(SystemExit) as raised:
        run_command(monkeypatch, "overlap", one, one)
    assert raised.value.code == 1
    run_command(monkeypatch, "stats", one)
    assert "questions 1" in capsys.readouterr().out


def test_wrong_input_ends_with_one_line(videos, tmp_path, monkeypatch, capsys):
    given = {"--dataset": "videomme", "--annotations": write(tmp_path / "a.json", [{"videoID": "x"}]),
             "--videos": videos(), "--out": tmp_path / "o.jsonl"}
    number = write(tmp_path / "3.json", 3)

    def holds(change, named):
        flags = [part for flag in (given | change).items() if flag[1] is not None for part in flag]
        with pytest.raises(SystemExit) as raised:
            run_command(monkeypatch, "convert", *flags)
        message = capsys.readouterr().err.strip()
        assert raised.value.code == 2 and named in message and len(message.splitlines()) == 1
        assert not (tmp_path / "o.jsonl").exists()

    all_hold(holds, [
        ({"--dataset": "mine"}, "videomme"), ({"--videos": "nowhere"}, "nowhere"),
        ({"--annotations": "no.json"}, "no.json"), ({"--annotations": "data_prep.py"}, ".parquet"),
        ({"--annotations": number}, "not a row 3"), ({"--out": "x.txt"}, ".jsonl"), ({"--out": None}, "--out"),
        ({"--dataset": "lvbench"}, 'no "'), ({"--subtitles": "nowhere"}, "nowhere")])


@pytest.mark.parametrize("name, evidence, hits, recalls, so_far", [
    ("lvbench", [[1, 2]], [True, True, False], [0.5, 0.1, 0], 0.6),
    ("longvideobench", [[0.562, 0.688], [2.062, 2.188]], [True, True, False],
     [0.5, 0.038 / 0.252, 0], 0.5 + 0.038 / 0.252),
    ("lsdbench", [[1, 3]], [True, True, False], [0.25, 0.1, 0], 0.35)])
def test_zooms_are_compared_with_a_benchmarks_evidence(videos, tmp_path, name, evidence, hits, recalls, so_far):
    path, folder = write(tmp_path / "a.json", RAW[name]), videos(*FILES[name])
    question = run_convert(name, path, folder, tmp_path / "o.jsonl")[0][0]
    assert question["evidence"] == evidence
    env = ZoomEnv(question, EnvConfig(), tmp_path)
    env.reset()
    for segment in ([0, 1.5], [1.9, 2.1], [3.2, 4]):
        call = json.dumps({"segment": segment, "fps": 8})
        env.step(f"<think>look</think><video_zoom>{call}</video_zoom>")
    episode = {"policy": "p", "mode": "zoom", "number": 0, "question": question["id"], "kind": "a",
               "right": 1.0, "calls": list(places.calls_of(env))}
    rows = places.zoom_rows(episode, question)
    assert [row["hit"] for row in rows] == hits
    assert [row["recall"] for row in rows] == pytest.approx(recalls)
    assert rows[-1]["recall_so_far"] == pytest.approx(so_far)
