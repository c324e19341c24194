"""Alarms of RL: each on metrics made by hand, the good run's silence, and runs that go wrong."""

import json
import math
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import make_place

import generation
import rl
import rollout
import sft
import zoom_env
from demo.tiny_base import TINY_BASE
from training.alarms import ALARMS, Alarms
from zoom_env import REWARD_PARTS, EnvConfig

GOOD = dict(accuracy=0.7, format=0.97, zooms=1.6, truncated=0.01, no_spread_wrong=0.1, entropy=0.3, kl=0.001,
            mismatch=1e-7, updates=4)


def said(run, config=rl.Config(), env_config=EnvConfig(), dtype=torch.float32, begin=()):
    """[(step, what was said)] of a run's metrics, in which GOOD's stand where a step names none."""
    alarms = Alarms(config, SimpleNamespace(env_config=env_config, dtype=dtype), begin)
    steps = [GOOD | changed | {"step": number} for number, changed in enumerate(run, 1)]
    return [(m["step"], line) for m in steps for line in alarms.look(m)]


def test_a_good_run_is_silent():
    """By the values of the demo's good run at some of its steps; what it may have had at most of groups that
    are wrong alike; and an easier one, which ends right and sure in everything."""
    rows = [(0.73, 0.97, 1.60, 0, 0.24, 0.0211, 8e-5), (0.58, 0.90, 1.97, 0.02, 0.11, 0.0221, 6e-4),
            (0.68, 0.91, 1.72, 0, 0.24, 0.0205, 9e-4), (0.87, 0.97, 1.2, 0, 0.26, 0.0214, 0.0047),
            (0.94, 0.98, 1.15, 0, 0.12, 0.0138, 0.01), (0.95, 0.96, 0.953, 0, 0.1, 0.0099, 0.0065),
            (0.98, 0.99, 0.914, 0, 0.03, 0.0071, 0.008), (0.95, 0.96, 1.04, 0.01, 0.1, 0.0098, 0.0081)]
    names = "accuracy", "format", "zooms", "truncated", "no_spread_wrong", "entropy", "kl"
    assert said([dict(zip(names, row)) for row in rows for _ in range(3)]) == []
    assert said([{}] * 3 + [dict(accuracy=1.0, format=1.0, no_spread_wrong=0.0, entropy=1e-5)] * 3) == []


# what goes wrong after three good steps, and words of the line
BAD = [
    (dict(zooms=0.3), "zooms collapse", "--tool_weight"), (dict(format=0.6), "the format decays", "--lr"),
    (dict(no_spread_wrong=0.5), "groups are wrong", "--data"), (dict(truncated=0.2), "cut off", "--lr"),
    (dict(entropy=0.02), "entropy collapses", "--entropy_weight"),
    (dict(entropy=1.6), "entropy explodes", "--lr"), (dict(kl=0.25), "KL runs away", "--kl_weight"),
    (dict(mismatch=2e-5), "sampling and scoring differ", "--no-compile"),
    (dict(mismatch=math.nan), "sampling and scoring differ", "--no-compile")]


@pytest.mark.parametrize("bad, what, flag", BAD, ids=[f"{bad}" for bad, *_ in BAD])
def test_an_alarm_is_said_once_after_two_bad_steps(bad, what, flag):
    (step, line), = said([{}] * 3 + [bad] * 4 + [{}] * 2 + [bad] * 4)
    assert step == 5 and what in line and flag in line and "\n" not in line
    # one bad step may be chance; nor do some that are nearly bad matter
    assert said([{}] * 3 + [bad, {}] * 4) == []
    nearly = {name: GOOD[name] + (value - GOOD[name]) / 3 for name, value in bad.items() if value == value}
    assert not nearly or said([{}] * 3 + [nearly] * 4) == []
    # broken in the second step, which is one of the start's
    assert [step for step, _ in said([{}] + [bad] * 3)] == [3]


def test_thresholds_go_with_the_start():
    """What is bad for one run is how another one always was; but not without end."""
    for alarm, usual, bad in (("zooms", 0.3, 0.05), ("format", 0.5, 0.3), ("no_spread_wrong", 0.45, 0.78),
                              ("truncated", 0.3, 0.45), ("kl", 0.02, 0.41), ("entropy", 1.6, 8.1),
                              ("entropy", 0.02, 0.0019)):
        assert said([{alarm: usual}] * 6) == []
        (step, line), = said([{alarm: usual}] * 3 + [{alarm: bad}] * 2)
        assert step == 5 and alarm in line
    for alarm, value in (("zooms", 0.01), ("no_spread_wrong", 0.9), ("truncated", 0.6), ("kl", 0.6),
                         ("mismatch", 2e-4)):
        assert [step for step, _ in said([{alarm: value}] * 5)] == [2]
    for start, bad in ((1e-3, 2e-2), (0.02, 0.11)):  # in bfloat16
        assert said([dict(mismatch=start)] * 6, dtype=torch.bfloat16) == []
        assert len(said([dict(mismatch=start)] * 3 + [dict(mismatch=bad)] * 3, dtype=torch.bfloat16)) == 1


def test_the_cause_is_what_the_run_says_of_itself():
    def line(run, **how):
        return said(run, **how)[0][1]

    falls = [{}] * 3 + [dict(zooms=0.1, format=0.1)] * 2
    zooms, form = said(falls, rl.Config(tool_weight=0.0, format_weight=0.0))
    assert "--tool_weight is 0" in zooms[1] and "--format_weight is 0" in form[1]
    assert "never learned the tool" in line([dict(zooms=0.0)] * 2)
    assert "--max_turn_tokens (1024)" in line([dict(truncated=0.9)] * 2)
    assert "--lr 0.25" in line([{}] * 3 + [dict(truncated=0.9)] * 2, config=rl.Config(lr=0.25))
    broken = said([{}] * 3 + [dict(truncated=0.9, zooms=0, format=0, no_spread_wrong=1)] * 2)
    assert "cut off" in broken[0][1] and all("most episodes are cut off" in said for _, said in broken[1:])
    assert len(broken) == 4


def test_nothing_is_said_of_what_cannot_be_otherwise():
    """Without a tool, without a reference, without an entropy; of steps that made no update; and while nearly
    all is right, a sure policy is no fault."""
    bad = [dict(zooms=0.0, kl=0.0, entropy=0.0)] * 6
    assert len(said(bad[:3] + [dict(kl=9.0, entropy=0.0)] * 3)) == 2  # zooms, KL
    silent = rl.Config(kl_weight=0.0, entropy_weight=0.0)
    assert said(bad[:3] + [dict(kl=9.0, zooms=0.0, entropy=0.0)] * 3, silent, EnvConfig(max_zooms=0)) == []
    assert said([{}] * 3 + [dict(updates=0, kl=0.0, entropy=0.0)] * 3) == []
    assert said([{}] * 3 + [dict(entropy=1e-9, accuracy=0.95)] * 3) == []
    assert {alarm.metric for alarm in ALARMS} == set(GOOD) - {"accuracy", "updates"}


def test_a_run_that_goes_on_says_nothing_again():
    """As metrics.jsonl has it, where nan is null. What had begun, and was not said yet, is said in time."""
    bad = dict(mismatch=math.nan)
    whole = [GOOD | {"step": n} for n in (1, 2, 3)] + [GOOD | bad | {"step": n} for n in range(4, 9)]
    as_file = json.loads(json.dumps(whole).replace("NaN", "null"))

    def goes_on(after):
        policy = SimpleNamespace(env_config=EnvConfig(), dtype=torch.float32)
        alarms = Alarms(rl.Config(), policy, as_file[:after])
        return [m["step"] for m in whole[after:] for _ in alarms.look(m)]

    assert [goes_on(after) for after in (0, 3, 4, 5, 7)] == [[5], [5], [5], [], []]


# ------------------------------------------------------------------------------------------------ real runs
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("alarms"), layers=1, train=5, test=1)


def run(monkeypatch, place, out, *flags):
    """rl.py on it."""
    flags = ["--model", place / "model", "--data", place / "train.jsonl", "--out", out, "--batch_size", 1,
             "--mini_batch_size", 1, "--group_size", 2, "--max_draws", 1, "--max_turn_tokens", 3,
             "--no-compile", "--no-dynamic_sampling", *flags]
    call(monkeypatch, rl.main, *flags)


def call(monkeypatch, main, *flags):
    """A script's main with these flags, on the CPU."""
    flags = [*flags, "--device", "cpu", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, flags)])
    main()


def test_a_planted_fault_of_sampling_is_said_once(place, tmp_path, monkeypatch, capsys):
    """Sampling notes log-probabilities that are 10% off. Stopped after three steps, the run goes on without
    saying it again."""
    def faulty(*args, sample=generation.sample):
        token, log_prob = sample(*args)
        return token, 1.1 * log_prob

    def alarms():
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("alarm: sampling")]

    run(monkeypatch, place, tmp_path / "good", "--steps", 3)
    assert not alarms()
    for module in (generation, rollout):
        monkeypatch.setattr(module, "sample", faulty)
    show = rl.show_step

    def stop(metrics, *args):
        if metrics["step"] == 4:
            raise KeyboardInterrupt
        show(metrics, *args)

    monkeypatch.setattr(rl, "show_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, place, tmp_path / "bad", "--steps", 5, "--save_every", 1)
    line, = alarms()
    assert "in step 2" in line and "--no-compile" in line
    monkeypatch.setattr(rl, "show_step", show)
    run(monkeypatch, place, tmp_path / "bad", "--steps", 5, "--save_every", 1)
    steps = [json.loads(line) for line in open(tmp_path / "bad" / "metrics.jsonl")]
    assert len(steps) == 5 and steps[-1]["mismatch"] > 1e-3 and not alarms()


def test_turns_that_are_too_short_are_said(place, tmp_path, monkeypatch, capsys):
    run(monkeypatch, place, tmp_path / "run", "--steps", 2, "--max_turn_tokens", 1)
    said = capsys.readouterr().out
    assert "alarm: episodes are cut off: truncated 1 in step 2" in said and "--max_turn_tokens (1)" in said


@pytest.mark.slow
def test_steps_that_are_too_large_break_a_policy(tmp_path, monkeypatch, capsys):
    """The demo's base after a short cold start, with a learning rate a hundred times too large: it says
    anything but what it should, and six alarms tell so, each once. With the demo's own there is none."""
    data = tmp_path / "data"
    subprocess.run([sys.executable, Path(rl.__file__).with_name("data_prep.py"), "synthetic", "--train", "200",
                    "--test", "5", "--out", data], check=True)
    call(monkeypatch, sft.main, "--model", TINY_BASE, "--data", data / "sft.jsonl", "--out", tmp_path / "sft")

    def alarms(lr):
        call(monkeypatch, rl.main, "--model", tmp_path / "sft", "--data", data / "train.jsonl", "--out",
             tmp_path / lr, "--steps", 6, "--batch_size", 4, "--mini_batch_size", 2, "--group_size", 4,
             "--max_draws", 1, "--no-dynamic_sampling", "--lr", lr)
        lines = capsys.readouterr().out.splitlines()
        return [line.split(": ")[1] for line in lines if line.startswith("alarm: ")]

    assert alarms("1e-4") == []
    said = alarms("1e-2")
    assert len(said) == len(set(said)) and set(said) >= {
        "the KL runs away", "episodes are cut off", "zooms collapse", "the format decays",
        "the entropy explodes", "groups are wrong in all answers alike, which teaches nothing"}


@pytest.mark.slow
def test_a_reward_that_no_answer_matters_to_ends_in_a_collapse(place, tmp_path, monkeypatch, capsys):
    """Of the entropy: a reward by the text, whatever the question, with steps that are far too large."""
    def by_text(env):
        said = "".join(turn.text for turn in env.turns)
        return dict.fromkeys(REWARD_PARTS, 0.0) | {"format": zlib.crc32(said.encode()) % 3 / 2}

    monkeypatch.setattr(zoom_env, "reward_parts", by_text)
    run(monkeypatch, place, tmp_path / "run", "--steps", 20, "--temperature", 4, "--lr", 0.1,
        "--clip_high", 10, "--group_size", 16, "--kl_weight", 0, "--entropy_weight", 1e-9,
        "--max_turn_tokens", 6)
    line, = [line for line in capsys.readouterr().out.splitlines() if "the entropy collapses" in line]
    assert "--entropy_weight" in line and "--lr 0.1" in line
