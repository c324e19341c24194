"""When memory runs out: one line that says when, how much was asked for, and which flags lower it."""

import re
import traceback

LOWER = {
    "loading": "--shard all with more processes, --offload optimizer or --lora_rank",
    "rollout": "--cache_gb, --max_rows or --max_response_tokens",
    "update": "--max_tokens_per_pass, --offload, or --shard all with more processes",
    "saving": "--max_rows, --batch_size or the processes of a machine, one of which writes a file of weights"}


def out_of_memory(error):
    """One line for an exception that says that memory ran out; None for any other one."""
    said = str(error)
    by_text = isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", said)
    if not isinstance(error, MemoryError) and not by_text:
        return None
    when = doing(error)
    asked = re.search(r"allocate (\d+ bytes|[\d.]+ [KMGTP]iB)", said)
    where = f", where {asked[1]} more were asked for" if asked else ""
    return f"out of memory at {when}{where}; lower {LOWER[when]}; --plan says what a run needs"


def doing(error):
    """What the run did when an exception came, a key of LOWER, by the functions that it passed through."""
    functions, modules = set(), set()
    for frame, _ in traceback.walk_tb(error.__traceback__):
        functions.add(frame.f_code.co_name)
        modules.add(frame.f_globals.get("__name__"))
    if functions & {"load_weights", "load_policy"}:
        return "loading"
    if functions & {"save", "save_run"}:
        return "saving"
    if modules & {"rollout", "generation"} or "gathered" in functions:  # shards are gathered for rollouts
        return "rollout"
    return "update"
