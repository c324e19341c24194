"""A served teacher's trajectories: each rule of the verifier, what is kept, what a kill loses, the judge."""

import json
import random
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from api_server import KEY, api_server, completion, refusal, text_of, use_key
from tiny import make_place, random_policy
from test_served import evaluated, turns_so_far

import data_prep
from common import UserError
from model import encode, replay
from protocols import make_env
from sources import teacher
from sources.read import read_trajectories
from sources.served import ServedEpisode
from training.environment import load_env_config

pytest.importorskip("openai")
HERE = Path(__file__).parent.parent
THINK = "<think>I look.</think>"


def zoom(start_s, end_s, fps=1, think=THINK):
    return think + f'<video_zoom>{{"segment": [{start_s}, {end_s}], "fps": {fps}}}</video_zoom>'


def answer(letter, think=THINK):
    return f"{think}<answer>{letter}</answer>"


def wrong(question):
    return answer("B" if question["answer"] == "A" else "A")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Questions with evidence, each with its number in its text, and a checkpoint."""
    folder = make_place(tmp_path_factory.mktemp("teacher"), layers=1)
    rows = [json.loads(line) for line in open(folder / "train.jsonl")]
    rows = [row | {"id": f"q{n}", "question": f"{row['question']} #{n}#"}
            for n, row in enumerate(row for row in rows if row["evidence"])]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def key(monkeypatch):
    use_key(monkeypatch)


def questions_of(place):
    return [json.loads(line) for line in open(place / "questions.jsonl")]


def asked_of(body, place):
    """The question that a request is about."""
    return questions_of(place)[int(re.search("#(\\d+)#", text_of(body))[1])]


def knows(place):
    """A teacher that looks at the evidence, then answers right."""
    def say(body):
        question = asked_of(body, place)
        if turns_so_far(body):
            return answer(question["answer"])
        start_s, end_s = question["evidence"][0]
        return zoom(start_s, end_s)
    return say


def prepared(command, place, out, *flags):
    """Runs data_prep.py; returns the rows, and those that were rejected."""
    sys.argv = ["data_prep.py", command, "--questions", str(place / "questions.jsonl"), "--out", str(out),
                *map(str, flags)]
    data_prep.main()
    rejected = [json.loads(line) for line in open(out.with_suffix(".rejected.jsonl"))]
    return [json.loads(line) for line in open(out)], rejected


def episode(place, question, turns, before=(), truncated=False):
    """One in which a student has said `before`, and the teacher the rest."""
    env = make_env(question | {teacher.BEFORE: [*before]}, load_env_config(place / "model"), place)
    teacher.with_student(env)
    for text in turns:
        env.step(text)
    env.end()
    return ServedEpisode(env, [], truncated=truncated)


# ------------------------------------------------------------------------------------------------- the rules
def test_each_rule_of_an_exemplar(place):
    question = questions_of(place)[0]
    start_s, end_s = question["evidence"][0]
    look, right = zoom(start_s, end_s), answer(question["answer"])

    def broken(*turns, rounds=None, **how):
        return teacher.broken_rule(episode(place, question, turns, **how), rounds)

    assert broken(look, right) is None and broken(right) is None
    assert broken(look, right, truncated=True) == "cut off"
    assert broken(look, wrong(question)) == broken(look) == "wrong"
    for bad in ("hm", look.removeprefix(THINK), zoom(0, 60, 8), look + "and", "<think>x<think>" + look):
        assert broken(bad, right) == "not well formed"
    assert broken(look, right + ".") == "not well formed"
    assert broken(look, look, right, rounds=3) is None
    assert broken(look, look, right, rounds=2) == "too many turns"


def test_each_rule_of_a_reflection(place):
    question = next(q for q in questions_of(place) if q["answer_type"] == "multiple_choice")
    start_s, end_s = question["evidence"][0]
    look, right, failed = zoom(start_s, end_s, 2), answer(question["answer"]), zoom(2, 10)

    def broken(*turns, before=(failed,)):
        return teacher.broken_rule(episode(place, question, turns, before))

    assert broken(look, right, before=(zoom(0, 1),)) is None
    # what shows nothing new: no zoom, the same, within it at its rate or a lower one, or hardly another
    for again in ((), (failed,), (zoom(3, 7),), (zoom(2, 10, 0.5),), (zoom(3, 7), failed), (zoom(2.5, 10.5),),
                  (zoom(2, 10, 1.2),)):
        assert broken(*again, right) == "nothing new"
    for other in (zoom(3, 7, 2), zoom(0, 7), zoom(20, 30), zoom(6, 14), zoom(2, 10, 2)):
        assert broken(other, right) is None
    assert broken(zoom(3, 7), right, before=(zoom(20, 30), failed)) == "nothing new"
    # a student's turn that is not well formed is no fault of the teacher's
    assert broken(look, right, before=("hm", zoom(0, 1))) is None
    for hint in ("The hint helps.", "I was told that it is late.", "As you said, it is elsewhere.", "I'm told so.",
                 "This message wants another zoom.", "The ground-truth is there.", "It was pointed out.",
                 "The user says that my zooms did not lead to it.", "The prompt says so.", "I've been told.",
                 "According to the user it is late.", "The user wants me to say what was wrong."):
        assert broken(look, answer(question["answer"], f"<think>{hint}</think>")) == "speaks of hints"
    for fair in ("It is tinted.", "The user asks for a colour.", "I noted a flash.", "As I said before.",
                 "The note on the table is red.", "She reads the message on the sign.", "A hint of blue."):
        assert broken(look, answer(question["answer"], f"<think>{fair}</think>")) is None
    # nothing that it was told gives the answer away
    said = f"<think>So the answer is {question['answer']}.</think>"
    assert broken(look, right, before=(zoom(0, 1, think=said),)) == "told"
    other = "<think>So the answer is {}.</think>".format("B" if question["answer"] == "A" else "A")
    assert broken(look, right, before=(zoom(0, 1, think=other),)) is None


@pytest.mark.parametrize("kind, truth, text, does", [
    ("open_ended", "a red car", "I see a red car.", True), ("open_ended", "a red car", "I see red carts.", False),
    ("number", 3, "there are 3 of them", True), ("number", 3, "there are 13", False),
    ("number", 3, "the third", False), ("open_ended", "the car", "car", True),
    ("multiple_choice", "B", "maybe B", True), ("multiple_choice", "B", "red, then blue", False),
    ("segment", [3, 9], "from 3 s to 9 s", True), ("segment", [30, 90], "from 3 s to 9 s", False)])
def test_what_gives_an_answer_away(kind, truth, text, does):
    """Wherever it stands in a turn."""
    question = {"answer_type": kind, "answer": truth, "options": ["red", "blue"]}
    call = '<video_zoom>{"segment": [0, 1], "fps": 3}</video_zoom>'
    for turn in (f"<think>{text}</think>{call}", text + call, f"<think>so</think>{text}{call}", f"<think>{text}",
                 f"<answer>{text}</answer><answer>x</answer>", f"<think>{text}</think><think>x</think>{call}"):
        assert teacher.tells(turn, question) == does


def test_a_call_may_give_a_segment_away():
    question = {"answer_type": "segment", "answer": [3, 9]}
    call = '<think>t</think><video_zoom>{"segment": [%s, 9.0], "fps": 1}</video_zoom>'
    assert teacher.tells(call % 3, question) and not teacher.tells(call % 8, question)


def test_luck():
    """At least half of a question's samples are right, or a zoom of this one hits."""
    def line(right, hits=0.0, rule=None, turns=()):
        return {"right": right, "hits": hits, "rule": rule or (None if right else "wrong"), "turns": turns}

    chosen = lambda lines, keep=9: teacher.choose(
        [each | {"turns": [str(n)]} for n, each in enumerate(lines)], keep)
    kept, others = chosen([line(1), line(0), line(0), line(0)])
    assert not kept and [rule for rule, _ in others] == ["luck", "wrong", "wrong", "wrong"]
    kept, _ = chosen([line(1), line(0), line(1), line(0)])
    assert [each["right_samples"] for each in kept] == ["2 of 4"] * 2
    kept, _ = chosen([line(1), line(0), line(1, hits=0.5), line(0), line(0)])
    assert [each["turns"] for each in kept] == [["2"]]
    # right, though it breaks another rule, is no luck of the others
    kept, _ = chosen([line(1), line(1, rule="speaks of hints"), line(0), line(0)])
    assert len(kept) == 1
    # those that hit come first; the same turns once
    kept, others = chosen([line(1), line(1, hits=1.0)], keep=1)
    assert kept[0]["turns"] == ["1"] and others[0][0] == "more than --keep"
    kept, others = teacher.choose([line(1, turns=["a"]), line(1, turns=["a"])], 9)
    assert len(kept) == 1 and others[0][0] == "said before"


# ------------------------------------------------------------------------------------------------- exemplars
def test_exemplars(place, tmp_path, capsys):
    """Rows that sft.py reads and replays from another folder, where each comes from; the rest beside."""
    out, questions = tmp_path / "deep" / "t.jsonl", questions_of(place)
    wrong_one = questions[2]["id"]

    def say(body):
        question = asked_of(body, place)
        return wrong(question) if question["id"] == wrong_one else knows(place)(body)

    with api_server(say) as server:
        flags = "--base_url", server.url, "--model", place / "model", "--samples", 2
        rows, rejected = prepared("exemplars", place, out, *flags)
        came = len(server.requests)
        assert prepared("exemplars", place, out, *flags) == (rows, rejected) and len(server.requests) == came
    assert [row["question"]["id"] for row in rows] == [q["id"] for q in questions if q["id"] != wrong_one]
    assert [(row["question"], row["rule"]) for row in rejected if row["rule"] != "said before"] == [
        (wrong_one, "wrong")] * 2
    made = rows[0]["provenance"]
    assert (made["teacher"], made["right"], made["temperature"], made["sample"]) == ("teacher", "2 of 2", 1.0, 0)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", made["date"]) and len(made["prompt_sha256"]) == 64
    files = [path for path in out.parent.rglob("*") if path.is_file()]
    assert not any(KEY in path.read_text() or "127.0.0.1" in path.read_text() for path in files)
    assert "rejected: said before" in (said := capsys.readouterr().out) and "tokens: " in said
    policy = random_policy(layers=1)
    read, bad = read_trajectories(out, 0.0)
    for row in read:
        dialogue, env = replay(policy, row, out.parent)
        assert env.rewards["accuracy"] == 1 and env.num_calls() == 1 and sum(dialogue.trained)
    assert not bad and len(read) == len(rows)


def test_what_was_not_played_is_tried_again(place, tmp_path, capsys):
    """A question that the server does not answer, and a limit of tokens: what is there is written."""
    out, broken = tmp_path / "t.jsonl", questions_of(place)[1]["id"]
    say = lambda body: refusal(400, "no") if asked_of(body, place)["id"] == broken else knows(place)(body)
    with api_server(say) as server:
        rows, _ = prepared("exemplars", place, out, "--base_url", server.url, "--model", place / "model")
    (skipped,) = [json.loads(line) for line in open(out.with_suffix(".skipped.jsonl"))]
    assert skipped == {"row": broken, "reason": "status 400: no"} and "tries again" in capsys.readouterr().err
    with api_server(knows(place)) as server:
        again, _ = prepared("exemplars", place, out, "--base_url", server.url, "--model", place / "model")
        assert len(server.requests) == 2 and len(again) == len(rows) + 1
        other = tmp_path / "other.jsonl"
        flags = "--base_url", server.url, "--model", place / "model", "--concurrency", 1
        with pytest.raises(UserError, match="--max_tokens_total 220"):
            prepared("exemplars", place, other, *flags, "--max_tokens_total", 220)
        assert len(other.read_text().splitlines()) == 1
        whole, _ = prepared("exemplars", place, other, *flags)
    strip = lambda rows: [row["question"]["id"] for row in rows]
    assert strip(whole) == strip(again)


def test_flags_that_are_wrong(place, tmp_path):
    for flags, words in ((("exemplars",), "--base_url is needed"),
                         (("reflections", "--base_url", "http://x"), "--student is needed"),
                         (("reflections", "--base_url", "http://x", "--student", "http://y", "--learn", "no"),
                          "--learn must be all or corrections")):
        with pytest.raises(UserError, match=words):
            prepared(flags[0], place, tmp_path / "t.jsonl", *flags[1:])
    with pytest.raises(UserError, match="another file whose name ends with .jsonl"):
        prepared("exemplars", place, tmp_path / "t.json", "--base_url", "http://x")
    with api_server(lambda body: wrong(asked_of(body, place))) as server:
        with pytest.raises(UserError, match="no exemplar was kept"):
            prepared("exemplars", place, tmp_path / "t.jsonl", "--base_url", server.url, "--model", place / "model")


# ----------------------------------------------------------------------------------------------- reflections
def test_reflections(place, tmp_path):
    """The student's wrong turns without its answer, then the correction; the note is in no row, and the
    dialogue that is trained is one that the student could have had."""
    out, questions = tmp_path / "r.jsonl", questions_of(place)
    right_one, direct_one = questions[0]["id"], questions[1]["id"]
    bad_zoom = zoom(0, 1)

    def student(body):
        question = asked_of(body, place)
        if question["id"] == right_one:
            return answer(question["answer"])
        if question["id"] == direct_one or turns_so_far(body) > 1:
            return wrong(question)
        return ["hm", bad_zoom][turns_so_far(body)]

    def corrects(body):
        question, own = asked_of(body, place), turns_so_far(body) - 2
        assert ("Your zooms so far did not lead" in text_of(body))
        assert wrong(question) not in text_of(body)
        return zoom(*question["evidence"][0]) if own == 0 else answer(question["answer"])

    with api_server(student) as pupil, api_server(corrects) as server:
        flags = "--base_url", server.url, "--student", pupil.url, "--model", place / "model"
        rows, _ = prepared("reflections", place, out, *flags)
        came = len(pupil.requests), len(server.requests)
        part, _ = prepared("reflections", place, out, *flags, "--learn", "corrections")
        assert (len(pupil.requests), len(server.requests)) == came
    assert {body["temperature"] for body in pupil.requests} == {1.0}
    assert [row["question"]["id"] for row in rows] == [q["id"] for q in questions[2:]]
    for row, less in zip(rows, part):
        assert row["kind"] == "reflection" and row["turns"][:2] == ["hm", bad_zoom] and len(row["turns"]) == 4
        assert row["learn"] == [True] * 4 and less["learn"] == [False, False, True, True]
        assert row["provenance"]["student"] == "teacher"  # as both servers call their model
        assert not {teacher.BEFORE, teacher.STUDENT} & row["question"].keys()
    assert "did not lead" not in out.read_text() and "127.0.0.1" not in out.read_text()
    policy = random_policy(layers=1)
    dialogue, env = replay(policy, rows[0], tmp_path)
    plain = make_env(rows[0]["question"], replace(policy.env_config, max_zooms=env.config.max_zooms), tmp_path)
    shown = encode(policy, plain.reset())
    assert dialogue.ids[:len(shown.ids)] == shown.ids and env.rewards["accuracy"] == 1


def test_a_student_of_a_folder_and_one_that_uses_up_its_zooms(place, tmp_path, capsys):
    """It plays here, once, in the environment that it was trained in; one zoom is left for the teacher."""
    def corrects(body):
        question = asked_of(body, place)
        last = body["messages"][-1]["content"]
        last = last if isinstance(last, str) else last[-1]["text"]
        return zoom(*question["evidence"][0]) if "did not lead" in last else answer(question["answer"])

    questions, out = questions_of(place), tmp_path / "r.jsonl"
    with api_server(lambda body: zoom(0, 1)) as pupil, api_server(corrects) as server:
        rows, _ = prepared("reflections", place, out, "--base_url", server.url, "--student", pupil.url, "--model",
                           place / "model")
    most = load_env_config(place / "model").max_zooms
    assert len(rows) == len(questions) and all(len(row["turns"]) == most + 1 for row in rows)
    assert all(row["turns"][:most - 1] == [zoom(0, 1)] * (most - 1) for row in rows)
    # a random one says nothing that is right, and its episodes are cut off: it has no zoom to mend
    with api_server(corrects) as server:
        with pytest.raises(UserError, match="no reflection was kept"):
            prepared("reflections", place, tmp_path / "s.jsonl", "--base_url", server.url, "--student",
                     place / "model", "--max_zooms", "0")
    assert f"student: {len(questions)} questions" in capsys.readouterr().out


def test_what_of_a_student_is_mended(place, tmp_path):
    """A turn that was cut off is not trained, and who never zoomed has no zoom to mend."""
    questions, out = questions_of(place)[:3], tmp_path / "r.jsonl"

    def student(body):
        question = asked_of(body, place)
        if question["id"] == questions[0]["id"] and turns_so_far(body):
            return completion("<think>so so so", "length")
        if question["id"] == questions[1]["id"]:
            return "hm" if not turns_so_far(body) else wrong(question)
        return zoom(0, 1) if not turns_so_far(body) else answer(question["answer"])

    def corrects(body):
        question = asked_of(body, place)
        return zoom(*question["evidence"][0]) if turns_so_far(body) == 1 else answer(question["answer"])

    with api_server(student) as pupil, api_server(corrects) as server:
        rows, _ = prepared("reflections", place, out, "--base_url", server.url, "--student", pupil.url, "--model",
                           place / "model")
    assert [row["question"]["id"] for row in rows] == [questions[0]["id"]]
    assert rows[0]["turns"][0] == zoom(0, 1) and len(rows[0]["turns"]) == 3


def test_a_run_that_is_begun_anew_leaves_what_is_there(place, tmp_path):
    """Moved aside, also where the server is gone."""
    out = tmp_path / "t.jsonl"
    with api_server(knows(place)) as server:
        rows, _ = prepared("exemplars", place, out, "--base_url", server.url, "--model", place / "model")
    with pytest.raises(UserError, match="cannot reach the server"):
        prepared("exemplars", place, out, "--base_url", server.url, "--model", place / "model", "--resume",
                 "never")
    assert [json.loads(line) for line in open(tmp_path / "t.1.jsonl")] == rows and not out.exists()


def test_another_teacher_does_not_go_on(place, tmp_path):
    out, broken = tmp_path / "t.jsonl", questions_of(place)[1]["id"]
    say = lambda body: refusal(400, "no") if asked_of(body, place)["id"] == broken else knows(place)(body)
    with api_server(say, models=("a",)) as server:
        prepared("exemplars", place, out, "--base_url", server.url, "--model", place / "model")
    with api_server(knows(place), models=("b",)) as server:
        with pytest.raises(UserError, match="begun with the teacher a, not b"):
            prepared("exemplars", place, out, "--base_url", server.url, "--model", place / "model")


def test_a_row_says_its_protocol(place, tmp_path):
    """So that it is replayed by it, whatever the student plays."""
    def say(body):
        question = asked_of(body, place)
        start_s, end_s = question["evidence"][0]
        call = json.dumps({"name": "crop_video", "arguments": {"video_path": "v", "start_time": start_s,
                                                               "end_time": end_s}})
        return THINK + (answer(question["answer"], "") if turns_so_far(body) else f"<tool_call>{call}</tool_call>")

    with api_server(say) as server:
        rows, _ = prepared("exemplars", place, tmp_path / "t.jsonl", "--base_url", server.url, "--model",
                           place / "model", "--protocol", "longvt")
    _, env = replay(random_policy(layers=1), rows[0], tmp_path)
    assert [turn.kind for turn in env.turns] == ["call", "answer"]


# ------------------------------------------------------------------------------------------------------ kills
@pytest.mark.slow
def test_kills_of_a_distillation(place, tmp_path, times):
    """Killed at random moments: no answer that came is asked for again, what was on its way at most once, and
    the rows are those of a run that was left alone."""
    def slowly(body):
        time.sleep(0.15)
        said = knows(place)(body)
        with lock:
            answered.append(json.dumps([body["messages"], body["seed"]]))
        return said

    lock, answered, rng = threading.Lock(), [], random.Random(4)
    with api_server(slowly) as server:
        flags = ["--questions", place / "questions.jsonl", "--base_url", server.url, "--model", place / "model",
                 "--samples", 3 * times, "--concurrency", 2]
        command = lambda out: [sys.executable, str(HERE / "data_prep.py"), "exemplars", "--out", str(out),
                               *map(str, flags)]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path)
        assert subprocess.run(command(tmp_path / "alone.jsonl"), **quiet).returncode == 0
        alone, asked_alone = (tmp_path / "alone.jsonl").read_text(), len(answered)
        answered.clear()
        kills, file = 8 * times, tmp_path / "killed.work" / "answers.jsonl"
        for _ in range(kills):
            lines = len(file.read_text().splitlines()) if file.exists() else 0
            process = subprocess.Popen(command(tmp_path / "killed.jsonl"), **quiet)
            # from the first request of this start on, at a random moment
            while process.poll() is None and (len(file.read_text().splitlines()) if file.exists() else 0) == lines:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            assert process.poll() is None, "it has ended before it could be killed"
            process.kill()
            process.wait()
        came = file.read_text().splitlines()
        assert subprocess.run(command(tmp_path / "killed.jsonl"), **quiet).returncode == 0
    assert (tmp_path / "killed.jsonl").read_text() == alone
    whole = file.read_text().splitlines()
    complete = [line for line in came if line.endswith("}")]
    assert whole[:len(complete)] == complete
    assert len({json.loads(line)["asked"] for line in whole}) == len(whole) == asked_alone
    assert len(answered) <= asked_alone + 2 * kills  # what was on its way
    assert len(set(answered)) == asked_alone


# ------------------------------------------------------------------------------------------------------ judge
def test_a_judge_of_open_answers(place, tmp_path, capsys):
    """Grades what waits, of a finished run, too, without playing; asks once; what is no verdict is no grade."""
    rows, kinds = questions_of(place)[:4], ["yes.", "No", "I cannot say", "yes"]
    for n, row in enumerate(rows):
        row |= {"answer_type": "open_ended", "answer": f"red {n}", "options": None,
                "meta": {"kind": "open", "judge": n < 3}}
    (place / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plays = lambda body: answer(f"said {re.search('#(.)#', text_of(body))[1]}") if "#3#" not in text_of(
        body) else answer("red 3")

    def grades(body):
        n = int(re.search(r'red (\d)"', text_of(body))[1])
        return completion(kinds[n], "length" if n == 3 and len(judge.requests) < 6 else "stop")

    with api_server(plays) as server, api_server(grades, models=("judge",)) as judge:
        flags = "--base_url", server.url, "--model", place / "model", "--mode", "zoom"
        (row,) = evaluated(place, tmp_path / "out", *flags)
        assert row["waits_for_judge"] == 3 and row["accuracy"] == 1.0
        came = len(server.requests)
        (row,) = evaluated(place, tmp_path / "out", *flags, "--judge_url", judge.url)
        assert len(server.requests) == came and len(judge.requests) == 4
        # 3 was cut off, 2 is no verdict
        assert (row["waits_for_judge"], row["accuracy"], row["settings"]["judge"]) == (2, 0.5, "judge")
        assert "4 open answers, 2 without a verdict; it agrees with the normalised match in 1 of 2" in (
            capsys.readouterr().out)
        (again,) = evaluated(place, tmp_path / "out", *flags, "--judge_url", judge.url)
        assert again == row and len(judge.requests) == 4
    with api_server(lambda body: refusal(500, "oops"), models=("judge",)) as judge:  # it is gone
        (place / "test.jsonl").write_text("".join(json.dumps(row | {"id": f"{row['id']} {n}"}) + "\n"
                                                  for row in rows for n in range(9)))
        with api_server(plays) as server:
            with pytest.raises(UserError, match="failed at 8 questions in a row"):
                evaluated(place, tmp_path / "gone", "--base_url", server.url, "--model", place / "model", "--mode",
                          "zoom", "--judge_url", judge.url, "--timeout_s", 1, "--concurrency", 2)
    written = (tmp_path / "out" / "judge.jsonl").read_text()
    assert KEY not in written and "127.0.0.1" not in written
