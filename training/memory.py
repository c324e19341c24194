"""When memory runs out: one line that says when, how much was asked for, and what to lower first."""

import re
import traceback

import torch

LOWER = {
    "loading": "--shard all with more processes, --offload or --lora_rank",
    "rollout": "--cache_gb, --max_rows or --max_response_tokens",
    "update": "--max_tokens_per_pass, then take --offload or more processes with --shard all",
    "saving": "--max_rows or --cache_gb; the host needs room for one file of weights"}


def out_of_memory(error):
    """One line for an exception that says that memory ran out; None for any other one."""
    by_name = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not by_name:
        return None
    when = doing(error)
    asked = re.search(r"allocate (\d+ bytes|[\d.]+ [GMK]iB)", str(error))
    where = f", where {asked[1]} more were asked for" if asked else ""
    return f"out of memory at {when}{where}; lower {LOWER[when]}; --plan says what a run needs"


def doing(error):
    """What the run did when an exception came, by the functions that it passed through."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = {frame.f_code.co_name for frame in frames}
    if "load_weights" in names or "load_policy" in names:
        return "loading"
    if "save" in names or "save_run" in names:
        return "saving"
    if any(frame.f_globals.get("__name__") in ("rollout", "generation") for frame in frames):
        return "rollout"
    return "update"
