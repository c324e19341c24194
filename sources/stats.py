"""What is in a file of questions, trajectories or messages: kinds, durations, letters, rounds, token lengths.

    python data_prep.py stats questions.jsonl [--model DIR]
"""

import os
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean, median

from tqdm import tqdm

from model import encode, replay
from protocols import make_env
from sources.files import of_videos
from sources.read import read_either
from sources.released_data import encode_stored
from sources.rows import is_number, is_trajectory, question_of
from training.checkpoints import load_policy
from training.tables import kind_of, text_table
from video import VideoError, open_video

COLUMNS = {"name": "{name}", "n": "{n}", "least": "{least:.1f}", "median": "{median:.1f}",
           "mean": "{mean:.1f}", "most": "{most:.1f}"}


def stats(path, model=None):
    """Prints the tables and returns them as {name: a dict, or a list of dicts}. Raises UserError.

    model: a checkpoint, for token lengths: of the whole dialogue of a trajectory, of the prompt of a
    question, as far as the videos are there."""
    rows, bad = read_either(path)
    folder, questions = Path(path).parent, [question_of(row) for row in rows]
    trajectories = [row for row in rows if is_trajectory(row)]
    by_video = {q["video"]: q for q in questions if "video" in q}
    durations_s = of_videos(lambda question: duration_of(question, folder), by_video.values(), "videos")
    durations = dict(zip(by_video, durations_s))
    answer_types = Counter(q["answer_type"] for q in questions if "answer_type" in q)
    letters = Counter(q["answer"].strip().upper() for q in questions
                      if q.get("answer_type") == "multiple_choice")
    images = {name for q in questions for name in q.get("images") or []}
    missing = [name for name in [*by_video, *sorted(images)] if not os.path.isfile(folder / name)]
    counts = {"questions": len({q["id"] for q in questions}), "rows": len(rows), "unusable": len(bad),
              "videos": len(by_video), "videos missing": sum(name in by_video for name in missing)}
    for field in ("evidence", "images", "subtitles"):
        counts[f"with {field}"] = sum(bool(q.get(field)) for q in questions)
    found = {
        "counts": counts,
        "kinds": by_group(questions, kind_of, durations),
        "answer types": dict(answer_types),
        "letters": dict(sorted(letters.items())),
    }
    if groups := by_group(questions, duration_group, durations):
        found["duration groups"] = groups
    if trajectories:
        found["rounds"] = dict(sorted(Counter(len(row["turns"]) for row in trajectories).items()))
        found["kinds of trajectory"] = dict(Counter(str(row.get("kind")) for row in trajectories))
    if model:
        found["tokens"] = [token_lengths(model, rows, folder)]
    for name, table in found.items():
        if isinstance(table, dict):
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in table.items()))
        else:
            print(name if name == "tokens" else f"{name}, seconds of their videos")
            print(text_table(COLUMNS, table))
    unreadable = [name for name, seconds in durations.items() if seconds is None and name not in missing]
    for what, names in (("unusable", [f"{line}: {reason}" for line, reason in bad]), ("missing", missing),
                        ("its duration cannot be read", unreadable)):
        for name in names[:5]:
            print(f"    {what}  {name}")
    return found


def duration_group(question):
    return str((question.get("meta") or {}).get("duration_group") or "")


def duration_of(question, folder):
    """Seconds that a question's video lasts, by its meta or else by the file; None where neither says."""
    duration_s = (question.get("meta") or {}).get("duration_s")
    if is_number(duration_s):
        return duration_s
    try:
        return open_video(str(folder / question["video"])).duration_s
    except VideoError:
        return None


def by_group(questions, group_of, durations):
    """A row for each group, the largest first: how many questions it has, and how long their videos are, each
    video once, as far as that is known. Questions whose group is "" are in none."""
    groups = defaultdict(list)
    for question in questions:
        if group := group_of(question):
            groups[group].append(question.get("video"))
    rows = []
    for name in sorted(groups, key=lambda name: -len(groups[name])):
        durations_s = [durations[video] for video in set(groups[name]) if durations.get(video) is not None]
        rows.append({"name": name, "n": len(groups[name])} | spread(durations_s))
    return rows


def spread(values):
    if not values:
        return {}
    return {"least": min(values), "median": median(values), "mean": mean(values), "most": max(values)}


def token_lengths(model, rows, folder):
    """The spread of tokens, {"name", "n", ...}: of a trajectory's dialogue, or of a question's prompt."""
    policy, lengths = load_policy(model), []
    for row in tqdm(rows, desc="tokens", unit="row", dynamic_ncols=True):
        try:
            if "messages" in row:
                dialogue = encode_stored(policy, row, folder)
            elif is_trajectory(row):
                dialogue, _ = replay(policy, row, folder)
            else:
                dialogue = encode(policy, make_env(row, policy.env_config, folder).reset())
        except (VideoError, ValueError):  # without its video, or not as the environment would have it
            continue
        lengths.append(len(dialogue.ids))
    what = "dialogue" if is_trajectory(rows[0]) else "prompt"
    return {"name": f"tokens of a {what}", "n": len(lengths)} | spread(lengths)
