"""Faults, more of them than the tests have time for. A process that saves checkpoint after checkpoint, of a policy and
then of a run that is to go on, is killed at random points, and what is in the folder is loaded: every weight of checkpoint
k is k, so one that is a mixture shows. Then random bytes are put into each file that a command reads.

    python tests/bench_faults.py [--kills 20] [--bytes 500] [--seed 0]
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from test_checkpoints import kill_saves, one_value
from test_random_bytes import make_place, one_case
from test_run_checkpoints import SAVE_FOREVER, newest_step


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(".")[0])
    parser.add_argument("--kills", type=int, default=20, help="how often a save is killed")
    parser.add_argument("--bytes", type=int, default=500, help="how many files are spoiled")
    parser.add_argument("--seed", type=int, default=0, help="of the times from the first save to the kill")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    delays_s = [rng.uniform(0.05, 1) for _ in range(args.kills)]
    failed = kills("a policy", delays_s, one_value,
                   lambda folder: len(list(folder.glob("*.tmp/*"))) + len(list(folder.glob("*.safetensors"))) - 1)
    failed += kills("a run", delays_s, newest_step, lambda folder: len(list(folder.glob("checkpoints/*.tmp/*"))),
                    SAVE_FOREVER)
    failed += random_bytes(args.bytes, args.seed)
    sys.exit(1 if failed else 0)


def kills(what, delays_s, value_of, left_over, *program):
    """How many kills leave no whole checkpoint, or one older than the last that was reported."""
    print(f"| kill of a save of {what} | after (s) | last save reported | checkpoint in the folder | files left over "
          "| whole |\n|---|---|---|---|---|---|")
    failed = 0
    with tempfile.TemporaryDirectory() as root:
        for number, (folder, reported) in enumerate(kill_saves(root, delays_s, *program)):
            left = left_over(folder)
            try:
                value = value_of(folder)
            except Exception as error:
                value = f"{type(error).__name__}: {error}".splitlines()[0]
            whole = value in (reported, reported + 1)
            failed += not whole
            print(f"| {number + 1} | {delays_s[number]:.2f} | {reported} | {value} | {left} | "
                  f"{'yes' if whole else 'NO'} |", flush=True)
    print(f"\n{len(delays_s) - failed} of {len(delays_s)} folders held one whole checkpoint\n")
    return failed


def random_bytes(cases, seed):
    """How many of the cases end in anything but a file that is read or one line."""
    ends = Counter()
    with tempfile.TemporaryDirectory() as root:
        place = make_place(Path(root) / "place")
        for case in range(seed, seed + cases):
            try:
                end = one_case(place, Path(root) / "copy", case)
                ends["read" if end.endswith(": read") else "one line"] += 1
            except (Exception, pytest.fail.Exception) as error:
                ends["traceback or hang"] += 1
                print(f"case {case}: {type(error).__name__}: {error}")
    print(f"{cases} files with random bytes: {dict(ends)}")
    return ends["traceback or hang"]


if __name__ == "__main__":
    main()
