"""Evaluation: intervals, the table's figures against a count by hand, asking about one video, wrong input."""

import json
import os
import signal
import sys
import wave
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import all_hold
from launcher import launch
from PIL import Image
from tiny import random_policy as make_policy

import eval as evaluation
from controls import modes
from demo import synthetic
from model import encode
from rollout import Episode
from training import run_folder, tables
from training.checkpoints import save_policy
from zoom_env import Message, ZoomEnv

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    synthetic.synthetic(folder, 5, 10, seed=4)
    save_policy(make_policy(layers=2), folder / "policy")
    return folder


def main(monkeypatch, capsys, *flags):
    """eval.py in this process: (exit status, what it printed, its one line of error)."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags), "--device", "cpu"])
    try:
        status = evaluation.run_main(evaluation.main) or 0
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert "Traceback" not in said.err and (status != 2 or sum("error:" in line for line in lines) == 1)
    return status, said.out, lines[-1] if status == 2 else ""


def interrupt_after(number, monkeypatch):
    """Ends an evaluation when it has so many episodes."""
    record, left = evaluation.record, iter(range(number))

    def count(episode):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return record(episode)

    monkeypatch.setattr(evaluation, "record", count)


def test_wilson_interval():
    """Against published values: 81 of 263 (Newcombe 1998, table I)."""
    low, high = tables.interval(81, 263)
    assert low == pytest.approx(0.2553, abs=1e-4) and high == pytest.approx(0.3662, abs=1e-4)
    assert tables.interval(0, 20)[0] == 0 and tables.interval(20, 20)[1] == pytest.approx(1)


class Known:
    """An engine whose episodes say these texts, without a policy that computes."""

    def __init__(self, policy, texts, limit):
        self.policy, self.texts, self.limit = policy, texts, limit

    def play(self, questions, root, env_config, on_end, make_env):
        for number, (question, turns) in enumerate(zip(questions, self.texts)):
            env = make_env(question, env_config, root)
            e = Episode(encode(self.policy, env.reset()), env=env, question_number=number)
            for text in turns:
                encode(self.policy, [Message("assistant", [text])], e.dialogue)
                reply = env.step(text)
                e.take_reply(self.policy, reply, self.limit)
            on_end(e)
        return None, []


ZOOM = '<think>t</think><video_zoom>{{"segment": [{}, {}], "fps": 2}}</video_zoom>'
ANSWER = "<think>t</think><answer>{}</answer>"


@pytest.fixture(scope="module")
def detail(folder):
    """A question that needs a zoom, and a wrong answer to it."""
    questions = map(json.loads, open(folder / "test.jsonl"))
    question = next(q for q in questions if q["meta"]["kind"] == "detail")
    return question, "ABCD"["ABCD".index(question["answer"]) - 1]


def play_known(folder, question, texts, limit=10**6, **env):
    policy, written = make_policy(layers=1), []
    config, questions = replace(policy.env_config, **env), {n: dict(question) for n in range(len(texts))}
    engine, play, mode = Known(policy, texts, limit), evaluation.Play("p", "zoom"), modes.Mode("zoom")
    evaluation.evaluate(engine, play, mode, questions, folder, config, written.append)
    return written, tables.table_rows("p", "zoom", written, questions, 3)[0]


def test_figures_equal_a_count_by_hand(folder, detail):
    """Episodes that are known: one zooms into the evidence and is right, one zooms elsewhere with one bad
    call and is wrong."""
    question, wrong = detail
    start, end = question["evidence"][0]
    far = 0 if start > 20 else 100
    written, rows = play_known(folder, question, [
        [ZOOM.format(start, end), ANSWER.format(question["answer"])],
        [ZOOM.format(far, far + 5), "what?", ANSWER.format(wrong)]])
    row = rows[0]
    assert row["kind"] == "all" and rows[1]["kind"] == "detail" and row["num_questions"] == 2
    assert row["accuracy"] == 0.5 and row["zooms_per_question"] == 1 and row["hit_rate"] == 0.5
    assert row["invalid_call_rate"] == 1 / 3 and row["skipped"] == 3
    assert row["calls_without_tool"] is None and row["untagged"] == 0
    num_frames = [9 + max(1, int((end - start) * 2)), 9 + 10]
    assert [e["frames"] for e in written] == num_frames and row["frames_per_question"] == sum(num_frames) / 2
    bound = synthetic.uniform_bound(row, [question] * 2)
    best = synthetic.uniform_accuracy(question, round(row["frames_per_question"]))
    assert bound["accuracy"] == pytest.approx(best)
    lines = tables.text_table(tables.COLUMNS, [*rows, bound]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_without_a_tool_calls_are_no_invalid_calls_and_a_bare_answer_counts(folder, detail):
    question, wrong = detail
    written, (row, *_) = play_known(folder, question, [
        [question["answer"]], [f"It is seen.\nThe answer is {question['answer']}."],
        [f"The answer is {wrong}."], [ANSWER.format(question["answer"])], [ZOOM.format(0, 5)],
        ["<video_zoom>?</video_zoom>"]], max_zooms=0)
    assert [e["right"] for e in written] == [1, 1, 0, 1, 0, 0]
    assert row["accuracy"] == 0.5 and row["untagged"] == 3 and row["calls_without_tool"] == 2
    assert row["invalid_call_rate"] is None and row["zooms_per_question"] == 0
    assert " - " in tables.text_table(tables.COLUMNS, [row])


def test_a_zoom_whose_reply_was_dropped_is_none(folder, detail):
    written, (row, *_) = play_known(folder, detail[0], [[ZOOM.format(0, 5)]], limit=1)
    assert row["zooms_per_question"] == 0 and row["frames_per_question"] == 9
    assert row["invalid_call_rate"] == 0 and written[0]["hits_known"] == 0


def test_results_file(folder, tmp_path, monkeypatch, capsys):
    status, said, error = main(
        monkeypatch, capsys, "--model", folder / "policy", "--data", folder / "test.jsonl", "--out", tmp_path,
        "--mode", "uniform", "--num_frames", 24, "--max_turn_tokens", 8, "--dtype", "bfloat16")
    assert status == 0, error
    assert "torch.bfloat16, decode step plain" in said
    rows = json.loads((tmp_path / "results.json").read_text())
    for key in ("policy", "mode", "num_questions", "skipped", "accuracy", "accuracy_low", "accuracy_high",
                "frames_per_question", "zooms_per_question", "invalid_call_rate", "hit_rate", "untagged",
                "calls_without_tool", "tokens_per_question", "seconds_per_question"):
        assert key in rows[0]
    assert rows[0]["num_questions"] == 10 and rows[0]["mode"] == "uniform"
    assert rows[0]["frames_per_question"] == 24 and rows[0]["zooms_per_question"] == 0


# -------------------------------------------------------------------------------------------- runs that go on
TINY = Path(ROOT, "demo", "tiny_base")


def results(out):
    """All that a run says in the end, seconds aside."""
    read = lambda name: [json.loads(line) for line in (out / name).read_text().splitlines()]
    rows = json.loads((out / "results.json").read_text()), read("by_kind.jsonl"), read("episodes.jsonl")
    return [[{k: v for k, v in row.items() if "seconds" not in k} for row in part] for part in rows]


def write_questions(folder, path, **videos):
    """The questions, some with another video."""
    questions = [json.loads(line) for line in open(folder / "test.jsonl")]
    for question in questions:
        question["video"] = videos.get(question["id"].replace("-", "_"), str(folder / question["video"]))
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return questions


def cut_a_line(path):
    """A line more, of which only the start was written."""
    first = path.read_text().splitlines()[0]
    with open(path, "a") as file:
        file.write(first[:50])


def test_an_interrupted_run_goes_on_to_the_same_results(folder, tmp_path, monkeypatch, capsys):
    """With other rows at one time, and a line that was cut off."""
    flags = ("--model", folder / "policy", "--data", folder / "test.jsonl", "--max_turn_tokens", 12)
    assert main(monkeypatch, capsys, *flags, "--out", tmp_path / "undisturbed")[0] == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        interrupt_after(4, patched)
        assert main(patched, capsys, *flags, "--out", out, "--max_rows", 2)[0] == 130
    assert not (out / "results.json").exists()
    assert len((out / "episodes.jsonl").read_text().splitlines()) == 4
    cut_a_line(out / "episodes.jsonl")
    status, said, _ = main(monkeypatch, capsys, *flags, "--out", out, "--max_rows", 5)
    assert status == 0 and "goes on, 4 episodes" in said
    assert results(out) == results(tmp_path / "undisturbed")


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """(flags, results) of a run of the tiny base with nothing in its way."""
    out = tmp_path_factory.mktemp("undisturbed")
    flags = ("--model", TINY, "--data", folder / "test.jsonl", "--max_turn_tokens", 120, "--mode", "zoom",
             "--device", "cpu")
    launch(1, "eval.py", [*flags, "--out", out]).wait()
    return flags, results(out)


def dies(after, *flags):
    """eval.py in a process that is killed after so many episodes."""
    record, left = evaluation.record, int(after)

    def count(e):
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return record(e)

    evaluation.record, sys.argv = count, ["eval.py", *flags]
    evaluation.run_main(evaluation.main)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_to_the_same_results(folder, tmp_path, undisturbed, processes):
    flags, expected = undisturbed
    out = tmp_path / "out"
    died = launch(processes, "test_eval:dies", [4 // processes, *flags, "--out", out, "--max_rows", 2])
    with pytest.raises(AssertionError, match="-9"):
        died.wait()
    assert not (out / "results.json").exists()
    parts = sorted(out.glob("episodes*.jsonl"))
    there = [line for path in parts for line in path.read_text().splitlines()]
    assert 1 <= len(there) <= 4, died.said()
    cut_a_line(next(path for path in parts if path.read_text()))
    said = launch(1, "eval.py", [*flags, "--out", out, "--max_rows", 5]).wait()  # other rows, and one process
    assert f"goes on, {len(there)} episodes" in said
    assert results(out) == expected and [path.name for path in out.glob("episodes*")] == ["episodes.jsonl"]


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(folder, tmp_path, undisturbed):
    flags, expected = undisturbed
    assert "2 process(es)" in launch(2, "eval.py", [*flags, "--out", tmp_path]).wait()
    assert results(tmp_path) == expected


def test_a_finished_run_is_shown_another_is_refused_or_moved_aside(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    write_questions(folder, tmp_path / "q.jsonl")
    flags = ("--model", folder / "policy", "--data", tmp_path / "q.jsonl", "--out", out, "--max_turn_tokens",
             4, "--mode", "zoom")
    call = lambda *more: main(monkeypatch, capsys, *flags, *more)
    assert call()[0] == 0
    first = (out / "episodes.jsonl").read_text()
    monkeypatch.setattr(evaluation, "load_policy", None)  # nothing is played from here on
    status, said, _ = call("--max_rows", 3, "--cache_gb", 1)
    assert status == 0 and "finished" in said and "95% interval" in said
    for more, words in [(("--seed", 1), "--seed 0, not 1"),
                        (("--mode", "uniform"), '--mode "zoom", not "uniform"'),
                        (("--dtype", "bfloat16"), "--dtype"), (("--model", TINY), "--model")]:
        status, _, error = call(*more)
        assert status == 2 and words in error and str(out) in error, error
    assert (out / "episodes.jsonl").read_text() == first
    monkeypatch.undo()
    assert call("--resume", "never")[0] == 0
    assert (out / "episodes.1.jsonl").read_text() == first
    assert all((out / name).exists() for name in ("results.1.json", "run.1.json", "results.json"))
    # other input, as after more training: a finished run is moved aside, one that is not finished is refused
    (tmp_path / "q.jsonl").write_text((tmp_path / "q.jsonl").read_text().replace("Which", "What"))
    assert call()[0] == 0 and (out / "episodes.2.jsonl").exists() and not (out / "episodes.3.jsonl").exists()
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(run | {"finished": False}))
    (tmp_path / "q.jsonl").write_text((tmp_path / "q.jsonl").read_text().replace("What", "Which"))
    status, _, error = call()
    assert status == 2 and "question file" in error and not (out / "episodes.3.jsonl").exists()
    assert call("--resume", "sometimes")[0] == 2


def test_the_checkpoint_counts_by_its_content(tmp_path):
    save_policy(make_policy(layers=1), tmp_path)
    before = run_folder.fingerprint(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert run_folder.fingerprint(tmp_path) == before
    save_policy(make_policy(seed=1, layers=1), tmp_path)
    assert run_folder.fingerprint(tmp_path) != before
    assert run_folder.fingerprint("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"


# ------------------------------------------------------------------------- what was skipped, once it is there
@pytest.fixture
def place(folder, tmp_path):
    """Questions with videos of their own, one of which is away: (flags, the video, what it holds)."""
    rows = write_questions(folder, tmp_path / "q.jsonl")
    (tmp_path / "videos").mkdir()
    for row in rows:
        name = Path(row["video"]).name
        (tmp_path / "videos" / name).write_bytes(Path(row["video"]).read_bytes())
        row["video"] = f"videos/{name}"
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    video = tmp_path / rows[-1]["video"]
    content = video.read_bytes()
    video.unlink()
    flags = ("--model", folder / "policy", "--data", tmp_path / "q.jsonl", "--max_turn_tokens", 4)
    return flags, video, content


def skipped_ids(out):
    return [json.loads(line)["row"] for line in (out / "skipped.jsonl").read_text().splitlines()]


def test_what_was_skipped_is_played_once_it_can_be(place, tmp_path, monkeypatch, capsys):
    """A video that was missing, then damaged, then whole, in two modes; not while it cannot be played, and
    not as others are gone. In the end all is as if everything had been there from the start."""
    flags, video, content = place
    call = lambda *more: main(monkeypatch, capsys, *flags, "--out", tmp_path / "out", *more)
    status, said, _ = call()
    assert status == 0 and "new run" in said and len(skipped_ids(tmp_path / "out")) == 5
    first = results(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "load_policy", None)
        for broken in (None, b"no video" * 1000, content[:3000]):
            if broken:
                video.write_bytes(broken)
            assert call()[0] == 0 and call("--strict")[0] == 3
            assert results(tmp_path / "out") == first
    # killed in the second start, with one more episode, then to the end
    video.write_bytes(content)
    with monkeypatch.context() as patched:
        interrupt_after(1, patched)
        assert main(patched, capsys, *flags, "--out", tmp_path / "out")[0] == 130
    status, said, _ = call("--strict")
    assert status == 0 and "goes on, 11 episodes" in said
    assert skipped_ids(tmp_path / "out") == []
    assert main(monkeypatch, capsys, *flags, "--out", tmp_path / "whole")[0] == 0
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    # all videos are gone, a table, the episodes: what was found stays
    whole = results(tmp_path / "out")
    for path in video.parent.iterdir():
        path.unlink()
    monkeypatch.setattr(evaluation, "load_policy", None)
    for lost in (None, "by_kind.jsonl", "skipped.jsonl"):
        if lost:
            (tmp_path / "out" / lost).unlink()
        status, said, _ = call("--strict")
        assert status == 0 and ("finished" in said) == (not lost) and "95% interval" in said
        assert results(tmp_path / "out") == whole
    (tmp_path / "out" / "episodes.jsonl").unlink()
    video.write_bytes(content)
    status, said, _ = call("--strict")
    assert status == 0 and "finished" in said and "95% interval" in said


def test_an_image_of_a_question_that_comes_later_is_played(place, tmp_path, monkeypatch, capsys):
    flags, video, content = place
    video.write_bytes(content)
    rows = [json.loads(line) for line in open(tmp_path / "q.jsonl")]
    for row, name in zip(rows, ("a.png", "b.png")):
        row |= {"images": [name], "question": f"<image> {row['question']}"}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    call = lambda: main(monkeypatch, capsys, *flags, "--out", tmp_path / "out", "--mode", "uniform")
    assert call()[0] == 0 and len(skipped_ids(tmp_path / "out")) == 2
    Image.new("RGB", (56, 56)).save(tmp_path / "b.png")
    status, said, _ = call()
    assert status == 0 and "goes on, 8 episodes" in said
    assert skipped_ids(tmp_path / "out") == [rows[0]["id"]]
    monkeypatch.setattr(evaluation, "load_policy", None)
    status, said, _ = call()
    assert status == 0 and "finished" in said


@pytest.mark.slow
def test_two_processes_go_on_with_what_was_skipped(place, tmp_path):
    flags, video, content = place
    flags = (*flags, "--device", "cpu")
    out, whole = tmp_path / "out", tmp_path / "whole"
    launch(2, "eval.py", [*flags, "--out", out]).wait()
    assert "finished" in launch(2, "eval.py", [*flags, "--out", out]).wait()
    video.write_bytes(content)
    assert "goes on, 10 episodes" in launch(2, "eval.py", [*flags, "--out", out]).wait()
    launch(1, "eval.py", [*flags, "--out", whole]).wait()
    assert results(out) == results(whole) and skipped_ids(out) == []


def test_where_nothing_can_be_played_an_earlier_run_stays(place, tmp_path, monkeypatch, capsys):
    flags, video, _ = place
    out = tmp_path / "out"
    assert main(monkeypatch, capsys, *flags, "--out", out)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    rows = [json.loads(line) | {"video": "away.mp4"} for line in open(tmp_path / "q.jsonl")]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for more in ((), ("--resume", "never")):
        flags = (*flags, "--data", tmp_path / "other.jsonl", *more)
        status, _, error = main(monkeypatch, capsys, *flags, "--out", out)
        assert status == 2 and "away.mp4: no such file" in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


# -------------------------------------------------------------------------------------------------- bad input
def test_bad_videos_are_counted_and_named_and_end_nothing(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    write_questions(folder, tmp_path / "q.jsonl", test_0000_0="none.mp4", test_0000_1="text.mp4")
    flags = ("--model", folder / "policy", "--data", tmp_path / "q.jsonl", "--out", tmp_path / "out",
             "--max_turn_tokens", 4, "--mode", "zoom")
    status, said, _ = main(monkeypatch, capsys, *flags)
    row = json.loads((tmp_path / "out" / "results.json").read_text())[0]
    assert status == 0 and row["num_questions"] == 8 and row["skipped"] == 2
    assert "skipped test_0000-0: " in said and "none.mp4" in said and "skipped test_0000-1: " in said
    assert len((tmp_path / "out" / "episodes.jsonl").read_text().splitlines()) == 8
    assert main(monkeypatch, capsys, *flags, "--strict")[0] == 3  # of the finished one, too


def test_no_video_at_all_says_why(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "load_policy", None)  # before a model loads
    questions = [json.loads(line) for line in open(folder / "test.jsonl")]
    for question in questions:
        question["video"] = question["video"].replace("/", "\\")
    (folder / "windows.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    status, _, error = main(monkeypatch, capsys, "--model", folder / "policy", "--out", tmp_path,
                            "--data", folder / "windows.jsonl")
    assert status == 2 and "test_0000-0: " in error and 'write "/"' in error and "windows.jsonl" in error
    monkeypatch.undo()
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    for question in questions:
        question["video"] = "text.mp4"
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    status, _, error = main(monkeypatch, capsys, "--model", folder / "policy", "--data", tmp_path / "q.jsonl",
                            "--out", tmp_path / "out")
    assert status == 2 and "text.mp4" in error and "not a video" in error


def test_a_folder_that_cannot_be_written_to_is_named_at_once(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluation, "load_policy", None)
    whats = {"--out": ("--data", folder / "test.jsonl"),
             "--save_frames": ("--video", folder / "videos" / "test_0000.mp4", "--question", "q")}

    def is_named(flag, name):
        flags = ["--model", folder / "policy", *whats[flag], flag, tmp_path / name]
        status, _, error = main(monkeypatch, capsys, *flags)
        assert status == 2 and "cannot write into" in error and name.split("\0")[0] in error

    names = "file", "file/out", "/proc/none/out", "with\0zero"
    all_hold(is_named, [(flag, name) for flag in whats for name in names])


def test_a_full_disk_keeps_what_is_there(tmp_path, monkeypatch):
    rows = run_folder.Rows("/dev", "full", None, 0)
    monkeypatch.setattr(rows, "out", tmp_path)
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    with pytest.raises(evaluation.UserError, match="No space left"):
        rows.write({"number": 1})


@pytest.mark.filterwarnings("error::DeprecationWarning", "error::FutureWarning")
def test_ask_about_a_video(folder, tmp_path, monkeypatch, capsys):
    video = folder / "videos" / "test_0000.mp4"
    status, said, error = main(
        monkeypatch, capsys, "--model", folder / "policy", "--video", video, "--question", "What happens?",
        "--options", "this", "that", "--save_frames", tmp_path / "seen", "--max_turn_tokens", 8)
    assert status == 0, error
    assert "overview: 9 frames" in said and "answer:" in said and "A. this" in said
    assert len(list((tmp_path / "seen").glob("0_overview_*.png"))) == 1


def test_a_strip_holds_frames_of_any_sizes():
    sizes = [(28, 56), (84, 28), (56, 56)]
    images = [torch.full((3, *size), n + 1, dtype=torch.uint8) for n, size in enumerate(sizes)]
    strip, left = evaluation.strip(images), 0
    assert strip.shape == (3, 84, 140) and strip.dtype == torch.uint8
    for image, (height, width) in zip(images, sizes):
        assert torch.equal(strip[:, :height, left:left + width], image)
        assert not strip[:, height:, left:left + width].any()
        left += width


def test_wrong_input_gives_one_line_and_status_2(folder, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.mp4"
    text.write_text("this is no video\n" * 100)
    audio = tmp_path / "audio.wav"
    with wave.open(str(audio), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"\0\0" * 8000)
    video, policy = folder / "videos" / "test_0000.mp4", folder / "policy"

    def is_one_line(flags, words):
        status, _, error = main(monkeypatch, capsys, *flags, "--out", tmp_path / "out")
        assert status == 2 and words in error, error

    data = ["--model", policy, "--data", folder / "test.jsonl"]
    all_hold(is_one_line, [
        (["--model", policy, "--video", tmp_path / "none.mp4", "--question", "q"], "none.mp4"),
        (["--model", policy, "--video", text, "--question", "q"], "text.mp4"),
        (["--model", policy, "--video", audio, "--question", "q"], "audio.wav"),
        (["--model", policy, "--video", video, "--question", "  "], "--question"),
        (["--model", policy, "--video", video], "--question"),
        (["--model", tmp_path, "--video", video, "--question", "q"], "config.json"),
        ([*data, "--mode", "sideways"], "sideways"),
        ([*data, "--num_frames", "0"], "--num_frames must be at least 1"),
        ([*data, "--num_frames", "5", "9"], "--num_frames takes one number"),
        ([*data, "--temperature", "-1"], "--temperature"),
        ([*data, "--max_bad", "nan"], "--max_bad"),
        ([*data, "--dtype", "float16"], "--dtype"),
    ])
