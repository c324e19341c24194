"""Checkpoints of a run: any number of processes reads what another wrote; faults; a full disk."""

import json
import os
import pickle
import resource
import shutil
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launcher import launch
from safetensors import safe_open
from test_safe_files import newest_step, save_numbered
from tiny import DEVICE

from common import UserError, start_processes
from training import run_checkpoints
from training.run_checkpoints import SavedRun, Shard, run_folders, save_run
from training.weights import rows_of


# ----------------------------------------------------------------------------------- as many rows as each has
def tensors():
    """Rows that 2 and 3 processes cannot share evenly, some of which have none; special values; views."""
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.4e38], device=DEVICE)
    return {"head.weight": draw(7, 300), "head.weight exp_avg": draw(7, 300).bfloat16(),
            "one row": draw(1, 5), "bias": draw(11), "bias.half": draw(2).bfloat16(), "one": draw(1),
            "special": special,
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
        read = torch.full(rows.shape, 7.0, dtype=rows.dtype, device=DEVICE)
        saved.read_into(name, read, start, shape)
        assert torch.equal(bits(read), bits(rows)), name


def write_and_read(root, file_bytes, *others):
    """What other numbers of processes wrote, and of what these write everything."""
    rank, world = 0, 1
    if "RANK" in os.environ:
        rank, world, _ = start_processes("cpu")
    for other in others:
        assert_reads(Path(root) / other / "checkpoints" / "step_3", rank, world)
    out = Path(root) / f"by{world}"
    state = {"step": 3, "order": [3, 1, 2], "rate": 1e-7, "nothing": None, "of": "é"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_checkpoints, "FILE_BYTES", float(file_bytes))
        assert save_run(out, 3, shards_of(rank, world), state, {"rank": rank}, keep=1) > 0
    saved = SavedRun(run_folders(out)[-1])
    assert (saved.step, saved.state) == (3, state)
    assert saved.rank_states == [{"rank": r} for r in range(world)]
    assert_reads(saved.folder, 0, 1)


@pytest.mark.device
@pytest.mark.parametrize("file_bytes", [2000, 1e9])
def test_a_process_reads_what_it_wrote(tmp_path, file_bytes):
    write_and_read(tmp_path, file_bytes)


def test_any_number_of_processes_reads_what_another_number_wrote(tmp_path):
    write_and_read(tmp_path, 1e9)
    launch(3, "test_run_checkpoints:write_and_read", [tmp_path, 2000, "by1"]).wait()
    launch(2, "test_run_checkpoints:write_and_read", [tmp_path, 1e9, "by1", "by3"]).wait()
    for writers in (1, 2, 3):
        folder = tmp_path / f"by{writers}" / "checkpoints" / "step_3"
        for parts in (1, 2, 3, 5, 13):
            for part in range(parts):
                assert_reads(folder, part, parts)
        files = [file.name.split("-")[0] for file in folder.glob("*.safetensors")]
        assert set(files) == {f"rank{rank}" for rank in range(writers)}
        assert (len(files) > 15) == (writers == 3)


def save_beside_a_barrier(out):
    """A thread of each process saves, while the first process waits in the main thread for the second one."""
    rank, world, _ = start_processes("cpu")
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
    saving = threading.Thread(target=save_run, args=(out, 3, shards_of(rank, world), {}, {}, 1, group))
    saving.start()
    if rank == 1:
        saving.join()
    dist.barrier()
    saving.join()
    assert_reads(run_folders(out)[-1], rank, world)


def test_a_save_meets_in_its_own_group_alone(tmp_path):
    launch(2, "test_run_checkpoints:save_beside_a_barrier", [tmp_path]).wait(timeout_s=60)


def test_a_file_holds_at_most_the_limit_or_one_row(tmp_path, monkeypatch):
    total = sum(tensor.nbytes for tensor in tensors().values())
    for file_bytes in (360, 2000, 9000):
        out, size = tmp_path / f"{file_bytes}", 0
        monkeypatch.setattr(run_checkpoints, "FILE_BYTES", file_bytes)
        save_run(out, 1, shards_of(0, 1), {}, {}, keep=1)
        files = [*run_folders(out)[0].glob("*.safetensors")]
        for file in files:
            with safe_open(file, "pt") as opened:
                parts = [opened.get_tensor(key) for key in opened.keys()]
            here = sum(part.nbytes for part in parts)
            assert here <= file_bytes or len(parts) == 1 and len(parts[0]) == 1
            size += here
        assert size == total and total / max(file_bytes, 8000) <= len(files) <= 2 * total / file_bytes + 1


# ----------------------------------------------------------------------------------------------- what is read
@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_checkpoints, "FILE_BYTES", 2000)
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


def test_a_broken_index_is_one_line(folder):
    begin = '{"step": 3, "state": {}, "rank_states": [], "tensors": '
    refusal_of = {}
    for text in ("", "{", "[]", "3", "null", "{}", '{"step": 3}', "[" * 100_000, "\0", "\udcff",
                 begin + "[]}", begin + '{"head.weight": 3}}', begin + '{"head.weight": {}}}',
                 begin + '{"head.weight": {"shape": [7, 300], "parts": [[1]]}}}', None):
        (folder / "checkpoint.json").unlink()
        if text is not None:
            (folder / "checkpoint.json").write_bytes(text.encode(errors="surrogateescape"))
        try:
            refusal_of[text] = refusal(folder)
        except BaseException as error:
            refusal_of[text] = repr(error)
        (folder / "checkpoint.json").touch()
    assert {text: line for text, line in refusal_of.items() if "cannot be read" not in line} == {}


def test_another_tensor_is_one_line(folder):
    read = lambda name, *shape, dtype=torch.float32: lambda saved: saved.read_into(
        name, torch.empty(shape, dtype=dtype), 0, shape)
    assert "tail.weight" in refusal(folder, read("tail.weight", 7, 300))
    assert "head.weight has shape [7, 300], not [7, 301]" in refusal(folder, read("head.weight", 7, 301))
    assert "[7, 300], not [8, 300]" in refusal(folder, read("head.weight", 8, 300))
    assert "[7, 300], not [2100]" in refusal(folder, read("head.weight", 2100))
    assert "bfloat16" in refusal(folder, read("head.weight", 7, 300, dtype=torch.bfloat16))


def test_a_file_that_is_cut_off_or_missing_is_one_line(folder):
    """To no bytes, within the header, in half, by the last byte; or gone."""
    wrong = []
    for file in sorted(folder.glob("*.safetensors"))[::5]:
        content = file.read_bytes()
        for keep in (0, 5, len(content) // 2, len(content) - 1, None):
            file.write_bytes(content[:keep])
            if keep is None:
                file.unlink()
            if file.name not in refusal(folder):
                wrong.append((file.name, keep))
        file.write_bytes(content)
    assert wrong == []
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


# ----------------------------------------------------------------------------------------------- what is kept
def names(out):
    return sorted(path.name for path in (Path(out) / "checkpoints").iterdir())


def test_so_many_stay_by_their_numbers(tmp_path):
    for keep in (1, 2, 3):
        out = tmp_path / f"{keep}"
        for number, step in enumerate((8, 9, 10, 11, 100), 1):
            save_numbered(out, step, keep)
            assert [int(path.name[5:]) for path in run_folders(out)] == [8, 9, 10, 11, 100][:number][-keep:]
            assert newest_step(out) == step and len(names(out)) == min(number, keep)


def test_a_checkpoint_of_the_same_step_stays(tmp_path):
    for step in (3, 4, 4):
        save_numbered(tmp_path, step)
    assert newest_step(tmp_path) == 4 and names(tmp_path) == ["step_3", "step_4"]


# --------------------------------------------------------------------------------- a full disk in one process
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


def test_a_full_disk_in_one_process_is_one_line_in_all_and_the_last_checkpoint_stays(tmp_path):
    out = tmp_path / "full"
    said = launch(2, "test_run_checkpoints:fill_disk", [out]).wait()
    lines = [line for line in said.splitlines() if "cannot save" in line]
    assert len(lines) == 8
    for line in lines:
        before, _, _, line = line.split(" ", 3)
        stays = "step_4 stays, from which the run can go on" if before == "1" else "there is no earlier one"
        assert f"cannot save {out / 'checkpoints' / 'step_10'}" in line and "File too large" in line
        assert line.endswith(f"{stays}; make room and start again")


# ----------------------------------------------------------------------------------------------------- memory
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
    """Prints of each case, in its own process: name, peak without a save, with it, largest file's bytes."""
    torch.set_num_threads(1)
    for name, (shape, file_bytes, _) in MEMORY.items():
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == 0
            continue
        run_checkpoints.FILE_BYTES = file_bytes
        number = 200_000_000 // torch.empty(shape).nbytes
        tensors = [torch.full(shape, float(i)) for i in range(number)]
        if name != "contiguous":
            tensors = [tensor.t() for tensor in tensors]
        shards = [Shard(f"{i}", tensor, 0, tuple(tensor.shape)) for i, tensor in enumerate(tensors)]
        nothing = peak_bytes(lambda: sum(range(1_000_000)))
        save = peak_bytes(lambda: save_run(out, 1, shards, {}, {}, keep=1))
        largest = max(file.stat().st_size for file in run_folders(out)[0].iterdir())
        print(json.dumps([name, nothing, save, largest]), flush=True)
        shutil.rmtree(out)
        os._exit(0)


@pytest.mark.slow
def test_a_save_needs_little_more_than_its_largest_file(tmp_path):
    """With 200 MB of tensors. Those that are not contiguous are copied first, as those on a GPU are; a row
    may fill two thirds of a file."""
    said = launch(1, "test_run_checkpoints:measure_saves", [tmp_path / "out"]).wait()
    cases = [json.loads(line) for line in said.splitlines() if line.startswith("[")]
    assert [name for name, *_ in cases] == list(MEMORY)
    for name, nothing, save, largest in cases:
        _, file_bytes, times = MEMORY[name]
        print(f"{name}: {save / 1e6:.1f} MB, {save / largest:.2f} x the largest file")
        assert nothing < 1e6 and 0.6 * file_bytes < largest < file_bytes + 1e4, name
        assert save <= times * largest, name
        assert name == "contiguous" or save > 0.9 * largest, name  # it is seen
