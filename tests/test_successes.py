"""A policy's successes: what is kept and what is not, and that it replays to the tokens that were played."""

import json
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny import make_place, random_policy

import data_prep
import sft
from common import UserError
from model import Sampled, encode, replay
from rollout import Episode
from sources import successes
from sources.read import read_trajectories
from zoom_env import Message, ZoomEnv

THINK = "<think>I look.</think>"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("successes"), layers=1)


def zoom(start_s, end_s):
    return THINK + f'<video_zoom>{{"segment": [{start_s}, {end_s}], "fps": 1}}</video_zoom>'


def right(question, think=THINK):
    return f"{think}<answer>{question['answer']}</answer>"


def episode(policy, question, root, turns, truncated=False, split=()):
    """One in which the policy has said these turns. split: numbers of turns that were sampled letter by
    letter, as no text is read."""
    env = ZoomEnv(question, policy.env_config, root)
    e = Episode(encode(policy, env.reset()), env=env, truncated=truncated)
    for number, text in enumerate(turns):
        ids = policy.tokenize(text)
        if number in split:
            ids = [token for letter in text for token in policy.tokenize(letter)]
        assert policy.tokenizer.decode(ids) == text
        if not text.endswith("</video_zoom>"):
            ids.append(policy.im_end)
        encode(policy, [Message("assistant", [Sampled(ids, [0.0] * len(ids))])], e.dialogue, rules=env)
        encode(policy, env.step(text), e.dialogue, rules=env)
    env.end()
    return e


def first_of(place, kind):
    questions = [json.loads(line) for line in open(place / "train.jsonl")]
    return next(question for question in questions if question["meta"]["kind"] == kind)


def test_what_is_kept_and_why_the_rest_is_not(place, policy):
    """One episode for each reason, and three successes, of which those come first whose zooms hit."""
    question = first_of(place, "detail")
    start_s, end_s = question["evidence"][0]
    hit, miss = zoom(start_s, end_s), zoom(*((0, 2) if start_s > 5 else (60, 62)))
    wrong = THINK + f"<answer>{'B' if question['answer'] == 'A' else 'A'}</answer>"
    answer = right(question)
    others = right(question, "<think>I see the blue scene.</think>")
    split = [episode(policy, question, place, [others], split=[0])]
    assert split[0].env.rewards["reward"] > 0.9
    group = [episode(policy, question, place, turns, **how) for turns, how in (
        ([answer], {}), ([answer], {}), ([hit, miss, answer], {}), ([hit, answer], {}), ([wrong], {}),
        (["hm", answer], {}), ([answer + "."], {}), ([hit, answer], dict(truncated=True)), ([hit], {}))]
    rejects = Counter()
    kept = successes.choose(policy, group + split, 2, rejects)
    assert kept == [group[3], group[2]]
    assert rejects == {"said before": 1, "wrong": 2, "not well formed": 2, "cut off": 1,
                       "more than --keep": 1, "its text is other tokens": 1}
    assert successes.choose(policy, group, 9, Counter()) == [group[3], group[2], group[0]]
    assert successes.choose(policy, [group[4]], 1, Counter()) == []


def test_a_row_replays_to_what_was_played(place, policy, tmp_path):
    """Every token and every mask, from another folder; also where the checkpoint that is trained allows fewer
    zooms."""
    question = first_of(place, "order")
    start_s, end_s = question["evidence"][0]
    turns = [zoom(start_s, end_s), zoom(start_s - 1, end_s + 1), right(question)]
    played = episode(policy, question, place, turns)
    row = successes.trajectory(played, place, tmp_path / "rft.jsonl")
    (tmp_path / "rft.jsonl").write_text(json.dumps(row) + "\n")
    (row,), bad = read_trajectories(tmp_path / "rft.jsonl", 0.0)
    assert not bad and row["kind"] == "success" and row["turns"] == turns and row["learn"] == [True] * 3
    fewer = random_policy()
    fewer.env_config = replace(fewer.env_config, max_zooms=1)
    for trained in (policy, fewer):
        dialogue, env = replay(trained, row, tmp_path)
        assert dialogue.ids == played.dialogue.ids and dialogue.trained == played.dialogue.trained
        assert env.rewards == played.env.rewards and env.rewards["accuracy"] == 1


class ScriptedEngine:
    """Plays as an Engine does, but says of an answer only whether it is right, by chance."""

    def __init__(self, policy, config, generator, group_size):
        assert config.temperature == 1 and config.max_turn_tokens == policy.env_config.max_turn_tokens
        self.policy, self.group_size, self.generator = policy, group_size, generator

    def play(self, questions, root, on_end):
        groups = []
        for question in questions:
            groups.append([])
            for number in range(self.group_size if question["id"] != "gone" else 0):
                share = torch.rand(1, generator=self.generator).item()
                answer = question["answer"] if question["meta"]["kind"] == "detail" else "none"
                said = f"<think>{share:.6f}</think><answer>{answer}</answer>"
                e = episode(self.policy, question, root, [said])
                e.number = number
                groups[-1].append(e)
                on_end(e)
        gone = [question["id"] for question in questions if question["id"] == "gone"]
        return groups, [(name, "no such file: none.mp4") for name in gone]


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["data_prep.py", "successes", "--device", "cpu", *map(str, flags)])
    data_prep.main()


def test_the_command(place, tmp_path, monkeypatch, capsys):
    """Rows that sft.py reads, the same for the same seed and others for another; what could not be played is
    named, and what was not kept is counted."""
    monkeypatch.setattr(successes, "make_player", ScriptedEngine)
    questions = [json.loads(line) for line in open(place / "train.jsonl")]
    extra = [questions[0] | {"id": "gone", "video": "none.mp4"},
             questions[0] | {"id": "judged", "meta": {"kind": "detail", "judge": True}}]
    (place / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions + extra))
    flags = "--model", place / "model", "--questions", place / "questions.jsonl", "--samples", 3
    written = {}
    for name, seed, keep in (("a", 4, 2), ("b", 4, 2), ("c", 5, 2)):
        command(monkeypatch, *flags, "--out", tmp_path / f"{name}.jsonl", "--seed", seed, "--keep", keep)
        written[name] = (tmp_path / f"{name}.jsonl").read_text()
    said = capsys.readouterr().out
    assert written["a"] == written["b"] != written["c"]
    rows, bad = read_trajectories(tmp_path / "a.jsonl", 0.0)
    details = [q["id"] for q in questions if q["meta"]["kind"] == "detail"]
    assert [row["question"]["id"] for row in rows] == [name for name in details for _ in range(2)]
    assert len(sft.filter_kinds(rows, ["success"])) == len(rows) == 2 * len(details)
    assert rows[0]["provenance"] == {"sample": 0, "max_zooms": 4, "model": str(place / "model"), "seed": 4,
                                     "temperature": 1.0}
    assert f"wrong {3 * (10 - len(details))}" in said and f"more than --keep {len(details)};" in said
    skipped = [json.loads(line) for line in open(tmp_path / "a.skipped.jsonl")]
    assert [row["row"] for row in skipped] == ["judged", "gone"] and "none.mp4" in skipped[1]["reason"]
    # nothing is written over what is read, nor where there is nothing
    for flags, words in (((*flags, "--out", place / "questions.jsonl"), "another file"),
                         ((*flags[:2], "--questions", place / "hard.jsonl", "--out", tmp_path / "d.jsonl"),
                          "no success")):
        hard = [q for q in questions if q["meta"]["kind"] != "detail"]
        (place / "hard.jsonl").write_text("".join(json.dumps(q) + "\n" for q in hard))
        with pytest.raises(UserError, match=words):
            command(monkeypatch, *flags)
    assert not (tmp_path / "d.jsonl").exists()


@pytest.mark.slow
def test_what_a_policy_plays_is_counted(place, tmp_path, capsys):
    """By the real engine: a random policy has no success, and each of its episodes a reason."""
    with pytest.raises(UserError, match="no success"):
        successes.successes(place / "model", place / "test.jsonl", tmp_path / "x.jsonl", 3, device="cpu")
    assert "0 of 5 questions" in (said := capsys.readouterr().out) and "cut off 15" in said
