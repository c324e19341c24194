"""SFT: the loss against its definition, the same however it is split, schedule, kinds, skipped rows, and a
run from end to end."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from cases import all_hold
from launcher import launch
from test_rl import assert_same, make_policy
from tiny import DEVICE

import sft
from common import UserError, run_main, start_processes
from demo import synthetic
from model import replay, token_log_probs
from training.checkpoints import load_policy, save_policy
from training.run import TrainingRun
from training.weights import MasterWeights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    synthetic.synthetic(folder, 10, 5, seed=4)
    save_policy(make_policy(), folder / "start")
    return folder


def read_rows(folder, number=None):
    return [json.loads(line) for line in open(folder / "sft.jsonl")][:number]


def flat(masters):
    return torch.cat([p.detach().flatten().clone() for p in masters.parameters])


def one_step(folder, rank=0, world=1, max_tokens_per_pass=100_000):
    """Parameters' change in one step of plain gradient descent, and the metrics."""
    policy, rows = make_policy(), read_rows(folder, 7)
    dialogues, bad = sft.load_dialogues(policy, rows[rank::world], folder, 10_000)
    assert not bad
    config = sft.Config(max_tokens_per_pass=max_tokens_per_pass, max_grad_norm=1e9)
    masters = MasterWeights(policy)
    before = flat(masters)
    optimizer = torch.optim.SGD(masters.parameters, lr=1.0)
    ids = [row["question"]["id"] for row in rows]
    metrics = sft.train_step(masters, dialogues, ids, optimizer, config, DEVICE)
    return flat(masters) - before, metrics


@pytest.fixture(scope="module")
def whole(folder):
    return one_step(folder)


@pytest.mark.device
def test_a_step_is_the_gradient_of_the_mean(folder, whole):
    """The definition: each dialogue scored alone, the mean over all trained tokens of the batch."""
    change, metrics = whole
    policy = make_policy()
    dialogues, _ = sft.load_dialogues(policy, read_rows(folder, 7), folder, 10_000)
    sft.fill_features(policy, dialogues)
    loss = -torch.cat([token_log_probs(policy, [[d]])[0] for d in dialogues]).mean()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
    assert (change + gradient).norm() <= 1e-4 * gradient.norm() > 0
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
    assert metrics["tokens"] == sum(sum(d.trained) for d in dialogues)
    assert metrics["length"] == sum(len(d.ids) for d in dialogues)


@pytest.mark.device
@pytest.mark.parametrize("max_tokens", [1, 1200])
def test_step_does_not_depend_on_the_micro_batch(folder, whole, max_tokens):
    assert_same(whole, one_step(folder, max_tokens_per_pass=max_tokens))


@pytest.mark.device
def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(folder, monkeypatch, capsys):
    log_probs = sft.token_log_probs
    monkeypatch.setattr(sft, "token_log_probs", lambda *args: (log_probs(*args)[0] * torch.inf, None))
    change, metrics = one_step(folder)
    assert metrics["bad_steps"] == 1 and metrics["grad_norm"] == 0 and not change.any()
    assert read_rows(folder)[0]["question"]["id"] in capsys.readouterr().err


def save_step(folder, out):
    """Of one process of several."""
    rank, world, _ = start_processes("cpu")
    torch.save(one_step(Path(folder), rank, world), f"{out}/{rank}.pt")


@pytest.mark.device
def test_step_is_the_same_on_two_processes(folder, whole, tmp_path):
    """Seven trajectories on two processes: unequal numbers of rows and of tokens."""
    launch(2, "test_sft:save_step", [folder, tmp_path]).wait()
    for rank in range(2):
        assert_same(whole, torch.load(tmp_path / f"{rank}.pt"))


def test_only_learned_turns_of_the_assistant_are_in_the_loss(folder):
    row = next(row for row in read_rows(folder) if len(row["turns"]) == 2)
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


def test_each_process_has_its_share_of_every_batch():
    """All rows once an epoch, each epoch in another order, batch by batch; the same order for a seed."""
    config = sft.Config(epochs=2, batch_size=4, seed=3)
    shares = [list(sft.batches(10, config, rank, world)) for rank, world in ((0, 1), (0, 2), (1, 2))]
    whole, first, second = shares
    assert [epoch for epoch, _ in whole] == [0, 0, 0, 1, 1, 1]
    assert [len(rows) for _, rows in whole] == [4, 4, 2] * 2
    orders = [[number for epoch, rows in whole if epoch == e for number in rows] for e in range(2)]
    assert orders[0] != orders[1] and all(sorted(order) == list(range(10)) for order in orders)
    for (_, rows), (_, even), (_, odd) in zip(whole, first, second, strict=True):
        assert even == rows[::2] and odd == rows[1::2]
    assert list(sft.batches(10, config, 0, 1)) == whole
    assert list(sft.batches(10, sft.Config(epochs=2, batch_size=4, seed=4), 0, 1)) != whole


@pytest.mark.device
def test_what_is_prefetched_changes_nothing_but_times(folder, tmp_path, monkeypatch):
    """Two epochs with rows that cannot be replayed: metrics, order and skipped rows of a plain loop, to the
    bit. Each step is made with the learning rate that its metrics say."""
    rows = read_rows(folder, 8)
    rows[2]["turns"] = rows[2]["turns"] + ["more"]
    rows[5]["question"] = rows[5]["question"] | {"id": "gone", "video": "missing.mp4"}
    trained, rates, step = [], [], sft.train_step

    def recorded(policy, dialogues, ids, optimizer, *rest):
        trained.append((ids, [d.ids for d in dialogues]))
        rates.append(optimizer.param_groups[0]["lr"])
        return step(policy, dialogues, ids, optimizer, *rest)

    def run(name):
        trained.clear()
        rates.clear()
        (tmp_path / name).mkdir()
        config = sft.Config(data=str(folder / "sft.jsonl"), out=str(tmp_path / name), epochs=2, batch_size=3,
                            lr=1e-3, warmup=0.5, max_bad=0.5)
        training = TrainingRun("sft", config, {}, 0, 1, DEVICE)
        skipped = sft.train(MasterWeights(make_policy()), rows, config, training, 0, 1, DEVICE, None)
        metrics = [json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")]
        for m in metrics:
            assert 0 <= m.pop("seconds_data") <= m.pop("seconds")
            for key in ("seconds_save", "seconds_idle", "seconds_gather"):
                m.pop(key)
        assert rates == [m["lr"] for m in metrics] == [sft.learning_rate(n, 6, config) for n in range(6)]
        return metrics, skipped, trained.copy()

    monkeypatch.setattr(sft, "train_step", recorded)
    metrics, skipped, seen = run("prefetched")
    plainly = lambda load, batches: ((batch, load(batch), 0.0) for batch in batches)
    monkeypatch.setattr(sft, "prefetch", plainly)
    plain_metrics, plain_skipped, plain_seen = run("plain")
    assert (skipped, seen) == (plain_skipped, plain_seen)
    # a GPU may add up in another order each time, by atomic operations
    rel = 0 if DEVICE.type == "cpu" else 1e-4
    for step, plain_step in zip(metrics, plain_metrics, strict=True):
        assert step == pytest.approx(plain_step, rel=rel, abs=rel)
    assert len(metrics) == 6 and len(skipped) == 4 and {"gone"} < {where for where, _ in skipped}
    assert metrics[-1]["skipped"] == 4 and metrics[0]["loss"] != metrics[1]["loss"]


# ------------------------------------------------------------------------------------------------- the script
def run(monkeypatch, capsys, *flags):
    """sft.py in this process: (exit status, what it wrote to stdout, to stderr)."""
    monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, flags)])
    status = 0
    try:
        run_main(sft.main)
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.device
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_run_learns_the_protocol_and_names_what_it_skips(folder, tmp_path, monkeypatch, capsys, dtype):
    rows = read_rows(folder)
    rows[0]["question"]["video"] = "missing.mp4"
    rows[1]["turns"] = rows[1]["turns"] + ["<think>more</think><answer>A</answer>"]
    rows[1]["learn"] = [True] * len(rows[1]["turns"])
    (folder / "some.jsonl").write_text("not json\n" + "".join(json.dumps(r) + "\n" for r in rows))
    flags = ["--model", folder / "start", "--data", folder / "some.jsonl"]
    status, _, error = run(monkeypatch, capsys, *flags, "--out", tmp_path / "out", "--lr", 3e-3,
                           "--batch_size", 4, "--epochs", 3, "--max_bad", 0.5, "--device",
                           DEVICE.type, "--dtype", dtype)
    assert status == 0, error
    metrics = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    skipped = [json.loads(line) for line in open(tmp_path / "out" / "skipped.jsonl")]
    assert skipped[0]["row"] == "line 1" and len(skipped) == 7  # the line, and two rows in each epoch
    reasons = " ".join(s["reason"] for s in skipped)
    assert "missing.mp4" in reasons and "over after" in reasons
    load = lambda path: load_policy(path, dtype=getattr(torch, dtype))
    policy, start = load(tmp_path / "out"), load(folder / "start")
    same = [torch.equal(a, b) for a, b in zip(policy.visual.parameters(), start.visual.parameters())]
    assert all(same) and not torch.equal(policy.head.weight, start.head.weight)  # vision is frozen
    status, _, error = run(monkeypatch, capsys, *flags, "--out", tmp_path / "out2")
    assert status == 2 and "3 of" not in error and "line 1" in error


@pytest.mark.device
def test_only_trajectories_of_some_kinds(folder, tmp_path, monkeypatch, capsys):
    """--kinds exemplar trains on these alone; a kind of which there is none is refused, and the others are
    named."""
    rows = read_rows(folder)
    kinds = Counter(row["kind"] for row in rows)
    assert set(kinds) == {"direct", "exemplar", "reflection"}
    policy = make_policy()
    for chosen in (["exemplar"], ["reflection", "exemplar"]):
        out = tmp_path / chosen[0]
        flags = ["--model", folder / "start", "--data", folder / "sft.jsonl", "--out", out,
                 "--batch_size", 100, "--epochs", 1, "--device", DEVICE.type, "--kinds", *chosen]
        status, said, error = run(monkeypatch, capsys, *flags)
        assert status == 0, error
        assert f"sft: {sum(kinds[kind] for kind in chosen)} trajectories" in said
        metrics = json.loads((out / "metrics.jsonl").read_text())
        dialogues = [replay(policy, row, folder)[0] for row in rows if row["kind"] in chosen]
        assert metrics["tokens"] == sum(sum(d.trained) for d in dialogues)
    assert sft.filter_kinds(rows, None) == rows
    with pytest.raises(UserError, match="--kinds other: .*; kinds are direct, exemplar, reflection"):
        sft.filter_kinds(rows, ["exemplar", "other"])


def test_wrong_input_gives_one_line_and_status_2(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def is_one_line(flags, word):
        flags = ["--data", folder / "sft.jsonl", "--out", tmp_path, *flags]
        status, said, error = run(monkeypatch, capsys, *flags)
        assert status == 2 and word in error and len(error.strip().splitlines()) == 1, error

    all_hold(is_one_line, [
        (["--lr", "fast"], "lr"), (["--no_such_flag", "1"], "no_such_flag"),
        (["--model", "runs/none"], "runs/none"),
        (["--model", folder / "start", "--kinds", "other"], "--kinds other"),
        (["--model", "x/y", "--data", "none.jsonl"], "none.jsonl")])
