import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ablations
import eval as evaluation
import findings.stage
import rl
import sft
from common import UserError, parse_flags
from controls import modes
from findings import compare
from findings.stage import Stage
from training.tables import interval

ROOT = Path(ablations.__file__).parent


@pytest.fixture
def place(tmp_path):
    """A place with data that nobody plays."""
    (tmp_path / "data").mkdir()
    for name in ("sft", "train", "test"):
        kinds = ["exemplar"] * 7 + ["direct"] * 2
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(f'{{"kind": "{kind}"}}\n' for kind in kinds))
    return ablations.Place("demo", 0, tmp_path)


def row(name):
    return ablations.BY_NAME[name]


def result(questions, seed=0, per_video=1, **more):
    """A row's result, of {number: (right, zooms)}; so many questions are about one video."""
    return {"seed": seed, "questions": {str(n): {"right": right, "zooms": zooms, "video": f"{n // per_video}"}
                                        for n, (right, zooms) in questions.items()}} | more


# -------------------------------------------------------------------------------------------------- the table
@pytest.mark.parametrize("name", ablations.BY_NAME)
def test_each_row_has_flags_that_its_scripts_take_and_a_mode_that_is_evaluated(name):
    assert ablations.choose([name])[-1].name == name
    each = row(name)
    filled = lambda flags: (flags or "").format(frames=20, twice=40, fps=1, epochs=12).split()
    for script, flags in ((sft, each.sft), (rl, each.rl), (sft, each.rft)):
        parse_flags(script.Config, "", (), argv=filled(flags))
    config = parse_flags(evaluation.Config, "", (), argv=filled(each.eval))
    modes.check_flags(config)
    names = [*modes.modes_of(config, is_demo=False)]
    gate, *_ = modes.gate_modes(config) or [names[-1]]
    assert each.mode == gate


def test_every_row_has_a_name_of_its_own_and_every_claim_has_its_rows():
    assert len(ablations.BY_NAME) == len(ablations.ROWS)
    for finding in compare.FINDINGS:
        assert {finding.row, finding.other} <= set(ablations.BY_NAME)
    for each in ablations.ROWS:
        assert each.of is None or row(each.of).of is None


def test_wrong_names_and_flags_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="no row or group bogus"):
        ablations.choose(["bogus"])
    mine = ablations.Row("mine", "own", "", rl="--cliphigh 1")
    monkeypatch.setattr(ablations, "ROWS", [ablations.FULL, mine])
    with pytest.raises(UserError, match="row mine: rl.py has no flag --cliphigh"):
        ablations.choose([])
    for wrong in ("zooms-1", "bogus"):
        monkeypatch.setattr(ablations, "ROWS", [ablations.FULL, ablations.Row("mine", "own", "", of=wrong)])
        with pytest.raises(UserError, match=f"row mine: {wrong} has to be a row with a policy"):
            ablations.choose([])


# ------------------------------------------------------------------------------------------------- the stages
def test_stages_with_the_same_flags_and_inputs_are_one(place):
    kinds = lambda name: [stage.kind for stage in ablations.chain(row(name), place)]
    folders = lambda name: [stage.folder for stage in ablations.chain(row(name), place)]
    assert kinds("full") == ["sft", "rl", "eval"] and kinds("no-rl") == ["sft", "eval"]
    assert kinds("no-cold-start") == ["rl", "eval"] and kinds("rft") == ["sft", "successes", "rft", "eval"]
    assert folders("full")[0] == folders("no-bonus")[0] == folders("no-rl")[0]
    assert folders("full")[:2] == folders("zooms-0")[:2] and folders("full")[2] != folders("zooms-0")[2]
    assert folders("full")[1] != folders("no-bonus")[1]
    assert folders("no-reflection")[0] != folders("full")[0]  # and so is all that comes after it
    assert not set(folders("no-reflection")) & set(folders("full"))
    assert not set(folders("full")) & set(
        stage.folder for stage in ablations.chain(row("full"), place._replace(seed=1)))


def test_only_what_hangs_on_changed_data_has_another_key(place):
    before = ablations.chain(row("full"), place)
    (place.folder / "data" / "train.jsonl").write_text("other questions")
    after = ablations.chain(row("full"), place)
    assert [old.key == new.key for old, new in zip(before, after)] == [True, False, False]


def test_a_file_that_a_flag_names_is_an_input(monkeypatch, place, tmp_path):
    prompt = tmp_path / "prompt.txt"
    mine = ablations.Row("mine", "own", "", rl=f"--system_prompt {prompt}")
    keys = []
    for text in ("Look.", "Look closer.", "Look."):
        prompt.write_text(text)
        keys.append([stage.key for stage in ablations.chain(mine, place)])
    assert keys[0] == keys[2] and [a == b for a, b in zip(*keys[:2])] == [True, False, False]


def test_without_the_tool_there_are_as_many_updates(place):
    cold_start, *_ = ablations.chain(row("no-tool"), place)
    assert cold_start.command[cold_start.command.index("--epochs") + 1] == "9"  # 2 of 9 rows, for 2 passes over 9


def test_the_plan_expects_what_a_suite_takes(place, tmp_path, capsys):
    minutes = []
    for suite in ("search", "demo", "demo-quick"):
        there = place._replace(suite=suite)
        findings.stage.show_plan([(there, ablations.FULL, ablations.chain(ablations.FULL, there))], tmp_path)
        minutes.append(int(re.search(r"3 stages to run, some (\d+) minutes", capsys.readouterr().out)[1]))
    assert minutes == [21, 11, 1]


def test_a_stage_takes_the_policy_of_the_one_before(place):
    sft, rl, evaluation = ablations.chain(row("no-bonus"), place)
    assert rl.command[:3] == ["rl.py", "--model", str(sft.folder)]
    assert rl.command[-2:] == ["--seed", "0"] and "--tool_weight" in rl.command
    assert evaluation.command[:3] == ["eval.py", "--model", str(rl.folder)]


def script(folder, text):
    path = folder / "script.py"
    path.write_text(text)
    return path


def test_a_stage_runs_once_and_one_that_failed_again(tmp_path):
    text = f"import sys; open({str(tmp_path / 'ran')!r}, 'a').write('x'); sys.exit(len(sys.argv) > 1)"
    path = str(script(tmp_path, text))
    failing = Stage("sft", [path, "--fail"], "", tmp_path / "stage")
    for said in ("status 1, see .*log.txt", "has failed before"):  # in one process once
        with pytest.raises(UserError, match=said):
            failing.run()
    assert failing.result() is None
    findings.stage.FAILED.clear()
    stage = Stage("sft", [path], "", tmp_path / "stage")
    stage.run()
    stage.run()
    assert (tmp_path / "ran").read_text() == "xx"
    assert stage.result()["command"] == f"python {path}"


def test_seconds_before_a_kill_count(tmp_path):
    stage = Stage("sft", [str(script(tmp_path, ""))], "", tmp_path / "stage")
    stage.folder.mkdir()
    (stage.folder / "metrics.jsonl").write_text('{"seconds": 40.0}\n{"seconds": 60.0}\n')
    stage.run()
    assert stage.result()["seconds"] == 100.0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part")
def test_a_stage_ends_with_the_script_that_is_killed(tmp_path):
    pid = tmp_path / "pid"
    text = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    path = script(tmp_path, text)
    code = f"from pathlib import Path; from findings.stage import Stage; " \
           f"Stage('sft', [{str(path)!r}], '', Path({str(tmp_path / 'stage')!r})).run()"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not pid.exists() or not pid.read_text():
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    stat, until = Path("/proc", pid.read_text(), "stat"), time.time() + 10
    alive = lambda: stat.exists() and ") Z " not in stat.read_text()  # whoever adopts it may not wait for it
    while alive() and time.time() < until:
        time.sleep(0.05)
    assert not alive()
    assert not (tmp_path / "stage" / "result.json").exists()


# ------------------------------------------------------------------------------------------ all of it, played
class Played:
    """Stands for the stages: writes what they write. Dies at the start or end of the `dies`-th command.
    policy: what the scripts of `other` leave as a checkpoint."""

    def __init__(self, dies=None, at_end=False, policy="same", other=("sft.py", "rl.py")):
        self.dies, self.at_end, self.policy, self.other, self.ran = dies, at_end, policy, other, []

    def __call__(self, words, **_):
        if len(self.ran) == self.dies and not self.at_end:
            raise KeyboardInterrupt
        words = list(map(str, words))
        name = next(Path(word).name for word in words if word.endswith(".py"))
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        if name == "data_prep.py":
            for file in ("sft", "train", "test"):
                rows = [{"video": f"{n // 5}.mp4", "kind": "direct"} for n in range(30)]
                (out / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif name == "eval.py":
            limited = {"--max_zooms", "--num_frames"} & set(words)
            right = [int(not limited or n % 3 == 0) for n in range(30)]
            turns = [f'<video_zoom>{{"segment": [0, 8], "fps": {fps}}}</video_zoom>' for fps in (0.5, 2, 2)]
            calls = [{"segment": segment, "frames": 1, "hit": None} for segment in ([0, 8], [2, 4], [6, 9])]
            figures = [{"mode": mode, "accuracy": sum(right) / 30, "frames_per_question": 22.7,
                        "questions_sha256": "0"}
                       for mode in ("zoom off", "zoom")]
            (out / "results.json").write_text(json.dumps([*figures, {"mode": "bound", "accuracy": 0.5}]))
            (out / "episodes.jsonl").write_text("".join(json.dumps(
                {"policy": "p", "mode": mode, "number": n, "question": n, "kind": "count", "right": r, "zooms": r,
                 "answer": "A" if n % 2 else None, "turns": turns, "calls": calls}) + "\n"
                for mode, rights in (("zoom", right), ("zoom off", [0] * 30)) for n, r in enumerate(rights)))
        else:
            (out / "config.json").write_text(self.policy if name in self.other else "same")
            (out / "metrics.jsonl").write_text(
                "".join(json.dumps({"step": n, "seconds": 1e5, "accuracy": 0.5, "zooms": 1.0}) + "\n"
                        for n in range(3)))
        if len(self.ran) == self.dies:
            raise KeyboardInterrupt
        self.ran.append(" ".join(words[words.index(next(w for w in words if w.endswith(name))):]))
        return subprocess.CompletedProcess(words, 0)


NAMES = "no-rl", "zooms-0", "no-tool", "no-kl"


def make_all(monkeypatch, folder, played):
    monkeypatch.setattr(findings.stage.subprocess, "run", played)
    monkeypatch.setattr(findings.stage, "code_version", lambda: "0123")
    monkeypatch.setattr(sys, "argv", ["ablations.py", *NAMES, "--runs", str(folder), "--out",
                                      str(folder / "page.md")])
    ablations.main()
    return without_seconds(folder / "page.md")


def without_seconds(page):
    return re.sub(r"[\d.]+ \| 0123 \|\n", "|\n", page.read_text())


def test_after_a_kill_nothing_finished_runs_twice_and_the_tables_are_the_same(monkeypatch, tmp_path):
    whole = Played()
    page = make_all(monkeypatch, tmp_path / "whole", whole)
    commands = [command.replace(str(tmp_path / "whole"), "") for command in whole.ran]
    assert len(commands) == len(set(commands)) == 1 + 3 + 1 + 1 + 3 + 2  # data, then the rows in order
    for dies in range(len(commands)):
        folder = tmp_path / str(dies)
        first, then = Played(dies, at_end=dies % 2), Played()
        with pytest.raises(KeyboardInterrupt):
            make_all(monkeypatch, folder, first)
        assert make_all(monkeypatch, folder, then) == page
        ran = [command.replace(str(folder), "") for command in first.ran + then.ran]
        assert ran == commands
        again = Played()
        assert make_all(monkeypatch, folder, again) == page and not again.ran


def test_a_row_takes_its_frames_from_the_full_runs_result(monkeypatch, tmp_path):
    played = Played()
    make_all(monkeypatch, tmp_path, played)
    no_tool = [command for command in played.ran if "--num_frames" in command]
    assert len(no_tool) == 2 and all("--num_frames 23 " in command for command in no_tool)


def rows_of(folder):
    return set(ablations.read_results(folder)[0]["demo"])


def test_a_result_of_other_flags_is_in_no_table(monkeypatch, tmp_path, capsys):
    make_all(monkeypatch, tmp_path, Played())
    assert rows_of(tmp_path) == {"full", *NAMES}
    rows = [each._replace(rl="--kl_weight 0.1") if each.name == "no-kl" else each for each in ablations.ROWS]
    monkeypatch.setattr(ablations, "ROWS", rows)
    assert rows_of(tmp_path) == {"full", *NAMES} - {"no-kl"}
    assert "no-kl is left out" in capsys.readouterr().out


def test_a_result_of_another_mode_or_of_stages_that_another_row_made_anew_is_in_no_table(monkeypatch, tmp_path):
    make_all(monkeypatch, tmp_path, Played())
    rows = [each._replace(mode="zoom off") if each.name == "no-kl" else each for each in ablations.ROWS]
    with monkeypatch.context() as patch:
        patch.setattr(ablations, "ROWS", rows)
        assert rows_of(tmp_path) == {"full", *NAMES} - {"no-kl"}
    place = ablations.Place("demo", 0, tmp_path / "demo/0")
    cold_start = ablations.chain(ablations.FULL, place)[0].folder
    (cold_start / "config.json").write_text("other")
    ablations.make_row(ablations.FULL, place)  # RL and evaluation anew
    assert rows_of(tmp_path) == {"full", "no-tool"}


def test_a_row_that_hangs_on_what_has_changed_is_in_no_table(monkeypatch, tmp_path):
    """The cold start is made anew by another method: what was made of the old one is not shown beside it."""
    make_all(monkeypatch, tmp_path, Played())
    cold_start, *_ = stages = ablations.chain(ablations.FULL, ablations.Place("demo", 0, tmp_path / "demo/0"))
    (cold_start.folder / "config.json").write_text("other")
    assert rows_of(tmp_path) == {"no-tool"}  # its cold start is another
    (cold_start.folder / "config.json").write_text("same")
    assert rows_of(tmp_path) == {"full", *NAMES}
    shutil.rmtree(stages[-1].folder)
    assert rows_of(tmp_path) == {*NAMES} - {"no-tool"}  # without the full run nobody knows its frames
    questions = tmp_path / "demo/0/data/test.jsonl"
    questions.write_text(questions.read_text() + "\n")
    assert "demo" not in ablations.read_results(tmp_path)[0]


def test_results_stay_when_the_runs_are_gone(monkeypatch, tmp_path, capsys):
    """The tables are the same without the runs, and where only some are made again; a line of other flags,
    of other questions, or of a row that is to be made anew is in none."""
    page, kept = make_all(monkeypatch, tmp_path, Played()), tmp_path / "page.jsonl"
    lines = [json.loads(line) for line in open(kept)]
    assert [(line["row"], line["seed"]) for line in lines] == [(name, 0) for name in ("full", *NAMES)]
    assert str(tmp_path) not in json.dumps([line["questions"] for line in lines])
    shutil.rmtree(tmp_path / "demo")

    def again(*names):
        monkeypatch.setattr(sys, "argv", ["ablations.py", *names, "--runs", str(tmp_path), "--out",
                                          str(tmp_path / "page.md")])
        ablations.main()
        return without_seconds(tmp_path / "page.md")

    assert again("full") == page
    assert {name for line in open(kept) for name in [json.loads(line)["row"]]} == {"full", *NAMES}
    # other flags, other questions
    edited = [line | {"made_of": [], "inputs": line["inputs"]} if line["row"] == "no-kl" else
              line | {"inputs": ["other", "ones"]} if line["row"] == "no-rl" else line for line in lines]
    kept.write_text("".join(json.dumps(line) + "\n" for line in edited))
    again("full")
    said = capsys.readouterr().out
    assert "no-kl is left out: it was made with other flags" in said
    assert "no-rl is left out: it is of other questions" in said
    assert "no-kl | 0 |" not in (tmp_path / "page.md").read_text()
    assert [json.loads(line)["row"] for line in open(kept)] == ["full", "zooms-0", "no-tool", "no-rl", "no-kl"]
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # the policy of another row, where that was made anew and is another one now, in whatever order
    for order in (1, -1):
        kept.write_text("".join(json.dumps(line) + "\n" for line in lines[::order]))
        shutil.rmtree(tmp_path / "demo")
        monkeypatch.setattr(findings.stage.subprocess, "run", Played(policy="other", other=["rl.py"]))
        assert "zooms-0 | 0 |" not in again("full") and "no-kl | 0 |" in (tmp_path / "page.md").read_text()
        assert "zooms-0 is left out: full has another policy now" in capsys.readouterr().out
    of_all = [json.loads(line) for line in open(kept)]
    kept.write_text("".join(json.dumps(line) + "\n" for line in reversed(of_all)))  # full, then the row of it
    shutil.rmtree(tmp_path / "demo")
    assert "zooms-0 | 0 |" not in again("no-kl")
    # a line of an earlier version
    kept.write_text("".join(json.dumps({key: value for key, value in line.items() if key != "kinds"}) + "\n"
                            if line["row"] == "zooms-0" else json.dumps(line) + "\n" for line in lines))
    shutil.rmtree(tmp_path / "demo")
    monkeypatch.setattr(findings.stage.subprocess, "run", Played())
    assert "zooms-0 | 0 |" not in again("full")
    assert "zooms-0 is left out: it is of an earlier version" in capsys.readouterr().out
    assert again("zooms-0") == page
    # a row whose stage was taken away is not shown by its old line
    shutil.rmtree(ablations.chain(ablations.BY_NAME["zooms-0"], ablations.Place("demo", 0, tmp_path / "demo/0"))[
        -1].folder)
    assert "zooms-0 | 0 |" not in again("full")


def test_runs_may_be_moved_and_need_their_data(monkeypatch, tmp_path, capsys):
    make_all(monkeypatch, tmp_path / "here", Played())
    runs = (tmp_path / "here").rename(tmp_path / "there")
    assert rows_of(runs) == {"full", *NAMES}
    for name in ("sft", "test"):
        (runs / f"demo/0/data/{name}.jsonl").rename(tmp_path / "away")
        assert "demo" not in ablations.read_results(runs)[0]
        assert f"is taken for gone, as {runs / 'demo/0/data'}/{name}.jsonl is" in capsys.readouterr().out
        (tmp_path / "away").rename(runs / f"demo/0/data/{name}.jsonl")
    # a result of an earlier version is written anew by its command, without a run
    result = runs / "demo/0/rows/no-kl/result.json"
    before = json.loads(result.read_text())
    result.write_text(json.dumps({key: value for key, value in before.items() if key != "inside"}))
    assert rows_of(runs) == {"full", *NAMES} - {"no-kl"}
    assert "no-kl is left out" in capsys.readouterr().out


def test_a_stage_that_was_stopped_goes_on_with_the_same_inputs_and_begins_anew_with_others(tmp_path):
    given, path = tmp_path / "input", script(tmp_path, "import sys; sys.exit('b' in open('input').read())")
    path.write_text(path.read_text().replace("'input'", repr(str(given))))
    stage = Stage("sft", [str(path)], "", tmp_path / "stage", (str(given),))
    given.write_text("a")
    stage.run()
    (stage.folder / "checkpoint").write_text("half")
    (stage.folder / "result.json").unlink()
    stage.run()
    assert (stage.folder / "checkpoint").exists()
    given.write_text("b")
    with pytest.raises(UserError):
        stage.run()
    assert not (stage.folder / "checkpoint").exists()
    given.write_text("a")  # what it had finished with this is no longer there
    assert stage.result() is None


def test_a_kill_while_an_old_folder_is_removed_leaves_nothing_of_it(monkeypatch, tmp_path):
    given, path = tmp_path / "input", script(tmp_path, "")
    stage = Stage("sft", [str(path)], "", tmp_path / "stage", (str(given),))
    given.write_text("a")
    stage.run()
    (stage.folder / "run.json").write_text("of a")
    given.write_text("b")

    def killed(folder, **_):
        if Path(folder).exists():
            (Path(folder) / "begun.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        stage.run()
    stage.run()
    assert stage.result() and not (stage.folder / "run.json").exists()
    assert [each.name for each in tmp_path.iterdir() if each.is_dir()] == ["stage"]


def test_a_resumed_stage_names_both_commits(monkeypatch, tmp_path):
    path = script(tmp_path, "import sys; sys.exit(1)")
    stage = Stage("sft", [str(path)], "", tmp_path / "stage")
    monkeypatch.setattr(findings.stage, "code_version", lambda: "a")
    with pytest.raises(UserError):
        stage.run()
    findings.stage.FAILED.clear()
    path.write_text("")
    monkeypatch.setattr(findings.stage, "code_version", lambda: "b")
    stage.run()
    assert stage.result()["commits"] == ["a", "b"]


def test_what_hangs_on_a_stage_that_was_removed_is_made_again_if_it_differs(monkeypatch, tmp_path):
    make_all(monkeypatch, tmp_path, Played())
    cold_start = ablations.chain(ablations.FULL, ablations.Place("demo", 0, tmp_path / "demo" / "0"))[0]
    for policy, scripts in (("same", ["sft"]), ("other", ["sft", "rl", "eval", "eval", "eval", "rl", "eval"])):
        shutil.rmtree(cold_start.folder)
        played = Played(policy=policy)
        make_all(monkeypatch, tmp_path, played)
        assert [Path(command.split()[0]).stem for command in played.ran] == scripts


def test_a_failed_row_does_not_end_the_others(monkeypatch, tmp_path):
    played = Played()

    def fails(words, **settings):
        if "--kl_weight" in words:
            return subprocess.CompletedProcess(words, 1)
        return played(words, **settings)

    with pytest.raises(UserError, match="not there: no-kl of seed 0"):
        make_all(monkeypatch, tmp_path, fails)
    assert "| zooms-0 |" in (tmp_path / "page.md").read_text()


def test_without_the_full_run_no_row_has_its_frames(monkeypatch, tmp_path, capsys):
    played = Played()

    def fails(words, **settings):
        if "eval.py" in str(words[1]) and not {"--num_frames", "--max_zooms"} & set(words):
            return subprocess.CompletedProcess(words, 1)
        return played(words, **settings)

    with pytest.raises(UserError, match="not there: full of seed 0, no-rl of seed 0"):
        make_all(monkeypatch, tmp_path, fails)
    assert "no-tool: its frames are those of the row full, which is not there" in capsys.readouterr().out
    assert not [command for command in played.ran if "{" in command or "direct" in command]


def test_a_row_of_a_mode_that_was_not_evaluated_is_named(monkeypatch, tmp_path):
    mine = ablations.Row("mine", "own", "", of="full", mode="zoom x8")
    monkeypatch.setattr(ablations, "ROWS", [ablations.FULL, mine])
    monkeypatch.setattr(ablations, "BY_NAME", {"full": ablations.FULL, "mine": mine})
    monkeypatch.setattr(sys.modules[__name__], "NAMES", ("mine",))
    with pytest.raises(UserError, match="not there: mine of seed 0"):
        make_all(monkeypatch, tmp_path, Played())


def test_the_page_says_what_was_computed(monkeypatch, tmp_path):
    page = make_all(monkeypatch, tmp_path, Played())
    # 30 right against 10 right, on the same questions; half have no answer, all second zooms lie in the first
    assert re.search(r"\| zooms-0 \| 0 \| 33.3 \(19.2 - 51.2\) \|  \| -66.7 \(-73.3 to -60.0\) \| "
                     r"count 33 \| 50.0 \|.* \| 100.0 \|", page)
    assert re.search(r"zooms beat as many uniform frames.* \| not shown \| full - no-tool, right \| "
                     r"100.0 - 33.3 \| \+66.7 .*\) \| 1 \| yes", page)
    for name in ("no-rl", "full"):
        assert f"| {name} | 33.3 | 66.7 | 0.0 | 0.0 | 0.0 | 2: 66.7, 0.5: 33.3 |" in page
    numbers = json.loads((tmp_path / "page.json").read_text())["demo"]
    assert numbers["fps"]["full"] == {"0.5": 30, "2": 60}
    assert numbers["rows"]["full"]["accuracy"] == 1.0 and numbers["rows"]["full"]["bound"] == 0.5
    assert numbers["training"]["full"] == [[1.0] * 3, [0.5] * 3]


# ------------------------------------------------------------------------------------------------ the figures
def test_the_page_says_what_the_rows_are():
    lines = {line.split(" | ")[0][2:]: line for line in compare.rows_page(ablations.ROWS).splitlines()}
    assert lines["full"].endswith("(table 3) |  |") and lines["no-rl"].endswith("| no rl.py |")
    assert lines["no-cold-start"].endswith("| no sft.py; rl.py --steps 8 |")
    assert lines["zooms-1"].endswith("| the policy of full; eval.py --max_zooms 1 |")
    assert lines["rft"].endswith("| no rl.py; sft.py on its own successes |")
    assert all(each.shows and each.shows in lines[each.name] for each in ablations.ROWS)


def test_a_difference_of_nothing_has_no_sign():
    assert compare.with_interval((-0.0, -0.0001, 0.0001), 100) == "+0.0 (+0.0 to +0.0)"


def test_a_difference_is_paired():
    # the same accuracy of 50%: on each question otherwise, and on each the same
    half = {n: (n % 2, 1) for n in range(40)}
    other = {n: (1 - n % 2, 0) for n in range(40)}
    mean, low, high, p, _ = compare.difference({0: result(half)}, {0: result(other)}, "right")
    assert mean == 0 and -0.35 < low < -0.2 and 0.2 < high < 0.35 and p == 1
    assert compare.difference({0: result(half)}, {0: result(half)}, "right") == (0, 0, 0, 1, [0])
    assert compare.difference({0: result(half)}, {0: result(other)}, "zooms")[:3] == (1, 1, 1)


def test_the_questions_of_a_video_are_drawn_together():
    """40 videos with ten questions each, which say the same, tell as much as 40 questions."""
    few, many = ({n: (n // size % 4 > 0, 0) for n in range(40 * size)} for size in (1, 10))
    none = {n: (0, 0) for n in range(400)}
    found = compare.difference({0: result(few)}, {0: result(none)}, "right")
    grouped = compare.difference({0: result(many, per_video=10)}, {0: result(none, per_video=10)}, "right")
    assert grouped[:3] == found[:3] and found.high - found.low > 0.2


@pytest.mark.parametrize("more, less, p", [
    (0, 0, 1), (5, 5, 1), (4, 0, 0.125), (6, 0, 0.03125), (1, 9, 22 / 1024)])
def test_signs_are_tested_exactly(more, less, p):
    assert compare.sign_test(more, less) == pytest.approx(p)


def test_a_difference_is_over_the_seeds_and_questions_that_both_have():
    row = {0: result({0: (1, 0), 1: (1, 0), 2: (None, 0)}), 1: result({0: (1, 0)}, 1)}
    other = {0: result({1: (0, 0), 2: (1, 0), 3: (1, 0)}), 2: result({0: (1, 0)}, 2)}
    assert compare.difference(row, other, "right")[:3] == (1, 1, 1)
    assert compare.difference({0: row[0]}, {2: other[2]}, "right") is None


@pytest.mark.parametrize("found, verdict", [
    ((0.2, 0.1, 0.3, 0.01, [0.1, 0.3]), "agrees"), ((-0.2, -0.3, -0.1, 0.01, [-0.2]), "disagrees"),
    ((0.1, -0.1, 0.3, 0.01, [0.1]), "cannot be told"), ((0, 0, 0, 1, [0]), "no difference"),
    ((0.002, -0.005, 0.009, 0.5, [0.002]), "no difference"),
    ((0.002, -0.005, 0.02, 0.5, [0.002]), "cannot be told"),
    ((0.005, 0.001, 0.009, 0.03, [0.005]), "agrees"),  # small, but there
    ((0.2, 0.1, 0.3, 0.01, [0.5, -0.1]), "cannot be told"),  # seeds disagree
    ((0.013, 0.003, 0.03, 0.125, [0.013]), "cannot be told")])  # 4 questions of 300, all one way
def test_a_verdict_is_by_the_interval_the_seeds_and_the_signs(found, verdict):
    finding = compare.FINDINGS[0]
    assert compare.verdict(compare.Difference(*found), finding) == verdict
    words = {"agrees": "yes", "disagrees": "no"}
    own = finding._replace(of_paper=False)
    assert compare.verdict(compare.Difference(*found), own) == words.get(verdict, verdict)


def test_no_difference_in_zooms_is_a_tenth_of_one():
    finding = compare.FINDINGS[0]._replace(field="zooms")
    for size, verdict in ((0.09, "no difference"), (0.11, "cannot be told")):
        assert compare.verdict(compare.Difference(0, -size, size, 1, [0]), finding) == verdict


def test_seeds_are_pooled_and_their_spread_stands_beside():
    more = lambda accuracy: dict(figures={"accuracy": accuracy, "zooms_per_question": accuracy}, bound=None,
                                 seconds=1.0, commits=["c"], kinds={"count": [10 * accuracy, 10]},
                                 unanswered=1 - accuracy, inside=None)
    seeds = {0: result({n: (1, 1) for n in range(10)}, 0, **more(1.0)),
             1: result({n: (n < 5, 1) for n in range(10)}, 1, **more(0.5))}
    found = compare.row_figures(seeds, {})
    assert (found["accuracy"], found["low"], found["high"]) == (0.75, *interval(15, 20))
    assert found["spread"] == pytest.approx(0.3536, abs=1e-4) and found["zooms"] == 0.75
    assert found["against_full"] is None
    seeds[1]["kinds"]["order"] = [1, 2]
    assert compare.row_figures(seeds, {})["kinds"] == {"count": 0.75, "order": 0.5}
    assert found["kinds"] == {"count": 0.75} and (found["unanswered"], found["inside"]) == (0.25, None)


def test_calls_are_counted_by_the_frames_a_second_that_they_ask_for():
    call = lambda fps: f'<think>fps 3</think><video_zoom>{{"segment": [0, 1], "fps": {fps}}}</video_zoom>'
    texts = [call(fps) for fps in (0.5, 1, 1.01, 2, 4, 8, 8.5)]
    bad = [call(fps) for fps in ("NaN", "-1", '"x"', "[", "null")] + ["<answer>A</answer>", "<video_zoom>[1]"
                                                                      "</video_zoom>"]
    counts = compare.fps_counts(2 * texts + bad)
    assert [*counts.items()] == [(fps, 2) for fps in ("0.5", "1", "1.01", "2", "4", "8", "8.5")]
    assert compare.fps_shares(counts) == [pytest.approx(n / 7) for n in (2, 2, 1, 1, 1)]
    assert compare.fps_shares({}) == [None] * 5
