"""Questions and trajectories: synthetic videos with a scripted teacher, and the tiny base model that learns from them.

    python data_prep.py synthetic --out runs/data --train 1200 --test 300 --seed 0
    python data_prep.py tiny_base --out tiny_base

synthetic writes into --out: videos/*.mp4 (H.264), train.jsonl and test.jsonl (questions), sft.jsonl (trajectories).
A video is a row of scenes, each of one background colour. In each of them a coloured shape flashes for about a second,
once or up to four times. The overview shows where each scene is, and almost never a flash, so a question about a flash
needs a zoom:

    detail     which colour or shape flashes in the blue scene?            one zoom
    count      how many shapes flash in the blue scene?                    one zoom, close enough
    order      which colours flash in the blue and in the red scene?       two zooms
    holistic   which scene comes first, last, or right after another?      none

A question's meta says how well N uniform frames could do: `uniform_accuracy[N]` is 1 where they show all the evidence,
and a guess among the options that what they show leaves open elsewhere, averaged over the phase of the sampling.

The scripted teacher plays through the environment like any policy, and a trajectory is kept only if the environment
grades it right and well formed. It knows where to look, but not how closely: see `Teacher`.

tiny_base makes the model that the demo starts from, as the paper starts from a pretrained one: a Qwen2.5-VL of 1.1 M
parameters with a tokenizer of its own, pretrained on descriptions and look-ups over synthetic frames. It can name
colours and shapes, find a scene's time tags and pick an option's letter, and has never seen the zoom tool.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from answers import LETTERS, normalise, option_texts
from common import UserError, check_bad, fail, read_rows, read_text, run_main


# ------------------------------------------------------------------------------------------------ questions, trajectories
def question_error(question):
    """Why a question row cannot be used, or None: one line. What passes can be shown, graded and written."""
    if not isinstance(question, dict):
        return "not a JSON object"
    if reason := unwritable(question):
        return reason
    for key in ("id", "video", "question", "answer", "answer_type"):
        if question.get(key) in (None, ""):
            return f'no "{key}"'
        if key != "answer" and not (isinstance(question[key], str) and question[key].strip()):
            return f'"{key}" is not a text'
    is_number = lambda x: type(x) in (int, float) and abs(x) < 1e300  # no nan, no integer beyond floats
    is_segment = lambda x: isinstance(x, list) and len(x) == 2 and all(map(is_number, x)) and 0 <= x[0] < x[1]
    kind, answer = question["answer_type"], question["answer"]
    options, evidence, chosen, meta = map(question.get, ("options", "evidence", "overview_frames", "meta"))
    if "\0" in question["video"]:
        return "video is not a path"
    options = [] if options is None else options
    if not isinstance(options, list) or not all(isinstance(o, str) and o.strip() for o in options):
        return "options are not a list of texts"
    if len({o.strip() for o in option_texts(options)}) < len(options):
        return "two options are the same"
    if not 2 * (kind == "multiple_choice") <= len(options) <= len(LETTERS):
        return f"multiple_choice needs 2 to {len(LETTERS)} options"
    try:
        fits = {
            "multiple_choice": lambda: answer.strip().upper() in list(LETTERS[:len(options)]),
            "number": lambda: is_number(float(answer) if isinstance(answer, str) else answer),
            "segment": lambda: is_segment(answer),
            "open_ended": lambda: (isinstance(answer, str) or is_number(answer)) and normalise(answer),
        }[kind]()
    except KeyError:
        return f"unknown answer_type {kind[:60]!r}"
    except (ValueError, AttributeError):
        fits = False
    if not fits:
        return f"answer {str(answer)[:60]!r} cannot be right: its type is {kind}"
    if evidence is not None and not (isinstance(evidence, list) and all(map(is_segment, evidence))):
        return "evidence is not a list of [start_s, end_s]"
    if chosen is not None and not (isinstance(chosen, list) and all(is_number(n) and n >= 0 for n in chosen)):
        return "overview_frames is not a list of frame numbers"
    if not isinstance(meta, dict | None):
        return "meta is not an object"
    if not all(isinstance(name, str | None) for name in (question.get("source"), (meta or {}).get("kind"))):
        return "source or meta's kind is not a text"
    if "uniform_accuracy" in (meta or {}) and not (meta.get("kind") and is_number(meta.get("duration_s"))):
        return "meta has uniform_accuracy, but no kind or duration_s"
    return None


def unwritable(row):
    """Which field of a row cannot be written: half of a cut emoji is no UTF-8, nan is no JSON. Or None."""
    for key, value in row.items():
        try:
            json.dumps({key: value}, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, TypeError, RecursionError) as error:
            return f"{key!r} cannot be written: {error}"
    return None


def trajectory_error(row):
    """Why a trajectory row cannot be used, or None: one line."""
    if not isinstance(row, dict):
        return "not a JSON object"
    if reason := question_error(row.get("question")) or unwritable(row):
        return reason
    turns, learn, provenance = row.get("turns"), row.get("learn"), row.get("provenance")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        return "turns must be texts"
    if not isinstance(learn, list) or not all(isinstance(x, bool) for x in learn) or len(learn) != len(turns):
        return "learn must be true or false for each turn"
    if not isinstance(provenance, dict | None):
        return "provenance is not an object"
    max_zooms = (provenance or {}).get("max_zooms", 0)
    if type(max_zooms) is not int or max_zooms < 0:
        return "provenance's max_zooms is not a number of zooms"
    return None


def read_questions(path, max_bad):
    """The question rows of a .jsonl file and [(line, reason)] of those left out. Raises UserError."""
    return read_rows(path, max_bad, question_error)


def read_trajectories(path, max_bad):
    """The trajectory rows of a .jsonl file and [(line, reason)] of those left out. Raises UserError."""
    return read_rows(path, max_bad, trajectory_error)


def use_overview(env_config, questions, overview, max_bad):
    """Applies --overview: one of EnvConfig's ways, or a JSON file with the frames that another selector chose, a list of
    {"video_name", "question", "frame_idx"} (TSPO's format; a row belongs to the question with the same file name and the
    same first line). Returns the questions that it has frames for and [(id, reason)] of the others."""
    if overview is None:
        return env_config, questions, []
    if not overview.endswith(".json"):
        try:
            env_config = replace(env_config, overview=overview)
        except ValueError as error:
            raise UserError(f"--{error}, or a .json file") from None
        return env_config, questions, []
    first_line = lambda text: text.strip().splitlines()[0].strip()
    try:
        chosen = {(Path(row["video_name"]).name, first_line(row["question"])): [float(n) for n in row["frame_idx"]]
                  for row in json.loads(read_text(overview)) if row.get("frame_idx")}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise UserError(f"cannot read --overview {overview}: {type(error).__name__}: {error}") from None
    known, bad = [], []
    for question in questions:
        frames = chosen.get((Path(question["video"]).name, first_line(question["question"])))
        if frames:
            question["overview_frames"] = frames
            known.append(question)
        else:
            bad.append((question["id"], "no frames chosen for it"))
    check_bad(bad, len(questions), max_bad, overview)
    return env_config, known, bad


def main():
    from demo.synthetic import NUM_TEST, NUM_TRAIN, synthetic
    from demo.tiny_base import BASE_STEPS, TINY_BASE, tiny_base

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (see --help)")
    commands = parser.add_subparsers(dest="command", required=True)
    show = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sub = commands.add_parser("synthetic", help="videos, questions and trajectories of the demo", **show)
    sub.add_argument("--out", default="runs/data", help="folder to write")
    sub.add_argument("--train", type=int, default=NUM_TRAIN, help="number of training questions")
    sub.add_argument("--test", type=int, default=NUM_TEST, help="number of held-out questions")
    sub.add_argument("--seed", type=int, default=0, help="seed of videos, questions and the teacher")
    sub = commands.add_parser("tiny_base", help="pretrain the tiny base model", **show)
    sub.add_argument("--out", default=TINY_BASE, help="checkpoint folder to write")
    sub.add_argument("--steps", type=int, default=BASE_STEPS,
                     help="optimizer steps of the curriculum; three tenths as many follow")
    sub.add_argument("--seed", type=int, default=0, help="seed of weights and lessons")
    sub.add_argument("--init", help="checkpoint folder to begin the last part from")
    args = parser.parse_args()
    if args.command == "synthetic":
        if args.train < 1 or args.test < 1:
            raise UserError("--train and --test must be at least 1")
        synthetic(args.out, args.train, args.test, args.seed)
    else:
        tiny_base(args.out, args.steps, args.seed, args.init)


if __name__ == "__main__":
    run_main(main)
