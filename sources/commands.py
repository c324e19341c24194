"""The commands of data_prep.py: the demo's files, other people's data, what is in a file."""

import sys

from common import UserError
from scale.runs import open_folder


def add_commands(commands, show, question_error, trajectory_error):
    """Adds them to data_prep.py's subparsers; each has its function as `run`.

    show: settings of all its parsers. question_error, trajectory_error: why a row cannot be used."""
    from demo.synthetic import NUM_TEST, NUM_TRAIN
    from demo.tiny_base import BASE_STEPS, TINY_BASE
    from sources.benchmarks import FORMATS
    from sources.protocols import official

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
    sub.add_argument("--init", help="checkpoint folder to begin the last part from")
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
    sub.set_defaults(run=lambda args: run_convert(args, question_error))
    sub = commands.add_parser("overlap", help="videos and questions that two files share; status 1 if any",
                              **show)
    sub.add_argument("first", help="file of questions or trajectories")
    sub.add_argument("second", help="another one")
    sub.set_defaults(run=lambda args: run_overlap(args, question_error))
    sub = commands.add_parser("stats", help="what is in a file of questions or trajectories", **show)
    sub.add_argument("file", help="file of questions or trajectories")
    sub.add_argument("--model", help="checkpoint folder, for token lengths")
    sub.set_defaults(run=lambda args: run_stats(args, question_error, trajectory_error))


def run_demo(args):
    from demo.synthetic import synthetic
    from demo.tiny_base import tiny_base

    for name in ("train", "test", "steps"):
        if getattr(args, name, 1) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    open_folder(args.out)
    if args.command == "synthetic":
        synthetic(args.out, args.train, args.test, args.seed)
    else:
        tiny_base(args.out, args.steps, args.seed, args.init)


def run_convert(args, question_error):
    from sources.benchmarks import convert

    convert(args.dataset, args.annotations, args.videos, args.out, args.subtitles, args.check_videos,
            question_error=question_error)


def run_overlap(args, question_error):
    from sources.overlap import overlap

    if any(overlap(args.first, args.second, question_error).values()):
        sys.exit(1)


def run_stats(args, question_error, trajectory_error):
    from sources.stats import stats

    stats(args.file, args.model, question_error=question_error, trajectory_error=trajectory_error)
