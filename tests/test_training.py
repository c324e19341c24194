"""Runs that are killed and started again: nothing is lost but the steps since the last save, and what follows is what an
undisturbed run would have done."""

import atexit
import errno
import fcntl
import functools
import json
import os
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
from cases import all_hold
from launcher import launch
from safetensors.torch import save_file
from tiny import DEVICE, random_policy

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
    own = {"rl.py": ["--data", place / "train.jsonl", "--steps", 5, "--batch_size", 4, "--mini_batch_size", 2,
                     "--group_size", 3, "--max_turn_tokens", 6, "--max_draws", 2, "--temperature", 4,
                     "--lr", 1e-4, "--no-compile"],
           "sft.py": ["--data", place / "few.jsonl", "--epochs", 2, "--batch_size", 4, "--lr", 1e-3]}
    return [*own[script], "--model", place / "model", "--out", out, "--device", DEVICE.type,
            "--dtype", "float32", "--save_every", 2, "--shard", shard, *more]


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


@pytest.mark.device
def test_a_killed_run_goes_on_as_if_nothing_had_been(place, tmp_path):
    """One process of sft.py: the metrics are an undisturbed run's to the bit, and so is the checkpoint. (On a
    GPU nearly: it adds up in no fixed order.)"""
    same_after_a_kill(place, tmp_path, "sft.py", "none", 1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("script, shard, after_lines", [("sft.py", "all", 4)])
def test_two_killed_processes_go_on_as_if_nothing_had_been(place, tmp_path, script, shard, after_lines, times):
    for number in range(times):
        same_after_a_kill(place, tmp_path / str(number), script, shard, 2, after_lines)
    assert "is finished" in finish(place, tmp_path / "0", script, shard, 2)


def same_after_a_kill(place, out, script, shard, processes, after_lines):
    whole = whole_run(script, shard, processes)
    kill_and_go_on(place, out, script, shard, processes, after_lines, delay_s=random.random() / 2)
    assert_same_metrics(metrics(out), metrics(whole))
    mine, theirs, before = (load_policy(folder).state_dict() for folder in (out, whole, place / "model"))
    for key, tensor in theirs.items():
        # AdamW's first steps are as long for the smallest gradients, which a GPU's order changes most
        most = 0 if DEVICE.type == "cpu" else 0.1 * (tensor - before[key]).norm()
        assert (mine[key] - tensor).norm() <= most, key


def assert_same_metrics(mine, theirs):
    """To the bit; on a GPU, which adds up in no fixed order, nearly."""
    if DEVICE.type == "cpu":
        assert mine == theirs
        return
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs):
        assert a == pytest.approx(b, rel=1e-2, abs=1e-3)


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
    rank, world, device = start_processes(DEVICE.type)
    saved = json.loads((Path(run) / "run.json").read_text())["settings"]
    known = {f: saved[f] for f in saved if f in rl.Config.__dataclass_fields__}
    here = dict(out=run, data=f"{place}/train.jsonl", model=f"{place}/model", shard=shard)
    config = rl.Config(**known | here | dict(device=DEVICE.type))
    training = TrainingRun("rl", config, {"model": config.model, "questions": config.data}, rank, world, device)
    weights = load_weights(config.model, config, run_environment(config.model, config), device)
    optimizer = make_optimizer(weights, config)
    progress = training.start(weights, optimizer, 5, {"step": 0}, torch.Generator())

    def whole(tensor):
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return tensor.detach().clone().cpu()

    tensors = {name: [whole(p), *(whole(optimizer.state[p][what]) for what in ("step", "exp_avg", "exp_avg_sq"))]
               for name, p in weights.master_weights.items()}
    rows = [json.loads(line) for line in open(config.data)]
    draws = [row["id"] for row in islice(rl.endless(rows, config.seed), progress["drawn"], progress["drawn"] + 4)]
    if rank == 0:
        torch.save({"tensors": tensors, "progress": progress, "draws": draws}, Path(out) / "state.pt")


@pytest.mark.device
@pytest.mark.slow
@pytest.mark.parametrize("first, others", [
    ((2, "all"), [(1, "none"), (3, "all"), (2, "none")]), ((1, "all"), [(1, "none")]),
    ((1, "none"), [(1, "all")])])
def test_rl_goes_on_with_another_number_of_processes(place, tmp_path, first, others):
    """Or with shards, or without. Weights, moments, step, place in the data and skipped rows are bit-equal,
    and the next questions the same."""
    run, (processes, shard) = tmp_path / "run", first
    runs = start(place, run, "rl.py", shard, processes)
    wait_for(runs, lambda: run_folders(run))
    runs.kill()
    states = []
    for processes, shard in (first, *others):
        launch(processes, "test_training:state_of_a_run", [place, run, shard, tmp_path]).wait()
        states.append(torch.load(tmp_path / "state.pt"))
    for state in states[1:]:
        assert state["progress"] == states[0]["progress"] and state["draws"] == states[0]["draws"]
        for name, tensors in states[0]["tensors"].items():
            assert len(tensors) == 4 and all(map(torch.equal, tensors, state["tensors"][name])), name
    assert states[0]["progress"]["step"] > 0 and states[0]["progress"]["drawn"] >= 8
    said = finish(place, run, "rl.py", "none", 1)
    assert ("random numbers are drawn from new seeds" in said) == (first[0] > 1)
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
    (code / "docs").mkdir(), (code / "docs/tables.md").write_text("1")
    git(code, "add", "."), git(code, "commit", "-m", "1")
    (code / "docs/tables.md").write_text("2")  # a result, no code
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


def test_a_run_is_not_taken_for_another_scripts(tmp_path):
    """eval.py into the folder of a run that trains would take the place of its run.json, and it could not go on."""
    begin = lambda names, **more: run_folder.begin_run(tmp_path, replace(Settings(""), **more), (), {}, names)
    begin("metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("first")
    for finished in (False, True):
        run_folder.note(tmp_path, finished=finished)
        with pytest.raises(UserError, match="--warmup"):
            begin("episodes.jsonl", warmup=0.5)
        assert begin("metrics.jsonl") == ("finished" if finished else "unfinished")
    assert begin("episodes.jsonl", warmup=0.5, resume="never") == "new"
    assert (tmp_path / "metrics.1.jsonl").read_text() == "first" and (tmp_path / "run.1.json").exists()


def make_checkpoint(folder, seed=0):
    """A folder as others publish it: a file of 9 MB of weights, its index, settings."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    save_file({name: torch.randn(1100, 1000, generator=generator) for name in "ab"}, folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    return folder


def test_a_checkpoint_counts_by_its_content_wherever_it_lies(tmp_path):
    """Copied, with other times and another name; linked, as the hub's cache has it; with what else a download brings.
    Trained again under the same names it is another one, and so it is cut off, or with other settings."""
    base = make_checkpoint(tmp_path / "base")
    weights, index = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
    before = run_folder.fingerprint(base)

    def change(folder, name, how):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(how(content))

    def link(folder):
        for file in list(folder.iterdir()):
            file.rename(tmp_path / f"blob-{file.name}")
            file.symlink_to(tmp_path / f"blob-{file.name}")

    def add(folder):
        (folder / ".cache").mkdir()
        for name in ("README.md", "metrics.jsonl", ".lock"):
            (folder / name).write_text("x")

    def train_again(folder):
        shutil.rmtree(folder)
        make_checkpoint(folder, seed=1)

    def compare(number, same, change_it):
        folder = tmp_path / f"copy{number}"
        shutil.copytree(base, folder, copy_function=shutil.copyfile)
        for file in folder.iterdir():
            os.utime(file, (number, number))
        change_it(folder)
        assert (run_folder.fingerprint(folder) == before) == same

    flip = lambda at: lambda content: content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]
    all_hold(compare, [(number, *case) for number, case in enumerate([
        (True, lambda folder: None), (True, link), (True, add),
        (True, lambda folder: change(folder, index, lambda content: content.replace(b" ", b"\n  "))),
        (False, train_again),
        (False, lambda folder: change(folder, weights, lambda content: content[:-1])),
        (False, lambda folder: change(folder, weights, lambda content: content[:-1] + b"\0")),
        (False, lambda folder: change(folder, weights, flip(100))),
        (False, lambda folder: change(folder, "config.json", lambda content: content + b" ")),
        (False, lambda folder: (folder / weights).rename(folder / "pytorch_model.bin")),
        (False, lambda folder: (folder / weights).unlink())])])


def test_a_run_of_an_earlier_version_whose_checkpoint_counted_by_times_goes_on(tmp_path):
    base, out, rows = make_checkpoint(tmp_path / "base"), tmp_path / "out", tmp_path / "rows.jsonl"
    rows.write_text("1")
    begin = lambda **inputs: run_folder.begin_run(out, Settings(""), (), {"model": base, "rows": rows} | inputs, "metrics.jsonl")
    assert begin() == "new"
    (out / "metrics.jsonl").write_text("first")
    run = json.loads((out / "run.json").read_text())
    run["inputs"]["model"] = "0" * 64
    (out / "run.json").write_text(json.dumps(run))
    assert begin() == "unfinished"
    for name in ("", "Qwen/Qwen2.5-VL-7B-Instruct"):  # what is not of both is compared
        run["inputs"] = {"model": "0" * 64, "rows": "0" * 64}
        if name:
            run["inputs"] = run["inputs"] | {"model": name, "rows": run_folder.fingerprint(rows)}
        (out / "run.json").write_text(json.dumps(run))
        with pytest.raises(UserError, match="its content differs"):
            begin()


# ------------------------------------------------------------------------------------------ one run, one folder
def own(out, seconds, forks):
    """Owns a folder for some time; if `forks`, beside a child that lives longer."""
    run_folder.own_folder(out)
    print("mine", flush=True)
    if forks == "True" and os.fork() == 0:
        time.sleep(8)
        os._exit(0)
    time.sleep(float(seconds))


def owner(out, seconds=100, forks=False):
    runs = launch(1, "test_training:own", [out, seconds, forks])
    wait_for(runs, lambda: "mine" in runs.said())
    return runs


def test_a_folder_belongs_to_one_run_until_it_ends(tmp_path, monkeypatch, capsys):
    """Killed or not, beside a child that it has forked or not; who comes meanwhile waits, then is refused."""
    out, link = tmp_path / "out", tmp_path / "link"
    out.mkdir(), link.symlink_to(out)
    (out / "metrics.jsonl").write_text("first")
    begin = lambda out=out, **more: run_folder.begin_run(out, replace(Settings(""), **more), (), {}, "metrics.jsonl")
    runs = owner(out)
    monkeypatch.setattr(run_folder, "WAIT_S", 0.3)
    for more in ({}, {"resume": "never"}, {"out": link}):
        with pytest.raises(UserError, match=rf"belongs to a run that is alive \(process {runs.pids[0]} on .*--out") as error:
            begin(**more)
        assert "\n" not in str(error.value)
        assert capsys.readouterr().out.count("waiting") == 1
    assert sorted(path.name for path in out.iterdir()) == [".lock", "metrics.jsonl"]  # nothing was changed
    runs.kill()
    assert begin() == begin(resume="never") == "new" and (out / "metrics.1.jsonl").exists() and not capsys.readouterr().out
    # another one can have it once the run is finished, or its process has ended
    monkeypatch.setattr(run_folder, "WAIT_S", 6)
    run_folder.finish_run(out)
    for forks in (False, True):
        runs = owner(out, 1, forks)
        assert begin(resume="never") == "new" and capsys.readouterr().out.count("waiting") == 1
        runs.wait()
        run_folder.disown_folder(out)


def test_where_the_file_system_has_no_locks_there_is_a_warning(tmp_path, monkeypatch, capsys):
    for number in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
        def refuse(*_):
            raise OSError(number, os.strerror(number))
        monkeypatch.setattr(fcntl, "flock", refuse)
        run_folder.own_folder(tmp_path)
        run_folder.disown_folder(tmp_path)
        warning = capsys.readouterr().err
        assert warning.count("\n") == 1 and os.strerror(number) in warning and str(tmp_path) in warning


def impatient_sft(*flags):
    run_folder.WAIT_S = 1
    sys.argv = ["sft.py", *flags]
    sft.run_main(sft.main)


@pytest.mark.slow
def test_a_second_start_of_a_run_is_refused_in_one_line(place, tmp_path):
    long = flags(place, tmp_path, "sft.py", "none", "--epochs", 1000)
    first = launch(1, "sft.py", long)
    wait_for(first, lambda: len(lines(tmp_path)) >= 2)
    for more in ((), ("--resume", "never"), ("--warmup", 0.5)):
        said = launch(1, "test_training:impatient_sft", [*long, *more]).wait([2])
        assert "waiting 1 s" in said and "sft.py: error: " in said and "belongs to a run that is alive" in said
        assert "Traceback" not in said and said.count("error:") == 1
    assert not list(tmp_path.glob("*.1*")) and first.poll() == [None]
    first.kill()
    steps = [m["step"] for m in metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_a_run_whose_torchrun_is_killed_and_that_is_started_again_at_once(place, tmp_path):
    """Its processes end within seconds, in loading, too, and what follows is an undisturbed run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               Path(__file__).parent.parent / "bench" / "planted_rl.py", *flags(place, tmp_path, "rl.py", "none")]
    command = [*map(str, command)]

    def others():
        """The processes with this folder among their flags."""
        found = [path for path in Path("/proc").glob("[0-9]*/cmdline")]
        return [path for path in found if str(tmp_path).encode() in readable(path)]

    def readable(path):
        try:
            return path.read_bytes()
        except OSError:
            return b""

    for early in (True, False):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as torchrun:
            end = time.time() + 120
            while (len(others()) < 3 if early else len(lines(tmp_path)) < 3) and time.time() < end:
                time.sleep(0.02)
            torchrun.kill()
        killed = others()
        assert len(killed) >= 2
        if early:
            while any(map(readable, killed)) and time.time() < end:
                time.sleep(0.1)
            assert not any(map(readable, killed))
    finish(place, tmp_path, "rl.py", "none", 2)
    assert not any(map(readable, killed)) and metrics(tmp_path) == metrics(whole_run("rl.py", "none", 2))


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


@pytest.mark.device
@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 1])
def test_held_out_questions_and_metrics_of_what_a_step_waits_for(place, tmp_path, processes):
    val = ("--val", place / "test.jsonl", "--val_every", 2)
    finish(place, tmp_path / "out", "rl.py", "all", processes, *val)
    rows = [json.loads(line) for line in lines(tmp_path / "out")]
    assert [("val_accuracy" in row) for row in rows] == [False, True, False, True, True]
    for row in rows:
        assert row["seconds_idle"] >= 0 and row["seconds_gather"] > 0
        assert (row["gathered_gb"] > 0) == (processes > 1)  # one has all of the shards
    assert [row["seconds_save"] > 0 for row in rows] == [False, False, True, False, True]
