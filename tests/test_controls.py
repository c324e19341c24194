"""Controls of evaluation: other clips, forced zooms, votes, the gate, where zooms go; by hand and in runs."""

import json
import sys

import pytest
import torch
from launcher import launch
from test_eval import interrupt_after, main, results
from tiny import ScriptedEnv, make_place, random_policy, restless

import eval as evaluation
import protocols
from common import UserError
from controls import altered, effects, modes, places, votes
from model import encode
from protocols.released import TEXTS
from rollout import Episode
from training.checkpoints import load_policy
from video import Frame, read_frames
from zoom_env import EnvConfig

ZOOM = '<think>t</think><video_zoom>{"segment": [%g, %g], "fps": 2}</video_zoom>'
ANSWER = "<think>t</think><answer>%s</answer>"
CROP = ('<tool_call>{"name": "crop_video", "arguments": {"video_path": "v", "start_time": 20, '
        '"end_time": 24}}</tool_call>')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("data"), layers=2, train=5, test=10, seed=4)


@pytest.fixture(scope="module")
def rows(folder):
    return [json.loads(line) for line in open(folder / "test.jsonl")]


def config_of(protocol, **more):
    texts = {name: f"{name} " for name in TEXTS}
    return EnvConfig(protocol=protocol, texts=texts, min_pixels=784, max_pixels=784, **more)


# ------------------------------------------------------------------------------------------------ other clips
def reply(folder, question, mode, protocol, say):
    env = altered.maker(mode)(question, config_of(protocol), folder)
    opening = env.reset()
    return opening, env.step(say)[0].content, env


@pytest.mark.parametrize("protocol, say", [("videozoomer", ZOOM % (20, 24)), ("longvt", CROP),
                                           ("released", ZOOM % (20, 24))])
def test_only_the_pictures_of_a_clip_are_others(folder, rows, protocol, say):
    """Tags, times and sizes are the clip's; the overview, and whether it hit, stay."""
    question = altered.with_other_videos({0: rows[0]}, rows, folder, seed=0)[0]
    play = lambda clips: reply(folder, question, modes.Mode(clips, clips=clips), protocol, say)
    texts = lambda content: [item for item in content if isinstance(item, str)]
    frames = lambda content: [item for item in content if isinstance(item, Frame)]
    opening, shown, env = play("shown")
    assert len(frames(shown)) >= 4
    other = question[altered.OTHERS][0]
    assert other != env.path
    for clips in ("grey", "other"):
        same, content, played = play(clips)
        assert texts(content) == texts(shown) and played.turns[0].calls == env.turns[0].calls
        for before, after in zip(opening[1].content, same[1].content):
            assert before == after if isinstance(before, str) else torch.equal(before.image, after.image)
        assert len(frames(content)) == len(frames(shown)) and played.frames_shown == env.frames_shown
        for before, after in zip(frames(shown), frames(content)):
            assert (after.time_s, after.image.shape) == (before.time_s, before.image.shape)
            expected = torch.full_like(before.image, altered.GREY)
            if clips == "other":
                [frame] = read_frames(other, (before.time_s,), 784, 784, 28)
                expected = altered.resized(frame.image, before.image.shape[1:])
            assert torch.equal(after.image, expected)
    _, content, played = play("none")
    assert not frames(content) and played.frames_shown == len(frames(opening[1].content))
    assert texts(content)[0] == texts(shown)[0].replace(f"{len(frames(shown))} frames", "0 frames")
    assert played.num_calls() == 1 and not played.done


def test_sizes_stay_where_the_other_video_has_others():
    wide = torch.zeros(3, 28, 56, dtype=torch.uint8)
    assert altered.resized(wide, torch.Size((28, 28))).shape == (3, 28, 28)
    assert altered.resized(wide, wide.shape[1:]) is wide


def test_times_are_moved_into_the_other_video():
    assert altered.moved([20.0, 24.0], 100.0) == [20.0, 24.0]
    assert altered.moved([96.0, 98.0, 104.0], 100.0) == [92.0, 94.0, 100.0]
    assert altered.moved([10.0, 30.0, 50.0], 20.0) == [0.0, 10.0, 20.0]  # closer together
    assert altered.moved([10.0], 4.0) == [4.0]


def test_the_other_video_is_another_one_and_chosen_by_place_and_seed(tmp_path):
    names = ["a.mp4", "./a.mp4", "b.mp4", "c.mp4", "d.mp4", "a.mp4"]
    rows = [{"video": name} for name in names]
    questions = dict(enumerate(rows))
    others = lambda asked, seed: {number: question[altered.OTHERS] for number, question in
                                  altered.with_other_videos(asked, rows, tmp_path, seed).items()}
    chosen = others(questions, 0)
    for number, row in questions.items():
        resolved = {(tmp_path / path).resolve() for path in chosen[number]}
        assert len(resolved) == 3 and (tmp_path / row["video"]).resolve() not in resolved
    assert others({4: rows[4]}, 0)[4] == chosen[4]  # whatever else is asked
    assert len({str(others(questions, seed)) for seed in range(5)}) > 1
    with pytest.raises(UserError, match="two videos"):
        altered.with_other_videos(questions, rows[:2], tmp_path, 0)


def test_a_video_that_cannot_stand_in_gives_way_to_the_next(folder, rows, tmp_path):
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    whole = next(str(folder / row["video"]) for row in rows if row["video"] != rows[0]["video"])
    play = lambda *paths: reply(folder, rows[0] | {altered.OTHERS: list(map(str, paths))},
                                modes.Mode("o", clips="other"), "videozoomer", ZOOM % (20, 21))
    frames = lambda content: [item.image for item in content if isinstance(item, Frame)]
    broken, plain = frames(play(tmp_path / "text.mp4", whole)[1]), frames(play(whole)[1])
    assert len(broken) == 2 and all(map(torch.equal, broken, plain))
    with pytest.raises(UserError, match="stand in"):
        play(tmp_path / "text.mp4")


def test_clips_helped_or_harmed():
    def line(mode, number, right, kind, turns, zooms=1):
        return {"policy": "p", "mode": mode, "number": number, "question": f"q{number}", "right": right,
                "kind": kind, "turns": turns, "calls": [{"turn": 1}] * zooms}

    shown = [line("zoom", 0, 1.0, "a", ["e", "z", "B"]), line("zoom", 1, 0.0, "a", ["e", "z", "B"]),
             line("zoom", 2, 1.0, "b", ["e", "z", "B"]), line("zoom", 3, 1.0, "b", ["B"], zooms=0),
             line("zoom", 4, None, "b", ["x"]), line("zoom", 5, 1.0, "b", ["z"])]
    grey = [line("grey", 0, 0.4, "a", ["e", "z", "C"]), line("grey", 1, 0.5, "a", ["e", "z", "A"]),
            line("grey", 2, 1.0, "b", ["e", "y", "B"]), line("grey", 3, 1.0, "b", ["B"], zooms=0),
            line("grey", 4, None, "b", ["x"]), line("grey", 6, 1.0, "b", ["z"])]
    found = effects.effects(shown, grey)
    assert [row["effect"] for row in found] == ["helped", "harmed", "none", "none"]
    assert [row["parted"] for row in found] == [False, False, True, False]
    table = {row["kind"]: row for row in effects.effect_rows(found)}
    assert list(table) == ["all", "zoomed", "a", "b"]
    assert (table["all"]["right_shown"], table["all"]["right_altered"]) == (3 / 4, 3 / 4)
    assert [table["zoomed"][key] for key in ("num_questions", "helped", "harmed", "none")] == [3, 1, 1, 1]
    assert table["a"]["parted"] is None and table["b"]["parted"] == 1
    text = effects.report(list(table.values()))
    assert "helped" in text and "75.0%" in text and "parted" in text


# ------------------------------------------------------------------------------------------------ zoom first
@pytest.mark.parametrize("protocol", ["videozoomer", "longvt", "released"])
def test_an_answer_before_a_zoom_is_refused(folder, rows, protocol):
    make = altered.maker(modes.Mode("always", zoom="always"))
    zoom = CROP if protocol == "longvt" else ZOOM % (20, 24)
    answer = ANSWER % rows[0]["answer"]
    env = make(rows[0], config_of(protocol, max_zooms=3), folder)
    env.reset()
    [message] = env.step(answer)
    assert altered.ZOOM_FIRST in "".join(message.content) and not env.done and env.answer() != "wrong"
    assert len(env.step(zoom)[0].content) > 3 and env.step(answer) == []
    assert env.rewards["accuracy"] == 1 and (altered.num_refused(env), env.num_calls()) == (1, 1)
    # in the last round it counts
    env = make(rows[0], config_of(protocol, max_zooms=2), folder)
    env.reset()
    assert env.step(answer) and env.step(answer) and env.step(answer) == []
    assert env.rewards["accuracy"] == 1 and altered.num_refused(env) == 2
    assert altered.maker(modes.Mode("zoom"))(rows[0], config_of(protocol), folder).__class__ is \
        protocols.PROTOCOLS[protocol]


# ---------------------------------------------------------------------------------------------- votes, a gate
CHOICE = {"id": "q", "answer": "B", "answer_type": "multiple_choice", "options": ["red", "blue", "green"]}


def sample(answer, right=0.0, **more):
    return {"answer": answer, "right": right, "frames": 20, "overview_frames": 9, "tokens": 500, "zooms": 1,
            "prompt_tokens": 300, "generated": 100, "hits": 1, "hits_known": 1, "invalid": 0, "refused": 0,
            "untagged": False, "calls_without_tool": None} | more


def test_the_majority_answers_at_the_cost_of_all():
    line = votes.vote([sample("A"), sample(" B", 1.0), sample("blue", 1.0)], CHOICE)
    assert (line["answer"], line["right"], line["disagreeing"]) == (" B", 1.0, 1)
    assert (line["frames"], line["tokens"], line["generated"]) == (9 + 3 * 11, 300 + 3 * 200, 300)
    assert line["zooms"] == 3 and line["calls_without_tool"] is None and len(line["samples"]) == 3
    cases = [
        (["A", "C", "C", "A"], "A", 2), (["C", "A", "A", "C"], "C", 2),  # the first one of equal ones
        ([None, None, "B"], "B", 2), (["who knows", "well", "B"], "B", 2),  # silence is no answer
        ([None, "who knows"], None, 2)]
    for answers, winner, disagreeing in cases:
        line = votes.vote([sample(answer) for answer in answers], CHOICE)
        assert (line["answer"], line["disagreeing"]) == (winner, disagreeing)
    words = {"answer_type": "open_ended"}
    line = votes.vote([sample("a cat"), sample("The dog."), sample("dog")], words)
    assert (line["answer"], line["disagreeing"]) == ("The dog.", 1)


def test_a_gate_takes_its_threshold_from_the_other_half():
    """In one half zooms are right and direct answers wrong, in the other it is the other way: each half is
    played by what is best for the other one, so all are wrong."""
    questions = {number: {"id": f"q{number}", "video": f"{number // 2}.mp4"} for number in range(20)}
    which = [votes.half(question) for question in questions.values()]
    assert set(which) == {0, 1} and which[::2] == which[1::2]  # questions of a video are in one half
    direct, zoomed = [], []
    for number, question in questions.items():
        zooms_are_right = float(which[number] == 0)
        label = {"number": number, "question": question["id"], "seconds": 1.0, "mode": "x"}
        direct.append(sample("A", 1 - zooms_are_right, frames=9, disagreeing=number % 4, samples=[]) | label)
        zoomed.append(sample("B", zooms_are_right) | label)
    lines, words = votes.gate(direct, zoomed, "gate x5", 5, questions)
    assert words == "over 5 / -1 of 5"
    assert [line["gate_zooms"] for line in lines] == [half == 1 for half in which]
    assert all(line["right"] == 0 and line["mode"] == "gate x5" and "samples" not in line for line in lines)
    far = lines[which.index(1)]
    assert (far["tokens"], far["generated"], far["seconds"], far["frames"]) == (1000, 200, 2.0, 20)


def test_a_gate_zooms_where_answers_disagree_and_zooms_help():
    """Direct answers are right where at most one of five differs; zooms are right always, at more frames."""
    pairs = [(sample("A", float(disagreeing <= 1), frames=9, disagreeing=disagreeing, seconds=1.0),
              sample("A", 1.0, seconds=1.0)) for disagreeing in (0, 1, 1, 2, 3)]
    assert votes.choose_threshold(pairs, 5) == 1
    assert votes.choose_threshold(pairs[:3], 5) == 5  # it never helps: fewest frames
    assert votes.choose_threshold([], 5) == 0
    assert votes.choose_threshold([(pairs[0][0] | {"right": None}, pairs[0][1])], 5) == 0


# --------------------------------------------------------------------------------------------- where zooms go
def test_recall_and_overlap_by_hand():
    evidence = [[10.0, 20.0], [18.0, 30.0], [50.0, 50.0]]
    assert places.recall([[15.0, 40.0]], evidence) == 15 / 20
    assert places.recall([[15.0, 22.0], [5.0, 16.0]], evidence) == 12 / 20
    assert places.overlap([15.0, 40.0], evidence) == 15 / 30
    assert places.overlap([40.0, 45.0], evidence) == 0
    moments = [[5.0, 5.0], [9.0, 9.0]]
    assert places.recall([[4.0, 6.0]], moments) == 1 / 2 and places.overlap([4.0, 6.0], moments) is None
    assert places.recall([[4.0, 6.0]], []) is None
    for segment, inside in [((12, 14), True), ((10, 14), True), ((10, 20), False), ((9, 14), False)]:
        assert places.lies_inside(segment, (10, 20)) == inside


def test_zooms_by_number():
    def line(number, right, *segments):
        calls = [{"turn": n, "segment": s, "frames": 4, "hit": s[0] < 20} for n, s in enumerate(segments)]
        return {"policy": "p", "mode": "zoom", "number": number, "question": f"q{number}", "kind": "a",
                "right": right, "calls": calls}

    question = {"evidence": [[10.0, 20.0]]}
    rows = places.zoom_rows(line(0, 1.0, (0.0, 15.0), (10.0, 15.0)), question)
    rows += places.zoom_rows(line(1, 0.0, (30.0, 40.0), (15.0, 20.0)), question)
    total, first, second = places.by_number(rows)
    assert (total["num_zooms"], first["num_zooms"], second["nth"]) == (4, 2, 2)
    assert (first["hit"], first["recall"], first["overlap"]) == (1 / 2, 1 / 4, 5 / 20 / 2)
    assert (second["recall"], second["recall_so_far"], second["length_s"]) == (1 / 2, 1 / 2, 5.0)
    assert (second["inside"], second["inside_where_right"], first["inside"]) == (1 / 2, 1.0, None)
    text = places.report([total, first, second])
    assert "overlap" in text and "inside the one before" in text
    # without evidence, and of a vote
    vote = line(2, 1.0, (0.0, 5.0)) | {"samples": [line(2, 1.0, (0.0, 5.0)), line(2, 0.0, (1.0, 6.0))]}
    for call in vote["samples"][0]["calls"] + vote["samples"][1]["calls"]:
        call["hit"] = None
    total, _ = places.by_number(places.zoom_rows(vote, {"evidence": None}))
    assert (total["num_zooms"], total["num_with_evidence"], total["recall"]) == (2, 0, None)


# ------------------------------------------------------------------------------------------------- real runs
def flags_of(folder, out, *more):
    return ("--model", folder / "model", "--data", folder / "test.jsonl", "--out", out, "--max_turn_tokens",
            40, *more)


def read(out, name):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def tables_of(out):
    names = "clips", "clips_by_kind", "zooms", "zooms_by_number"
    return [results(out), *(read(out, name) for name in names)]


def lively(*args):
    """A random policy that ends its turns."""
    return restless(load_policy(*args))


@pytest.fixture
def scripted(monkeypatch):
    """What such a policy says counts as zooms, errors and answers."""
    monkeypatch.setitem(protocols.PROTOCOLS, "videozoomer", ScriptedEnv)
    monkeypatch.setattr(evaluation, "load_policy", lively)


def test_clips_in_a_run_that_goes_on(folder, rows, tmp_path, scripted, monkeypatch, capsys):
    clips = "--clips", "grey", "other", "none"
    status, said, error = main(monkeypatch, capsys, *flags_of(folder, tmp_path / "whole", *clips))
    assert status == 0, error
    assert "what seeing the clips did" in said and "where zooms go" in said
    episodes = read(tmp_path / "whole", "episodes")
    assert [row["mode"] for row in episodes[::10]] == ["zoom", "grey clips", "other clips", "no clips"]
    shown, others = episodes[:10], episodes[10:]
    assert any(e["zooms"] for e in shown)
    effects_of = read(tmp_path / "whole", "clips")
    assert len(effects_of) == 30 and not any(row["parted"] for row in effects_of)
    for e in others:
        before, = (line for line in shown if line["number"] == e["number"])
        first = before["calls"][:1]
        assert [call["segment"] for call in e["calls"][:1]] == [call["segment"] for call in first]
        assert e["frames"] == 9 or e["mode"] != "no clips"
        effect, = (row for row in effects_of if (row["mode"], row["number"]) == (e["mode"], e["number"]))
        assert (effect["right_shown"], effect["right_altered"]) == (before["right"] >= 0.5, e["right"] >= 0.5)
    zooms = read(tmp_path / "whole", "zooms")
    assert len(zooms) == sum(e["zooms"] for e in episodes)
    settings = [row["settings"] for row in json.loads((tmp_path / "whole" / "results.json").read_text())]
    assert [s.get("clips") for s in settings if s] == [None, "grey", "other", "none"]
    # ended in the second mode, and begun again
    with monkeypatch.context() as patched:
        interrupt_after(14, patched)
        assert main(patched, capsys, *flags_of(folder, tmp_path / "out", *clips))[0] == 130
    status, said, _ = main(monkeypatch, capsys, *flags_of(folder, tmp_path / "out", *clips, "--max_rows", 3))
    assert status == 0 and "goes on, 14 episodes" in said
    assert tables_of(tmp_path / "out") == tables_of(tmp_path / "whole")
    status, _, error = main(monkeypatch, capsys, *flags_of(folder, tmp_path / "out", "--clips", "grey"))
    assert status == 2 and "--clips" in error


def test_zooms_and_votes_in_a_run_that_goes_on(folder, tmp_path, scripted, monkeypatch, capsys):
    flags = flags_of(folder, tmp_path, "--zoom", "policy", "always", "never", "gate", "--votes", 3)
    with monkeypatch.context() as patched:
        interrupt_after(3 * 4 + 2, patched)
        assert main(patched, capsys, *flags)[0] == 130
    there = read(tmp_path, "episodes")  # of a vote that was cut off nothing is there
    assert len(there) <= 4 and all(len(line["samples"]) == 3 for line in there)
    status, said, error = main(monkeypatch, capsys, *flags)
    assert status == 0 and f"goes on, {len(there)} episodes" in said, error
    names = "zoom x3", "always zoom x3", "zoom off x3", "zoom", "gate x3"
    found = {row["mode"]: row for row in json.loads((tmp_path / "results.json").read_text())
             if row["mode"] != "bound"}
    assert tuple(found) == names
    assert all(row["num_questions"] == 10 and row["seconds_per_question"] > 0 for row in found.values())
    assert found["zoom x3"]["settings"]["temperature"] == 1 and found["zoom"]["settings"]["temperature"] == 0
    never = found["zoom off x3"]
    assert never["frames_per_question"] == 9 and never["zooms_per_question"] == 0
    assert 3 <= never["generated_per_question"] <= 3 * 40  # tokens of one turn
    direct, zoomed = ([line for line in read(tmp_path, "episodes") if line["mode"] == mode]
                      for mode in ("zoom off x3", "zoom"))
    for line, now, closer in zip(read(tmp_path, "gate"), direct, zoomed, strict=True):
        assert line["gate_zooms"] == (now["disagreeing"] > line["threshold"])
        assert line["right"] == (closer if line["gate_zooms"] else now)["right"]
    assert {row["mode"] for row in read(tmp_path, "zooms")} <= {"zoom x3", "always zoom x3", "zoom"}


def test_answers_are_refused_in_a_run(folder, rows, tmp_path):
    """A policy that answers at once, as the loop that eval.py uses plays it: counted apart from bad calls."""
    written, policy = [], random_policy(layers=1)

    class Says:
        def play(self, questions, root, env_config, on_end, make_env):
            env = make_env(questions[0], env_config, root)
            dialogue = encode(policy, env.reset())
            for text in (ANSWER % "A", "what?", ZOOM % (20, 24), ANSWER % questions[0]["answer"]):
                env.step(text)
            on_end(Episode(dialogue, env=env))
            return None, []

    mode = modes.Mode("always zoom", zoom="always")
    play = evaluation.Play("p", mode.name)
    evaluation.evaluate(Says(), play, mode, {0: rows[0]}, folder, policy.env_config, written.append)
    line, = written
    assert (line["right"], line["refused"], line["invalid"], line["zooms"]) == (1.0, 1, 1, 1)


def scripted_run(*flags):
    """eval.py as with the fixture `scripted`."""
    protocols.PROTOCOLS["videozoomer"], evaluation.load_policy = ScriptedEnv, lively
    sys.argv = ["eval.py", *flags]
    evaluation.run_main(evaluation.main)


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(folder, tmp_path):
    more = "--clips", "grey", "other", "--device", "cpu"
    for processes in (1, 2):
        flags = flags_of(folder, tmp_path / str(processes), *more)
        launch(processes, "test_controls:scripted_run", flags).wait()
    assert tables_of(tmp_path / "1") == tables_of(tmp_path / "2")
