"""The two file formats, questions and trajectories: what a row holds, and what is wrong with one.

A file has one JSON object a line. A question:

    {"id": "q1", "video": "clips/1.mp4", "question": "What is red?", "options": ["a car", "a bus"],
     "answer": "B", "answer_type": "multiple_choice", "source": "mine", "evidence": [[12, 15.5]], "meta": {}}

    id, source        of the question and of its data set: names for reports
    video             path, relative to the file that the row is in
    question, options a text, and the texts to choose from, or null
    answer            by answer_type: multiple_choice a letter, number a number, open_ended a text,
                      segment [start_s, end_s], whose score is the intersection over union
    evidence          [[start_s, end_s], ...] to be seen, or null; tells which zooms hit, is never shown
    meta              anything else; results are grouped by its "kind", or else by source, and by its
                      "duration_group" or "duration_s"; with "judge": true no grade counts
    overview_frames   optional: numbers of the frames to show in the overview instead of its own choice
    images            optional: image files, as video, one for each <image> in the question's text
    subtitles         optional: [[start_s, end_s, text], ...] of what is said

and a trajectory, which is what a teacher said on such a question:

    {"question": {...}, "kind": "exemplar", "turns": ["<think>...</think><video_zoom>...</video_zoom>", ...],
     "learn": [true, true], "provenance": {"teacher": "scripted", "seed": 0}}

    kind              exemplar, or reflection: it first looks in a wrong place, and mends it
    turns             the assistant's texts; what it saw is replayed from the video
    learn             for each turn, whether it is in the loss
    provenance        how it was made; "max_zooms" in it is how many zooms the episode allows
"""

import json

from grading import LETTERS, normalise, option_texts


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
    images, subtitles = question.get("images"), question.get("subtitles")
    if "\0" in question["video"]:
        return "video is not a path"
    options = [] if options is None else options
    if not isinstance(options, list) or not all(isinstance(o, str) and o.strip() for o in options):
        return "options are not a list of texts"
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
    texts = [option.strip() for option in option_texts(options)]
    if fits and kind == "multiple_choice" and texts.count(texts[LETTERS.index(answer.strip().upper())]) > 1:
        return "two options are the same, and right"
    if not fits:
        return f"answer {str(answer)[:60]!r} cannot be right: its type is {kind}"
    if evidence is not None and not (isinstance(evidence, list) and all(map(is_segment, evidence))):
        return "evidence is not a list of [start_s, end_s]"
    if chosen is not None and not (isinstance(chosen, list) and all(is_number(n) and n >= 0 for n in chosen)):
        return "overview_frames is not a list of frame numbers"
    is_path = lambda x: isinstance(x, str) and x.strip() and "\0" not in x
    if images is not None and not (isinstance(images, list) and all(map(is_path, images))):
        return "images is not a list of paths"
    if images is not None and len(images) != (marks := question["question"].count("<image>")):
        return f"there are {len(images)} images, and {marks} <image> in the question"
    is_line = lambda x: isinstance(x, list) and len(x) == 3 and isinstance(x[2], str) and x[2].strip() and (
        all(map(is_number, x[:2])) and 0 <= x[0] <= x[1])
    if subtitles is not None and not (isinstance(subtitles, list) and all(map(is_line, subtitles))):
        return "subtitles is not a list of [start_s, end_s, text]"
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
