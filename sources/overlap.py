"""What two files have in common: videos by content and name, questions by their normalised text and options.

    python data_prep.py overlap train.jsonl test.jsonl     exit status 1 if there is anything, 0 if not
"""

import os
from collections import defaultdict
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from common import read_rows
from grading import normalise
from sources.rows import question_error
from training.run_folder import hash_file


def question_of(row):
    """The question of a row: itself, or that of a trajectory."""
    return row["question"] if isinstance(row.get("question"), dict) else row


def read_any(path):
    """(questions, rows) of a file of questions or of trajectories; rows that cannot be used are left out and
    counted, as they may hold a video all the same. Raises UserError."""
    rows, bad = read_rows(path, 1.0, lambda row: question_error(question_of(row)))
    if bad:
        print(f"{path}: {len(bad)} rows cannot be used ({bad[0][0]}: {bad[0][1]})")
    return [question_of(row) for row in rows], rows


def overlap(first, second):
    """{what is the same: [(of the first file, of the second)]}, and prints counts with the first ones."""
    sides = [(Path(path).parent, read_any(path)[0]) for path in (first, second)]
    found = {
        "the same video by content": same_content(*[{root / q["video"] for q in questions}
                                                    for root, questions in sides]),
        "the same video by name": in_both(*[{q["video"]: PurePosixPath(q["video"]).stem.casefold()
                                             for q in questions} for _, questions in sides]),
        "the same question and options": in_both(*[{q["id"]: question_key(q) for q in questions}
                                                   for _, questions in sides])}
    for what, pairs in found.items():
        print(f"{what}: {len(pairs)}")
        print(*(f"    {a}  {b}\n" for a, b in pairs[:5]), sep="", end="")
    return found


def question_key(question):
    return normalise(question["question"]), tuple(sorted(map(normalise, question.get("options") or [])))


def in_both(first, second):
    """[(name in the first, name in the second)] of what has the same key; one pair a key."""
    by_key = {key: name for name, key in reversed(second.items())}
    pairs = {key: (name, by_key[key]) for name, key in reversed(first.items()) if key in by_key}
    return list(pairs.values())[::-1]


def same_content(first, second):
    """Pairs of files with the same bytes. Only files of a size that is there on both sides are hashed."""
    by_size = [defaultdict(set), defaultdict(set)]
    for sizes, paths in zip(by_size, (first, second)):
        for path in paths:
            if os.path.isfile(path):
                sizes[path.stat().st_size].add(path.resolve())
    both = by_size[0].keys() & by_size[1].keys()
    files = sorted({path for sizes in by_size for size in both for path in sizes[size]})
    bar = tqdm(files, desc="hashes", unit="video", dynamic_ncols=True, disable=not files)
    hashes = {path: hash_file(path) for path in bar}
    sides = [{str(path): hashes[path] for size in both for path in sorted(sizes[size])} for sizes in by_size]
    return in_both(*sides)
