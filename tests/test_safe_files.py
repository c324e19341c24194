"""Saves of a policy and of a run that are killed at any moment, or meet a full disk: what was saved before is
there, whole, or what is saved now. `pytest -m slow --times 10` kills more of them."""

import functools
import json
import os
import random
import resource
import runpy
import shutil
import stat
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from launcher import launch
from tiny import random_policy

from common import UserError
from training.checkpoints import INDEX, load_policy, save_policy
from training.run_checkpoints import SavedRun, Shard, run_folders, save_run

# of the module os: what a save does to a disk
CALLS = ("replace", "rename", "mkdir", "rmdir", "unlink", "fsync")
both_kinds = pytest.mark.parametrize("kind", ["policy", "run"])


# ----------------------------------------------------------------------------------- saves that have a number
@functools.cache
def small_policy():
    """A random policy of one layer; the same one each time."""
    return random_policy(layers=1)


def fill(policy, value):
    with torch.no_grad():
        for p in policy.parameters():
            p.fill_(value)
    return policy


def one_value(folder):
    """The value that all weights of a checkpoint have."""
    values = {v for p in load_policy(folder).parameters() for v in p.unique().tolist()}
    assert len(values) == 1, values
    return values.pop()


def numbered(step):
    """Shards in which every value is the step's number."""
    yield Shard("a", torch.full((50, 1000), float(step)), 0, (50, 1000))
    yield Shard("b", torch.full((3,), float(step)), 0, (3,))
    yield Shard("c", torch.full((300, 100), float(step)).bfloat16(), 0, (300, 100))


def newest_step(out):
    """The number of a run's newest checkpoint. Fails if one of them is not whole."""
    for folder in run_folders(out):
        saved = SavedRun(folder)
        assert folder.name == f"step_{saved.step}" and saved.state == {"step": saved.step}
        assert saved.rank_states == [saved.state]
        for name, rows, start, shape in numbered(saved.step):
            read = torch.zeros_like(rows)
            saved.read_into(name, read, start, shape)
            assert torch.equal(read, rows), name
    return saved.step


def save_numbered(out, step, keep=2):
    save_run(out, step, numbered(step), {"step": step}, {"step": step}, keep)


def save(kind, folder, number):
    if kind == "policy":
        save_policy(fill(small_policy(), float(number)), folder)
    else:
        save_numbered(folder, number)


def number_in(kind, folder):
    return one_value(folder) if kind == "policy" else newest_step(folder)


def saves_in(kind, folder):
    """The folder in which a save of `folder` makes its temporary one."""
    return folder if kind == "policy" else folder / "checkpoints"


def left_over(kind, folder):
    """What a killed save has left."""
    left = list(saves_in(kind, folder).glob("saving-*"))
    if kind == "policy":
        left += list(folder.glob("model*.safetensors"))[1:]
    return left


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---------------------------------------------------------------------------------------------- at every step
class Stop(BaseException):
    """Ends a save as a kill does: nothing that comes after it, as cleaning up, is done."""


@contextmanager
def disk_ends(calls, error):
    """A context in which a disk takes so many calls; each one after them raises an error. Yields a list, in
    which there is something once one has."""
    raised = []

    def limited(original):
        def call(*args, **options):
            nonlocal calls
            calls -= 1
            if calls < 0:
                raised.append(error)
                raise error
            return original(*args, **options)
        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, limited(getattr(os, name)))
        yield raised


def end_at_each_call(start, error, save_it, number_in_it):
    """Saves over what is in the folder `start`, in a copy each time, and each time the disk takes one call
    more, until a save ends. Yields (the copy, the number that is saved there then). At first that must be the
    old one, and from one call on the new one."""
    calls, found = 0, []
    while True:
        folder = start.with_name(f"after{calls}")
        shutil.copytree(start, folder, copy_function=os.link)  # no file is ever changed
        with disk_ends(calls, error) as raised:
            try:
                save_it(folder)
            except Stop:
                pass
            except UserError as failed:
                assert (error.strerror or str(error)) in str(failed) and "\n" not in str(failed)
        found.append(number_in_it(folder))
        yield folder, found[-1]
        if not raised:
            break
        calls += 1
    assert calls > 5 and found == sorted(found) and found[0] < found[-1], found


@both_kinds
@pytest.mark.parametrize("error", [
    Stop(),
    pytest.param(OSError(30, "Read-only file system"), marks=pytest.mark.slow),
    pytest.param(OSError("no number"), marks=pytest.mark.slow)], ids=repr)
def test_a_save_that_ends_at_any_step_leaves_a_whole_one(tmp_path, kind, error):
    start = tmp_path / "start"
    for number in (0, 1):
        save(kind, start, number)
    (start / "metrics.jsonl").write_text("mine")
    (start / "other.safetensors").write_text("mine")
    steps = end_at_each_call(start, error, lambda folder: save(kind, folder, 2),
                             lambda folder: number_in(kind, folder))
    for step, (folder, number) in enumerate(steps):
        assert number in (1, 2)
        assert (folder / "metrics.jsonl").read_text() == (folder / "other.safetensors").read_text() == "mine"
        if step % 3 == 0:
            save(kind, folder, 3)
            assert number_in(kind, folder) == 3 and not left_over(kind, folder)


@both_kinds
def test_what_is_saved_is_on_the_disk_before_its_commit_and_that_before_the_old_goes(tmp_path, kind):
    """Else a power cut could leave the new name and half of what it names, or neither."""
    for number in (0, 1):
        save(kind, tmp_path, number)
    old, on_disk, lacking = {*tmp_path.rglob("*")}, set(), []
    commit = tmp_path / INDEX if kind == "policy" else tmp_path / "checkpoints" / "step_2"
    inode = lambda path: os.stat(path).st_ino
    fsync, replace, unlink, kept_until = os.fsync, os.replace, os.unlink, []

    def synced(descriptor):
        on_disk.add(os.fstat(descriptor).st_ino)
        return fsync(descriptor)

    def replaced(source, target):
        if Path(target) == commit:
            # the folder of the names is the policy's own, and the one that gets a name
            new = [tmp_path if kind == "policy" else Path(source)]
            new += [path for path in tmp_path.rglob("*") if path.is_file() and path not in old]
            lacking.append([path for path in new if inode(path) not in on_disk])
        elif lacking:
            kept_until.append(inode(commit.parent) in on_disk)
        result = replace(source, target)
        on_disk.discard(inode(Path(target).parent))  # it holds another name now
        return result

    def unlinked(*args, **options):
        if lacking:
            kept_until.append(inode(commit.parent) in on_disk)
        return unlink(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(os, "replace", replaced)
        patch.setattr(os, "unlink", unlinked)
        save(kind, tmp_path, 2)
    assert lacking == [[]] and kept_until[0]


# ------------------------------------------------------------------------------------------------- full disks
@both_kinds
def test_a_full_disk_is_one_line_and_nothing_has_changed(tmp_path, kind):
    save(kind, tmp_path, 1)
    before, hard = names(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    # bytes a file: config.json, tokenizer.json, weights are larger; or shards
    for limit in (100, 60_000, 500_000) if kind == "policy" else (100, 60_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(UserError, match="cannot save") as raised:
                save(kind, tmp_path, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)
        assert number_in(kind, tmp_path) == 1 and names(tmp_path) == before


@both_kinds
def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path, kind):
    file = saves_in(kind, tmp_path / "out")
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    for path in (tmp_path / "out", file / "sub", Path("/proc/nothing")):
        with pytest.raises(UserError, match="cannot save .+: .{5}") as raised:
            save(kind, path, 1)
        assert "\n" not in str(raised.value)
    assert file.read_text() == "mine"


# -------------------------------------------------------------------------------------------------- leftovers
@both_kinds
def test_leftovers_of_killed_saves_go_and_nothing_else(tmp_path, kind):
    """What cannot be removed stops no save: on NFS a folder stays as long as a process reads in it."""
    save(kind, tmp_path, 1)
    folder, mine = saves_in(kind, tmp_path), tmp_path / "mine"
    for name in ("saving-old.tmp/deep", "other.tmp/deep"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("x")
    mine.mkdir()
    (mine / "file").write_text("mine")
    (folder / "saving-file.tmp").write_text("mine")
    (folder / "saving-link.tmp").symlink_to(mine)
    save(kind, tmp_path, 2)
    assert number_in(kind, tmp_path) == 2
    assert not (folder / "saving-old.tmp").exists() and (folder / "other.tmp/deep/file").exists()
    assert (folder / "saving-file.tmp").exists()
    assert (folder / "saving-link.tmp" / "file").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------ kills
def save_forever(kind, folder):
    """Saves 1, 2, ... over each other, and says so, until it is killed."""
    for number in range(1, 100_000):
        save(kind, Path(folder), number)
        print(number, flush=True)


def kill_saves(root, delays_s, kind):
    """Kills saves of a policy or a run so many seconds after the first one has ended, in a folder of its own
    each time. Yields (folder, number of the last save that was reported)."""
    for number, delay_s in enumerate(delays_s):
        folder, deadline = Path(root) / f"killed{number}", time.time() + 120
        process = launch(1, "test_safe_files:save_forever", [kind, folder])
        while not reported(process):
            assert process.poll() == [None] and time.time() < deadline
            time.sleep(0.02)
        time.sleep(delay_s)
        process.kill()
        yield folder, reported(process)[-1]


def reported(process):
    """The numbers that `save_forever` has said so far."""
    if not process.logs[0].exists():
        return []
    *lines, _ = process.said().split("\n")
    return [int(line) for line in lines if line.isdigit()]


@pytest.mark.slow
@both_kinds
def test_a_killed_save_leaves_a_whole_one(tmp_path, kind, times):
    rng = random.Random()
    for folder, reported in kill_saves(tmp_path, [rng.uniform(0.05, 1) for _ in range(2 * times)], kind):
        assert number_in(kind, folder) in (reported, reported + 1)
        save(kind, folder, reported + 2)
        assert number_in(kind, folder) == reported + 2 and not left_over(kind, folder)


# ------------------------------------------------------------------------------------------------------ modes
ROOT = Path(__file__).resolve().parent.parent
UMASKS = ["022", "002", "077"]


def under_umask(umask, script, *flags):
    """A script of the project, as someone with this umask starts it."""
    os.umask(int(umask, 8))
    sys.argv = [script, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def wrong_modes(folder, umask):
    """{path: mode} of the files and folders below one whose mode is not what the umask gives."""
    wrong = {}
    for path in folder.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != (0o777 if path.is_dir() else 0o666) & ~int(umask, 8):
            wrong[str(path.relative_to(folder))] = oct(mode)
    return wrong


@both_kinds
@pytest.mark.parametrize("umask", UMASKS)
def test_what_is_saved_has_the_mode_that_the_umask_gives(tmp_path, kind, umask):
    before = os.umask(int(umask, 8))
    try:
        save(kind, tmp_path, 1)
        save(kind, tmp_path, 2)
    finally:
        os.umask(before)
    assert not wrong_modes(tmp_path, umask)


@pytest.mark.slow
@pytest.mark.parametrize("umask", ["002"])  # all three: of what is saved, above
def test_all_that_the_scripts_write_has_the_mode_that_the_umask_gives(tmp_path, umask):
    """Data, policies, adapters, checkpoints of runs, metrics, tables, what is converted."""
    def run(script, *flags):
        launch(1, "test_safe_files:under_umask", [umask, script, *flags]).wait()

    run("data_prep.py", "synthetic", "--out", tmp_path / "data", "--train", 3, "--test", 3)
    common = ["--device", "cpu", "--save_every", 1, "--lora_rank", 2, "--val", tmp_path / "data" / "test.jsonl"]
    base = ROOT / "demo" / "tiny_base"
    run("sft.py", *common, "--model", base, "--data", tmp_path / "data" / "sft.jsonl", "--out", tmp_path / "sft")
    run("rl.py", *common, "--model", tmp_path / "sft", "--data", tmp_path / "data" / "train.jsonl", "--steps", 1,
        "--batch_size", 1, "--mini_batch_size", 1, "--max_draws", 1, "--group_size", 2, "--out", tmp_path / "rl")
    run("eval.py", "--device", "cpu", "--model", tmp_path / "rl", "--data", tmp_path / "data" / "test.jsonl",
        "--out", tmp_path / "eval")
    run("eval.py", "--device", "cpu", "--model", tmp_path / "rl", "--video", tmp_path / "data" / "videos" / "test_0000.mp4",
        "--question", "What?", "--save_frames", tmp_path / "seen")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.json").write_text(json.dumps([{
        "videoID": "test_0000", "question_id": "1", "question": "What?", "options": ["A. x", "B. y", "C. z", "D. w"],
        "answer": "A", "duration": "short", "task_type": "count"}]))
    run("data_prep.py", "convert", "--dataset", "videomme", "--annotations", tmp_path / "rows", "--videos",
        tmp_path / "data" / "videos", "--out", tmp_path / "converted" / "q.jsonl")
    shutil.rmtree(tmp_path / "rows")
    written = {path.name for path in tmp_path.rglob("*")}
    assert {"adapter_model.safetensors", "metrics.jsonl", "results.json", "q.jsonl", "checkpoint.json", "run.json"} <= written
    assert not wrong_modes(tmp_path, umask)
