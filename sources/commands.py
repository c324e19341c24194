"""The commands of data_prep.py about other people's data and about what is in a file."""

import sys


def add_commands(commands, show, question_error, trajectory_error):
    """Adds convert, overlap and stats to data_prep.py's subparsers; each has its function as `run`.

    show: settings of all its parsers. question_error, trajectory_error: why a row cannot be used."""
    from sources.benchmarks import FORMATS
    from sources.protocols import official

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
