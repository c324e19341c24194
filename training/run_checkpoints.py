"""Checkpoints of a run, from which it goes on: written by all processes, read by any number of them.

out/checkpoints/step_N holds safetensors files, each with rows of some tensors of one process, and
checkpoint.json, which says what stands where. Nothing is ever unpickled. Its commit is that the folder gets
its name, so a kill at any moment leaves the last one whole.
"""

import json
import os
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from common import UserError, first_line, gather, read_text
from training.checkpoints import sync

FILE_BYTES = 256e6  # of tensors in a file: it is made in memory before it is written


class Shard(NamedTuple):
    """Rows of a tensor that one process writes: rows `start` .. of a tensor of `shape`."""

    name: str
    rows: torch.Tensor
    start: int
    shape: tuple


def save_run(out, step, shards, state, rank_state, keep, group=None):
    """Writes out/checkpoints/step_N, from which a run can go on with any number of processes. All of them
    call it. What stands there is safetensors and JSON; nothing is ever unpickled.

    Args:
        shards: Shards, made one at a time; of all processes together each row once.
        state: a dict for JSON, the first process's counts. rank_state: the same, of each process.
        keep: how many checkpoints stay, the newest. group: of the processes, see `gather`.
    Returns the seconds it took. Its commit is that the folder gets its name, so a kill at any moment leaves
    the last one whole; one of the same step stays as it is, as no folder can take the place of another at
    once. Raises UserError, on all processes, if one of them cannot write."""
    began = time.time()
    rank, folder = (dist.get_rank() if dist.is_initialized() else 0), Path(out) / "checkpoints"
    temporary, target = folder / f"step_{step}.tmp", folder / f"step_{step}"
    parts, error = [], None
    try:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir()
    except OSError as failed:
        error = failed.strerror or first_line(failed)
    agree(error, target, group)
    # each process its rows
    try:
        for number, of_file in enumerate(grouped(shards), 1):
            file = temporary / f"rank{rank}-{number:05d}.safetensors"
            save_file({f"{i}": shard.rows for i, shard in enumerate(of_file)}, file)
            sync(file)
            parts += [(shard.name, list(shard.shape), file.name, f"{i}", shard.start, len(shard.rows))
                      for i, shard in enumerate(of_file)]
            of_file.clear()  # enumerate holds it while the next one is made
    except Exception as failed:  # safetensors has errors of its own
        error = getattr(failed, "strerror", None) or first_line(failed)
    agree(error, target, group)
    parts, rank_states = gather(parts, group), gather([rank_state], group)
    # the first one says what stands where, and gives the folder its name
    try:
        if rank == 0:
            tensors = {}
            for name, shape, *part in parts:
                tensors.setdefault(name, {"shape": shape, "parts": []})["parts"].append(part)
            index = {"step": step, "state": state, "rank_states": rank_states, "tensors": tensors}
            (temporary / "checkpoint.json").write_text(json.dumps(index), encoding="utf-8")
            sync(temporary / "checkpoint.json")
            sync(temporary)
            if not target.is_dir():
                os.replace(temporary, target)
            sync(folder)
            for old in run_folders(out)[:-keep]:
                os.replace(old, old.with_suffix(".tmp"))  # half of it never stands under its name
            for left in folder.glob("*.tmp"):
                shutil.rmtree(left, ignore_errors=True)  # the next save tries again
    except OSError as failed:
        error = failed.strerror or first_line(failed)
    agree(error, target, group)
    return time.time() - began


def grouped(shards):
    """Lists of shards, on the CPU, of at most FILE_BYTES or one: a file is made in memory before it is
    written. A larger shard is cut into several. Tensors without rows are left out."""
    group, size = [], 0
    for name, rows, start, shape in shards:
        most = max(1, int(FILE_BYTES // max(1, rows[:1].nbytes)))  # rows in a file
        for first in range(0, len(rows), most):
            part = rows[first:first + most].detach()
            if group and size + part.nbytes > FILE_BYTES:
                yield group
                group, size = [], 0
            part = part.cpu().contiguous()  # a file at a time
            group.append(Shard(name, part, start + first, shape))
            size += part.nbytes
    if group:
        yield group


def agree(error, target, group=None):
    """Raises UserError on all processes if one of them has an error. Only the first one removes what is half
    written: a late one could delete the next save's folder."""
    errors = gather([error] if error else [], group)
    if errors:
        if not dist.is_initialized() or dist.get_rank() == 0:
            shutil.rmtree(target.with_suffix(".tmp"), ignore_errors=True)
        last = run_folders(target.parents[1])
        stays = f"{last[-1].name} stays, from which the run can go on" if last else "there is no earlier one"
        raise UserError(f"cannot save {target}: {errors[0]}; {stays}; make room and start again")


def run_folders(out):
    """The checkpoints of a run, the newest last."""
    number = lambda path: int(path.name.removeprefix("step_"))
    return sorted((path for path in (Path(out) / "checkpoints").glob("step_*")
                   if re.fullmatch(r"step_\d+", path.name)), key=number)


class SavedRun:
    """A checkpoint of a run: `step`, `state` and `rank_states` as they were given, and rows of tensors."""

    def __init__(self, folder):
        self.folder, self.files = Path(folder), {}
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
        """Fills `rows` with rows `start` .. of a tensor. Raises UserError if it is not there, or another."""
        with self._reading():
            if name not in self.tensors:
                raise UserError(f"it has no {name}")
            saved, at = self.tensors[name], start
            if saved["shape"] != list(shape):
                raise UserError(f"{name} has shape {saved['shape']}, not {list(shape)}")
            for file, key, first, length in sorted(saved["parts"], key=lambda part: part[2]):
                low, high = max(first, start), min(first + length, start + len(rows))
                if low == at < high:
                    target = rows[low - start:high - start]
                    part = self._read(file, key, low - first, high - first)
                    if (part.shape, part.dtype) != (target.shape, target.dtype):
                        raise UserError(f"rows of {name} are {part.dtype} {list(part.shape)} in {file}, not "
                                        f"{target.dtype} {list(target.shape)}")
                    target.copy_(part)
                    at = high
            if at < start + len(rows):
                raise UserError(f"row {at} of {name} is missing")

    def _read(self, file, key, start, stop):
        try:
            if file not in self.files:
                self.files[file] = safe_open(self.folder / file, "pt")
            return self.files[file].get_slice(key)[start:stop]
        except Exception as error:
            raise UserError(f"{file}: {first_line(error)}") from None
