"""What is in a question or trajectory file: kinds, durations, letters, rounds, token lengths.

    python data_prep.py stats questions.jsonl [--model DIR]
"""

import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median

from tqdm import tqdm

from common import read_rows
from grading import LETTERS
from model import encode, replay
from protocols import make_env
from sources.overlap import question_of
from sources.rows import question_error, trajectory_error
from training.checkpoints import load_policy
from training.tables import kind_of, text_table
from video import VideoError, open_video

SPREAD = {name: "{" + name + ":.1f}" for name in ("least", "median", "mean", "most")}


def stats(path, model=None):
    """Prints the tables and returns them as {name: a dict, or a list of dicts}. Raises UserError.

    model: a checkpoint, for token lengths: of the whole dialogue of a trajectory, of the prompt of a
    question, as far as the videos are there."""
    is_trajectory = lambda row: isinstance(row, dict) and isinstance(row.get("question"), dict)
    check = lambda row: trajectory_error(row) if is_trajectory(row) else question_error(row)
    rows, bad = read_rows(path, 1.0, check)
    questions, trajectories = list(map(question_of, rows)), [row for row in rows if is_trajectory(row)]
    root = Path(path).parent
    files = {q["video"]: root / q["video"] for q in questions}
    missing = [name for name, file in files.items() if not os.path.isfile(file)]
    durations = video_durations(questions, files)
    kinds = defaultdict(list)
    for question in questions:
        kinds[kind_of(question)].append(question)
    found = {
        "counts": {"questions": len({q["id"] for q in questions}), "rows": len(rows), "unusable": len(bad),
                   "videos": len(files), "videos missing": len(missing),
                   "with evidence": sum(bool(q.get("evidence")) for q in questions),
                   "with images": sum(bool(q.get("images")) for q in questions),
                   "with subtitles": sum(bool(q.get("subtitles")) for q in questions)},
        "kinds": [{"name": kind, "n": len(some)} | seconds_of(some, durations)
                  for kind, some in sorted(kinds.items(), key=lambda item: -len(item[1]))],
        "answer types": dict(Counter(q["answer_type"] for q in questions)),
        "letters": dict(sorted(Counter(str(q["answer"]).strip().upper() for q in questions
                                       if q["answer_type"] == "multiple_choice").items(),
                               key=lambda item: LETTERS.index(item[0])))}
    groups = defaultdict(list)
    for question in questions:
        if group := (question.get("meta") or {}).get("duration_group"):
            groups[str(group)].append(question)
    if groups:
        found["duration groups"] = [{"name": group, "n": len(some)} | seconds_of(some, durations)
                                    for group, some in groups.items()]
    if trajectories:
        found["rounds"] = dict(sorted(Counter(len(row["turns"]) for row in trajectories).items()))
        found["kinds of trajectory"] = dict(Counter(str(row.get("kind")) for row in trajectories))
    if model:
        found["tokens"] = [token_lengths(model, rows, root, is_trajectory)]
    show(found)
    return found


def video_durations(questions, files):
    """{video: seconds}, from meta, or from the file where that is there and can be read."""
    durations = {q["video"]: (q.get("meta") or {}).get("duration_s") for q in questions}
    known = {name: s for name, s in durations.items() if isinstance(s, int | float)}

    def look(name):
        try:
            return open_video(str(files[name])).duration_s
        except VideoError:
            return None

    unknown = [name for name in durations if name not in known and os.path.isfile(files[name])]
    with ThreadPoolExecutor(8) as pool:
        looked = tqdm(pool.map(look, unknown), total=len(unknown), desc="videos", unit="video",
                      dynamic_ncols=True, disable=not unknown)
        return known | {name: s for s, name in zip(looked, unknown) if s is not None}


def spread(values):
    if not values:
        return dict.fromkeys(SPREAD)
    return {"least": min(values), "median": median(values), "mean": mean(values), "most": max(values)}


def seconds_of(questions, durations):
    """The spread of the durations of their videos, each video once."""
    return spread([durations[name] for name in {q["video"] for q in questions} if name in durations])


def token_lengths(model, rows, root, is_trajectory):
    """The spread of tokens, {"name", "n", ...}: of a trajectory's dialogue, or of a question's prompt."""
    policy, lengths = load_policy(model), []
    for row in tqdm(rows, desc="tokens", unit="row", dynamic_ncols=True):
        try:
            if is_trajectory(row):
                lengths.append(len(replay(policy, row, root)[0].ids))
            else:
                env = make_env(row, policy.env_config, root)
                lengths.append(len(encode(policy, env.reset()).ids))
        except (VideoError, ValueError):  # without its video, or not as the environment would have it
            continue
    what = "dialogue" if rows and is_trajectory(rows[0]) else "prompt"
    return {"name": f"tokens of a {what}", "n": len(lengths)} | spread(lengths)


def show(found):
    """Prints the tables."""
    for name, table in found.items():
        if isinstance(table, dict):
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in table.items()))
        else:
            unit = "" if name == "tokens" else ", s"
            columns = {name: "{name}", "n": "{n}"} | {key + unit: cell for key, cell in SPREAD.items()}
            print(text_table(columns, table))
