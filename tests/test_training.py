"""Runs that are killed and started again: nothing is lost but the steps since the last save, and what follows is what an
undisturbed run would have done."""

import atexit
import functools
import json
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from launcher import launch
from tiny import random_policy

import rl
import sft
from common import UserError, start_processes
from demo.synthetic import synthetic
from scale.pick import load_weights
from training import run_folder
from training.checkpoints import load_policy, save_policy
from training.environment import run_environment
from training.run import TrainingRun, make_optimizer
from training.run_checkpoints import SavedRun, run_folders

TIMES = {"seconds", "seconds_rollout", "seconds_update", "seconds_data", "seconds_save", "seconds_idle", "seconds_gather"}


@pytest.fixture(scope="session")
def place():
    return shared_place()


@functools.cache
def shared_place():
    """What `make_place` makes, once for all tests."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    make_place(Path(folder.name))
    return Path(folder.name)


@functools.cache
def whole_run(script, shard, processes):
    """The folder of an undisturbed run, once for all tests."""
    out = shared_place() / f"whole-{script}-{shard}-{processes}"
    finish(shared_place(), out, script, shard, processes)
    assert len({m["loss"] for m in metrics(out) if "loss" in m}) > 3
    return out


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
    path = {"rl.py": "bench/planted_rl.py"}.get(script, script)
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


def test_a_killed_run_goes_on_as_if_nothing_had_been(place, tmp_path):
    """One process of sft.py: the metrics are an undisturbed run's to the bit, and so is the checkpoint."""
    same_after_a_kill(place, tmp_path, "sft.py", "none", 1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("script, shard, after_lines", [("sft.py", "all", 4)])
def test_two_killed_processes_go_on_as_if_nothing_had_been(place, tmp_path, script, shard, after_lines):
    same_after_a_kill(place, tmp_path, script, shard, 2, after_lines)
    assert "is finished" in finish(place, tmp_path, script, shard, 2)


def same_after_a_kill(place, out, script, shard, processes, after_lines):
    whole = whole_run(script, shard, processes)
    kill_and_go_on(place, out, script, shard, processes, after_lines, delay_s=random.random() / 2)
    assert metrics(out) == metrics(whole)
    mine, theirs = (load_policy(folder).state_dict() for folder in (out, whole))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_sft_goes_on_with_another_number_of_processes(place, tmp_path):
    """From two, replicated, to three with shards, to one: the same metrics to 1e-5."""
    whole, out = whole_run("sft.py", "none", 1), tmp_path / "changed"
    for processes, shard, after in ((2, "none", 3), (3, "all", 5)):
        runs = start(place, out, "sft.py", shard, processes)
        wait_for(runs, lambda: len(lines(out)) >= after)
        runs.kill()
    finish(place, out, "sft.py", "none", 1)
    changed, whole = metrics(out), metrics(whole)
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
    weights = load_weights(config.model, config, run_environment(config.model, config), device)
    optimizer = make_optimizer(weights, config)
    progress = training.start(weights, optimizer, 5, {"step": 0}, torch.Generator())
    whole = lambda tensor: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
    tensors = {name: [whole(p), *(whole(optimizer.state[p][what]) for what in ("step", "exp_avg", "exp_avg_sq"))]
               for name, p in weights.master_weights.items()}
    rows = [json.loads(line) for line in open(config.data)]
    draws = [row["id"] for row in islice(rl.endless(rows, config.seed), progress["drawn"], progress["drawn"] + 4)]
    if rank == 0:
        torch.save({"tensors": tensors, "progress": progress, "draws": draws}, Path(out) / "state.pt")


@pytest.mark.slow
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
    said = finish(place, run, "rl.py", "none", 1)
    assert "random numbers are drawn from new seeds" in said
    assert [m["step"] for m in metrics(run)] == [1, 2, 3, 4, 5]


# ------------------------------------------------------------------------------------------------ the same run?
@dataclass(frozen=True)
class Settings:
    data: str
    warmup: float = 0.1
    cache_gb: float = 1.0
    resume: str = "auto"


def git(folder, *words):
    subprocess.run(["git", "-C", folder, "-c", "user.name=x", "-c", "user.email=x@x", *words], check=True, capture_output=True)


def test_what_a_run_was_started_with(tmp_path, monkeypatch, capsys):
    """Other settings or inputs are refused; what may differ, and the code, is not; --resume never moves the run aside."""
    out, data, code = tmp_path / "out", tmp_path / "rows.jsonl", tmp_path / "code"
    out.mkdir(), code.mkdir(), data.write_text("1")
    monkeypatch.setattr(run_folder, "__file__", str(code / "file.py"))
    begin = lambda **more: run_folder.begin_run(out, replace(Settings(str(data)), **more), (), {"rows": data}, "metrics.jsonl")
    assert begin() == begin() == "new"  # nothing is written yet
    (out / "metrics.jsonl").write_text("first")
    assert begin() == begin(cache_gb=2.0) == "unfinished"
    with pytest.raises(UserError, match=r"--warmup 0.1, not 0.5.*--resume never"):
        begin(warmup=0.5)
    data.write_text("2")
    with pytest.raises(UserError, match="another rows: its content differs"):
        begin()
    data.write_text("1")
    # without a repository nothing is said of the code, in one the commit and changes are
    assert not capsys.readouterr().err and json.loads((out / "run.json").read_text())["code"] is None
    git(code, "init")
    (code / "file.py").write_text("1")
    git(code, "add", "."), git(code, "commit", "-m", "1")
    assert begin() == "unfinished" and begin(resume="never") == "new" and not capsys.readouterr().err
    assert (out / "metrics.1.jsonl").read_text() == "first" and (out / "run.1.json").exists()
    (out / "metrics.jsonl").write_text("second")
    assert begin() == "unfinished" and not capsys.readouterr().err
    (code / "file.py").write_text("2")
    assert begin() == "unfinished"
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "goes on with" in warning and "with changes" in warning
    git(code, "commit", "-am", "2")
    assert begin() == "unfinished" and capsys.readouterr().err.count("\n") == 1
    # a finished run says so, or is moved aside where its input has changed
    run_folder.finish_run(out)
    assert begin() == "finished" and not capsys.readouterr().err
    with pytest.raises(UserError, match="--warmup"):
        begin(warmup=0.5)
    data.write_text("3")
    assert begin() == "new" and (out / "metrics.2.jsonl").read_text() == "second"
    # what no run has written is taken for none
    for text in ("", "[]", "7", '{"settings": {}}', '{"settings": [], "inputs": {}, "finished": false}'):
        (out / "run.json").write_text(text)
        (out / "metrics.jsonl").write_text(text or "x")
        assert begin() == "new", text


@pytest.mark.slow
def test_a_finished_run_says_so_and_never_makes_it_again(place, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole_run("sft.py", "none", 1), out)
    first = lines(out)
    assert "is finished" in finish(place, out, "sft.py", "none", 1)
    said = start(place, out, "sft.py", "none", 1, "--warmup", 0.5).wait([2])
    assert "--warmup 0.1, not 0.5" in said and lines(out) == first
    finish(place, out, "sft.py", "none", 1, "--resume", "never")
    assert (out / "metrics.1.jsonl").read_text().splitlines() == first and len(lines(out)) == len(first)
    assert (out / "checkpoints.1").is_dir() and run_folders(out)


# --------------------------------------------------------------------------------------------- what else may be
@pytest.mark.slow
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


def guarded_sft(*flags):
    """sft.py, which fails if anything is unpickled while a checkpoint is read."""
    def guarded(function):
        def call(*args):
            def no(*args, **how):
                raise AssertionError("unpickled")
            names = [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]
            before = [getattr(module, name) for module, name in names]
            for module, name in names:
                setattr(module, name, no)
            function(*args)
            for (module, name), value in zip(names, before):
                setattr(module, name, value)
            print(f"guarded {function.__name__}")
        return call

    SavedRun.__init__, SavedRun.read_into = guarded(SavedRun.__init__), guarded(SavedRun.read_into)
    sys.argv = ["sft.py", *flags]
    sft.main()


@pytest.mark.slow
def test_nothing_is_unpickled_when_a_run_goes_on(place, tmp_path):
    shutil.copytree(whole_run("sft.py", "none", 1), tmp_path / "run")
    run_folder.note(tmp_path / "run", finished=False)
    said = launch(1, "test_training:guarded_sft", flags(place, tmp_path / "run", "sft.py", "none")).wait()
    assert "guarded __init__" in said and "guarded read_into" in said and "goes on after step" in said


@pytest.mark.slow
def test_held_out_questions_and_metrics_of_what_a_step_waits_for(place, tmp_path):
    finish(place, tmp_path / "out", "rl.py", "all", 2, "--val", place / "test.jsonl", "--val_every", 2)
    rows = [json.loads(line) for line in lines(tmp_path / "out")]
    assert [("val_accuracy" in row) for row in rows] == [False, True, False, True, True]
    for row in rows:
        assert row["seconds_idle"] >= 0 and row["gathered_gb"] > 0 and row["seconds_gather"] > 0
    assert [row["seconds_save"] > 0 for row in rows] == [False, False, True, False, True]
