"""What every script starts with: one-line errors, flags, processes and devices, rows of a file.

A script's settings are a dataclass: each field is a flag, with its comment as help. What all scripts have in
common stands in RunConfig, which theirs inherit.
"""

import argparse
import errno
import inspect
import io
import json
import os
import re
import select
import socket
import sys
import time
import types
from contextlib import nullcontext
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from stopping import end_at_signals, wait_for_the_end

TIMEOUT = timedelta(hours=2)  # that a process waits for another one, whose rollout may take longer


# ----------------------------------------------------------------------------------------------------- errors
class UserError(Exception):
    """Wrong input: shown as one line, exit status 2."""


def first_line(error):
    """An exception's kind and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def fail(message):
    """One line, exit status 2. Of several processes one speaks: another than the first only if that goes on.
    torchrun ends the others, and shows the line once more at the end of its own report."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    sys.exit(2)


def warn(message):
    """One line; of several processes the first one's."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


class Shown(io.FileIO):
    """Where standard output or error goes. What cannot be written is dropped: a run of days does not end as
    nobody reads what it prints (head has ended, the terminal was closed), or as the log's disk is full."""

    lost = None  # the first error of standard output, other than that nobody reads it

    def write(self, data):
        try:
            while (written := super().write(data)) is None:  # full, where another program made it not block
                select.select([], [self], [])
            return written
        except OSError as error:
            if error.errno != errno.EPIPE and self.fileno() == 1:
                Shown.lost = Shown.lost or error
            return len(data)


def open_streams():
    """Makes print, tqdm and what else writes to standard output or error raise nothing: what the terminal's
    encoding lacks is shown as an escape. Other streams in their place, as a notebook's, stay."""
    for name, kept in (("stdout", "__stdout__"), ("stderr", "__stderr__")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, kept):
            continue
        if stream is None:  # closed by who started the script
            stream = open(os.devnull, "w")
            setattr(sys, kept, stream)
        file = io.BufferedWriter(Shown(stream.fileno(), "w", closefd=False))
        at_once = stream.line_buffering or stream.write_through
        text = io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=at_once)
        setattr(sys, name, text)


def check_shown():
    """Raises UserError where what was printed could not all be written: for commands that only print."""
    sys.stdout.flush()
    if Shown.lost:
        raise UserError(f"cannot write to standard output: {Shown.lost.strerror}")


def run_main(main, explain=None):
    """Runs a script's main. Wrong input ends it with one line and exit status 2, and so does an exception of
    which `explain` makes a line (else it returns None). Of several processes those that miss one that has
    ended say nothing: torchrun ends them while they wait. The first's bug is shown. Where nobody reads what
    is printed, the script goes on all the same, and its status is what it was. A signal ends it as stopping.py
    says, whatever main meets from then on."""
    open_streams()
    end_at_signals()
    try:
        run_to_the_end(main, explain)
    finally:
        wait_for_the_end()


def run_to_the_end(main, explain):
    try:
        main()
        sys.stdout.flush()
        if Shown.lost:
            warn(f"not all that was printed could be written: {Shown.lost.strerror}")
        if dist.is_initialized():
            dist.barrier()  # who leaves early is missed by the others
    except UserError as error:
        fail(str(error))
    except OSError as error:  # a full disk, a folder that was taken away: reading has its own errors
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        fail(f"cannot write {error.filename or 'a file'}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        line = explain(error) if explain else None
        if line:
            fail(line)
        if dist.is_initialized() and dist.get_world_size() > 1:
            time.sleep(5 if dist.get_rank() == 0 else 10)
        raise
    if dist.is_initialized():  # not by the interpreter's own end, which libraries' threads may abort
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# ------------------------------------------------------------------------------------------------------ flags
@dataclass(frozen=True)
class RunConfig:
    """Settings of every script."""

    protocol: str | None = None  # name or file of what the policy meets (protocols/); else as trained
    system_prompt: str | None = None  # file with another system prompt
    overview: str | None = None  # uniform, nearest_keyframe, auto, a .json of chosen frames; else as trained
    num_frames: list[int] | None = None  # frames of the overview, of several one a question; else as trained
    zoom_fps: float | None = None  # frames a second of all zooms, 0: as a call asks; else as trained
    max_zooms: int | None = None  # zooms in an episode, 0: no tool; else as trained
    max_bad: float = 0.01  # share of unusable rows above which the run ends
    seed: int = 0  # of the order of the data, and of sampling
    device: str | None = None  # cpu, cuda; by default cuda where there is one
    dtype: str | None = None  # of the compute weights: float32 or bfloat16; by default bfloat16 on cuda


def parse_flags(config_class, description, at_least_one, preset=None, argv=None):
    """Settings from the command line.

    Args:
        config_class: a dataclass; its fields, inherited ones last, are flags, with their comments as help.
        at_least_one: fields that must not be below 1. No number may be negative or nan.
        preset: given the settings that were typed, a dict, returns those that replace the defaults of others.
    Ends with one line and status 2 on a wrong flag."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=plain)
    parser.error = lambda message: fail(f"{message} (see --help)")
    add_flags(parser, config_class)
    return config_of(config_class, vars(parser.parse_args(argv)), at_least_one, preset)


def add_flags(parser, config_class):
    """A flag for each field of a dataclass; only those that are given come back (SUPPRESS)."""
    comments = field_comments(config_class)
    for f in sorted(fields(config_class), key=lambda f: f.name not in config_class.__annotations__):
        settings = dict(default=argparse.SUPPRESS)
        settings["help"] = f"{comments[f.name]} (default {f.default})".replace("%", "%%")
        kind = f.type.__args__[0] if isinstance(f.type, types.UnionType) else f.type  # int | None: int
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif getattr(kind, "__origin__", None) is list:
            settings |= {"nargs": "+", "type": kind.__args__[0]}
        else:
            settings |= {"type": kind, "metavar": kind.__name__.removesuffix("_or_auto")}
        parser.add_argument(f"--{f.name}", **settings)


def config_of(config_class, given, at_least_one, preset=None):
    """The config of the flags that were given, see `parse_flags`."""
    config = config_class(**(preset(given) if preset else {}) | given)
    for f in fields(config_class):
        value, least = getattr(config, f.name), int(f.name in at_least_one)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not number >= least:  # nan, too
                fail(f"--{f.name} must be at least {least}, not {number}")
    return config


def float_or_auto(text):
    """Type of a setting that is a number, or "auto": found at the start."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or auto, not {text}") from None


def field_comments(config_class):
    """{field: its comment} of a dataclass and the ones that it inherits from; "" where there is none."""
    comments = dict.fromkeys((f.name for f in fields(config_class)), "")
    for cls in reversed(config_class.__mro__[:-1]):
        comments |= re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE)
    return comments


# -------------------------------------------------------------------------------------------------- processes
def start_processes(device=None):
    """Joins torchrun's process group where there is one. Returns (rank, world size, torch.device). A process
    that waits for another one longer than TIMEOUT ends.

    Everything distributed here is: each process computes the gradient of its own share of a sum whose
    denominator is counted over all processes, and training/weights.py adds the shares up. Raises UserError
    for a device that is not there, and where only some of torchrun's variables are."""
    needed = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    given = [name for name in needed if os.environ.get(name)]
    if ("RANK" in given or os.environ.get("WORLD_SIZE", "1") != "1") and len(given) < len(needed):
        missing = ", ".join(name for name in needed if name not in given)
        raise UserError(f"{given[0]} is set, but not {missing}; start several processes by torchrun")
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if not 0 <= rank < world:
            raise ValueError
    except ValueError:
        raise UserError("RANK must be a number from 0 to below that in WORLD_SIZE; "
                        "start several processes by torchrun") from None
    device, backend = choose_device(device)
    if "RANK" in given and not dist.is_initialized():
        try:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # torchrun listens there before it starts processes; if it is gone, joining would wait
                address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                socket.create_connection(address, timeout=60).close()
            own = {"device_id": device} if backend == "nccl" else {}  # else it guesses by the rank
            dist.init_process_group(backend, timeout=TIMEOUT, **own)
        except (RuntimeError, ValueError, OSError) as error:  # no such address, a port in use
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"cannot join the other processes at {address}: {reason}") from None
    return rank, world, device


class Waited:
    """Seconds that this process waited in `sum_over_processes` for others."""

    seconds = 0.0

    def take_s(self):
        """Those since the last call."""
        taken, self.seconds = self.seconds, 0.0
        return taken


WAITED = Waited()


def sum_over_processes(values, device):
    """A dict of numbers, each summed over all processes; all of them must have the same keys."""
    sums = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=device)
    if dist.is_initialized():
        began = time.monotonic()
        dist.all_reduce(sums)
        sums = sums.cpu()  # waits for it
        WAITED.seconds += time.monotonic() - began
    return dict(zip(values, sums.tolist()))


def gather(items, group=None):
    """The lists of all processes, joined. group: a process group of all of them, by default the first one."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items, group=group)
    return [item for part in lists for item in part]


# ---------------------------------------------------------------------------------------------------- devices
# All that only CUDA executes, and all places that ask which device it is; but for scale/devices.py.
# The rest is the same everywhere.
def choose_device(name=None):
    """(torch.device, process group's backend). On CUDA each process of a machine takes a GPU of its own."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {name} is no device; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda") or device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: there is none here; use cpu or cuda")
    if device.type == "cpu":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
        if processes > 1:  # torchrun gives each one thread; share the cores instead
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
        return device, "gloo"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
    torch.cuda.set_device(device)
    return device, "nccl"


def gpu_names():
    """The names of the GPUs of this machine; [] without CUDA."""
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def choose_dtype(name, device):
    """The compute weights' dtype. Raises UserError for one that is not offered."""
    if name not in (None, "float32", "bfloat16"):
        raise UserError(f"--dtype must be float32 or bfloat16, not {name}")
    return getattr(torch, name or ("bfloat16" if has_graphs(device) else "float32"))


def has_graphs(device):
    """Whether many an operation takes less time than its launch, and steps can be captured as graphs."""
    return device.type == "cuda"


def on_own_stream(device):
    """A context in which copies do not wait for what other threads gave the device."""
    if device.type == "cuda":
        return torch.cuda.stream(torch.cuda.Stream(device))
    return nullcontext()


def capture_graph(step, generator, pool):
    """A function without arguments as a CUDA graph: (replay, what `step` returned, the graphs' memory pool).

    Whatever `step` reads and writes must stay where it is. It runs once before, as libraries set themselves
    up in their first calls, and for each stream: on the one that captures; the random generator is set back
    after that."""
    given, generator = generator, generator or torch.cuda.default_generators[torch.cuda.current_device()]
    state, stream = generator.get_state(), capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    generator.set_state(state)
    graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
    if given is not None:  # the default one is registered anyway
        graph.register_generator_state(generator)
    # one pool for all graphs: they never run at the same time
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        result = step()
    return graph.replay, result, pool


@cache
def capture_stream(device):
    """The one stream on which graphs of a device are captured."""
    return torch.cuda.Stream(device)


# ------------------------------------------------------------------------------------------------------- rows
def read_text(path):
    """A file's text: UTF-8 whatever the locale, without a byte order mark. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or 'it is not UTF-8'}") from None
    if "\0" in text:
        raise UserError(f"cannot read {path}: it is not UTF-8, but UTF-16 or no text")
    return text


def read_rows(path, max_bad, check):
    """Rows of a .jsonl file, and [(line number or id, reason)] of those left out: not JSON, or `check(row)`
    names a reason. Raises UserError if the file cannot be read, or more than the share `max_bad` is bad."""
    rows, bad = [], []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not at other line ends: texts hold them
        line = line.strip().removeprefix("\ufeff")  # of files that were joined
        if not line:
            continue
        try:
            row = json.loads(line, strict=False)  # with a form feed in a text, too
            reason = check(row)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            bad.append((f"line {number}", reason))
        else:
            rows.append(row)
    check_bad(bad, len(rows) + len(bad), max_bad if rows else 0, path)
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows, bad


def check_bad(bad, total, max_bad, path):
    """Raises UserError, naming the first ones, when more than the share `max_bad` of `total` rows is bad."""
    if len(bad) > max_bad * total:
        first = "; ".join(f"{where}: {reason}" for where, reason in bad[:3])
        raise UserError(f"{path}: {len(bad)} of {total} rows cannot be used ({first}); "
                        "fix them or raise --max_bad")


def write_jsonl(path, rows):
    """One JSON row a line, renamed into place when it is whole."""
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def open_folder(path):
    """Makes a folder and tries to write into it. Returns its Path. Raises UserError."""
    path = Path(path)
    trial = path / f".trial{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        try:
            trial.write_bytes(bytes(4096))
        finally:
            trial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write into {path}: {getattr(error, 'strerror', None) or error}") from None
    return path


def write_json(path, value):
    """Renamed into place when it is whole."""
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(temporary, path)
