"""What is wrong with a row of questions or of trajectories; docs/data.md says what it holds."""

import json

from grading import LETTERS, normalise

MARKS = "<video>", "<audio>"  # that other formats put in a text where one belongs
ANSWER_TYPES = ("multiple_choice", "number", "segment", "open_ended")


# ---------------------------------------------------------------------------------------------------- values
def is_text(value):
    """A text that says something."""
    return isinstance(value, str) and value.strip() != ""


def is_path(value):
    return is_text(value) and "\0" not in value


def is_number(value):
    """A finite number, within what a float holds; nan is none."""
    return type(value) in (int, float) and abs(value) < 1e300


def is_frame_number(value):
    return is_number(value) and value >= 0


def is_span(value):
    """[start_s, end_s]; the two may be equal."""
    return is_list_of(is_number, value) and len(value) == 2 and 0 <= value[0] <= value[1]


def is_segment(value):
    """[start_s, end_s] that lasts."""
    return is_span(value) and value[0] < value[1]


def is_subtitle(value):
    return isinstance(value, list) and len(value) == 3 and is_span(value[:2]) and is_text(value[2])


LISTS = {  # fields that may be null: what each element must be, and in words
    "options": (lambda value: isinstance(value, str), "texts"),
    "evidence": (is_span, "[start_s, end_s]"),
    "overview_frames": (is_frame_number, "frame numbers"),
    "images": (is_path, "paths"),
    "subtitles": (is_subtitle, "[start_s, end_s, text]"),
}


def is_list_of(is_element, value):
    return isinstance(value, list) and all(map(is_element, value))


# ------------------------------------------------------------------------------------------------------ rows
def question_error(question):
    """Why a question row cannot be used, or None: one line. What passes can be shown, graded and written."""
    if not isinstance(question, dict):
        return "not a JSON object"
    if reason := unwritable(question):
        return reason
    # what each row has
    for key in ("id", "video", "question", "answer_type"):
        if not is_text(question.get(key)):
            return f'no "{key}", or it is not a text'
    if not is_path(question["video"]):
        return "video is not a path"
    text = question["question"].strip()
    if text.startswith(MARKS) or any(line.strip() in MARKS for line in text.split("\n")):
        return "<video> or <audio> in the question: the video needs no mark, and sound is not heard"
    answer, answer_type = question.get("answer"), question["answer_type"]
    if answer in (None, ""):
        return 'no "answer"'
    if answer_type not in ANSWER_TYPES:
        return f"unknown answer_type {answer_type[:60]!r}"
    # lists
    for key, (is_element, words) in LISTS.items():
        value = question.get(key)
        if value is not None and not is_list_of(is_element, value):
            return f"{key} is not a list of {words}"
    number = question.get("num_frames")
    if number is not None and not (type(number) is int and number > 0):
        return "num_frames is not a number of frames"
    images, marks = question.get("images"), question["question"].count("<image>")
    if images is not None and len(images) != marks:
        return f"there are {len(images)} images, and {marks} <image> in the question"
    # options and answer
    options = question.get("options") or []
    least = 2 if answer_type == "multiple_choice" else 0
    if not least <= len(options) <= len(LETTERS):
        return f"there must be {least} to {len(LETTERS)} options"
    if not answer_fits(answer, answer_type, options):
        return f"answer {str(answer)[:60]!r} cannot be right: its type is {answer_type}"
    if answer_type != "multiple_choice" and not all(map(is_text, options)):
        return "an option is empty, and the answer is no letter"
    # meta and source
    meta = question.get("meta")
    if meta is None:
        meta = {}
    if not isinstance(meta, dict):
        return "meta is not an object"
    if not isinstance(question.get("source"), str | None) or not isinstance(meta.get("kind"), str | None):
        return "source or meta's kind is not a text"
    if "uniform_accuracy" in meta and not (meta.get("kind") and is_number(meta.get("duration_s"))):
        return "meta has uniform_accuracy, but no kind or duration_s"
    return None


def answer_fits(answer, answer_type, options):
    """Whether a question of this type can have this answer."""
    if answer_type == "multiple_choice":
        return isinstance(answer, str) and answer.strip().upper() in list(LETTERS[:len(options)])
    if answer_type == "segment":
        return is_segment(answer)
    if answer_type == "open_ended":
        return (isinstance(answer, str) or is_number(answer)) and normalise(answer) != ""
    try:
        return is_number(float(answer) if isinstance(answer, str) else answer)
    except ValueError:
        return False


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
    if not isinstance(row.get("question"), dict):
        return '"question" is not an object: a trajectory has a question row in it'
    if reason := question_error(row["question"]) or unwritable(row):
        return reason
    turns, learn, provenance = row.get("turns"), row.get("learn"), row.get("provenance")
    if not is_list_of(lambda turn: isinstance(turn, str), turns) or not turns:
        return "turns must be texts"
    if not is_list_of(lambda flag: isinstance(flag, bool), learn) or len(learn) != len(turns):
        return "learn must be true or false for each turn"
    if not isinstance(provenance, dict | None):
        return "provenance is not an object"
    max_zooms = (provenance or {}).get("max_zooms", 0)
    if type(max_zooms) is not int or max_zooms < 0:
        return "provenance's max_zooms is not a number of zooms"
    return None


def is_trajectory(row):
    """Whether a row is meant as a trajectory: it holds a question."""
    return isinstance(row, dict) and isinstance(row.get("question"), dict)


def question_of(row):
    """The question of a row: itself, or that of a trajectory."""
    return row["question"] if is_trajectory(row) else row
