"""The paper's released data sets, read as they are.

    RL     a JSON list of {"videos": [path], "problem", "solution", "data_source", "extra_info"}, or a yaml with
           datasets: [{json_path, sampling_strategy}], each all, first:N, end:N or random:N, N perhaps N%.
           `problem` has <image> where the frames go, and the options in its text; "solution" may be "A."
    SFT    a JSON list of {"messages": [{"role", "content"}, ...], "images": [path, ...]}: each <image> is the
           next image file. Encoded as stored, since no video is named

Facts: the public repository zsgvivo/VideoZoomer, verl/utils/dataset/multimodal_dataset.py and
scripts/sft.yaml. Paths are relative to the file that is named (the yaml, too), or as given. A row of questions
keeps its `problem` in meta, for the released protocol; ours shows question and options apart.
"""

import json
import math
import random
import re
from pathlib import Path

from PIL import Image

from common import UserError, check_bad, read_text
from model import encode
from protocols.released import resized
from sources.rows import question_error
from sources.shapes import read_answer, split_options
from video import Frame, VideoError
from zoom_env import Message, ZoomEnv

SUFFIXES = (".json", ".yaml", ".yml")  # of files in these formats


# ------------------------------------------------------------------------------------------------ both formats
def read_list(path):
    """The list in a JSON file. Raises UserError."""
    try:
        rows = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} is not a JSON list of rows")
    return rows


def convert(path, rows, max_bad, read, check):
    """What `read(row, number)` makes of the rows, and [(row, reason)] of those left out. Raises UserError."""
    good, bad = [], []
    for number, row in enumerate(rows):
        try:
            made = read(row, number)
            reason = check(made)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            reason = ": ".join(map(str, filter(None, error.args))) if isinstance(error, ValueError) else (
                f"{type(error).__name__}: {error}")
        if reason:
            bad.append((f"row {number}", reason))
        else:
            good.append(made)
    check_bad(bad, len(rows), max_bad, path)
    if not good:
        raise UserError(f"{path} has no rows")
    return good, bad


# --------------------------------------------------------------------------------------------------------- RL
def read_released_questions(path, max_bad):
    """Question rows of an RL set, their videos relative to the file's folder, and [(row, reason)] of those left
    out. Raises UserError."""
    path = Path(path)
    rows = [row for part in sampled(path) for row in part]
    return convert(path, rows, max_bad, lambda row, number: question_of(row, number, path), question_error)


def sampled(path):
    """The rows of each data set of a file, a list of lists: as the strategy says, by the released code's seed."""
    if path.suffix == ".json":
        return [read_list(path)]
    try:
        import yaml
    except ImportError:
        raise UserError(f"{path} needs the package pyyaml: pip install pyyaml") from None
    try:
        parts = yaml.safe_load(read_text(path))["datasets"]
        parts = [(Path(part["json_path"]), str(part.get("sampling_strategy", "all"))) for part in parts]
    except (yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a list of datasets with a json_path ({type(error).__name__})") from None
    rng, found = random.Random(42), []
    for file, strategy in parts:
        rows = read_list(file if file.exists() else path.parent / file)
        kind, _, number = strategy.partition(":")
        if kind not in ("all", "first", "end", "random") or number and not re.fullmatch("[0-9]+%?", number):
            raise UserError(f"{path}: sampling_strategy {strategy} is not all, first:N, end:N or random:N")
        number = number and (math.ceil(int(number[:-1]) * len(rows) / 100) if "%" in number else int(number))
        if number != "" and kind == "random":
            rng.shuffle(rows)
        if number != "" and kind != "all":
            rows = rows[-number:] if kind == "end" else rows[:number]
        found.append(rows)
    return found


def question_of(row, number, path):
    """A question row of one of an RL set. Raises ValueError, LookupError, TypeError, AttributeError."""
    videos, problem, extra = row["videos"], row["problem"], row.get("extra_info") or {}
    if not isinstance(videos, list) or len(videos) != 1:
        raise ValueError("not one video")
    if not Path(videos[0]).is_absolute() and not (path.parent / videos[0]).exists() and Path(videos[0]).exists():
        videos = [str(Path(videos[0]).absolute())]  # as given
    text, options = split_problem(problem.replace("<image>", "").strip())
    kind = extra.get("answer_type") or ("multiple_choice" if options else "open_ended")
    solution = row["solution"]
    if kind == "multiple_choice":
        if not options:
            raise ValueError("no options in its problem")
        solution = read_answer(str(solution), options)
    elif options:
        text, options = problem.replace("<image>", "").strip(), []
    meta = {key: value for key, value in extra.items() if key != "answer_type"}
    kind_name = meta.get("kind") or meta.get("problem_type") or row.get("data_source")
    return {"id": str(extra.get("id", f"{path.stem}_{number}")), "video": videos[0], "question": text,
            "options": options or None, "answer": solution, "answer_type": kind,
            "source": row.get("data_source") or path.stem, "evidence": None,
            "meta": meta | {"problem": problem} | ({"kind": str(kind_name)} if kind_name else {})}


def split_problem(text):
    """(question, options) of a problem, whose options may have lines behind them: these go to the question."""
    lines, after = text.split("\n"), []
    while True:
        try:
            question, options = split_options("\n".join(lines))
            return "\n".join([question, *after]).strip(), options
        except ValueError:  # text behind the options
            after.insert(0, lines.pop())


# -------------------------------------------------------------------------------------------------------- SFT
class AsStored(ZoomEnv):
    """How rows of messages are encoded: Qwen's chat template, each end token of the assistant trained (the line
    break after it, which LLaMA-Factory trains, too, is not)."""

    trains_appended_end = True


def read_released_messages(path, max_bad):
    """Rows {"question": {"id"}, "messages", "images"} of an SFT set, and [(row, reason)] of those left out.
    Raises UserError."""
    path = Path(path)
    make = lambda row, number: {"question": {"id": f"{path.stem}_{number}"}, "messages": row["messages"],
                                "images": row.get("images") or []}
    return convert(path, read_list(path), max_bad, make, messages_error)


def messages_error(row):
    """Why a row of messages cannot be used, or None."""
    messages, images = row["messages"], row["images"]
    if not isinstance(messages, list) or not messages or not all(
            isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        return "messages are not a list of role and content"
    roles = [m.get("role") for m in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        return "after the system message, user and assistant do not take turns"
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        return "images are not a list of paths"
    marks = sum(m["content"].count("<image>") for m in messages)
    said = sum(m["content"].count("<image>") for m in messages if m["role"] == "assistant")
    return "<image> in an assistant's turn" if said else (
        f"{marks} <image>, {len(images)} images" if marks != len(images) else None)


def encode_stored(policy, row, root):
    """The Dialogue of a row of messages: a system message, by default Qwen's, the messages, and the images in
    their places, which are at most max_pixels large. Raises VideoError."""
    c = policy.env_config
    images = iter([stored_frame(Path(root, name), c.max_pixels, policy.frame_unit) for name in row["images"]])
    messages, dialogue = row["messages"], None
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    for message in messages:
        first, *parts = message["content"].split("<image>")
        content = [first, *(item for part in parts for item in (next(images), part))]
        dialogue = encode(policy, [Message(message["role"], content)], dialogue, rules=AsStored)
    return dialogue


def stored_frame(path, max_pixels, unit):
    """An image file as a Frame, as LLaMA-Factory and the processor size it. Raises VideoError."""
    try:
        with Image.open(path) as image:
            return Frame(0.0, resized(image.convert("RGB"), 0, max_pixels, unit, Image.Resampling.BICUBIC))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path}: not an image that is read ({error})") from None
