"""What two files have in common: videos by content and name, questions by their normalised text and options.

    python data_prep.py overlap train.jsonl test.jsonl     exit status 1 if there is anything, 0 if not
"""

import os
from pathlib import Path, PurePosixPath

from grading import normalise
from sources.files import in_threads
from sources.read import read_either
from sources.rows import question_of
from training.run_folder import hash_file


def overlap(first, second):
    """{what is the same: [(of the first file, of the second)]}, and prints counts with the first ones. The
    files hold questions or trajectories. Raises UserError."""
    first, second = questions_with_files(first), questions_with_files(second)
    hashes = content_hashes(first, second)
    found = {
        "the same video by content": in_both(first, second, "video", lambda q: hashes.get(q["file"])),
        "the same video by name": in_both(first, second, "video", video_name),
        "the same question and options": in_both(first, second, "id", question_key),
    }
    for what, pairs in found.items():
        print(f"{what}: {len(pairs)}")
        for of_first, of_second in pairs[:5]:
            print(f"    {of_first}  {of_second}")
    return found


def questions_with_files(path):
    """The questions of a file, each with its video's path and size in bytes as "file" and "size". Says how
    many rows cannot be used, as these may hold a video all the same."""
    rows, bad = read_either(path)
    if bad:
        line, reason = bad[0]
        print(f"{path}: {len(bad)} rows cannot be used ({line}: {reason})")
    questions = []
    for question in map(question_of, rows):
        file = os.path.realpath(Path(path).parent / question["video"])
        size = os.path.getsize(file) if os.path.isfile(file) else None
        questions.append(question | {"file": file, "size": size})
    return questions


def in_both(first, second, name, key):
    """[(name in the first, name in the second)] of questions with the same `key`, one pair a key; None is
    none. name: the field that is shown."""
    of_first, of_second = names_by_key(first, name, key), names_by_key(second, name, key)
    return [(of_first[k], of_second[k]) for k in of_first if k in of_second and k is not None]


def names_by_key(questions, name, key):
    names = {}
    for question in questions:
        names.setdefault(key(question), question[name])
    return names


def video_name(question):
    return PurePosixPath(question["video"]).stem.casefold()


def question_key(question):
    options = question.get("options") or []
    return normalise(question["question"]), tuple(sorted(map(normalise, options)))


def content_hashes(first, second):
    """{file: hash} of the videos that can be the same: only those of a size that is there on both sides are
    read."""
    sizes = {q["size"] for q in first} & {q["size"] for q in second} - {None}
    files = list({q["file"] for q in [*first, *second] if q["size"] in sizes})
    return dict(zip(files, in_threads(hash_file, files, "hashes")))
