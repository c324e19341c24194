"""The commands that make and look at files: the demo's, other people's data, what is in a file.

    python data_prep.py synthetic --out runs/data     videos, questions, trajectories (demo/synthetic.py)
    python data_prep.py tiny_base --out tiny_base     the model that the demo starts from (demo/tiny_base.py)
    python data_prep.py convert --dataset ...         a benchmark as a question file (sources/benchmarks.py)
    python data_prep.py protocol --official DIR       the released protocol's sentences (sources/official.py)
    python data_prep.py overlap FILE FILE             what two files share (sources/overlap.py)
    python data_prep.py stats FILE                    what a file holds (sources/stats.py)
    python data_prep.py successes --model DIR ...     its own successes, to train on (sources/successes.py)
    python data_prep.py exemplars --base_url URL ...  trajectories of a served teacher (sources/teacher.py)
    python data_prep.py reflections --student DIR ... a served teacher's corrections of a student's failures

docs/data.md says what a row of questions or of trajectories holds.
"""

import argparse
import sys

from common import add_flags, check_shown, config_of, fail, open_folder, run_main
from demo.search import SEARCH
from demo.synthetic import DEMO, NUM_TEST, NUM_TRAIN, synthetic
from demo.tiny_base import BASE_STEPS, TINY_BASE, tiny_base
from sources import official
from sources.benchmarks import FORMATS, convert
from sources.overlap import overlap
from sources.stats import stats
from sources.successes import successes
from sources.teacher import ReflectionConfig, TeacherConfig, distil

SUITES = {suite.name: suite for suite in (DEMO, SEARCH)}


def add_commands(commands, show):
    """Adds the commands; each has its function as `run`. show: settings of all parsers."""
    def add(name, run, help):
        parser = commands.add_parser(name, help=help, **show)
        parser.set_defaults(run=run)
        return parser.add_argument

    flag = add("synthetic", run_synthetic, "videos, questions and trajectories of the demo")
    flag("--out", default="runs/data", help="folder to write")
    flag("--suite", choices=SUITES, default="demo", help="kind of videos and questions (demo/search.py)")
    flag("--train", type=at_least_one, default=NUM_TRAIN, help="number of training questions")
    flag("--test", type=at_least_one, default=NUM_TEST, help="number of held-out questions")
    flag("--seed", type=int, default=0, help="seed of videos, questions and the teacher")
    flag = add("tiny_base", run_tiny_base, "pretrain the tiny base model")
    flag("--out", default=TINY_BASE, help="checkpoint folder to write")
    flag("--steps", type=at_least_one, default=BASE_STEPS, help="in the curriculum; 3/10 as many follow")
    flag("--seed", type=int, default=0, help="seed of weights and lessons")
    official.add_command(commands, show)
    flag = add("convert", run_convert, "a public data set as a question file")
    flag("--dataset", required=True, choices=FORMATS, help="which one it is")
    flag("--annotations", required=True, nargs="+", help="its .json, .jsonl, .tsv, .csv or .parquet files, "
         "or folders with them")
    flag("--videos", required=True, help="folder with its videos, also in subfolders")
    flag("--out", required=True, help=".jsonl file to write; what is left out or lacks something is named "
         "beside it")
    flag("--subtitles", help="folder with subtitles: .srt, .vtt, or .json of LongVideoBench or Whisper")
    flag("--check_videos", action="store_true", help="open each video, and name those that cannot be read")
    flag = add("overlap", run_overlap, "videos and questions that two files share; status 1 if any")
    flag("first", help="file of questions or trajectories")
    flag("second", help="another one")
    flag = add("stats", run_stats, "what is in a file of questions or trajectories")
    flag("file", help="file of questions or trajectories")
    flag("--model", help="checkpoint folder, for token lengths")
    flag = add("successes", run_successes, "play questions, and keep what is right and well formed")
    flag("--model", required=True, help="checkpoint folder or hub name that plays")
    flag("--questions", required=True, help="question file")
    flag("--out", required=True, help=".jsonl file of trajectories to write")
    flag("--samples", type=at_least_one, default=4, help="episodes a question")
    flag("--keep", type=at_least_one, default=1, help="trajectories a question, at most")
    flag("--seed", type=int, default=0, help="seed of the sampling")
    flag("--device", help="cpu, cuda; by default cuda where there is one")
    for name, config_class, help in (
            ("exemplars", TeacherConfig, "trajectories of a served teacher"),
            ("reflections", ReflectionConfig, "a served teacher's corrections of a student's failures")):
        parser = commands.add_parser(name, help=help, **show)
        add_flags(parser, config_class)
        parser.set_defaults(run=run_distil, config_class=config_class)


def at_least_one(text):
    """Type of a flag."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def run_synthetic(args):
    synthetic(args.out, args.train, args.test, args.seed, SUITES[args.suite])


def run_tiny_base(args):
    tiny_base(open_folder(args.out), args.steps, args.seed)


def run_convert(args):
    convert(args.dataset, args.annotations, args.videos, args.out, args.subtitles, args.check_videos)


def run_overlap(args):
    if any(overlap(args.first, args.second).values()):
        sys.exit(1)


def run_stats(args):
    stats(args.file, args.model)


def run_successes(args):
    successes(args.model, args.questions, args.out, args.samples, args.keep, args.seed, args.device)


def run_distil(args):
    given = vars(args)
    config_class = given.pop("config_class")
    flags = {name: given[name] for name in given if name not in ("command", "run")}
    distil(config_of(config_class, flags, ("samples", "keep", "rounds", "concurrency", "max_tokens_total")))


class Parser(argparse.ArgumentParser):
    """Its errors, and those of the commands' parsers, are one line."""

    def error(self, message):
        fail(f"{message} (see --help)")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_commands(commands, dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter))
    args = parser.parse_args()
    args.run(args)
    check_shown()


if __name__ == "__main__":
    run_main(main)
