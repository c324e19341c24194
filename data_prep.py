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

from common import UserError, check_bad, fail, read_rows, run_main
from zoom_env import LETTERS


# ------------------------------------------------------------------------------------------------ questions, trajectories
def question_error(question):
    """Why a question row cannot be used, or None."""
    if not isinstance(question, dict):
        return "not a JSON object"
    for key in ("id", "video", "question", "answer", "answer_type"):
        if question.get(key) in (None, ""):
            return f'no "{key}"'
    if not isinstance(question["question"], str) or not question["question"].strip():
        return "empty question"
    if not isinstance(question["video"], str):
        return "video is not a path"
    kind, options, answer = question["answer_type"], question.get("options"), question["answer"]
    if kind not in ("multiple_choice", "open_ended", "number", "segment"):
        return f"unknown answer_type {kind!r}"
    if kind == "multiple_choice":
        if not isinstance(options, list) or not 2 <= len(options) <= 26:
            return "multiple_choice needs 2 to 26 options"
        if not all(isinstance(option, str) for option in options):
            return "an option is not a text"
        if str(answer).strip().upper() not in LETTERS[: len(options)]:
            return f"answer {answer!r} is not the letter of an option"
    try:
        if kind == "number":
            float(answer)
        if kind == "segment" and not (len(answer) == 2 and answer[0] < answer[1] - 0.0):
            return f"answer {answer!r} is not [start_s, end_s]"
    except (TypeError, ValueError, IndexError):
        return f"answer {answer!r} is not a {kind}"
    try:
        if not all(start < end - 0.0 for start, end in question.get("evidence") or []):
            return "evidence has an interval that ends before it starts"
    except (TypeError, ValueError):
        return "evidence is not a list of [start_s, end_s]"
    chosen = question.get("overview_frames") or []
    if not isinstance(chosen, list) or not all(type(n) in (int, float) for n in chosen):
        return "overview_frames is not a list of frame numbers"
    if not isinstance(question.get("meta") or {}, dict):
        return "meta is not an object"
    return None


def trajectory_error(row):
    """Why a trajectory row cannot be used, or None."""
    if reason := question_error(row["question"]):
        return reason
    if not row["turns"] or not all(isinstance(turn, str) for turn in row["turns"]):
        return "turns must be texts"
    if len(row["turns"]) != len(row["learn"]):
        return "turns and learn differ in length"
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
                  for row in json.loads(Path(overview).read_text()) if row.get("frame_idx")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
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
