"""The paper's released data sets, read as they are.

    RL     a JSON list of {"videos": [path], "problem", "solution", "data_source", "extra_info"}, or a yaml
           with datasets: [{json_path, sampling_strategy}], each all, first:N, end:N or random:N (or N%).
           `problem` has <image>, or <video> as others write, where the frames go, and the options in its
           text; "solution" may be "A."
    SFT    a JSON list of {"messages": [{"role", "content"}, ...], "images": [path, ...]}: each <image> is the
           next image file. Encoded as stored, since no video is named; a row that refers to a video, to
           sound or to anything else that is not shown is left out and named

Facts: the public repository zsgvivo/VideoZoomer, verl/utils/dataset/multimodal_dataset.py and
scripts/sft.yaml. Paths are relative to the file that is named (the yaml, too), or as given. A row of
questions keeps its `problem` in meta, for the released protocol; ours shows question and options apart.
Fields of other sets of messages, which are not shown: LLaMA-Factory data/README.md (videos, audios, system,
tools), ms-swift docs/source_en/Customization/Custom-dataset.md (objects, contents that are lists).
"""

import math
import os
import random
import re
from pathlib import Path

from PIL import Image

from common import UserError, check_bad, first_line, read_text
from model import encode
from protocols.released import resized
from sources.files import read_file
from sources.rows import question_error
from sources.shapes import KINDS, RowFault, read_answer, split_named, split_options, without_control
from video import Frame, open_image
from zoom_env import Message, ZoomEnv

SUFFIXES = (".json", ".yaml", ".yml")  # of files in these formats
MEDIA = "videos", "video", "audios", "audio"  # fields that name some
# of a place for media in a text, but for <image>: <video>, <|image_pad|>, <image 1>, <img>
MARK = re.compile(r"<(?!(?-i:image>))\|?(?:video|audio|image|img)[ _]?\d*(?:_pad)?\|?/?>", re.IGNORECASE)


# ----------------------------------------------------------------------------------------------- both formats
def read_released(path, max_bad, read):
    """What `read(row, number, path)` makes of the rows of a file, and [(row, reason)] of those of which it
    raises RowFault, LookupError, TypeError or AttributeError. Raises UserError.

    read: released_question, message_row, or either_row."""
    path, good, bad = Path(path), [], []
    rows = read_file(path) if path.suffix.lower() == ".json" else read_mixture(path)
    for number, row in enumerate(rows):
        try:
            if not isinstance(row, dict):
                raise RowFault("not a JSON object")
            good.append(read(row, number, path))
        except RowFault as fault:
            bad.append((f"row {number}", str(fault)))
        except KeyError as error:
            bad.append((f"row {number}", f'no "{error.args[0]}"'))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            bad.append((f"row {number}", first_line(error)))
    check_bad(bad, len(rows), max_bad if good else 0, path)
    if not good:
        raise UserError(f"{path} has no rows")
    return good, bad


def either_row(row, number, path):
    """A row of messages or of questions, as it is one. Raises as they do."""
    is_question = "problem" in row and "messages" not in row
    return (released_question if is_question else message_row)(row, number, path)


def refuse(values, keys):
    """Raises RowFault where a row or a message has one of these fields, and something in it."""
    for key in keys:
        if values.get(key):
            raise RowFault(f'its "{key}" would not be shown')


# --------------------------------------------------------------------------------------------------------- RL
def read_mixture(path):
    """The rows of all data sets of a yaml file, each sampled by its strategy, with the released code's seed.
    Raises UserError."""
    try:
        import yaml
    except ImportError:
        raise UserError(f"{path} needs the package pyyaml: pip install pyyaml") from None
    rng, found = random.Random(42), []
    try:
        for part in yaml.safe_load(read_text(path))["datasets"]:
            file = Path(part["json_path"])
            rows = read_file(file if file.exists() else path.parent / file)
            found += sample(rows, str(part.get("sampling_strategy", "all")), rng)
    except (yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a list of datasets with a json_path ({type(error).__name__})") from None
    except RowFault as fault:
        raise UserError(f"{path}: {fault}") from None
    return found


def sample(rows, strategy, rng):
    """The rows that a strategy takes: all, first:N, end:N or random:N, where N may be a share, N%. Raises
    RowFault."""
    match = re.fullmatch("(all|first|end|random)(:([0-9]+)(%?))?", strategy)
    if not match:
        raise RowFault(f"sampling_strategy {strategy} is not all, first:N, end:N or random:N")
    kind, _, number, percent = match.groups()
    if number is None or kind == "all":
        return rows
    number = math.ceil(int(number) * len(rows) / 100) if percent else int(number)
    if kind == "random":
        rng.shuffle(rows)
    return rows[-number:] if kind == "end" else rows[:number]


def released_question(row, number, path):
    """A question row of a row of an RL set, its video relative to the file's folder. Raises RowFault,
    LookupError, TypeError, AttributeError."""
    videos, problem, extra = row["videos"], row["problem"], row.get("extra_info") or {}
    if not isinstance(videos, list) or len(videos) != 1:
        raise RowFault("not one video")
    video = videos[0]
    if not isinstance(video, str):
        raise RowFault("its video is not a path")
    refuse(row, ("images", "image", "audios", "audio"))
    problem = problem.replace("<video>", "<image>")
    if problem.count("<image>") > 1:
        raise RowFault(f"{problem.count('<image>')} places of a video, 1 video")
    if mark := MARK.search(problem):
        raise RowFault(f"{mark[0]} in its problem would not be shown")
    if not os.path.exists(path.parent / video) and os.path.exists(video):
        video = os.path.abspath(video)  # as given
    text = without_control(problem.replace("<image>", "")).strip()
    answer = row["solution"]
    question, options, after, named = split_named(text, answer, KINDS[:1])
    answer_type = extra.get("answer_type")
    if not answer_type:
        answer_type = "multiple_choice" if options else "open_ended"
    if answer_type == "multiple_choice":
        answer, question = read_answer(str(named), options), f"{question}\n{after}".strip()
    else:
        question, options = text, []
    meta = {key: value for key, value in extra.items() if key != "answer_type"} | {"problem": problem}
    kind = meta.get("kind") or meta.get("problem_type") or row.get("data_source")
    if kind:
        meta["kind"] = str(kind)
    made = {"id": str(extra.get("id", f"{path.stem}_{number}")), "video": video, "question": question,
            "options": options or None, "answer": answer, "answer_type": answer_type,
            "source": row.get("data_source") or path.stem, "evidence": None, "meta": meta}
    if reason := question_error(made):
        raise RowFault(reason)
    return made


# -------------------------------------------------------------------------------------------------------- SFT
class AsStored(ZoomEnv):
    """How rows of messages are encoded: Qwen's chat template, each end token of the assistant trained (the
    line break after it, which LLaMA-Factory trains, too, is not)."""

    trains_appended_end = True


def message_row(row, number, path):
    """{"question", "kind", "turns", "messages", "images"} of a row of messages; turns are the assistant's.
    The question is what the user's first message says beside frames and their tags: no more of a question row
    than id, text, options and images. Raises RowFault."""
    messages, images = row.get("messages"), row.get("images") or []
    if messages is None:
        raise RowFault("no messages", '"conversations" are not read' if "conversations" in row else "")
    refuse(row, (*MEDIA, "image", "objects", "system", "tools"))
    if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
        raise RowFault("messages are not a list of role and content, both of them texts")
    for message in messages:
        refuse(message, (*MEDIA, "images", "image", "tool_calls"))
        if message.get("loss") is False:  # of ms-swift
            raise RowFault('a message has "loss": false, and every turn would be trained')
        if mark := MARK.search(message["content"]):
            raise RowFault(f"{mark[0]} in a message would not be shown")
    roles = [m["role"] for m in messages]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise RowFault("after the system message, user and assistant do not take turns")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise RowFault("images are not a list of paths")
    if any("<image>" in m["content"] for m in messages if m["role"] == "assistant"):
        raise RowFault("<image> in an assistant's turn")
    marks = sum(m["content"].count("<image>") for m in messages)
    if marks != len(images):
        raise RowFault(f"{marks} <image>, {len(images)} images")
    asked = next(m["content"] for m in messages if m["role"] == "user")
    text, options, after = split_options(re.sub(r"(?:<[^<>]*>)?<image>", "", asked))
    question = {"id": f"{path.stem}_{number}", "question": f"{text}\n{after}".strip(), "options": options,
                "images": images}
    turns = [m["content"] for m in messages if m["role"] == "assistant"]
    return {"question": question, "kind": "messages", "turns": turns, "messages": messages, "images": images}


def is_message(value):
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("content"), str) and isinstance(value.get("role"), str)


def encode_stored(policy, row, root):
    """The Dialogue of a row of messages: a system message, by default Qwen's, the messages, and the images in
    their places, which are at most max_pixels large. Raises VideoError."""
    c = policy.env_config
    images = iter([stored_frame(Path(root, name), c.max_pixels, policy.frame_unit) for name in row["images"]])
    messages, dialogue = row["messages"], None
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    for message in messages:
        content = []
        for number, text in enumerate(message["content"].split("<image>")):
            if number:
                content.append(next(images))
            content.append(text)
        dialogue = encode(policy, [Message(message["role"], content)], dialogue, rules=AsStored)
    return dialogue


def stored_frame(path, max_pixels, unit):
    """An image file as a Frame, as LLaMA-Factory and the processor size it. Raises VideoError."""
    return Frame(0.0, resized(open_image(path), 0, max_pixels, unit, Image.Resampling.BICUBIC))
