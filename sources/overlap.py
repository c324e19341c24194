"""What two files have in common: videos by content and name, images by content, questions by their normalised
text and options.

    python data_prep.py overlap train.jsonl test.jsonl     exit status 1 if there is anything, 0 if not
"""

import os
from pathlib import Path, PurePosixPath

from grading import normalise
from sources.files import of_videos
from sources.read import read_either
from sources.rows import question_of
from training.run_folder import hash_file


def overlap(first, second):
    """{what is the same: [(of the first file, of the second)]}, and prints counts with the first ones. The
    files hold questions or trajectories. Raises UserError."""
    first, second = questions_with_files(first), questions_with_files(second)
    (questions, videos, images), (other_questions, other_videos, other_images) = first, second
    hashes = content_hashes(videos + images, other_videos + other_images)
    content = lambda file: hashes.get(file["path"])
    found = {
        "the same video by content": in_both(videos, other_videos, "name", content),
        "the same video by name": in_both(videos, other_videos, "name", video_name),
        "the same question and options": in_both(questions, other_questions, "id", question_key),
    }
    if images and other_images:
        found["the same image by content"] = in_both(images, other_images, "name", content)
    for what, pairs in found.items():
        print(f"{what}: {len(pairs)}")
        for of_first, of_second in pairs[:5]:
            print(f"    {of_first}  {of_second}")
    return found


def questions_with_files(path):
    """(questions, videos, images) of a file of questions, trajectories or messages; videos and images are
    {"name", "path", "size" in bytes}. Says how many rows cannot be used, as these may hold a video all the
    same."""
    rows, bad = read_either(path)
    if bad:
        line, reason = bad[0]
        print(f"{path}: {len(bad)} rows cannot be used ({line}: {reason})")
    questions = list(map(question_of, rows))
    videos = [question["video"] for question in questions if "video" in question]
    images = [name for question in questions for name in question.get("images") or []]
    return questions, with_sizes(videos, path), with_sizes(images, path)


def with_sizes(names, file):
    """{"name", "path", "size"} of the files that rows of `file` name; the size of a missing one is None."""
    found = []
    for name in dict.fromkeys(names):
        path = os.path.realpath(Path(file).parent / name)
        size = os.path.getsize(path) if os.path.isfile(path) else None
        found.append({"name": name, "path": path, "size": size})
    return found


def in_both(first, second, name, key):
    """[(name in the first, name in the second)] of questions or files with the same `key`, one pair a key;
    None is none. name: the field that is shown."""
    of_first, of_second = names_by_key(first, name, key), names_by_key(second, name, key)
    return [(of_first[k], of_second[k]) for k in of_first if k in of_second and k is not None]


def names_by_key(items, name, key):
    names = {}
    for item in items:
        names.setdefault(key(item), item[name])
    return names


def video_name(file):
    return PurePosixPath(file["name"]).stem.casefold()


def question_key(question):
    options = question.get("options") or []
    return normalise(question["question"]), tuple(sorted(map(normalise, options)))


def content_hashes(first, second):
    """{path: hash} of the files that can be the same: only those of a size that is there on both sides are
    read."""
    sizes = {file["size"] for file in first} & {file["size"] for file in second} - {None}
    paths = list({file["path"] for file in [*first, *second] if file["size"] in sizes})
    return dict(zip(paths, of_videos(hash_file, paths, "hashes")))
