"""The frames of the overview, as --overview names them: a way of EnvConfig, or a file of another selector."""

import json
from dataclasses import replace
from pathlib import Path

from common import UserError, check_bad, read_text


def use_overview(env_config, questions, overview, max_bad):
    """Applies --overview: one of EnvConfig's ways, or a .json file of frames that another selector chose.

    Such a file is a list of {"video_name", "question", "frame_idx"} (TSPO's format). A row belongs to the
    question with the same file name and the same first line, which gets it as overview_frames.
    Returns (env_config, questions that have frames, [(id, reason)] of the others). Raises UserError, also
    when more than the share `max_bad` has none."""
    if overview is None:
        return env_config, questions, []
    if not all("video" in question for question in questions):
        raise UserError("--overview chooses frames of videos; these rows hold image files")
    if not overview.endswith(".json"):
        try:
            env_config = replace(env_config, overview=overview)
        except ValueError as error:
            raise UserError(f"--{error}, or a .json file") from None
        return env_config, questions, []

    def key(video, question):
        return Path(video).name, question.strip().splitlines()[0].strip()

    try:
        chosen = {key(row["video_name"], row["question"]): [float(n) for n in row["frame_idx"]]
                  for row in json.loads(read_text(overview)) if row.get("frame_idx")}
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"cannot read --overview {overview}: {type(error).__name__}: {error}") from None
    known, bad = [], []
    for question in questions:
        if frames := chosen.get(key(question["video"], question["question"])):
            question["overview_frames"] = frames
            known.append(question)
        else:
            bad.append((question["id"], "no frames chosen for it"))
    check_bad(bad, len(questions), max_bad, overview)
    return env_config, known, bad
