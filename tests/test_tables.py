"""What evaluation reports: means over questions and tasks, by duration, skips, judges, settings; counted by hand, and
of real runs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from tiny import random_policy

import eval as evaluation
from demo.synthetic import synthetic
from training import environment, run_folder, tables
from training.checkpoints import save_policy
from zoom_env import ANY_FPS, EnvConfig

TINY = Path(__file__).resolve().parent.parent / "demo" / "tiny_base"


# --------------------------------------------------------------------------------------------------- by hand
def question(number, kind=None, **more):
    meta = {key: more.pop(key) for key in ("judge", "duration_s", "duration_group") if key in more}
    return {"id": f"q{number}", "video": f"{number}.mp4", "question": "What?", "options": ["x", "y"], "answer": "A",
            "source": "mine", "meta": meta | ({"kind": kind} if kind else {})} | more


def episode(number, right, kind, **more):
    return {"number": number, "right": right, "kind": kind, "seconds": 1.0, "frames": 10, "zooms": 1, "tokens": 100,
            "hits": 0, "hits_known": 0, "invalid": 0, "untagged": 0, "calls_without_tool": None} | more


def rows_of(by_kind):
    return {row["kind"]: row for row in by_kind}


def test_mean_over_questions_and_mean_over_tasks():
    """3 of 4 questions on counting, 0 of 1 on order: 60% of the questions, (75% + 0%) / 2 of the tasks."""
    questions = {n: question(n, "count" if n < 4 else "order") for n in range(5)}
    episodes = [episode(n, float(n < 3), questions[n]["meta"]["kind"]) for n in range(5)]
    by_kind, by_duration = tables.table_rows("p", "zoom", episodes, questions)
    rows = rows_of(by_kind)
    assert list(rows) == ["all", "count", "order", "task mean"] and by_duration == []
    assert rows["all"]["accuracy"] == 3 / 5 and rows["all"]["task_mean"] == 3 / 8
    assert rows["count"]["accuracy"] == 3 / 4 and rows["order"]["accuracy"] == 0
    assert rows["task mean"]["accuracy"] == 3 / 8 and rows["all"]["num_tasks"] == 2
    # what is right to a degree counts from a half on, as ever
    by_kind, _ = tables.table_rows("p", "zoom", [episode(0, 0.5, "count"), episode(1, 0.49, "count")],
                                {n: questions[n] for n in (0, 1)})
    assert by_kind[0]["accuracy"] == 1 / 2 and by_kind[0]["task_mean"] == 1 / 2
    assert "task mean" not in rows_of(by_kind)  # of one task it is the same


def test_skipped_questions_are_left_out_and_counted_as_wrong():
    """Of 4 + 4 + 1 questions 2 + 1 + 1 are without a video, two of them the same one, and 1 row is none."""
    kinds = ["a"] * 4 + ["b"] * 4 + ["c"]
    questions = {n: question(n, kind) for n, kind in enumerate(kinds)}
    questions[1]["video"] = questions[0]["video"] = "same.mp4"
    played = {2: 1.0, 3: 0.0, 4: 1.0, 5: 1.0, 6: 1.0}
    episodes = [episode(n, right, kinds[n]) for n, right in played.items()]
    rows = rows_of(tables.table_rows("p", "zoom", episodes, questions, num_bad=1)[0])
    total = rows["all"]
    assert (total["num_questions"], total["skipped"], total["missing_videos"]) == (5, 5, 3)
    assert total["accuracy"] == 4 / 5 and total["accuracy_skipped_wrong"] == 4 / 10
    assert total["task_mean"] == (1 / 2 + 1) / 2 and total["task_mean_skipped_wrong"] == (1 / 4 + 3 / 4 + 0) / 3
    assert rows["task mean"]["accuracy_skipped_wrong"] == total["task_mean_skipped_wrong"]
    assert [rows[kind]["skipped"] for kind in "abc"] == [2, 1, 1]
    assert rows["c"]["num_questions"] == 0 and rows["c"]["accuracy"] is None
    assert (rows["no video"]["num_questions"], rows["no video"]["skipped"]) == (0, 4)
    assert rows["bad row"]["skipped"] == 1
    text = tables.report(list(rows.values()), [], [])
    line_of = lambda kind: next(line for line in text.splitlines() if f"  {kind}  " in line)
    assert "skips wrong" in text and "80.0%" in line_of("all") and "40.0%" in line_of("all")
    assert "75.0%" in line_of("task mean") and "33.3%" in line_of("task mean") and "  4  " in line_of("no video")


def test_what_waits_for_a_judge_is_neither_right_nor_wrong():
    """4 questions are for a judge, 3 of them played; of the other 3, 1 of 2 is right and 1 is skipped."""
    questions = {n: question(n, "open", judge=True) for n in range(4)} | {n: question(n, "choice") for n in (4, 5, 6)}
    episodes = [episode(n, None, "open") for n in range(3)] + [episode(4, 1.0, "choice"), episode(5, 0.0, "choice")]
    rows = rows_of(tables.table_rows("p", "zoom", episodes, questions)[0])
    assert rows["all"]["num_questions"] == 5 and rows["all"]["waits_for_judge"] == 3
    assert rows["all"]["accuracy"] == 1 / 2 and rows["all"]["accuracy_skipped_wrong"] == 1 / 3
    assert (rows["all"]["accuracy_low"], rows["all"]["accuracy_high"]) == tables.interval(1, 2)
    assert rows["all"]["task_mean"] == 1 / 2  # of the one task with a grade
    assert rows["open"]["accuracy"] is rows["open"]["accuracy_low"] is rows["open"]["accuracy_skipped_wrong"] is None
    assert rows["open"]["waits_for_judge"] == 3 and rows["open"]["frames_per_question"] == 10
    assert "for a judge" in tables.report(list(rows.values()), [], [])


def test_groups_of_duration():
    """{what questions' metas say: {group: numbers of its questions}}"""
    cases = [
        ([{"duration_s": 59.9}, {"duration_s": 60}, {"duration_s": 3600}, {"duration_s": 20}],
         {"under 1 min": [0, 3], "1 to 3 min": [1], "60 min and more": [2]}),
        ([{"duration_group": 3600}, {"duration_group": 15, "duration_s": 9}, {}, {"duration_group": 600}],
         {"group 15": [1], "group 600": [3], "group 3600": [0], "unknown": [2]}),
        ([{"duration_group": group} for group in ("short", "medium", "long", "short")],
         {"short": [0, 3], "medium": [1], "long": [2]}),
        ([{"duration_group": group} for group in (15, "short", None, 3)],
         {"short": [1], "group 3": [3], "group 15": [0], "unknown": [2]}),
        ([{"duration_s": 5}, {"duration_s": 5}, {"duration_s": 5}, {}], {}),
        ([{"duration_s": 5}, {"duration_s": "5"}, {"duration_s": 5}, {"duration_s": True}], {})]
    for metas, expected in cases:
        questions = {n: question(n, **meta) for n, meta in enumerate(metas)}
        _, rows = tables.table_rows("p", "zoom", [episode(n, float(n < 1), "mine") for n in questions], questions)
        found = [(row["duration"], row["num_questions"], row["accuracy"]) for row in rows]
        assert found == [(group, len(numbers), (0 in numbers) / len(numbers)) for group, numbers in expected.items()]


def test_zooms_hit_by_kind_and_by_duration_where_evidence_is_known():
    """Of 3 + 2 zooms with evidence 2 + 0 hit; that of a question without evidence is in no rate."""
    questions = {0: question(0, "a", duration_s=30, evidence=[[1, 2]]), 1: question(1, "a", duration_s=30),
                 2: question(2, "b", duration_s=90, evidence=[[1, 2]])}
    episodes = [episode(0, 1.0, "a", zooms=3, hits=2, hits_known=3), episode(1, 1.0, "a", zooms=4),
                episode(2, 0.0, "b", zooms=2, hits=0, hits_known=2)]
    by_kind, by_duration = tables.table_rows("p", "zoom", episodes, questions)
    rows = rows_of(by_kind)
    assert [rows[kind]["hit_rate"] for kind in ("all", "a", "b")] == [2 / 5, 2 / 3, 0]
    assert [row["hit_rate"] for row in by_duration] == [2 / 3, 0] and rows["all"]["num_with_evidence"] == 2
    text = tables.report(by_kind, by_duration, [])
    assert "66.7%" in text and "under 1 min" in text
    titles = [line.split()[:4] for line in text.splitlines() if line.startswith("policy")]
    assert titles == [["policy", "mode", title, "n"] for title in ("kind", "duration", "kind")]
    assert rows["all"]["skipped"] == 0 and rows["a"]["skipped"] is None  # of a kind, 0 is not shown


def test_the_hash_is_of_what_was_asked():
    rows = [question(n) for n in range(3)]
    same = tables.questions_hash(rows)
    assert len(same) == 64 and tables.questions_hash(rows[::-1]) == same  # in whatever order
    assert tables.questions_hash([row | {"video": "elsewhere", "evidence": [[1, 2]]} for row in rows]) == same
    for key, value in [("id", "other"), ("question", "Who?"), ("options", ["y", "x"]), ("answer", "B")]:
        assert tables.questions_hash([rows[0] | {key: value}, *rows[1:]]) != same
    zero, empty = ({"id": "q", "question": "?", "answer": answer} for answer in (0, ""))
    assert tables.questions_hash([zero]) != tables.questions_hash([empty])
    assert tables.questions_hash([zero | {"options": None}]) == tables.questions_hash([zero | {"options": []}])


def test_columns_stand_where_they_say_something():
    questions = {n: question(n) for n in range(2)}
    by_kind, _ = tables.table_rows("p", "zoom", [episode(n, 1.0, "mine") for n in questions], questions)
    text = tables.report(by_kind, [], [])
    for absent in ("skips wrong", "for a judge", "no tool", "hit", "duration", "task mean"):
        assert absent not in text
    assert all(title in text for title in ("right", "95% interval", "untagged", "invalid"))


def test_a_protocol_is_named_and_a_prompt_known_by_its_hash():
    plain, other = EnvConfig(), EnvConfig(system_prompt="Look.", overview_fps=ANY_FPS, protocol="direct")
    plain, other = tables.environment_settings(plain), tables.environment_settings(other)
    assert (plain["protocol"], plain["overview_fps"], other["protocol"]) == ("videozoomer", 0.5, "direct")
    assert other["overview_fps"] is None  # a number of frames, whatever the length
    assert plain["system_prompt_sha256"] != other["system_prompt_sha256"]


def test_many_reasons_are_printed_in_part_and_equal_ones_once():
    skipped = [{"row": f"q{n}", "reason": "a.mp4: no such file"} for n in range(3)]
    assert tables.skipped_lines(skipped) == ["skipped q0, q1, q2: a.mp4: no such file"]
    many = [{"row": f"q{n}", "reason": f"{n}.mp4: no such file"} for n in range(tables.MOST_SHOWN + 7)]
    lines = tables.skipped_lines(many)
    assert len(lines) == tables.MOST_SHOWN + 1 and "7 more" in lines[-1] and "skipped.jsonl" in lines[-1]


# ------------------------------------------------------------------------------------------------- real runs
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with ten videos of their own, 0.mp4 .. 9.mp4, a random policy, and ten questions about them."""
    folder = tmp_path_factory.mktemp("place")
    synthetic(folder, 1, 10, seed=4)
    rows = [json.loads(line) for line in open(folder / "test.jsonl")]
    for number, row in enumerate(rows):
        shutil.copy(folder / row["video"], folder / f"{number}.mp4")
        del row["meta"]["uniform_accuracy"]  # as of a real benchmark
        row |= {"id": f"q{number}", "video": str(folder / f"{number}.mp4")}
    save_policy(random_policy(), folder / "policy")
    return folder, rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def play(monkeypatch, capsys, out, model, data, *flags):
    """eval.py in this process. Returns (what it printed, its row of results.json, {file: rows}, one line of error)."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, (
        "--model", model, "--data", data, "--out", out, "--device", "cpu", "--mode", "zoom",
        "--max_turn_tokens", 4, *flags))])
    status = 0
    try:
        evaluation.run_main(evaluation.main)
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    if status:
        return said.out, None, None, said.err.strip().splitlines()[-1]
    files = {name: [json.loads(line) for line in open(out / f"{name}.jsonl")]
             for name in ("episodes", "by_kind", "by_duration", "skipped")}
    result, = json.loads((out / "results.json").read_text())
    return said.out, result, files, ""


def test_a_fifth_of_the_videos_is_missing(place, tmp_path, monkeypatch, capsys):
    folder, rows = place
    gone, broken = tmp_path / "gone.mp4", tmp_path / "broken.mp4"
    broken.write_text("no video\n" * 100)
    rows = [row | {"video": str({3: gone, 7: broken}.get(n, row["video"]))} for n, row in enumerate(rows)]
    said, result, files, _ = play(monkeypatch, capsys, tmp_path / "out", TINY, write(tmp_path / "q.jsonl", rows),
                                  "--max_turn_tokens", 40)
    right = sum(e["right"] for e in files["episodes"])
    assert (result["num_questions"], result["skipped"], result["missing_videos"]) == (8, 2, 2)
    assert result["accuracy"] == right / 8 and result["accuracy_skipped_wrong"] == right / 10
    assert [(row["row"], Path(row["reason"].split(":")[0]).name) for row in files["skipped"]] == [
        ("q3", "gone.mp4"), ("q7", "broken.mp4")]
    assert {row["kind"]: row["skipped"] for row in files["by_kind"]}["no video"] == 2
    assert "skipped q3: " in said and "gone.mp4: no such file" in said and "skipped q7: " in said
    assert "skips wrong" in said and result["questions_sha256"] == tables.questions_hash(rows)
    assert result["played_sha256"] == tables.questions_hash(row for row in rows if row["id"] not in ("q3", "q7"))
    assert result["questions_sha256"][:12] in said and result["played_sha256"][:12] in said


@pytest.mark.slow
def test_nine_tenths_are_missing_and_then_all(place, tmp_path, monkeypatch, capsys):
    folder, rows = place
    rows = [row | {"video": row["video"] if n == 4 else f"none{n}.mp4"} for n, row in enumerate(rows)]
    data = write(tmp_path / "q.jsonl", rows)
    said, result, files, _ = play(monkeypatch, capsys, tmp_path / "out", folder / "policy", data)
    assert (result["num_questions"], result["skipped"], len(files["skipped"])) == (1, 9, 9)
    assert all(f"none{n}.mp4: no such file" in said for n in range(10) if n != 4)
    kinds = {row["meta"]["kind"] for row in rows}
    assert kinds < {row["kind"] for row in files["by_kind"]}  # those that were only skipped, too
    # a row that is no question is skipped, too
    (tmp_path / "bad.jsonl").write_text(data.read_text() + '{"id": "q10"}\n')
    said, result, files, _ = play(monkeypatch, capsys, tmp_path / "bad", folder / "policy", tmp_path / "bad.jsonl",
                                  "--max_bad", 0.1)
    assert result["skipped"] == 10 and result["missing_videos"] == 9 and "skipped line 11: " in said
    assert result["accuracy_skipped_wrong"] == files["episodes"][0]["right"] / 11
    assert {row["kind"]: row["skipped"] for row in files["by_kind"]}["bad row"] == 1
    # none
    write(data, [row | {"video": "none.mp4"} for row in rows])
    *_, error = play(monkeypatch, capsys, tmp_path / "all", folder / "policy", data)
    assert "no question could be played" in error and "none.mp4" in error


@pytest.mark.slow
def test_kinds_and_durations_of_a_real_run(place, tmp_path, monkeypatch, capsys):
    """Three groups of duration, evidence of every second question; the figures are those of the episodes."""
    folder, rows = place
    for number, row in enumerate(rows):
        row = rows[number] = row | {"evidence": row["evidence"] if number % 2 else None}
        row["meta"] = {"kind": "even" if number % 2 == 0 else "odd", "duration_group": (600, 15, 60)[number % 3]}
    said, result, files, _ = play(monkeypatch, capsys, tmp_path / "out", TINY, write(tmp_path / "q.jsonl", rows),
                                  "--max_turn_tokens", 120, "--seed", 3)
    right = {e["number"]: e["right"] for e in files["episodes"]}
    of = lambda numbers: sum(right[n] for n in numbers) / len(numbers)
    assert {row["duration"]: row["accuracy"] for row in files["by_duration"]} == {
        "group 15": of([1, 4, 7]), "group 60": of([2, 5, 8]), "group 600": of([0, 3, 6, 9])}
    by_kind = {row["kind"]: row for row in files["by_kind"]}
    assert list(by_kind) == ["all", "even", "odd", "task mean"]
    assert by_kind["even"]["accuracy"] == of(range(0, 10, 2)) and by_kind["odd"]["accuracy"] == of(range(1, 10, 2))
    assert result["task_mean"] == (of(range(0, 10, 2)) + of(range(1, 10, 2))) / 2
    assert by_kind["even"]["hit_rate"] is None
    assert result["num_with_evidence"] == sum(bool(row["evidence"]) for row in rows) < 10
    lines = said.splitlines()
    widest = max(len(line) - len(str(TINY)) for line in lines if str(TINY) in line)  # beside the policy's name
    assert widest <= 135
    titles = [line.split()[2] for line in lines if line.startswith("policy")]
    assert titles == ["kind", "duration", "kind", "protocol"]  # by kind, by duration, all, settings
    # what it was played with stands beside it
    expected = json.loads((TINY / "zoom_config.json").read_text())
    for key in ("max_zooms", "min_pixels", "max_pixels", "overview_max_frames", "overview_fps", "zoom_max_frames"):
        assert result["settings"][key] == expected[key]
    assert {key: result["settings"][key] for key in ("protocol", "temperature", "dtype", "seed")} == {
        "protocol": "videozoomer", "temperature": 0.0, "dtype": "float32", "seed": 3}
    last = [line for line in lines if "videozoomer" in line][-1]
    for word in ("float32", f"{expected['min_pixels']} - {expected['max_pixels']}", result["questions_sha256"][:12]):
        assert word in last


@pytest.mark.slow
def test_judges_rows_are_played_and_wait(place, tmp_path, monkeypatch, capsys):
    folder, rows = place
    for number in (2, 5, 6):
        rows[number] = rows[number] | {"options": None, "answer": "It is red.", "answer_type": "open_ended"}
        rows[number]["meta"] = rows[number]["meta"] | {"judge": True}
    data = write(tmp_path / "q.jsonl", rows)
    said, result, files, _ = play(monkeypatch, capsys, tmp_path / "out", TINY, data, "--max_turn_tokens", 40)
    assert [e["right"] is None for e in files["episodes"]] == [n in (2, 5, 6) for n in range(10)]
    assert all(e["turns"] for e in files["episodes"])
    assert result["num_questions"] == 10 and result["waits_for_judge"] == 3 and "for a judge" in said
    assert result["accuracy"] == sum(e["right"] for e in files["episodes"] if e["right"] is not None) / 7
    # all of them: there is no accuracy, and no error
    write(data, [rows[n] for n in (2, 5, 6)])
    _, result, _, _ = play(monkeypatch, capsys, tmp_path / "all", folder / "policy", data)
    assert result["accuracy"] is None and result["waits_for_judge"] == 3


@pytest.mark.slow
def test_a_run_that_has_only_its_tables_left_to_write_needs_no_policy(place, tmp_path, monkeypatch, capsys):
    """It was stopped after its last episode: what it was played with is known from run.json."""
    folder, rows = place
    data, out = write(tmp_path / "q.jsonl", rows), tmp_path / "out"
    flags = monkeypatch, capsys, out, folder / "policy", data, "--mode", "uniform", "--num_frames", 5
    _, result, files, _ = play(*flags)
    assert result["settings"]["overview_max_frames"] == 5 and result["settings"]["max_zooms"] == 0
    run_folder.note(out, finished=False)
    for name in ("results.json", "by_kind.jsonl", "by_duration.jsonl"):
        (out / name).unlink()
    monkeypatch.setattr(evaluation, "load_policy", None)
    _, *same = play(*flags)
    assert same == [result, files, ""]


def test_the_table_of_a_run_from_before_these_figures(tmp_path, capsys):
    old = {"policy": "p", "mode": "zoom", "kind": "all", "num_questions": 10, "skipped": 0, "accuracy": 0.5}
    write(tmp_path / "by_kind.jsonl", [old]), write(tmp_path / "skipped.jsonl", [])
    evaluation.report(tmp_path, strict=False)
    assert "50.0%" in capsys.readouterr().out
