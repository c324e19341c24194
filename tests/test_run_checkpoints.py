"""Checkpoints of a run: any number of processes reads what another number wrote; faults, kills, a full disk."""

import json
import os
import pickle
import random
import resource
import shutil
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from test_checkpoints import kill_saves

import training.run_checkpoints
from common import UserError, run_main, start_processes
from training.run_checkpoints import SavedRun, Shard, run_folders, save_run
from training.weights import rows_of

ROOT = Path(__file__).resolve().parent.parent
BEGIN = f"import os, sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
# For each folder a child that saves checkpoints 1, 2, ... until it is killed.
SAVE_FOREVER = """
import os, sys
sys.path[:0] = sys.argv[1:3]
from test_run_checkpoints import numbered, small_files
from training.run_checkpoints import save_run
small_files(100_000)
for out in sys.argv[3:]:
    if child := os.fork():
        os.waitpid(child, 0)
        print("dead", flush=True)
        continue
    print(os.getpid(), flush=True)
    for step in range(1, 100_000):
        save_run(out, step, numbered(step), {"step": step}, {"step": step}, keep=2)
        print(step, flush=True)
"""


def fork(processes, function, *args):
    """Runs a function in several processes that are joined as torchrun's are, without imports of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, children = free.getsockname()[1], []
    for rank in range(processes):
        if not (child := os.fork()):
            try:
                os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{processes}", "MASTER_ADDR": "127.0.0.1",
                               "MASTER_PORT": f"{port}"}
                run_main(lambda: function(*args))
            finally:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    assert not any([os.waitpid(child, 0)[1] for child in children])


def lines_of(function, *args):
    """What a function of this file says in a process of its own, line by line."""
    run = subprocess.run([sys.executable, "-c", f"{BEGIN}import test_run_checkpoints as t; t.{function}(*sys.argv[1:])",
                          *map(str, args)], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout.splitlines()


def small_files(file_bytes):
    training.run_checkpoints.FILE_BYTES = file_bytes


# ------------------------------------------------------------------------------------ as many rows as each has
def tensors():
    """Rows that 2 and 3 processes cannot share evenly, some of which have none; special values; views."""
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.4e38])
    return {"head.weight": draw(7, 300), "head.weight exp_avg": draw(7, 300).bfloat16(), "one row": draw(1, 5),
            "bias": draw(11), "bias.half": draw(2).bfloat16(), "one": draw(1), "special": special,
            "not contiguous": draw(40, 10).t(), "every second": draw(20, 3)[::2], "cube": draw(4, 2, 3),
            "longer than a file": draw(1000, 9), "row longer than a file": draw(2, 2000)}


def shards_of(part, parts):
    for name, tensor in tensors().items():
        start, stop = rows_of(len(tensor), part, parts)
        yield Shard(name, tensor[start:stop], start, tuple(tensor.shape))


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_reads(folder, part, parts):
    """These rows of all tensors, bit for bit."""
    saved = SavedRun(folder)
    for name, rows, start, shape in shards_of(part, parts):
        read = torch.full(rows.shape, 7.0, dtype=rows.dtype)
        saved.read_into(name, read, start, shape)
        assert torch.equal(bits(read), bits(rows)), name


def write_and_read(out, file_bytes, *others):
    """What other numbers of processes wrote, and of what these write everything."""
    rank, world, _ = start_processes("cpu")
    for other in others:
        assert_reads(other, rank, world)
    state = {"step": 3, "order": [3, 1, 2], "rate": 1e-7, "nothing": None, "of": "é"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.run_checkpoints, "FILE_BYTES", float(file_bytes))
        assert save_run(out, 3, shards_of(rank, world), state, {"rank": rank}, keep=1) > 0
    saved = SavedRun(run_folders(out)[-1])
    assert (saved.step, saved.state) == (3, state)
    assert saved.rank_states == [{"rank": r} for r in range(world)]
    assert_reads(saved.folder, 0, 1)


def write_all(root):
    """By 3 and by 2 processes; two of them also fill a disk."""
    by = lambda n: Path(root) / f"by{n}" / "checkpoints" / "step_3"
    fork(3, write_and_read, f"{root}/by3", 2000, by(1))
    fork(2, write_and_read, f"{root}/by2", 1e9, by(1), by(3))
    fork(2, fill_disk, f"{root}/full")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with what 1, 2 and 3 processes wrote, each of which has read what was there; and where two of
    them filled a disk, and what they said."""
    root = tmp_path_factory.mktemp("written")
    write_and_read(root / "by1", 1e9)
    return root, lines_of("write_all", root)


@pytest.mark.parametrize("writers", [1, 2, 3])
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 13])
def test_any_number_of_processes_reads_what_another_number_wrote(written, writers, parts):
    folder = written[0] / f"by{writers}" / "checkpoints" / "step_3"
    for part in range(parts):
        assert_reads(folder, part, parts)
    files = [file.name.split("-")[0] for file in folder.glob("*.safetensors")]
    assert set(files) == {f"rank{rank}" for rank in range(writers)} and (len(files) > 15) == (writers == 3)


@pytest.mark.parametrize("file_bytes", [360, 2000, 9000])
def test_a_file_holds_at_most_the_limit_or_one_row(tmp_path, monkeypatch, file_bytes):
    monkeypatch.setattr(training.run_checkpoints, "FILE_BYTES", file_bytes)
    save_run(tmp_path, 1, shards_of(0, 1), {}, {}, keep=1)
    files = [*run_folders(tmp_path)[0].glob("*.safetensors")]
    total = sum(tensor.nbytes for tensor in tensors().values())
    sizes = {}
    for file in files:
        with training.run_checkpoints.safe_open(file, "pt") as opened:
            parts = [opened.get_tensor(key) for key in opened.keys()]
        sizes[file] = sum(part.nbytes for part in parts)
        assert sizes[file] <= file_bytes or len(parts) == 1 and len(parts[0]) == 1
    assert sum(sizes.values()) == total and len(files) >= total / max(file_bytes, 8000)
    assert len(files) <= 2 * total / file_bytes + 1


# -------------------------------------------------------------------------------------------------- what is read
@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(training.run_checkpoints, "FILE_BYTES", 2000)
    save_run(tmp_path, 3, shards_of(0, 1), {"step": 3}, {}, keep=1)
    return run_folders(tmp_path)[0]


def test_nothing_is_unpickled(folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")
    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert_reads(folder, 0, 1)
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}


def change_index(folder, change):
    index = json.loads((folder / "checkpoint.json").read_text())
    change(index)
    (folder / "checkpoint.json").write_text(json.dumps(index))


def refusal(folder, read=None):
    """The one line with which a checkpoint is refused; it names the folder and says what to do."""
    with pytest.raises(UserError) as raised:
        read(SavedRun(folder)) if read else assert_reads(folder, 0, 1)
    line = str(raised.value)
    assert "\n" not in line and str(folder) in line and "remove that folder" in line
    return line


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"step": 3}', "[" * 100_000, "\0", "\udcff",
                                  '{"step": 3, "state": {}, "rank_states": [], "tensors": []}',
                                  '{"step": 3, "state": {}, "rank_states": [], "tensors": {"head.weight": 3}}',
                                  '{"step": 3, "state": {}, "rank_states": [], "tensors": {"head.weight": {}}}', None])
def test_a_broken_index_is_one_line(folder, text):
    if text is None:
        (folder / "checkpoint.json").unlink()
    else:
        (folder / "checkpoint.json").write_bytes(text.encode(errors="surrogateescape"))
    refusal(folder)


def test_another_tensor_is_one_line(folder):
    read = lambda name, *shape, dtype=torch.float32: lambda saved: saved.read_into(
        name, torch.empty(shape, dtype=dtype), 0, shape)
    assert "tail.weight" in refusal(folder, read("tail.weight", 7, 300))
    assert "head.weight has shape [7, 300], not [7, 301]" in refusal(folder, read("head.weight", 7, 301))
    assert "[7, 300], not [8, 300]" in refusal(folder, read("head.weight", 8, 300))
    assert "[7, 300], not [2100]" in refusal(folder, read("head.weight", 2100))
    assert "bfloat16" in refusal(folder, read("head.weight", 7, 300, dtype=torch.bfloat16))


@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_a_file_that_is_cut_off_or_missing_is_one_line(folder, keep):
    """To no bytes, within the header, in half, by the last byte; or gone."""
    for file in sorted(folder.glob("*.safetensors"))[::5]:
        content = file.read_bytes()
        file.write_bytes(content[:int(keep * len(content)) if keep == 0.5 else keep])
        assert file.name in refusal(folder)
        file.unlink()
        assert file.name in refusal(folder)
        file.write_bytes(content)
    assert_reads(folder, 0, 1)


def test_rows_that_are_missing_are_one_line(folder):
    whole = (folder / "checkpoint.json").read_text()
    parts = lambda index: index["tensors"]["longer than a file"]["parts"]
    number = len(parts(json.loads(whole)))
    assert number > 10

    def leave_out(index):
        del parts(index)[number // 2]

    def repeat(index):  # as many rows as there should be
        parts(index)[number // 2] = parts(index)[0]

    def shift(index):
        parts(index)[number // 2][2] += 1

    def lengthen(index):
        parts(index)[number // 2][3] += 1

    def none(index):
        parts(index).clear()

    for change in (leave_out, repeat, shift, lengthen, none):
        change_index(folder, change)
        assert "longer than a file" in refusal(folder), change
        (folder / "checkpoint.json").write_text(whole)
    change_index(folder, lambda index: parts(index).reverse())  # their order does not matter
    assert_reads(folder, 0, 1)


def test_rows_of_another_shape_in_a_file_are_one_line(folder):
    """A single row would be taken for all of them."""
    change_index(folder, lambda index: index["tensors"]["cube"].update(
        parts=[[*index["tensors"]["one row"]["parts"][0][:2], 0, 4]], shape=[4, 5]))
    read = lambda saved: saved.read_into("cube", torch.empty(4, 5), 0, (4, 5))
    assert "cube" in refusal(folder, read)


# ------------------------------------------------------------------------------------- saves that cannot finish
def numbered(step):
    """Every value is the step's number."""
    yield Shard("a", torch.full((50, 1000), float(step)), 0, (50, 1000))
    yield Shard("b", torch.full((3,), float(step)), 0, (3,))
    yield Shard("c", torch.full((300, 100), float(step)).bfloat16(), 0, (300, 100))


def newest_step(out):
    """The number of the newest checkpoint. Raises UserError or AssertionError if it is not whole."""
    saved = SavedRun(run_folders(out)[-1])
    step = saved.step
    assert saved.folder.name == f"step_{step}" and saved.state == {"step": step} and saved.rank_states == [saved.state]
    for name, rows, start, shape in numbered(step):
        read = torch.zeros_like(rows)
        saved.read_into(name, read, start, shape)
        assert torch.equal(read, rows), name
    return step


def save_numbered(out, step, keep=2):
    save_run(out, step, numbered(step), {"step": step}, {"step": step}, keep)


def names(out):
    return sorted(path.name for path in (Path(out) / "checkpoints").iterdir())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_stay_by_their_numbers(tmp_path, keep):
    for number, step in enumerate((8, 9, 10, 11, 100), 1):
        save_numbered(tmp_path, step, keep)
        assert [int(path.name[5:]) for path in run_folders(tmp_path)] == [8, 9, 10, 11, 100][:number][-keep:]
        assert newest_step(tmp_path) == step and len(names(tmp_path)) == min(number, keep)


def test_a_killed_save_leaves_a_whole_checkpoint_of_the_run(tmp_path):
    rng = random.Random()
    for out, reported in kill_saves(tmp_path, [rng.uniform(0.05, 1) for _ in range(2)], SAVE_FOREVER):
        assert newest_step(out) in (reported, reported + 1)
        save_numbered(out, reported + 2)
        assert newest_step(out) == reported + 2 and len(names(out)) == 2


class Stop(BaseException):
    """Ends a save between two of its steps, as a kill does: nothing of it is cleaned up."""


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("step", [5, 4])
def test_every_step_of_a_save_leaves_a_whole_checkpoint_of_the_run(tmp_path, monkeypatch, keep, step):
    """Also of a save over one of the same step, which stands already."""
    stops = 0
    while True:
        out, left = tmp_path / f"after{stops}", stops
        for before in (2, 3, 4):
            save_numbered(out, before, keep)

        def counted(original):
            def call(*args, **how):
                nonlocal left
                if left == 0:
                    raise Stop
                left -= 1
                return original(*args, **how)
            return call

        with monkeypatch.context() as patch:
            for place, name in ((os, "replace"), (os, "rmdir"), (os, "mkdir"), (training.run_checkpoints, "save_file"),
                                (training.run_checkpoints, "sync")):
                patch.setattr(place, name, counted(getattr(place, name)))
            try:
                save_numbered(out, step, keep)
                ended = True
            except Stop:
                ended = False
        assert newest_step(out) in (4, step), stops
        for path in run_folders(out):
            assert SavedRun(path).step == int(path.name[5:])
        save_numbered(out, 6, keep)
        assert newest_step(out) == 6 and len(names(out)) == keep
        if ended:
            assert stops > 5
            return
        stops += 1


def fill_disk(out):
    """One of two processes can write no large file: both say so, and the next save works."""
    rank, world, _ = start_processes("cpu")
    shards = lambda step: [Shard("a", torch.full((50_000,), float(step)), 50_000 * rank, (100_000,))]
    save = lambda step: save_run(out, step, shards(step), {"step": step}, {}, keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for before in (0, 1):  # nothing stands yet
        for full in (1, 0):
            if rank == full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
            try:
                save(10)
            except UserError as error:
                print(f"{before} {full} {rank} {error}\n", end="", flush=True)
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert rank or names(out) == ["step_4"] * before  # the first one begins the next save
        if not before:
            save(4)
    save(10)
    assert names(out) == ["step_10", "step_4"]
    for step in (4, 10):
        rows = torch.zeros(100_000)
        SavedRun(Path(out) / "checkpoints" / f"step_{step}").read_into("a", rows, 0, (100_000,))
        assert (rows == step).all()


def test_a_full_disk_in_one_process_is_one_line_in_all_and_the_last_checkpoint_stays(written):
    out, lines = written[0] / "full", written[1]
    assert len(lines) == 8
    for line in lines:
        before, _, _, line = line.split(" ", 3)
        stays = "step_4 stays, from which the run can go on" if before == "1" else "there is no earlier one"
        assert f"cannot save {out / 'checkpoints' / 'step_10'}" in line and "File too large" in line
        assert line.endswith(f"{stays}; make room and start again")


@pytest.mark.parametrize("name", ["mkdir", "replace", "fsync"])
@pytest.mark.parametrize("reason", [(30, "Read-only file system"), ("no number",)])
def test_a_disk_with_an_error_is_one_line_and_the_last_checkpoint_stays(tmp_path, monkeypatch, name, reason):
    """At each of the calls, one after the other."""
    calls = 0
    while True:
        out, left = tmp_path / f"after{calls}", calls
        save_numbered(out, 4)
        original = getattr(os, name)

        def fail(*args, **how):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(*reason)
            return original(*args, **how)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            try:
                save_numbered(out, 5)
                assert calls > 0
                return
            except UserError as error:
                assert reason[-1] in str(error) and "\n" not in str(error)
                stays = newest_step(out)
                assert f"step_{stays} stays" in str(error)
        save_numbered(out, 6)
        assert newest_step(out) == 6 and len(names(out)) == 2
        calls += 1


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(UserError, match=r"cannot save \S+step_5: .{5}") as raised:
        save_numbered(tmp_path, 5)
    assert "\n" not in str(raised.value) and "there is no earlier one" in str(raised.value)
    assert (tmp_path / "checkpoints").read_text() == "mine"


@pytest.mark.parametrize("what", ["a file", "a link"])
def test_what_cannot_be_removed_does_not_stop_a_save(tmp_path, what):
    """As on NFS, where a folder stays as long as a process reads in it."""
    save_numbered(tmp_path, 4)
    other = tmp_path / "checkpoints" / "other.tmp"
    other.write_text("mine") if what == "a file" else other.symlink_to(tmp_path)
    save_numbered(tmp_path, 5)
    assert newest_step(tmp_path) == 5 and os.path.lexists(other)


# -------------------------------------------------------------------------------------------------------- memory
def peak_bytes(function):
    """By how much the resident memory of this process grows at most while it calls the function."""
    def kilobytes(name):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(f"{name}:"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured anew
    before = kilobytes("VmRSS")
    function()
    return 1024 * (kilobytes("VmHWM") - before)


# In a file of 30 MB, blocks of less than 32 MB that malloc keeps are a part of what is measured.
MEMORY = {"contiguous": ((1000, 12_500), 30e6, 0.5), "copied, in many files": ((1000, 1000), 30e6, 3),
          "copied": ((12_500, 1000), 100e6, 1.5), "copied, long rows": ((10_000_000, 2), 60e6, 1.5)}


def measure_saves(out):
    """Of each case, in a process of its own: name, peak without a save, with it, bytes of the largest file."""
    torch.set_num_threads(1)
    for name, (shape, file_bytes, _) in MEMORY.items():
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == 0
            continue
        small_files(file_bytes)
        make = lambda i: torch.full(shape, float(i)) if name == "contiguous" else torch.full(shape, float(i)).t()
        number = 300_000_000 // make(0).nbytes
        shards = [Shard(f"{i}", make(i), 0, tuple(make(0).shape)) for i in range(number)]
        nothing = peak_bytes(lambda: sum(range(1_000_000)))
        save = peak_bytes(lambda: save_run(out, 1, shards, {}, {}, keep=1))
        largest = max(file.stat().st_size for file in run_folders(out)[0].iterdir())
        print(json.dumps([name, nothing, save, largest]), flush=True)
        shutil.rmtree(out)
        os._exit(0)


def test_a_save_needs_little_more_than_its_largest_file(tmp_path):
    """With 300 MB of tensors. Those that are not contiguous are copied first, as those on a GPU are; a row may
    fill two thirds of a file."""
    cases = [json.loads(line) for line in lines_of("measure_saves", tmp_path / "out")]
    assert [name for name, *_ in cases] == list(MEMORY)
    for name, nothing, save, largest in cases:
        _, file_bytes, times = MEMORY[name]
        print(f"{name}: {save / 1e6:.1f} MB, {save / largest:.2f} x the largest file")
        assert nothing < 1e6 and 0.6 * file_bytes < largest < file_bytes + 1e4 and save <= times * largest, name
        assert name == "contiguous" or save > 0.9 * largest, name  # it is seen
