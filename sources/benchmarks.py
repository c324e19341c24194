"""Public benchmarks and data sets as question files.

    python data_prep.py convert --dataset videomme --annotations FILE --videos DIR --out FILE.jsonl

A format is a function from a raw row to a `Given`, and a line in FORMATS with the published size; `finish`
brings what it found to our form. Each row comes out or is named with its reason in FILE.skipped.jsonl, and
counted by reason. A row that lacks its video, its evidence or its subtitles comes out all the same, and is
named. To add a data set, write a function and its line.
"""

import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Callable

from common import UserError, open_folder, write_jsonl
from grading import LETTERS
from sources.files import SUBTITLES, VIDEOS, FileIndex, of_videos, read_annotations, relative_to_file
from sources.images import place_images, save_image
from sources.rows import question_error
from sources.shapes import (KINDS, RowFault, control_in, first_of, letter_at, read_answer, read_list,
                            read_options, read_segments, split_named, unwrap, without_control,
                            without_filling, without_numbers, without_options)
from sources.subtitles import read_subtitles
from video import VideoError, open_video


# ---------------------------------------------------------------------------------------------------- formats
@dataclass
class Given:
    """What a format finds in a raw row, in any shape that sources/shapes.py reads."""

    video: object  # its file's name, with or without folders and suffix, perhaps in a list
    question: object
    answer: object
    options: object = None
    options_inside: bool = False  # whether the options stand in the question's text
    is_letter: bool = True  # a letter as answer is one, whatever the options are
    open: str = ""  # of a question without options: its answer is a "text", a "number", a "number or text"
    judge: bool = False  # whether only a judge can grade it where it has no options
    id: object = None  # without one it is made of the video's name, the question and its options
    folder: object = None  # part of the name of the video's folder
    meta: dict = field(default_factory=dict)
    evidence: object = None  # "00:15-00:19" or [[start, end], ...]
    frames: object = None  # evidence as numbers of frames
    images: dict = field(default_factory=dict)  # {1: image} of <image 1> in the question's text
    subtitles: object = None  # their file, where it is not called like the video
    begin_s: object = None  # the time in the subtitles at which the video begins


def keep(raw, *names, **renamed):
    """What a row says of these, for meta; numbers that a TSV has as text are numbers."""
    found = {}
    for new, old in (dict(zip(names, names)) | renamed).items():
        value = raw.get(old)
        if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?", value):
            value = float(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value not in (None, "", []):
            found[new] = value
    return found


def videomme(raw):
    return Given(
        id=raw.get("question_id"),
        video=first_of(raw, "videoID", "video_path", "video"),
        question=raw["question"],
        options=first_of(raw, "options", "candidates"),
        answer=raw["answer"],
        meta=keep(raw, "domain", "sub_category", kind="task_type", duration_group="duration"))


def longvideobench(raw):
    columns = [i for i in range(10) if f"option{i}" in raw]
    numbered = [raw.get(f"option{i}") for i in range(max(columns, default=-1) + 1)]
    right, position = letter_at(raw.get("correct_choice")), read_list(raw.get("position"))
    return Given(
        id=raw["id"],
        video=raw["video_path"],
        question=raw["question"],
        options=without_filling(read_list(raw.get("candidates")) or numbered, right),
        answer=right,
        frames=[int(n) for n in position] if position else None,
        subtitles=raw.get("subtitle_path"),
        begin_s=raw.get("starting_timestamp_for_subtitles"),
        meta=keep(raw | {"position": position}, "duration_group", "level", "topic_category", "position",
                  kind="question_category", duration_s="duration"))


def mlvu(raw):
    """Multiple choice, and the two tasks whose answer is a text."""
    task = first_of(raw, "task_type", "question_type")
    return Given(
        id=raw.get("question_id"),
        video=first_of(raw, "video_name", "video"),
        folder=task,
        question=raw["question"],
        options=raw.get("candidates"),
        answer=raw["answer"],
        is_letter=False,
        open="text",
        judge=True,
        meta=keep(raw | {"kind": task}, "kind", "scoring_points", duration_s="duration"))


def lvbench(raw):
    kinds = read_list(raw.get("question_type"))
    if not isinstance(kinds, list) or not kinds:
        kinds = [kinds]
    minutes = (raw.get("video_info") or {}).get("duration_minutes")
    more = {"kinds": kinds, "kind": kinds[0], "duration_s": round(minutes * 60, 3) if minutes else None}
    return Given(
        id=f"{raw['key']}_{raw['uid']}" if raw.get("key") else raw.get("uid"),
        video=first_of(raw, "video_path", "key"),
        question=raw["question"],
        options=raw.get("options"),
        options_inside=True,
        answer=raw["answer"],
        evidence=raw.get("time_reference"),
        meta=keep(raw | more, *more, topic="type"))


def videommmu(raw):
    """Its question in three tracks; in one of them an image belongs to the question. Where the file has none,
    it is the last frame of the benchmark's own videos."""
    places = f"{raw.get('_group')} {raw.get('category')} {raw['_path'].parent.name} {raw['_path'].name}"
    named = re.search("perception|comprehension|adaptation", places, re.IGNORECASE)
    if not named:
        raise RowFault("its track is not known", "name it by the file or its folder: Perception, ...")
    track = named[0].lower()
    return Given(
        id=f"{raw['id']}_{track}",
        video=raw.get("video") or raw["id"],
        question=raw["question"],
        options=raw.get("options"),
        answer=raw["answer"],
        open="number or text",
        images={1: raw.get("image")},
        meta=keep(raw, "question_type") | {
            "kind": track.capitalize(), "subject": "_".join(raw["id"].split("_")[1:-1])})


def videommlu(raw):
    """The quiz: questions whose answers a judge must grade."""
    return Given(
        id=raw.get("question_id"),
        video=first_of(raw, "video_id", "video_name", "video"),
        question=raw["question"],
        answer=raw["answer"],
        open="text",
        judge=True,
        meta=keep(raw, kind="discipline"))


def longvideoreason(raw):
    """Its options stand in the question; the questions without any have a text as answer."""
    return Given(
        id=raw.get("problem_id"),
        video=first_of(raw, "videos", "video"),
        question=raw["problem"],
        options=raw.get("options"),
        options_inside=True,
        answer=raw["answer"],
        open="text",
        judge=True,
        meta=keep(raw, kind="problem_type"))


def longvideoreason_train(raw):
    """Its numbers begin anew in each file, so they are no ids."""
    return replace(longvideoreason(raw), id=None)


def lsdbench(raw):
    span = raw.get("time_range")
    return Given(
        id=raw.get("id"),
        video=raw["video_id"],
        question=raw["question"],
        options=raw["options"],
        answer=raw["correct_answer"],
        evidence=[[span["start"], span["end"]]] if span else None)


def video_r1(raw):
    if raw["data_type"] != "video":
        raise RowFault("it is not about a video", str(raw["data_type"])[:60])
    open_types = {"numerical": "number", "regression": "number", "OCR": "text", "free-form": "text"}
    kind = raw["problem_type"]
    return Given(
        id=raw["problem_id"],
        video=raw["path"],
        question=raw["problem"],
        options=raw.get("options") if kind == "multiple choice" else None,
        options_inside=kind not in open_types,
        answer=raw["solution"],
        open=open_types.get(kind, ""),
        judge=kind == "free-form",
        meta=keep(raw, subset="data_source", kind="problem_type"))


@dataclass(frozen=True)
class Format:
    read: Callable  # raw row -> Given; raises RowFault or KeyError
    sizes: dict  # {published number of questions: of what}
    source: str  # of the sizes and the format
    list_key: str | None = None  # the beginning of the key under which a row holds several questions, if any


FORMATS = {
    "videomme": Format(videomme, {2700: "on 900 videos"}, "arXiv 2405.21075, github.com/EvolvingLMMs-Lab/"
                       "lmms-eval lmms_eval/tasks/videomme"),
    "longvideobench": Format(longvideobench, {1337: "validation"}, "huggingface.co/datasets/longvideobench/"
                             "LongVideoBench-Meta, github.com/longvideobench/LongVideoBench"),
    "mlvu_dev": Format(mlvu, {2175: "multiple choice", 2593: "with two tasks of open answers"},
                       "github.com/JUNJIE99/MLVU data/*.json"),
    "mlvu_test": Format(mlvu, {502: "multiple choice"}, "github.com/JUNJIE99/MLVU evaluation_test/"
                        "test_res.json, lmms-eval lmms_eval/tasks/mlvu"),
    "lvbench": Format(lvbench, {1549: "on 103 videos"}, "arXiv 2406.08035, huggingface.co/datasets/THUDM/"
                      "LVBench", list_key="qa"),
    "videommmu": Format(videommmu, {900: "three tracks", 300: "one track"},
                        "github.com/EvolvingLMMs-Lab/VideoMMMU data/*.json"),
    "videommlu": Format(videommlu, {}, "arXiv 2504.14693: 1,065 videos, github.com/Espere-1119-Song/"
                        "Video-MMLU", list_key="reason"),
    "longvideoreason_train": Format(longvideoreason_train, {}, "arXiv 2507.07966: 52K, later 104K, "
                                    "huggingface.co/datasets/LongVideo-Reason/longvideo-reason"),
    "longvideoreason_eval": Format(longvideoreason, {1000: "test"}, "arXiv 2507.07966, lmms-eval "
                                   "lmms_eval/tasks/longvideo_reason/README.md"),
    "lsdbench": Format(lsdbench, {1304: "on 400 videos"}, "github.com/dvlab-research/LSDBench README.md"),
    "video-r1": Format(video_r1, {}, "github.com/tulerfeng/Video-R1: 260k with images, or 165k"),
}


def parts_of(raw, list_key):
    """What each question of a raw row has beside what the row says of all: [{}] for a row that is one."""
    if list_key and isinstance(raw, dict):
        for key, value in raw.items():
            if key.startswith(list_key) and isinstance(value, list) and value:
                return value
    return [{}]


# ---------------------------------------------------------------------------------------------------- one row
NUMBER = re.compile(r"[-+]?((\d{1,3}(,\d{3})+|\d+)(\.\d+)?|\.\d+)")


def finish(given, source):
    """(our row, without its files; [(reason, details)] of what it lacks) of what a format found. Raises
    RowFault."""
    answer, options = given.answer, read_options(given.options)
    control = control_in([given.question, read_list(given.options), answer])
    question = without_control(str(given.question)).strip()
    question = question.removeprefix("<video>").strip()  # the frames come behind the question
    # options: given, or in the question's text
    if options:
        question = without_options(question, options)
        options, answer = without_numbers(options, answer)
    elif given.options_inside:
        kinds = KINDS[:1] if given.open else KINDS  # a number may answer an open question
        question, options, after, answer = split_named(question, answer, kinds)
        if after:
            raise RowFault("text follows the options in the question", repr(after[:60]))
        options = read_options(options)
        if not options and re.fullmatch(r"[(\[（]?[A-Za-z][)\]）]?\.?", unwrap(answer)):
            raise RowFault("no options in its question", question[-60:])
    if not question:
        raise RowFault("no question")
    if any("<image" in option for option in options):
        raise RowFault("an option is an image", str(options)[:60])
    # the answer
    meta, notes = dict(given.meta), []
    if "kind" in meta:
        meta["kind"] = str(meta["kind"])
    if options:
        answer, answer_type = read_answer(answer, options, given.is_letter), "multiple_choice"
        if options.count(options[LETTERS.index(answer)]) > 1:
            notes.append(("two options are the same, and right", f"{answer} of {options}"))
        if "" in options:
            notes.append(("an option is empty", f"{answer} of {options}"))
    else:
        if given.judge:
            meta["judge"] = True
        answer, answer_type = open_answer(given, meta)
    # evidence
    evidence = None
    if control:
        notes.append(("a control character was in its text", repr(control)))
    try:
        if given.evidence:
            evidence = read_evidence(given.evidence, meta.get("duration_s"))
    except RowFault as fault:
        meta["time_reference"] = given.evidence
        notes.append(fault.args)
    # the id
    video = str(given.video[0] if isinstance(given.video, list) else given.video)
    row_id = given.id
    if row_id in (None, ""):
        said = "\0".join([video, str(given.folder), question, *options])
        said = hashlib.sha256(said.encode(errors="replace")).hexdigest()
        row_id = f"{PurePosixPath(video).stem}_{said[:10]}"
    return {"id": str(row_id), "video": video, "question": question, "options": options or None,
            "answer": answer, "answer_type": answer_type, "source": source, "evidence": evidence,
            "meta": meta}, notes


def open_answer(given, meta):
    """(answer, answer_type) of a question without options; more texts that are right go to meta."""
    if not given.open:
        raise RowFault("no options")
    answer, several = given.answer, read_list(given.answer)
    if isinstance(several, list) and several and all(isinstance(text, str) for text in several):
        answer, meta["also_right"] = several[0], several[1:]
    elif str(answer).startswith(("['", '["')):
        raise RowFault("the answer is a list that cannot be read", str(answer)[:60])
    if answer in (None, "", []) or isinstance(answer, list | dict):
        raise RowFault("no answer", str(answer)[:60])
    text = unwrap(answer)
    if "number" in given.open and NUMBER.fullmatch(text):
        number = float(text.replace(",", ""))
        return int(number) if number.is_integer() else number, "number"
    if given.open == "number":
        raise RowFault("the answer is no number", repr(text[:60]))
    return text, "open_ended"


def read_evidence(given, duration_s):
    """[[start_s, end_s], ...], all of which begin before the video's end, where that is known."""
    evidence = read_segments(given)
    if duration_s is not None and max(start_s for start_s, _ in evidence) >= duration_s:
        raise RowFault("a time reference is after the video's end", str(evidence))
    return evidence


def add_files(row, given, annotations, out, videos, subtitles):
    """Adds the paths of a row's video and images, as rows of `out` have them, and its subtitles. Returns
    [(reason, details)] of what it lacks. Raises RowFault, OSError.

    Args:
        annotations: the file that it was read from. videos, subtitles: FileIndex; the latter may be None."""
    row["question"], pictures, notes = place_images(row["question"], given.images)
    video = videos.find(row["video"], given.folder)
    row["video"] = relative_to_file(video or videos.expected(row["video"]), out)
    if video is None:
        notes.append(("video missing", row["video"]))
    if subtitles:
        try:
            row["subtitles"], faults = find_subtitles(subtitles, given, row)
            if faults:
                notes.append(("some subtitles cannot be read", f"{len(faults)}: {'; '.join(faults[:3])}"))
        except FAULTS as error:
            notes.append(reason_of(error, "subtitles cannot be read"))
    if pictures:
        row["images"] = [save_image(image, annotations, out, f"{row['id']}_{number}")
                         for number, image in enumerate(pictures, 1)]
    return notes


def find_subtitles(index, given, row):
    """The subtitles while a row's video lasts, and what is left out of them. Raises RowFault where there are
    none."""
    path = index.find(given.subtitles or PurePosixPath(row["video"]).stem)
    if path is None:
        raise RowFault("no subtitles")
    found, faults = read_subtitles(path, float(given.begin_s or 0), row["meta"].get("duration_s"))
    if not found:
        raise RowFault("no subtitles", f"none while the video lasts in {path}")
    return found, faults


def look_at_video(row, folder, frames):
    """Opens a row's video, if it is there; adds its duration, and the evidence that counts frames. Returns
    (reason, details) of what it lacks, or None."""
    path = os.path.join(folder, row["video"])
    if not os.path.isfile(path):
        return ("evidence counts frames, and the video is missing", "") if frames else None
    try:
        video = open_video(path)
    except VideoError as error:
        return "video cannot be read", str(error)
    row["meta"].setdefault("duration_s", round(video.duration_s, 3))
    try:
        times_s = video.times_of(tuple(frames))
    except (VideoError, ArithmeticError) as error:
        return "evidence counts frames that the video does not have", str(error)
    if times_s:
        row["evidence"] = [[round(time_s, 3), round(time_s + 1 / video.fps, 3)] for time_s in times_s]
    return None


# ------------------------------------------------------------------------------------------------- conversion
FAULTS = ValueError, LookupError, TypeError, AttributeError, ArithmeticError, UserError  # of a raw row


def convert(name, annotations, videos, out, subtitles=None, check_videos=False):
    """Writes the question file `out`, and beside it what was left out or lacks something; prints counts.

    Args:
        name: of FORMATS. annotations: files, or folders with files. videos, subtitles: folders.
        check_videos: open each video, and add its duration to meta where it has none.
    Returns: (rows, [{"row", "reason", "details", "kept"}]). Raises UserError, also where no row comes out."""
    out, form = Path(out), FORMATS[name]
    if out.suffix != ".jsonl" or out.is_dir():
        raise UserError(f"--out {out}: it must be a file whose name ends with .jsonl")
    videos = FileIndex(videos, VIDEOS)
    subtitles = FileIndex(subtitles, SUBTITLES) if subtitles else None
    open_folder(out.parent)
    rows, frames, named, num_found = {}, {}, [], 0  # rows, and frames that are their evidence, by id
    for path, where, raw in read_annotations(annotations):
        parts = parts_of(raw, form.list_key)
        for number, part in enumerate(parts, 1):
            num_found += 1
            try:
                if isinstance(raw, RowFault):
                    raise raw
                given = form.read(raw | part | {"_path": path})
                row, lacks = finish(given, name)
                if row["id"] in rows:
                    raise RowFault("duplicate id", row["id"])
                lacks += add_files(row, given, path, out, videos, subtitles)
                if "_lines" in raw:
                    lacks.append(("a quoted field runs over lines", raw["_lines"]))
                if reason := question_error(row):
                    raise RowFault(reason)
            except FAULTS as error:
                here = f"{where}.{number}" if len(parts) > 1 else where
                named.append(skipped_line(here, False, *reason_of(error)))
                continue
            rows[row["id"]] = row
            if given.frames:
                frames[row["id"]] = given.frames
            named += [skipped_line(row["id"], True, *lack) for lack in lacks]
    if not rows:
        first = "{row}: {reason} {details}".format(**named[0]) if named else "it is empty"
        raise UserError(f"no row of {', '.join(map(str, annotations))} is one of {name} ({first})")
    looked_at = [row for row in rows.values() if check_videos or row["id"] in frames]
    look = lambda row: look_at_video(row, out.parent, frames.get(row["id"], ()))
    for row, lack in zip(looked_at, of_videos(look, looked_at, "videos")):
        if lack:
            named.append(skipped_line(row["id"], True, *lack))
    rows, skipped_file = list(rows.values()), out.with_suffix(".skipped.jsonl")
    write_jsonl(out, rows)
    write_jsonl(skipped_file, named)
    show_counts(name, num_found, rows, named)
    print(f"{out}, and what was left out or lacks something: {skipped_file}")
    return rows, named


def reason_of(error, otherwise="the row cannot be read"):
    """(reason, details) of a row that cannot be converted."""
    if isinstance(error, RowFault):
        return error.args
    if isinstance(error, KeyError):
        return f'no "{error.args[0]}"', ""
    return otherwise, f"{type(error).__name__}: {error}"


def skipped_line(where, kept, reason, details=""):
    """A line of the file of what was left out, or kept but lacks something."""
    details = " ".join(details.encode(errors="replace").decode().split())[:300]
    return {"row": where, "reason": reason, "details": details, "kept": kept}


def show_counts(name, num_found, rows, named):
    """What came out, what did not, and whether it is as many as were published."""
    sizes = FORMATS[name].sizes
    published = [f"{size} ({what}; difference {num_found - size:+d})" for size, what in sizes.items()]
    videos = len({row["video"] for row in rows})
    print(f"{name}: {len(rows)} of {num_found} questions on {videos} videos")
    published = " or ".join(published) or "no exact number"
    print(f"found {num_found} / published {published}; {FORMATS[name].source}")
    for kept, what in ((False, "left out"), (True, "kept, but")):
        reasons = Counter(line["reason"] for line in named if line["kept"] == kept)
        if reasons:
            print(f"{what}: " + ", ".join(f"{reason} {number}" for reason, number in reasons.most_common()))
