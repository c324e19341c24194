"""Public benchmarks and data sets as question files.

    python data_prep.py convert --dataset videomme --annotations FILE --videos DIR --out FILE.jsonl

A format is a function from a raw row to what is in it, and a line in FORMATS with the published size. What it
returns may have any shape that sources/shapes.py reads; `finish` brings it to our form:

    id            as text; without one it is made of the video's name, the question and its options
    video         its file's name, with or without folders and suffix; `folder`, part of its folder's name
    question, options, answer, meta; `inside` where the options stand in the question's text, `letter` where
                  the data set's own evaluation takes the answer for a letter, whatever the options are
    open          text or number: the type of answer of a question without options
    evidence      "00:15-00:19" or [[start, end], ...]; `frames`, numbers of frames, is evidence, too
    images        None, or {1: image} of <image 1> in the question's text
    subtitles     their file, where it is not called like the video; `begin_s`, where the video begins

Each row comes out or is named with its reason in FILE.skipped.jsonl, and counted by reason. A row that lacks
its video, its evidence or its subtitles comes out all the same, and is named. To add a data set, write a
function and its line.
"""

import hashlib
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Callable

from tqdm import tqdm

from common import UserError, open_folder, write_jsonl
from sources.files import SUBTITLES, VIDEOS, FileIndex, read_annotations, relative_to_file
from sources.images import place_images, save_image
from sources.rows import question_error
from sources.shapes import (
    check_segment,
    first_of,
    letter_at,
    read_answer,
    read_list,
    read_options,
    read_segments,
    seconds,
    split_options,
    unwrap,
    without_options,
)
from sources.subtitles import read_subtitles
from video import VideoError, open_video


# ---------------------------------------------------------------------------------------------------- formats
def keep(raw, *names, **renamed):
    """What a row says of these, for meta; numbers that a TSV has as text are numbers."""
    def number(value):
        if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?", value):
            value = float(value)
        return int(value) if isinstance(value, float) and value.is_integer() else value

    found = {new: raw.get(old) for new, old in (dict(zip(names, names)) | renamed).items()}
    return {name: number(value) for name, value in found.items() if value not in (None, "", [])}


def videomme(raw):
    return {"id": raw.get("question_id"), "video": first_of(raw, "videoID", "video_path", "video"),
            "question": raw["question"], "options": first_of(raw, "options", "candidates"),
            "answer": raw["answer"], "letter": True,
            "meta": keep(raw, "domain", "sub_category", kind="task_type", duration_group="duration")}


def longvideobench(raw):
    numbered = [raw[f"option{i}"] for i in range(10) if raw.get(f"option{i}") not in (None, "", "N/A")]
    position = read_list(raw.get("position"))
    return {"id": raw["id"], "video": raw["video_path"], "question": raw["question"],
            "options": raw.get("candidates") or numbered, "answer": letter_at(raw.get("correct_choice")),
            "letter": True,
            "frames": position and [int(n) for n in position],
            "subtitles": raw.get("subtitle_path"), "begin_s": raw.get("starting_timestamp_for_subtitles"),
            "meta": keep(raw | {"position": position}, "duration_group", "level", "topic_category",
                         "position", kind="question_category", duration_s="duration")}


def mlvu(raw):
    """Multiple choice, and the two tasks whose answer is a text."""
    raw = raw | {"task": first_of(raw, "task_type", "question_type")}
    options = raw.get("candidates")
    judge = {} if options else {"judge": True}
    return {"id": raw.get("question_id"), "video": first_of(raw, "video_name", "video"),
            "folder": raw["task"], "question": raw["question"], "options": options, "answer": raw["answer"],
            "open": "text",
            "meta": keep(raw, "scoring_points", kind="task", duration_s="duration") | judge}


def lvbench(raw):
    kinds = read_list(raw.get("question_type"))
    kinds = kinds if isinstance(kinds, list) and kinds else [kinds]
    minutes = (raw.get("video_info") or {}).get("duration_minutes")
    return {"id": f"{raw['key']}_{raw['uid']}" if raw.get("key") else raw.get("uid"),
            "video": first_of(raw, "video_path", "key"), "question": raw["question"],
            "options": raw.get("options"), "inside": True, "answer": raw["answer"], "letter": True,
            "evidence": raw.get("time_reference"),
            "meta": keep(raw | {"kinds": kinds, "kind": kinds[0]}, "kind", "kinds", topic="type") | (
                {"duration_s": round(minutes * 60, 3)} if minutes else {})}


def videommmu(raw):
    """Its question in three tracks; in one of them an image belongs to the question. Where the file has none,
    it is the last frame of the benchmark's own videos."""
    places = raw.get("_group"), raw.get("category"), raw["_path"].parent.name, raw["_path"].name
    tracks = [track for place in places for track in ("Perception", "Comprehension", "Adaptation")
              if track.lower() in str(place).lower()]
    if not tracks:
        raise ValueError("its track is not known", "name it by the file or its folder: Perception, ...")
    numbered = {int(key[-1]): raw[key] for key in raw if re.fullmatch(r"image.?\d", key)}
    return {"id": f"{raw['id']}_{tracks[0].lower()}", "video": raw.get("video") or raw["id"],
            "question": raw["question"], "options": raw.get("options"), "answer": raw["answer"],
            "letter": True, "open": "number or text", "images": {1: raw.get("image")} | numbered,
            "meta": keep(raw, "question_type") | {
                "kind": tracks[0], "subject": "_".join(raw["id"].split("_")[1:-1])}}


def videommlu(raw):
    """The quiz: questions whose answers a judge must grade."""
    return {"id": raw.get("question_id"), "video": first_of(raw, "video_id", "video_name", "video"),
            "question": raw["question"], "answer": raw["answer"], "open": "text",
            "meta": keep(raw, kind="discipline") | {"judge": True}}


def quiz(raw):
    lists = [value for key, value in raw.items() if key.startswith("reason") and isinstance(value, list)]
    return lists[0] if lists else [raw]


def longvideoreason(raw):
    """Its options stand in the question; the questions without any have a text as answer."""
    options = raw.get("options")
    bare = not options and not split_options(raw["problem"])[1]
    return {"id": raw.get("problem_id"), "video": first_of(raw, "videos", "video"),
            "question": raw["problem"], "options": options, "inside": True, "answer": raw["answer"],
            "letter": True, "open": "text",
            "meta": keep(raw, kind="problem_type") | ({"judge": True} if bare else {})}


def lsdbench(raw):
    span = raw.get("time_range")
    return {"id": raw.get("id"), "video": raw["video_id"], "question": raw["question"],
            "options": raw["options"], "answer": raw["correct_answer"], "letter": True,
            "evidence": span and [[span["start"], span["end"]]], "meta": {}}


def video_r1(raw):
    if raw["data_type"] != "video":
        raise ValueError("it is not about a video", str(raw["data_type"])[:60])
    types = {"numerical": "number", "regression": "number", "OCR": "text", "free-form": "text"}
    kind = raw["problem_type"]
    return {"id": raw["problem_id"], "video": raw["path"], "question": raw["problem"],
            "options": raw.get("options") if kind == "multiple choice" else None, "inside": kind not in types,
            "answer": raw["solution"], "letter": True, "open": types.get(kind),
            "meta": keep(raw, subset="data_source") | {"kind": kind} | (
                {"judge": True} if kind == "free-form" else {})}


@dataclass(frozen=True)
class Format:
    read: Callable  # raw row -> dict, see above; raises ValueError(reason, details) or KeyError
    sizes: dict  # {published number of questions: of what}
    source: str  # of the sizes and the format
    parts: Callable = lambda raw: [raw]  # a row with several questions -> their rows, added to what it has


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
                      "LVBench", parts=lambda raw: raw.get("qa") or [raw]),
    "videommmu": Format(videommmu, {900: "three tracks", 300: "one track"},
                        "github.com/EvolvingLMMs-Lab/VideoMMMU data/*.json"),
    "videommlu": Format(videommlu, {}, "arXiv 2504.14693: 1,065 videos, github.com/Espere-1119-Song/"
                        "Video-MMLU", parts=quiz),
    "longvideoreason_train": Format(lambda raw: longvideoreason(raw) | {"id": None}, {}, "arXiv 2507.07966: "
                                    "52K, later 104K, huggingface.co/datasets/LongVideo-Reason/"
                                    "longvideo-reason"),  # its numbers begin anew in each file
    "longvideoreason_eval": Format(longvideoreason, {1000: "test"}, "arXiv 2507.07966, lmms-eval "
                                   "lmms_eval/tasks/longvideo_reason/README.md"),
    "lsdbench": Format(lsdbench, {1304: "on 400 videos"}, "github.com/dvlab-research/LSDBench README.md"),
    "video-r1": Format(video_r1, {}, "github.com/tulerfeng/Video-R1: 260k with images, or 165k"),
}


# ---------------------------------------------------------------------------------------------------- one row
def finish(given, name):
    """(our row without its video's path, [(reason, details)] of what it lacks) of what a format returned.
    Raises ValueError(reason, details)."""
    question, options, notes = str(given["question"]).strip(), read_options(given.get("options")), []
    # options: given, or in the question's text
    if options:
        question = without_options(question, options)
    elif given.get("inside"):
        question, options = split_options(question)
        options = read_options(options)
        if not options and re.fullmatch(r"\(?[A-Z]\)?\.?", unwrap(given["answer"])):
            raise ValueError("no options in its question", question[-60:])
    if not question:
        raise ValueError("no question", "")
    if any("<image" in option for option in options):
        raise ValueError("an option is an image", str(options)[:60])
    # the answer
    meta = dict(given["meta"])
    if "kind" in meta:
        meta["kind"] = str(meta["kind"])
    if options:
        answer = read_answer(given["answer"], options, given.get("letter", False))
        answer_type = "multiple_choice"
    else:
        answer, answer_type = open_answer(given, meta)
    # evidence
    evidence = None
    try:
        if isinstance(given.get("evidence"), list):
            evidence = [check_segment(*map(seconds, segment)) for segment in given["evidence"]]
        elif given.get("evidence"):
            evidence = read_segments(given["evidence"])
        if evidence and max(start for start, _ in evidence) >= meta.get("duration_s", float("inf")):
            raise ValueError("a time reference is after the video's end", str(evidence))
    except ValueError as error:
        evidence, notes = None, [reason_of(error)]
        meta["time_reference"] = given["evidence"]
    video = given["video"][0] if isinstance(given["video"], list) else given["video"]
    row = {"id": given.get("id"), "video": str(video), "question": question,
           "options": options or None, "answer": answer, "answer_type": answer_type, "source": name,
           "evidence": evidence, "meta": meta}
    if row["id"] in (None, ""):
        said = "\0".join([row["video"], str(given.get("folder")), question, *options])
        said = hashlib.sha256(said.encode(errors="replace")).hexdigest()
        row["id"] = f"{PurePosixPath(row['video']).stem}_{said[:10]}"
    return row | {"id": str(row["id"])}, notes


def open_answer(given, meta):
    """(answer, answer_type) of a question without options."""
    if not given.get("open"):
        raise ValueError("no options", "")
    answer = given["answer"]
    several = read_list(answer)
    if isinstance(several, list) and several and all(isinstance(text, str) for text in several):
        answer, meta["also_right"] = several[0], several[1:]
    elif str(answer).startswith(("['", '["')):
        raise ValueError("the answer is a list that cannot be read", str(answer)[:60])
    if answer in (None, "", []) or isinstance(answer, list | dict):
        raise ValueError("no answer", str(answer)[:60])
    text = unwrap(answer)
    number = re.fullmatch(r"[-+]?((\d{1,3}(,\d{3})+|\d+)(\.\d+)?|\.\d+)", text)
    number = number and float(text.replace(",", ""))
    if "number" in given["open"] and isinstance(number, float):
        return int(number) if number.is_integer() else number, "number"
    if given["open"] == "number":
        raise ValueError("the answer is no number", repr(text[:60]))
    return text, "open_ended"


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
    video_index, subtitle_index = FileIndex(videos, VIDEOS), subtitles and FileIndex(subtitles, SUBTITLES)
    open_folder(out.parent)
    rows, named, found, ids, frames = [], [], 0, set(), {}  # frames: numbers that are evidence, by id

    def name_it(where, kept, reason, details):
        details = " ".join(details.encode(errors="replace").decode().split())[:300]
        named.append({"row": where, "reason": reason, "details": details, "kept": kept})

    def add(path, given, where):  # one question
        row, notes = finish(given, name)
        where = row["id"]
        if where in ids:
            raise ValueError("duplicate id", where)
        row["question"], pictures, missing = place_images(row["question"], given.get("images") or {})
        notes += missing
        if there := video_index.find(row["video"], given.get("folder")):
            row["video"] = relative_to_file(there, out)
            if given.get("frames"):
                frames[where] = given["frames"]
        else:
            row["video"] = relative_to_file(video_index.expected(row["video"]), out)
            notes.append(("video missing", row["video"]))
            if given.get("frames"):
                notes.append(("evidence counts frames, and the video is missing", ""))
        if subtitle_index:
            row["subtitles"] = find_subtitles(subtitle_index, given, row, notes)
        if pictures:
            row["images"] = [save_image(image, path, out, f"{where}_{number}")
                             for number, image in enumerate(pictures, 1)]
        row = {key: value for key, value in row.items() if key not in ("images", "subtitles") or value}
        if reason := question_error(row):
            raise ValueError(reason, "")
        ids.add(where)
        rows.append(row)
        for note in notes:
            name_it(where, True, *note)

    for path, where, raw in read_annotations(annotations):
        try:
            if isinstance(raw, ValueError):
                raise raw
            parts = form.parts(raw)
            if not isinstance(parts, list):
                raise ValueError("not a list of questions", str(parts)[:60])
        except FAULTS as error:
            found += 1
            name_it(where, False, *reason_of(error))
            continue
        for number, part in enumerate(parts, 1):
            found += 1
            here = where if len(parts) == 1 else f"{where}.{number}"
            try:
                add(path, form.read({**raw, **part, "_path": path}), here)
            except FAULTS as error:
                name_it(here, False, *reason_of(error))
    if not rows:
        first = "; ".join(f"{n['row']}: {n['reason']} {n['details']}" for n in named[:3]) or "it is empty"
        raise UserError(f"no row of {', '.join(map(str, annotations))} is one of {name} ({first})")
    look_at_videos(rows, out.parent, frames, check_videos, name_it)
    write_jsonl(out, rows)
    write_jsonl(skipped_file(out), named)
    show_counts(name, form, found, rows, named, out)
    return rows, named


def reason_of(error):
    """(reason, details) of a row that cannot be converted."""
    if isinstance(error, KeyError):
        return f'no "{error.args[0]}"', ""
    if type(error) is ValueError and len(error.args) == 2:
        return error.args
    return "the row cannot be read", f"{type(error).__name__}: {error}"


def skipped_file(out):
    """Where the rows are named that were left out or lack something."""
    return Path(out).with_suffix(".skipped.jsonl")


def find_subtitles(index, given, row, notes):
    """The subtitles of a row, or None and a note why there are none."""
    try:
        if path := index.find(given.get("subtitles") or PurePosixPath(row["video"]).stem):
            begin_s, duration_s = float(given.get("begin_s") or 0), row["meta"].get("duration_s")
            if found := read_subtitles(path, begin_s, duration_s):
                return found
        notes.append(("no subtitles", f"none while the video lasts in {path}" if path else ""))
    except FAULTS as error:
        known = type(error) is ValueError and len(error.args) == 2
        notes.append(error.args if known else ("subtitles cannot be read", str(error)))


def look_at_videos(rows, root, frames, check_videos, name_it):
    """Opens the videos of rows whose evidence counts frames, or all that are there, side by side; fills in
    evidence and durations."""
    by_path = {}
    for row in rows:
        if check_videos or row["id"] in frames:
            by_path.setdefault(str(Path(root, row["video"])), []).append(row)

    def look(path):
        try:
            if not os.path.isfile(path):
                return None
            video, times_s = open_video(path), {}
            for row in by_path[path]:
                try:
                    times_s[row["id"]] = video.times_of(tuple(frames.get(row["id"], ())))
                except (VideoError, ArithmeticError) as error:
                    times_s[row["id"]] = str(error)
            return video.duration_s, video.fps, times_s
        except VideoError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        looked = tqdm(pool.map(look, by_path), total=len(by_path), desc="videos", unit="video",
                      dynamic_ncols=True, disable=not by_path)
        for seen, path in zip(looked, by_path):
            for row in by_path[path] if seen else []:
                if isinstance(seen, str):
                    name_it(row["id"], True, "video cannot be read", seen)
                    continue
                duration_s, fps, times_s = seen
                row["meta"].setdefault("duration_s", round(duration_s, 3))
                if isinstance(times_s[row["id"]], str):
                    name_it(row["id"], True, "evidence counts frames that the video does not have",
                            times_s[row["id"]])
                elif times_s[row["id"]]:
                    row["evidence"] = [[round(t, 3), round(t + 1 / fps, 3)] for t in times_s[row["id"]]]


def show_counts(name, form, found, rows, named, out):
    """What came out, what did not, and whether it is as many as were published."""
    def counts(kept):
        reasons = Counter(line["reason"] for line in named if line["kept"] == kept)
        return ", ".join(f"{reason} {number}" for reason, number in reasons.most_common())

    published = " or ".join(f"{size} ({what})" for size, what in form.sizes.items()) or "no exact number"
    videos = len({row["video"] for row in rows})
    print(f"{name}: {len(rows)} of {found} questions on {videos} videos -> {out}")
    print(f"found {found} / published {published}; {form.source}")
    if form.sizes and found not in form.sizes:
        nearest = min(form.sizes, key=lambda size: abs(size - found))
        print(f"difference: {found - nearest:+d} against {nearest} ({form.sizes[nearest]})")
    for what, reasons in (("left out", counts(False)), ("kept, but", counts(True))):
        if reasons:
            print(f"{what}: {reasons}")
    if named:
        print(f"each is named in {skipped_file(out)}")
