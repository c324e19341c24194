"""Runs that can be stopped and go on: their folder, what they were started with, the rows that they wrote.

    own_folder(out)                              before anything is loaded: can it be written to, by this run?
    begin_run(out, config, ...), finish_run(out) run.json: is it the same run, and is it finished?
    Rows(out, "episodes", key, rank)             rows that several processes write, each at once

Several processes must see the same folder. Nothing here loads a model.
"""

import fcntl
import hashlib
import json
import os
import re
import socket
import subprocess
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from common import UserError, gather, open_folder, warn, write_json, write_jsonl
from stopping import ENDING

# Settings of all scripts that may differ when a run goes on. Of files the content counts, see `fingerprint`.
MAY_DIFFER = ("out", "resume", "device", "max_rows", "cache_gb", "compile",
              "data", "system_prompt")
LOCK = ".lock"  # the file in a folder that its owner has locked; it stays
WAIT_S = 30.0  # for an owner to end
PIECES, PIECE_BYTES = 64, 65_536  # of a weight file, which count
BY_PIECES = "pieces "  # how such a fingerprint begins

OWNED = {}  # {folder: the open lock file} of this process
os.register_at_fork(after_in_child=OWNED.clear)  # a child that outlives it does not keep them


# ---------------------------------------------------------------------------------------- one run, one folder
def own_folder(out):
    """Makes the folder `out` where there is none, and makes this process its owner until the run is finished
    or the process ends, however it does. The first process of a run calls this before it reads or changes
    anything there. Raises UserError where the folder cannot be written to, or another process owns it and
    does not end within WAIT_S. Where the file system has no locks there is a warning."""
    folder, until = open_folder(out).resolve(), None
    try:
        file = open(folder / LOCK, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {folder / LOCK}: {error.strerror}") from None
    if folder in OWNED and os.path.sameopenfile(OWNED[folder].fileno(), file.fileno()):
        return file.close()
    while not locked(file):
        file.seek(0)
        alive = f"{out} belongs to a run that is alive ({file.read(200) or 'another process'})"
        if until is None:
            print(f"{alive}: waiting {WAIT_S:.0f} s for its end", flush=True)
            until = time.monotonic() + WAIT_S
        elif time.monotonic() > until:
            raise UserError(f"{alive}; wait for its end, stop it, or give another --out")
        time.sleep(0.2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    OWNED[folder] = file


def disown_folder(out):
    """Another process may own the folder from here on."""
    if file := OWNED.pop(Path(out).resolve(), None):
        file.close()


def locked(file):
    """Locks an open file; False where another process has. The kernel's lock ends with who holds it, and
    reaches other machines over NFS."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warn(f"cannot lock {file.name} ({error.strerror}): start no second run in its folder")
    return True


# --------------------------------------------------------------------------------------- what a run was given
def fingerprint(path):
    """What tells an input from another by its content, wherever it lies: a file's hash; of a checkpoint
    folder that of its settings, and of names, sizes and PIECES evenly spaced pieces of its weight files, the
    first and the last bytes among them; a name that is no path stands for itself. Training changes all of a
    trained tensor: not seen are weights that were changed between the pieces alone. Raises UserError."""
    path = Path(path)
    try:
        if path.is_file():
            return hash_file(path)
        if not path.is_dir():
            return str(path)
        found = []
        for file in sorted(path.iterdir()):
            if re.fullmatch(r".*config\.json|tokenizer\.json", file.name):
                found.append(f"{file.name} {hash_file(file)}\n")
            elif file.suffix in (".safetensors", ".bin"):
                found.append(f"{file.name} {hash_pieces(file)}\n")
        return BY_PIECES + hashlib.sha256("".join(found).encode()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def hash_pieces(path):
    """The size of a file and the hash of some pieces of it; of a small file, of all of it."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as file:
        for number in range(PIECES):
            file.seek(number * max(0, size - PIECE_BYTES) // (PIECES - 1))
            digest.update(file.read(PIECE_BYTES))
    return f"{size} {digest.hexdigest()}"


def hash_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def begin_run(out, config, may_differ, inputs, names, check_new=lambda: None):
    """Owns the folder `out`, finds out whether the run in it goes on, and writes run.json for a new one.

    Args:
        config: a dataclass of settings. Its `resume` is auto, or never: then files of an earlier run are
            moved aside (episodes.1.jsonl, run.1.json, ...). All but MAY_DIFFER and `may_differ` must be the
            same.
        inputs: {what: path or None}, what is read; the content must be the same.
        names: a regular expression of the names of files that a run writes there, besides run.json. It is
            noted there: another script must not take the place of a run whose files are others.
        check_new: called before a new run begins; what it raises leaves everything as it is.
    Returns: new, unfinished or finished. A finished run whose input has changed since, as a checkpoint that
    was trained again, is moved aside, too. Raises UserError for a run with other settings, and names the
    first. Warns where the run began with other code."""
    own_folder(out)
    out, may_differ = Path(out), {*MAY_DIFFER, *may_differ}
    settings = {name: value for name, value in asdict(config).items() if name not in may_differ}
    now = {"settings": settings, "inputs": {what: fingerprint(path) for what, path in inputs.items() if path},
           "code": code_version(), "finished": False, "files": names}
    now, old = json.loads(json.dumps(now)), read_run(out)
    # those of the run that is there: eval.py and the scripts that train write others
    its_names = old.get("files", names) if old else names
    files = [path for path in sorted(out.iterdir()) if re.fullmatch(f"{names}|{its_names}", path.name)]
    something = any(path.stat().st_size for path in files)  # else nothing is lost
    if old and something and config.resume == "auto":
        difference = first_difference(old, now)
        if not difference:
            if old["finished"]:
                return "finished"
            warn_of_other_code(out, old, now["code"])
            return "unfinished"
        if not old["finished"] or old["settings"] != now["settings"]:
            raise UserError(f"{out} holds a run with {difference}; give the same, another --out, "
                            f"or --resume never, which moves it aside")
    check_new()
    if something:
        move_aside([*out.glob("run.json"), *files])  # a kill in between leaves no run
    write_json(out / "run.json", now)
    return "new"


def read_run(out):
    """What run.json holds, or None where there is none that `begin_run` wrote."""
    try:
        run = json.loads((out / "run.json").read_text(encoding="utf-8"))
        whole = isinstance(run["settings"], dict) and isinstance(run["inputs"], dict) and "finished" in run
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return run if whole else None


def warn_of_other_code(out, run, code):
    """Where a run that goes on, what its run.json holds, began with another `code_version`."""
    before = run.get("code")
    if before and code and before != code:
        warn(f"the run in {out} began with commit {before}, and goes on with {code}")


def code_version():
    """The git commit of the repository that this file is in, "with changes" where files of it differ, those
    in docs/ aside (ablations.py writes there); None where git or the repository is missing."""
    def git(*words):
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("diff", "--name-only", "HEAD", "--", ":/", ":(top,exclude)docs")
        return git("rev-parse", "HEAD") + " with changes" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def files_of(config):
    """{what: path or None} of the files that a RunConfig names, see `begin_run`."""
    files = {"system prompt": config.system_prompt}
    for what, name in (("overview", config.overview), ("protocol", config.protocol)):
        files[what] = name if name is not None and name.endswith(".json") else None
    return files


def note(out, **facts):
    """Writes facts into run.json, for when the run goes on. Returns all that it holds."""
    path = Path(out) / "run.json"
    run = json.loads(path.read_text(encoding="utf-8")) | facts
    write_json(path, run)
    return run


def finish_run(out):
    note(out, finished=True)
    disown_folder(out)


def first_difference(old, now):
    """What a run.json has otherwise, in words, or None."""
    for part, words in (("settings", "--{} {}, not {}"), ("inputs", "another {}: its content differs")):
        for key in now[part] | old[part]:
            before, value = old[part].get(key), now[part].get(key)
            if before != value and not (part == "inputs" and by_times(before, value)):
                return words.format(key, json.dumps(before), json.dumps(value))
    return None


def by_times(before, value):
    """Whether a checkpoint's fingerprint in a run.json is one of earlier versions, which counted its files'
    times: it says nothing of the content."""
    return value is not None and value.startswith(BY_PIECES) and re.fullmatch("[0-9a-f]{64}", before or "")


def move_aside(paths):
    """Renames files to name.N.ending, with the first N that is free for all of them."""
    paths, number = list(paths), 0
    targets = paths
    while any(target.exists() for target in targets):
        number += 1
        targets = [path.with_name(f"{path.stem}.{number}{path.suffix}") for path in paths]
    for path, target in zip(paths, targets):
        path.rename(target)


# -------------------------------------------------------------------------------------- rows of all processes
def own_group(timeout):
    """A process group of all processes for `gather`, in which they meet whatever they do in the default one;
    None where there is one process. timeout: after which one that waits for another ends."""
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=timeout)


class Rows:
    """Rows of a run, each written as soon as it is there. The first process appends to name.jsonl, the others
    to name.rank1.jsonl, ..., and all of them must make this object.

    key: row -> what it is sorted by, and known by when the run goes on; None for one that is not kept."""

    def __init__(self, out, name, key, rank):
        self.out, self.name, self.key, self.rank = Path(out), name, key, rank
        self.group = own_group(timedelta(days=30))  # they wait for the slowest one, however long it plays

    def begin(self, config, may_differ, inputs, names, check_new, is_whole):
        """`begin_run` in the first process. Returns (state, keys of the rows that are there) on all.

        is_whole: given those keys, whether a finished run has nothing more to do; else it goes on."""
        found = None
        if self.rank == 0:
            done = set()
            state = begin_run(self.out, config, may_differ, inputs, names, check_new)
            if state == "finished" and not is_whole({self.key(row) for row in self.read()}):
                state = "unfinished"
                warn_of_other_code(self.out, note(self.out, finished=False), code_version())
            if state == "unfinished":
                done = {self.key(row) for row in self.merge()}
            say = {"new": "a new run", "finished": "this run is finished",
                   "unfinished": f"the run goes on, {len(done)} {self.name} are there"}
            print(f"{self.out}: {say[state]}", flush=True)
            found = state, done
            ENDING.save = ENDING.lost = self._stopped
        return gather([found], self.group)[0]

    def write(self, row):
        """Appends a line to this process's file. Raises UserError."""
        path = self.out / (f"{self.name}.rank{self.rank}.jsonl" if self.rank else f"{self.name}.jsonl")
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; what is there stays") from None

    def _stopped(self):
        """What is said when a signal ends the run: each row is saved as soon as it is there."""
        there = {self.key(row) for row in self.read()} - {None}
        return f"stopped; {len(there)} {self.name} are there, the same command goes on"

    def wait(self):
        """Until all processes are here."""
        gather([], self.group)

    def files(self):
        pattern = rf"{re.escape(self.name)}(\.rank\d+)?\.jsonl"
        return [path for path in sorted(self.out.iterdir()) if re.fullmatch(pattern, path.name)]

    def read(self):
        """The rows of all files. What a kill has cut, a last line without its end, is left out."""
        rows = []
        for path in self.files():
            *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
            for line in lines:
                try:
                    rows.append(json.loads(line))
                except ValueError:  # after a power cut
                    continue
        return rows

    def merge(self):
        """Makes one file of all files, sorted, of rows with the same key the first. Returns its rows."""
        rows, files = {}, self.files()
        for row in self.read():
            if (key := self.key(row)) is not None:
                rows.setdefault(key, row)
        rows = [rows[key] for key in sorted(rows)]
        whole = self.out / f"{self.name}.jsonl"
        write_jsonl(whole, rows)
        for path in files:
            if path != whole:
                path.unlink()
        return rows
