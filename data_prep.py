"""The commands that make and look at files: the demo's, other people's data, what is in a file.

    python data_prep.py synthetic --out runs/data     videos, questions, trajectories (demo/synthetic.py)
    python data_prep.py tiny_base --out tiny_base     the model that the demo starts from (demo/tiny_base.py)
    python data_prep.py convert --dataset ...         a public benchmark as a question file (sources/benchmarks.py)
    python data_prep.py protocol --official DIR       the released protocol's sentences (sources/official.py)
    python data_prep.py overlap FILE FILE             what two files share (sources/overlap.py)
    python data_prep.py stats FILE                    what a file holds (sources/stats.py)

sources/rows.py says what a row of questions or of trajectories holds.
"""

import argparse
import sys

from common import UserError, fail, open_folder, run_main
from demo.synthetic import NUM_TEST, NUM_TRAIN, synthetic
from demo.tiny_base import BASE_STEPS, TINY_BASE, tiny_base
from sources import official
from sources.benchmarks import FORMATS, convert
from sources.overlap import overlap
from sources.stats import stats


def add_commands(commands, show):
    """Adds the commands; each has its function as `run`. show: settings of all parsers."""
    sub = commands.add_parser("synthetic", help="videos, questions and trajectories of the demo", **show)
    sub.add_argument("--out", default="runs/data", help="folder to write")
    sub.add_argument("--train", type=int, default=NUM_TRAIN, help="number of training questions")
    sub.add_argument("--test", type=int, default=NUM_TEST, help="number of held-out questions")
    sub.add_argument("--seed", type=int, default=0, help="seed of videos, questions and the teacher")
    sub.set_defaults(run=run_demo)
    sub = commands.add_parser("tiny_base", help="pretrain the tiny base model", **show)
    sub.add_argument("--out", default=TINY_BASE, help="checkpoint folder to write")
    sub.add_argument("--steps", type=int, default=BASE_STEPS, help="in the curriculum; 3/10 as many follow")
    sub.add_argument("--seed", type=int, default=0, help="seed of weights and lessons")
    sub.set_defaults(run=run_demo)
    official.add_command(commands, show)
    sub = commands.add_parser("convert", help="a public data set as a question file", **show)
    sub.add_argument("--dataset", required=True, choices=FORMATS, help="which one it is")
    sub.add_argument("--annotations", required=True, nargs="+", help="its .json, .jsonl, .tsv, .csv or "
                     ".parquet files, or folders with them")
    sub.add_argument("--videos", required=True, help="folder with its videos, also in subfolders")
    sub.add_argument("--out", required=True, help=".jsonl file to write; what is left out or lacks something "
                     "is named beside it")
    sub.add_argument("--subtitles", help="folder with subtitles: .srt, .vtt, or LongVideoBench's .json")
    sub.add_argument("--check_videos", action="store_true", help="open each video, and name those that "
                     "cannot be read")
    sub.set_defaults(run=run_convert)
    sub = commands.add_parser("overlap", help="videos and questions that two files share; status 1 if any",
                              **show)
    sub.add_argument("first", help="file of questions or trajectories")
    sub.add_argument("second", help="another one")
    sub.set_defaults(run=run_overlap)
    sub = commands.add_parser("stats", help="what is in a file of questions or trajectories", **show)
    sub.add_argument("file", help="file of questions or trajectories")
    sub.add_argument("--model", help="checkpoint folder, for token lengths")
    sub.set_defaults(run=run_stats)


def run_demo(args):
    for name in ("train", "test", "steps"):
        if getattr(args, name, 1) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    open_folder(args.out)
    if args.command == "synthetic":
        synthetic(args.out, args.train, args.test, args.seed)
    else:
        tiny_base(args.out, args.steps, args.seed)


def run_convert(args):
    convert(args.dataset, args.annotations, args.videos, args.out, args.subtitles, args.check_videos)


def run_overlap(args):
    if any(overlap(args.first, args.second).values()):
        sys.exit(1)


def run_stats(args):
    stats(args.file, args.model)


class Parser(argparse.ArgumentParser):  # errors of the commands are one line, too
    def error(self, message):
        fail(f"{message} (see --help)")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_commands(commands, show)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_main(main)
