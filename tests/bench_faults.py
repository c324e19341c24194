"""What a save survives: a process that saves checkpoint after checkpoint is killed at random points, and what is in
the folder is loaded. Every weight of checkpoint k is k, so one that is a mixture shows.

    python tests/bench_faults.py [--kills 20] [--seed 0]
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from test_checkpoints import kill_while_saving


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="how often a save is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the times between start and kill")
    args = parser.parse_args()
    rng, failed = random.Random(args.seed), 0
    print("| kill | after (s) | last save reported | checkpoint in the folder | left over | whole |\n|---|---|---|---|---|---|")
    for number in range(1, args.kills + 1):
        with tempfile.TemporaryDirectory() as folder:
            delay_s = rng.uniform(0.05, 1.5)
            reported = value = None
            try:
                reported, value = kill_while_saving(Path(folder), delay_s)
            except Exception as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            whole = value is not None and value in (reported, reported + 1)
            failed += not whole
            left = len(list(Path(folder).glob("*.tmp"))) + max(0, len(list(Path(folder).glob("*.safetensors"))) - 1)
            print(f"| {number} | {delay_s:.2f} | {reported} | {value} | {left} | {'yes' if whole else 'NO'} |", flush=True)
    print(f"\n{args.kills - failed} of {args.kills} folders held one whole checkpoint")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
