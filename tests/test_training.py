"""Runs that are killed, stopped and started again: nothing is lost but the steps since the last save, and what
follows is what an undisturbed run would have done."""

import json
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from launcher import launch
from tiny import random_policy

import rl
from common import start_processes
from demo.synthetic import synthetic
from training.checkpoints import load_policy
from training.checkpoints import save_policy
from training.run_checkpoints import run_folders
from scale.sharding import load_weights
from training.run import TrainingRun

ROOT = Path(__file__).resolve().parent.parent
TIMES = {"seconds", "seconds_rollout", "seconds_update", "seconds_data", "seconds_save", "seconds_idle", "seconds_gather"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    make_place(folder)
    return folder


def make_place(folder):
    """Questions, trajectories and a small random checkpoint."""
    synthetic(folder, 20, 5, seed=3)
    (folder / "few.jsonl").write_text("\n".join((folder / "sft.jsonl").read_text().splitlines()[:11]))
    policy = random_policy(layers=2)
    save_policy(policy, folder / "model")


def flags(place, out, script, shard, *more):
    """Of some steps of rl.py or sft.py that change the weights a lot, with a save every two of them."""
    own = {"rl.py": ["--data", place / "train.jsonl", "--steps", 5, "--batch_size", 4, "--mini_batch_size", 2, "--group_size", 3,
                     "--max_turn_tokens", 6, "--max_draws", 2, "--temperature", 4, "--lr", 1e-4],
           "sft.py": ["--data", place / "few.jsonl", "--epochs", 2, "--batch_size", 4, "--lr", 1e-3]}
    return [*own[script], "--model", place / "model", "--out", out, "--device", "cpu", "--save_every", 2, "--shard", shard, *more]


def start(place, out, script, shard, processes, *more):
    path = {"rl.py": "tests/planted_rl.py"}.get(script, script)
    return launch(processes, path, flags(place, out, script, shard, *more))


def finish(*args):
    return start(*args).wait()


def lines(out):
    path = out / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def metrics(out):
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines(out)]


def wait_for(runs, what, timeout_s=120):
    end = time.time() + timeout_s
    while not what():
        assert set(runs.poll()) == {None} and time.time() < end, runs.said()[-3000:]
        time.sleep(0.02)


def kill_and_go_on(place, out, script, shard, processes, after_lines, delay_s):
    """Kills a run with all its processes some time after it has written some lines, and lets it end. Returns how many
    lines there were."""
    runs = start(place, out, script, shard, processes)
    wait_for(runs, lambda: len(lines(out)) >= after_lines)
    time.sleep(delay_s)
    runs.kill()
    there = len(lines(out))
    finish(place, out, script, shard, processes)
    return there


@pytest.fixture(scope="module")
def whole_runs(place, tmp_path_factory):
    """The folder of an undisturbed run of two processes."""
    folders = {}

    def whole(script, shard):
        if (script, shard) not in folders:
            folders[script, shard] = tmp_path_factory.mktemp("whole") / "out"
            finish(place, folders[script, shard], script, shard, 2)
            assert len({m["loss"] for m in metrics(folders[script, shard]) if "loss" in m}) > 3
        return folders[script, shard]

    return whole


@pytest.mark.parametrize("script, shard, after_lines", [("rl.py", "none", 3), ("rl.py", "all", 1), ("sft.py", "all", 4)])
def test_a_killed_run_goes_on_as_if_nothing_had_been(place, tmp_path, whole_runs, script, shard, after_lines):
    """Two processes, killed once: the metrics are an undisturbed run's to the bit, and so is the checkpoint."""
    whole = whole_runs(script, shard)
    kill_and_go_on(place, tmp_path, script, shard, 2, after_lines, delay_s=random.random() / 2)
    assert metrics(tmp_path) == metrics(whole)
    mine, theirs = (load_policy(folder).state_dict() for folder in (tmp_path, whole))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert "is finished" in finish(place, tmp_path, script, shard, 2)


def test_sft_goes_on_with_another_number_of_processes(place, tmp_path):
    """From two, replicated, to three with shards, to one: the same metrics to 1e-5."""
    finish(place, tmp_path / "whole", "sft.py", "none", 1)
    out = tmp_path / "changed"
    for processes, shard, after in ((2, "none", 3), (3, "all", 5)):
        runs = start(place, out, "sft.py", shard, processes)
        wait_for(runs, lambda: len(lines(out)) >= after)
        runs.kill()
    finish(place, out, "sft.py", "none", 1)
    changed, whole = metrics(out), metrics(tmp_path / "whole")
    assert [m["step"] for m in changed] == [m["step"] for m in whole]
    for mine, theirs in zip(changed, whole):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)


def state_of_a_run(place, run, shard, out):
    """Goes on with a run, and writes what it has before the first step, whole."""
    rank, world, device = start_processes("cpu")
    saved = json.loads((Path(run) / "run.json").read_text())["settings"]
    known = {f: saved[f] for f in saved if f in rl.Config.__dataclass_fields__}
    config = rl.Config(**known | dict(out=run, data=f"{place}/train.jsonl", model=f"{place}/model", shard=shard, device="cpu"))
    training = TrainingRun("rl", config, {"model": config.model, "questions": config.data}, rank, world, device)
    weights = load_weights(config.model, config, device)
    optimizer = torch.optim.AdamW(weights.parameters, lr=1.0, fused=True)
    progress = training.start(weights, optimizer, 5, {"step": 0}, torch.Generator())
    whole = lambda tensor: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
    tensors = {name: [whole(p), *(whole(x) for x in optimizer.state[p].values())] for name, p in weights.masters.items()}
    rows = [json.loads(line) for line in open(config.data)]
    draws = [row["id"] for row in islice(rl.endless(rows, config.seed), progress["drawn"], progress["drawn"] + 4)]
    if rank == 0:
        torch.save({"tensors": tensors, "progress": progress, "draws": draws}, Path(out) / "state.pt")


def test_rl_goes_on_with_another_number_of_processes(place, tmp_path):
    """Weights, moments, step, place in the data and skipped rows are bit-equal, and the next questions the same."""
    run = tmp_path / "run"
    runs = start(place, run, "rl.py", "all", 2)
    wait_for(runs, lambda: run_folders(run))
    runs.kill()
    states = []
    for processes, shard in ((2, "all"), (1, "none"), (3, "all"), (2, "none")):
        launch(processes, "test_training:state_of_a_run", [place, run, shard, tmp_path]).wait()
        states.append(torch.load(tmp_path / "state.pt"))
    for state in states[1:]:
        assert state["progress"] == states[0]["progress"] and state["draws"] == states[0]["draws"]
        for name, tensors in states[0]["tensors"].items():
            assert len(tensors) == 4 and all(map(torch.equal, tensors, state["tensors"][name])), name
    assert states[0]["progress"]["step"] > 0 and states[0]["progress"]["drawn"] >= 8
    finish(place, run, "rl.py", "none", 1)
    assert [m["step"] for m in metrics(run)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("after_lines", [1, 3])
def test_a_run_that_is_told_to_stop_saves_the_start_of_its_step(place, tmp_path, whole_runs, after_lines):
    """SIGTERM, in a rollout or not: no finished step is lost, and what follows is an undisturbed run."""
    out = tmp_path / "stopped"
    runs = start(place, out, "rl.py", "none", 2, "--save_every", 100)
    wait_for(runs, lambda: len(lines(out)) >= after_lines)
    runs.signal(signal.SIGTERM)
    said = runs.wait([143, 143], timeout_s=25)
    there = len(lines(out))
    saved = int(run_folders(out)[-1].name.removeprefix("step_")) if run_folders(out) else 0
    assert f"the same command goes on after step {saved}" in said
    assert saved == there or f"{there} finished step" in said  # the weights had moved already
    finish(place, out, "rl.py", "none", 2, "--save_every", 100)
    assert metrics(out) == metrics(whole_runs("rl.py", "none"))


def test_torchrun_passes_the_signal_on(place, tmp_path):
    """Its processes end with 143; its own exit status is 1."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "tests/planted_rl.py"]
    process = subprocess.Popen([*map(str, command + flags(place, tmp_path, "rl.py", "none", "--steps", 1000))],
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.time() + 120
    while len(lines(tmp_path)) < 2 and time.time() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "the same command goes on after step" in said, said[-2000:]


def test_other_settings_are_refused_and_never_moves_aside(place, tmp_path):
    out = tmp_path / "out"
    finish(place, out, "sft.py", "none", 1)
    first = lines(out)
    assert "is finished" in finish(place, out, "sft.py", "none", 1)
    said = start(place, out, "sft.py", "none", 1, "--warmup", 0.5).wait([2])
    assert "--warmup 0.1, not 0.5" in said and lines(out) == first
    finish(place, out, "sft.py", "none", 1, "--resume", "never")
    assert (out / "metrics.1.jsonl").read_text().splitlines() == first and len(lines(out)) == len(first)
    assert (out / "checkpoints.1").is_dir() and run_folders(out)


@pytest.mark.parametrize("script", ["sft.py", "rl.py"])
def test_a_bad_video_on_one_process_is_left_out_by_all(place, tmp_path, script):
    """With shards each pass needs all processes; the one with nothing to do must not keep the others waiting."""
    rows = [json.loads(line) for line in open(place / ("few.jsonl" if script == "sft.py" else "train.jsonl"))][:4]
    for row in rows:
        question = row.get("question") if script == "sft.py" else row
        question["video"] = str(place / question["video"])
    question["video"] = "missing.mp4"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finish(place, tmp_path / "out", script, "all", 2, "--data", tmp_path / "rows.jsonl", "--batch_size", 2, "--max_bad", 0.5)
    skipped = (tmp_path / "out" / "skipped.jsonl").read_text()
    assert "missing.mp4" in skipped and lines(tmp_path / "out")


def test_nothing_is_unpickled_when_a_run_goes_on(place, tmp_path, monkeypatch):
    finish(place, tmp_path / "run", "sft.py", "none", 1)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(run | {"finished": False}))
    script = tmp_path / "guarded.py"
    script.write_text(
        "import pickle, runpy, sys, torch\n"
        f"sys.path[:0] = [{str(ROOT)!r}]; sys.argv[0] = {str(ROOT / 'sft.py')!r}\n"
        "import sft, training.checkpoints as c\n"
        "read = c.SavedRun.read_into\n"
        "def guarded(*args):\n"
        "    def no(*a, **k): raise AssertionError('unpickled')\n"
        "    pickle.load = pickle.loads = pickle.Unpickler = torch.load = no\n"
        "    print('guarded', flush=True)\n"
        "    return read(*args)\n"
        "c.SavedRun.read_into = guarded\n"
        "sft.run_main(sft.main)\n")
    said = subprocess.run([sys.executable, str(script), *map(str, flags(place, tmp_path / "run", "sft.py", "none"))],
                          capture_output=True, text=True, timeout=120)
    assert said.returncode == 0 and "guarded" in said.stdout and "goes on after step" in said.stdout, said.stderr[-2000:]


def test_held_out_questions_and_metrics_of_what_a_step_waits_for(place, tmp_path):
    finish(place, tmp_path / "out", "rl.py", "all", 2, "--val", place / "test.jsonl", "--val_every", 2)
    rows = [json.loads(line) for line in lines(tmp_path / "out")]
    assert [("val_accuracy" in row) for row in rows] == [False, True, False, True, True]
    for row in rows:
        assert row["seconds_idle"] >= 0 and row["gathered_gb"] > 0 and row["seconds_gather"] > 0
    assert [row["seconds_save"] > 0 for row in rows] == [False, False, True, False, True]
