"""What every script starts with: flags, processes, one-line errors, rows of a file."""

import argparse
import inspect
import json
import os
import re
import sys
import types
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist


class UserError(Exception):
    """Wrong input: shown as one line, exit status 2."""


# --------------------------------------------------------------------------------- what the stages share: processes
def start_processes(device=None):
    """Joins torchrun's process group where there is one. Returns (rank, world size, torch.device).

    Everything distributed here is: each process computes the gradient of its own share of a sum whose denominator is
    counted over all processes, and `sync_gradients` adds the shares up."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {device} is no device; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda") or device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: there is none here; use cpu or cuda")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    elif world > 1:  # torchrun starts each process with one thread; share the cores instead
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def sync_gradients(parameters):
    """Adds the gradients of all processes up, in place. A process without tokens takes part with zeros."""
    if dist.is_initialized():
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(grad.view_as(p))


def sum_over_processes(values, device):
    """A dict of numbers, each summed over all processes; all of them must have the same keys."""
    total = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def gather(items):
    """The lists of all processes, joined."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def clip_and_step(optimizer, parameters, max_norm):
    """One optimizer step on gradients of norm at most `max_norm`. Returns the norm before clipping; a step whose norm
    is not finite is left out."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    if norm == norm and norm != float("inf"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ------------------------------------------------------------------------------- what the stages share: command line
def fail(message):
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def run_main(main):
    """Runs a script's main; wrong input ends it with one line and exit status 2."""
    try:
        main()
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


def parse_flags(config_class, description, demo, at_least_one, argv=None):
    """A config from the command line. Each field of the dataclass is a flag, with its comment as help; where --model is
    not given, the values in `demo` (the tiny model's) take the place of the defaults (the paper's). No number
    may be negative or nan, and those in `at_least_one` not below 1."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config_class), re.MULTILINE))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (see --help)")
    for f in fields(config_class):
        default = f"default {f.default}" + (f"; without --model {demo[f.name]}" if f.name in demo else "")
        text = f"{comments[f.name]} ({default})".replace("%", "%%")
        kind = f.type.__args__[0] if isinstance(f.type, types.UnionType) else f.type  # int | None: int
        if kind is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        elif getattr(kind, "__origin__", None) is list:
            parser.add_argument(f"--{f.name}", nargs="+", type=kind.__args__[0], default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(f"--{f.name}", type=kind, metavar=kind.__name__, default=argparse.SUPPRESS, help=text)
    given = vars(parser.parse_args(argv))
    config = config_class(**(demo if given.get("model") is None else {}) | given)
    for f in fields(config_class):
        value, least = getattr(config, f.name), int(f.name in at_least_one)
        if isinstance(value, int | float) and not value >= least:  # nan, too
            fail(f"--{f.name} must be at least {least}, not {value}")
    return config


def read_rows(path, max_bad, check):
    """Rows of a .jsonl file, and [(line number or id, reason)] of those that are left out: not JSON, or `check(row)`
    names a reason. Raises UserError if the file cannot be read or more than the share `max_bad` is bad."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    rows, bad = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            reason = check(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            bad.append((f"line {number}", reason))
        else:
            rows.append(row)
    check_bad(bad, len(rows) + len(bad), max_bad, path)
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows, bad


def check_bad(bad, total, max_bad, path):
    """Raises UserError, naming the first ones, when more than the share `max_bad` of `total` rows is bad."""
    if len(bad) > max_bad * total:
        first = "; ".join(f"{where}: {reason}" for where, reason in bad[:3])
        raise UserError(f"{path}: {len(bad)} of {total} rows cannot be used ({first}); fix them or raise --max_bad")


def write_jsonl(path, rows):
    """One JSON row a line, renamed into place when it is whole."""
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, path)
