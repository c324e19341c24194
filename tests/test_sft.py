"""SFT: the loss against its definition, the same however it is split, schedule, skipped rows, and a run end to end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launcher import launch
from test_rl import assert_same
from tiny import random_policy as make_policy

import sft
from common import field_comments, start_processes
from demo import synthetic
from training.checkpoints import load_policy
from training.checkpoints import save_policy
from training.weights import MasterWeights
from training.run import TrainingRun

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    synthetic.synthetic(folder, 10, 5, seed=4)
    save_policy(make_policy(), folder / "start")
    return folder


def one_step(folder, rank=0, world=1, max_tokens_per_pass=100_000, rows=None):
    """Parameters' change in one step of plain gradient descent, and the metrics."""
    policy = make_policy()
    rows = rows or [json.loads(line) for line in open(folder / "sft.jsonl")][:7]
    dialogues, bad = sft.load_dialogues(policy, rows[rank::world], folder, 10_000)
    assert not bad
    config = sft.Config(max_tokens_per_pass=max_tokens_per_pass, max_grad_norm=1e9)
    masters = MasterWeights(policy)
    before = torch.cat([p.detach().flatten().clone() for p in masters.parameters])
    optimizer = torch.optim.SGD(masters.parameters, lr=1.0)
    metrics = sft.train_step(masters, dialogues, [row["question"]["id"] for row in rows], optimizer, config,
                             torch.device("cpu"))
    return torch.cat([p.detach().flatten() for p in masters.parameters]) - before, metrics


@pytest.fixture(scope="module")
def whole(folder):
    return one_step(folder)


@pytest.mark.parametrize("max_tokens", [1, 1200])
def test_step_does_not_depend_on_the_micro_batch(folder, whole, max_tokens):
    assert_same(whole, one_step(folder, max_tokens_per_pass=max_tokens))


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(folder, monkeypatch, capsys):
    log_probs = sft.token_log_probs
    monkeypatch.setattr(sft, "token_log_probs", lambda *args: (log_probs(*args)[0] * torch.inf, None))
    change, metrics = one_step(folder)
    assert metrics["bad_steps"] == 1 and metrics["grad_norm"] == 0 and not change.any()
    assert json.loads(open(folder / "sft.jsonl").readline())["question"]["id"] in capsys.readouterr().err


def save_step(folder, out):
    """Of one process of several."""
    rank, world, _ = start_processes("cpu")
    torch.save(one_step(Path(folder), rank, world), f"{out}/{rank}.pt")


def test_step_is_the_same_on_two_processes(folder, whole, tmp_path):
    """Seven trajectories on two processes: unequal numbers of rows and of tokens."""
    launch(2, "test_sft:save_step", [folder, tmp_path]).wait()
    for rank in range(2):
        assert_same(whole, torch.load(tmp_path / f"{rank}.pt"))


def test_only_learned_turns_of_the_assistant_are_in_the_loss(folder):
    row = next(r for line in open(folder / "sft.jsonl") if len((r := json.loads(line))["turns"]) == 2)
    policy = make_policy()
    trained = lambda learn: sft.load_dialogues(policy, [row | {"learn": learn}], folder, 10_000)[0][0]
    text = lambda d: policy.tokenizer.decode([i for i, t in zip(d.ids, d.trained) if t])
    both, second = trained([True, True]), trained([False, True])
    assert text(both) == row["turns"][0] + row["turns"][1] + "<|im_end|>"
    assert text(second) == row["turns"][1] + "<|im_end|>"
    assert both.ids == second.ids


def test_schedule_warms_up_and_ends_near_zero():
    config = sft.Config(lr=1.0, warmup=0.1)
    rates = [sft.learning_rate(s, 100, config) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1.0 and rates[-1] < 0.001
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert sft.learning_rate(0, 1, config) == 1.0


def test_what_is_prepared_ahead_changes_nothing_but_times(folder, tmp_path, monkeypatch):
    """Two epochs with rows that cannot be replayed: metrics, order and skipped rows of a plain loop, to the bit."""
    rows = [json.loads(line) for line in open(folder / "sft.jsonl")][:8]
    rows[2]["turns"] = rows[2]["turns"] + ["more"]
    rows[5]["question"] = rows[5]["question"] | {"id": "gone", "video": "missing.mp4"}
    trained, step = [], sft.train_step

    def recorded(policy, dialogues, ids, *rest):
        trained.append((ids, [d.ids for d in dialogues]))
        return step(policy, dialogues, ids, *rest)

    def run(name):
        trained.clear()
        (tmp_path / name).mkdir()
        config = sft.Config(data=str(folder / "sft.jsonl"), out=str(tmp_path / name), epochs=2, batch_size=3, lr=1e-3, max_bad=0.5)
        training = TrainingRun("sft", config, {}, 0, 1, torch.device("cpu"))
        skipped = sft.train(MasterWeights(make_policy()), rows, config, training, 0, 1, torch.device("cpu"), None)
        metrics = [json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")]
        assert all(0 <= m.pop("seconds_data") <= m.pop("seconds") for m in metrics)
        [m.pop(key) for m in metrics for key in ("seconds_save", "seconds_idle", "seconds_gather")]
        return metrics, skipped, trained.copy()

    monkeypatch.setattr(sft, "train_step", recorded)
    ahead = run("ahead")
    monkeypatch.setattr(sft, "prefetch", lambda load, batches: ((batch, load(batch), 0.0) for batch in batches))
    assert ahead == run("plain")
    assert len(ahead[0]) == 6 and len(ahead[1]) == 4 and {"gone"} < {where for where, _ in ahead[1]}
    assert [m["skipped"] for m in ahead[0]][-1] == 4 and ahead[0][0]["loss"] != ahead[0][1]["loss"]


def run(*flags, script="sft.py"):
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_run_learns_the_protocol_and_names_what_it_skips(folder, tmp_path, dtype):
    rows = [json.loads(line) for line in open(folder / "sft.jsonl")]
    rows[0]["question"]["video"] = "missing.mp4"
    rows[1]["turns"] = rows[1]["turns"] + ["<think>more</think><answer>A</answer>"]
    rows[1]["learn"] = [True] * len(rows[1]["turns"])
    (folder / "some.jsonl").write_text("not json\n" + "".join(json.dumps(r) + "\n" for r in rows))
    done = run("--model", folder / "start", "--data", folder / "some.jsonl", "--out", tmp_path / "out", "--lr", 3e-3,
               "--batch_size", 4, "--epochs", 3, "--max_bad", 0.5, "--device", "cpu", "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    skipped = [json.loads(line) for line in open(tmp_path / "out" / "skipped.jsonl")]
    assert skipped[0]["row"] == "line 1" and len(skipped) == 7  # the line, and two rows in each epoch
    assert any("missing.mp4" in s["reason"] for s in skipped) and any("over after" in s["reason"] for s in skipped)
    policy, start = load_policy(tmp_path / "out", dtype=getattr(torch, dtype)), load_policy(folder / "start", dtype=getattr(torch, dtype))
    same = [torch.equal(a, b) for a, b in zip(policy.visual.parameters(), start.visual.parameters())]
    assert all(same) and not torch.equal(policy.head.weight, start.head.weight)  # vision is frozen
    again = run("--model", folder / "start", "--data", folder / "some.jsonl", "--out", tmp_path / "out2")
    assert again.returncode == 2 and "3 of" not in again.stderr and "line 1" in again.stderr


@pytest.mark.parametrize("flags, word", [
    (["--lr", "fast"], "lr"), (["--no_such_flag", "1"], "no_such_flag"), (["--model", "runs/none"], "runs/none"),
    (["--model", "x/y", "--data", "none.jsonl"], "none.jsonl")])
def test_wrong_input_gives_one_line_and_status_2(flags, word, folder):
    done = run("--data", folder / "sft.jsonl", "--out", folder / "wrong", *flags)
    assert done.returncode == 2 and word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout


@pytest.mark.parametrize("script", ["sft", "rl", "eval"])
def test_each_setting_has_its_comment(script):
    assert all(field_comments(__import__(script).Config).values())


@pytest.mark.parametrize("script", ["sft.py", "rl.py", "eval.py"])
def test_help_names_each_flag_its_meaning_and_default(script):
    text = run("--help", script=script).stdout
    config, flags = __import__(script[:-3]).Config, {}
    for flag in re.split(r"\n  --", text[text.index("\noptions:"):])[1:]:
        flags[re.split(r"[ ,]", flag)[0]] = " ".join(flag.split())
    for field in config.__dataclass_fields__.values():
        assert re.search(r"\w{3,}.* \(default " + re.escape(str(field.default)), flags[field.name]), field.name
