"""Checkpoints of a run, from which it goes on: written by all processes, read by any number of them.

out/checkpoints/step_N holds safetensors files, each with rows of some tensors of one process, and
checkpoint.json, which says what stands where. Nothing is ever unpickled. The commit is that the folder gets
its name (training/safe_files.py), so a kill at any moment leaves the last one whole.

torch.distributed.checkpoint can write such files, too, one a tensor, by
HuggingFaceStorageWriter(save_distributed=True) into a folder that is renamed afterwards. A kill is survived
then, but each file is made twice in memory. Where two processes save 8 float32 tensors of 268 MB, half of
the rows each, a process needs 270 MB beside them (and 14 seconds) there, 2 MB (and 7 seconds) here; where
each has all rows, 542 MB there, 5 MB here. A disk that is full for one process is an error of 19 lines there.
"""

import json
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import UserError, first_line, gather, read_text, write_json
from training.safe_files import (commit_folder, make_temporary, reason_of, remove_folder, set_mode, sync,
                                 temporary_of)

FILE_BYTES = 256e6  # of tensors in a file; those that lie elsewhere, as on a GPU, are copied a file at a time


class Shard(NamedTuple):
    """Rows of a tensor that one process writes: rows `start` .. of a tensor of `shape`."""

    name: str
    rows: torch.Tensor
    start: int
    shape: tuple


class Part(NamedTuple):
    """Where `length` rows of a tensor, from row `start` on, stand: under the name `key` in a file."""

    file: str
    key: str
    start: int
    length: int


# ------------------------------------------------------------------------------------------------------- save
def save_run(out, step, shards, state, rank_state, keep, group=None):
    """Writes out/checkpoints/step_N, from which a run can go on with any number of processes. All of them
    call it.

    Args:
        shards: Shards, made one at a time; of all processes together each row once.
        state: a dict for JSON, the first process's. rank_state: the same, of each process.
        keep: how many checkpoints stay, the newest.
        group: the process group in which they meet, see `gather`.
    Returns the seconds it took. A checkpoint of the same step that is there stays as it is, as no folder can
    take the place of another at once. Raises UserError, on all processes, if one of them cannot write."""
    began = time.time()
    rank = dist.get_rank() if dist.is_initialized() else 0
    target = Path(out) / "checkpoints" / f"step_{step}"
    temporary = temporary_of(target)
    try:
        with failing_together(group):
            if rank == 0:
                make_temporary(temporary)
        with failing_together(group):
            written = write_shards(shards, temporary, rank)
        written, rank_states = gather(written, group), gather([rank_state], group)
        with failing_together(group):
            if rank == 0:
                write_index(temporary, written, step=step, state=state, rank_states=rank_states)
                if not target.is_dir():
                    commit_folder(temporary, target)
                for old in run_folders(out)[:-keep]:
                    remove_folder(old)
    except UserError as error:
        there = run_folders(out)
        stays = "there is no earlier one"
        if there:
            stays = f"{there[-1].name} stays, from which the run can go on"
        raise UserError(f"cannot save {target}: {error}; {stays}; make room and start again") from None
    finally:
        if rank == 0:  # another process could be late, and remove the next save's
            shutil.rmtree(temporary, ignore_errors=True)
    return time.time() - began


@contextmanager
def failing_together(group):
    """A context that all processes enter. If one of them cannot write in it, UserError is raised in all."""
    errors = []
    try:
        yield
    except (OSError, SafetensorError) as error:
        errors.append(reason_of(error))
    errors = gather(errors, group)
    if errors:
        raise UserError(errors[0])


def write_shards(shards, folder, rank):
    """Writes the files of this process. Returns [(name, shape, Part)]."""
    written = []
    for number, of_file in enumerate(split_by_files(shards), 1):
        file = folder / f"rank{rank}-{number:05d}.safetensors"
        save_file({f"{key}": shard.rows for key, shard in enumerate(of_file)}, file)
        set_mode(file)
        sync(file)
        written += [(shard.name, list(shard.shape), Part(file.name, f"{key}", shard.start, len(shard.rows)))
                    for key, shard in enumerate(of_file)]
        of_file.clear()  # enumerate holds it while the next one is made
    return written


def split_by_files(shards):
    """Yields lists of shards, on the CPU, each of at most FILE_BYTES or one row. A larger shard is cut into
    several; one without rows is left out."""
    of_file, size = [], 0
    for name, rows, start, shape in shards:
        most = max(1, int(FILE_BYTES // max(1, rows[:1].nbytes)))  # rows in a file
        for first in range(0, len(rows), most):
            part = rows[first:first + most].detach()
            if of_file and size + part.nbytes > FILE_BYTES:
                yield of_file
                of_file, size = [], 0
            of_file.append(Shard(name, part.cpu().contiguous(), start + first, shape))
            size += part.nbytes
    if of_file:
        yield of_file


def write_index(folder, written, **facts):
    """Writes checkpoint.json: the facts, and the shape and the Parts of each tensor."""
    tensors = {}
    for name, shape, part in written:
        tensors.setdefault(name, {"shape": shape, "parts": []})["parts"].append(part)
    write_json(folder / "checkpoint.json", facts | {"tensors": tensors})
    sync(folder / "checkpoint.json")


# ------------------------------------------------------------------------------------------------------- read
def run_folders(out):
    """The checkpoints of a run, the newest last."""
    folders = (Path(out) / "checkpoints").glob("step_*")
    folders = [path for path in folders if re.fullmatch(r"step_\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step_")))


class SavedRun:
    """A checkpoint of a run: `step`, `state` and `rank_states` as they were given, and rows of tensors.
    Raises UserError if it cannot be read."""

    def __init__(self, folder):
        self.folder = Path(folder)
        with self._reading():
            index = json.loads(read_text(self.folder / "checkpoint.json"))
            self.step, self.state, self.rank_states = index["step"], index["state"], index["rank_states"]
            self.tensors = index["tensors"]

    @contextmanager
    def _reading(self):
        try:
            yield
        except Exception as error:  # safetensors has errors of its own
            reason = error if isinstance(error, UserError) else first_line(error)
            raise UserError(f"{self.folder} cannot be read: {reason}; remove that folder, and the run goes "
                            "on from the one before") from None

    def read_into(self, name, rows, start, shape):
        """Fills `rows` with rows `start` .. of a tensor of `shape`. Raises UserError if it is not there, or
        another."""
        with self._reading():
            if name not in self.tensors:
                raise UserError(f"it has no {name}")
            saved = self.tensors[name]
            if saved["shape"] != list(shape):
                raise UserError(f"{name} has shape {saved['shape']}, not {list(shape)}")
            at, stop = start, start + len(rows)  # rows before `at` are there
            for part in sorted((Part(*part) for part in saved["parts"]), key=lambda part: part.start):
                end = min(part.start + part.length, stop)
                if part.start <= at < end:
                    target = rows[at - start:end - start]
                    found = self._read(part, at, end)
                    if (found.shape, found.dtype) != (target.shape, target.dtype):
                        raise UserError(f"rows of {name} in {part.file} are {found.dtype} "
                                        f"{list(found.shape)}, not {target.dtype} {list(target.shape)}")
                    target.copy_(found)
                    at = end
            if at < stop:
                raise UserError(f"row {at} of {name} is missing")

    def _read(self, part, start, stop):
        """Rows `start` to `stop` of the tensor, which are in a Part."""
        try:
            with safe_open(self.folder / part.file, "pt") as file:
                return file.get_slice(part.key)[start - part.start:stop - part.start]
        except Exception as error:
            raise UserError(f"{part.file}: {first_line(error)}") from None
