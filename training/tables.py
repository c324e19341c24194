"""What evaluation reports: how many were right, of what kind and duration, and with which settings.

    figures(name, mode, episodes, questions, num_bad)   rows of the table, from what eval.py wrote
    settings(config, env), questions_hash(questions)    what else a number depends on
    report(by_kind, by_duration, skipped)               all of it as text

Accuracy is a mean over questions, as the paper's is (row "all"), and over tasks: the mean of what each kind
has (row "task mean"; MLVU's own M-Avg). Skipped questions are left out in `right`, and count as wrong in
`skips wrong`, a column that stands where there are any. A question whose meta has "judge": true is played,
but has no grade until a judge gives one: it is in no accuracy, and counted in the column `for a judge`. Of
questions without evidence no zoom is known to hit: they are in no hit rate. Intervals are Wilson's, 95%.
"""

import hashlib
import json
import math
from pathlib import Path

from training.environment import ANY_FPS

COLUMNS = {
    "policy": "{policy}", "mode": "{mode}", "kind": "{kind}", "n": "{num_questions}",
    "skipped": "{skipped:d}", "for a judge": "{waits_for_judge:d}", "right": "{accuracy:.1%}",
    "95% interval": "{accuracy_low:.1%} - {accuracy_high:.1%}", "skips wrong": "{accuracy_skipped_wrong:.1%}",
    "frames": "{frames_per_question:.1f}", "zooms": "{zooms_per_question:.2f}", "hit": "{hit_rate:.1%}",
    "invalid": "{invalid_call_rate:.1%}", "no tool": "{calls_without_tool:d}",
    "untagged": "{untagged:d}", "tokens": "{tokens_per_question:.0f}", "s": "{seconds_per_question:.3f}"}
SETTINGS = {
    "policy": "{policy}", "mode": "{mode}", "protocol": "{settings[protocol]}",
    "overview": "{settings[overview]}", "frames": "{settings[overview_max_frames]:d}",
    "fps": "{settings[overview_fps]:g}", "zooms": "{settings[max_zooms]:d} x {settings[zoom_max_frames]:d}",
    "pixels": "{settings[min_pixels]:d} - {settings[max_pixels]:d}",
    "temperature": "{settings[temperature]:g}", "dtype": "{settings[dtype]}", "seed": "{settings[seed]:d}",
    "videos missing": "{missing_videos:d}", "evidence": "{num_with_evidence:d}",
    "questions": "{questions_sha256:.12}", "played": "{played_sha256:.12}"}
ONLY_WITH = {  # columns that stand only where a row has any of these
    "skips wrong": "skipped", "for a judge": "waits_for_judge", "played": "skipped"}
TASK_MEAN = "task mean"  # a row beside those of the kinds
DURATIONS = (  # up to below so many seconds
    (60, "under 1 min"), (180, "1 to 3 min"), (600, "3 to 10 min"), (1800, "10 to 30 min"),
    (3600, "30 to 60 min"), (math.inf, "60 min and more"))
MOST_SHOWN = 50  # reasons, and questions of one reason, that are printed; skipped.jsonl has all


# ----------------------------------------------------------------------------------------- kinds of questions
def kind_of(question):
    """The task that a question belongs to: its meta's kind, else its source."""
    return (question.get("meta") or {}).get("kind") or question.get("source") or "other"


def waits_for_judge(question):
    """Whether its grade is not for us to give."""
    return (question.get("meta") or {}).get("judge") is True


def durations(questions):
    """{number: how long its video is, in words} of {number: question}, the shortest first: the data set's own
    groups (meta's duration_group) where any question has one, names in the file's order; else DURATIONS (60 s
    is "1 to 3 min") where all have a duration_s; {} where not."""
    metas = {number: question.get("meta") or {} for number, question in questions.items()}
    of = lambda name: {number: meta.get(name) for number, meta in metas.items()}
    is_number = lambda x: type(x) in (int, float) and 0 <= x < math.inf
    groups, lengths_s = of("duration_group"), of("duration_s")
    if any(group is not None for group in groups.values()):
        rank = lambda number: (groups[number] is None, groups[number] if is_number(groups[number]) else -1)
        words = lambda x: "unknown" if x is None else f"group {x}" if is_number(x) else str(x)
        return {number: words(groups[number]) for number in sorted(groups, key=rank)}
    if not all(map(is_number, lengths_s.values())):
        return {}
    return {number: next(words for below_s, words in DURATIONS if lengths_s[number] < below_s)
            for number in sorted(lengths_s, key=lengths_s.get)}


# --------------------------------------------------------------------------------------------------- figures
def interval(right, total):
    """Wilson's 95% interval of a share."""
    if not total:
        return 0.0, 1.0
    z, p = 1.96, right / total
    centre, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, (centre - half) / (1 + z * z / total)), min(1.0, (centre + half) / (1 + z * z / total))


def figures(name, mode, episodes, questions, num_bad=0):
    """Rows of the table for one policy and mode.

    Args:
        episodes: the dicts that eval.py's `evaluate` wrote of those that were played.
        questions: {number: question}, all that were asked; the video of one without an episode was missing or
            could not be read.
        num_bad: rows of the file that are no question, of unknown kind.
    Returns: (by_kind, by_duration). by_kind: all questions, each kind, the mean over kinds where there are
        several, and rows that count what was skipped ("no video", "bad row"). by_duration: each group of
        `durations`, with "duration" in words."""
    played = {e["number"] for e in episodes}
    left = {number: question for number, question in questions.items() if number not in played}
    seconds = share(sum(e["seconds"] for e in episodes), len(episodes))
    play = {"policy": name, "mode": mode, "kind": "all"}

    def by(group):  # {number: its group} -> [(group, figures)], in the order of the dict
        for label in dict.fromkeys(group.values()):
            yield label, count([e for e in episodes if group[e["number"]] == label],
                               [q for number, q in left.items() if group[number] == label], 0, seconds)

    total = play | count(episodes, list(left.values()), num_bad, seconds)
    kinds = [play | {"kind": kind} | row for kind, row in by({n: kind_of(q) for n, q in questions.items()})]
    lengths = [play | {"duration": words} | row for words, row in by(durations(questions))]
    total |= {
        "task_mean": mean(row["accuracy"] for row in kinds),
        "task_mean_skipped_wrong": mean(row["accuracy_skipped_wrong"] for row in kinds),  # without bad rows
        "num_tasks": len(kinds),
        "num_with_evidence": sum(bool(questions[number].get("evidence")) for number in played),
        "missing_videos": len({question["video"] for question in left.values()}),
        "questions_sha256": questions_hash(questions.values()),
        "played_sha256": questions_hash(questions[number] for number in played)}
    # rows without episodes of their own
    empty, more = dict.fromkeys(total) | play, []
    if len(kinds) > 1:
        more.append(empty | {"kind": TASK_MEAN, "num_questions": total["num_questions"],
                             "accuracy": total["task_mean"],
                             "accuracy_skipped_wrong": total["task_mean_skipped_wrong"]})
    for what, number in (("no video", len(left)), ("bad row", num_bad)):
        if number:
            more.append(empty | {"kind": what, "num_questions": 0, "skipped": number})
    for row in kinds + lengths:
        row["skipped"] = row["skipped"] or None  # what is nothing is not shown
    return [total, *kinds, *more], lengths


def count(episodes, left, num_bad, seconds):
    """Figures of some episodes and of the questions that were left out."""
    graded = [e["right"] >= 0.5 for e in episodes if e["right"] is not None]
    wrong = num_bad + sum(not waits_for_judge(question) for question in left)
    low, high = interval(sum(graded), len(graded)) if graded else (None, None)
    known = lambda key: [e[key] for e in episodes if e[key] is not None]
    total = lambda key: sum(known(key)) if known(key) else None
    zooms, seen, invalid = total("zooms"), total("hits_known"), total("invalid")
    return {
        "num_questions": len(episodes), "skipped": len(left) + num_bad,
        "accuracy": share(sum(graded), len(graded)), "accuracy_low": low, "accuracy_high": high,
        "invalid_call_rate": None if invalid is None else invalid / max(1, invalid + zooms),
        "hit_rate": total("hits") / seen if seen else None, "untagged": total("untagged"),
        "calls_without_tool": total("calls_without_tool"),
        "seconds_per_question": seconds if episodes else None,
        **{f"{key}_per_question": share(total(key), len(episodes)) for key in ("frames", "zooms", "tokens")},
        "waits_for_judge": len(episodes) - len(graded),
        "accuracy_skipped_wrong": share(sum(graded), len(graded) + wrong)}


def share(part, whole):
    return part / whole if whole else None


def mean(values):
    values = [value for value in values if value is not None]
    return share(sum(values), len(values))


# -------------------------------------------------------------------------------------------------- settings
def environment(env):
    """What of an EnvConfig a number depends on; the system prompt as its hash."""
    names = ("overview", "overview_fps", "overview_max_frames", "max_zooms", "zoom_max_frames", "min_pixels",
             "max_pixels", "frame_unit")
    return {name: getattr(env, name) for name in ("protocol", *names)} | {
        "overview_fps": None if env.overview_fps >= ANY_FPS else env.overview_fps,
        "system_prompt_sha256": hashlib.sha256(env.system_prompt.encode()).hexdigest()}


def settings(config, env):
    """What stands beside a number: of eval.py's Config, with its dtype, and of an `environment`."""
    names = "temperature", "dtype", "seed", "max_turn_tokens", "max_response_tokens", "max_questions"
    chosen = {"overview": Path(config.overview).name} if (config.overview or "").endswith(".json") else {}
    return env | {name: getattr(config, name) for name in names} | chosen


def questions_hash(questions):
    """sha256 of the id, question, options and answer of question rows, in whatever order they are."""
    lines = sorted(json.dumps([q["id"], q["question"], q.get("options") or None, q["answer"]])
                   for q in questions)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------ text
def report(by_kind, by_duration, skipped):
    """All that is printed: the table by kind, and by duration where they differ; what was skipped, by name;
    then all questions, and what they were played with."""
    total = [row for row in by_kind if row["kind"] in ("all", TASK_MEAN)]
    parts = [text_table(shown(COLUMNS, by_kind), by_kind)]
    if len({row["duration"] for row in by_duration}) > 1:
        columns = {name.replace("kind", "duration"): words.replace("{kind}", "{duration}")
                   for name, words in shown(COLUMNS, by_duration).items()}
        parts.append(text_table(columns, by_duration))
    if skipped:
        parts.append("\n".join(skipped_lines(skipped)))
    parts.append(text_table(shown(COLUMNS, total), total))
    if played := [row for row in total if row.get("settings")]:
        parts.append(text_table(shown(SETTINGS, played), played))
    return "\n\n".join(parts)


def shown(columns, rows):
    """The columns without those that would say nothing of any row."""
    says = lambda name, words, row: row.get(ONLY_WITH[name]) if name in ONLY_WITH else cell(words, row) != "-"
    return {name: words for name, words in columns.items() if any(says(name, words, row) for row in rows)}


def skipped_lines(skipped):
    """A line for each reason, as a missing video is, with the questions that it kept from being played."""
    by_reason = {}
    for row in skipped:
        by_reason.setdefault(row["reason"], []).append(row["row"])

    def first(items, more):
        left = len(items) - MOST_SHOWN
        return items if left <= 0 else [*items[:MOST_SHOWN], more.format(left)]

    lines = [f"skipped {', '.join(first(names, '{} more'))}: {reason}" for reason, names in by_reason.items()]
    return first(lines, "and {} more reasons, see skipped.jsonl")


def text_table(columns, rows):
    """Dicts as an aligned table, the first three columns to the left. columns: {title: what the cell says,
    with fields of the dict}."""
    lines = [list(columns)] + [[cell(words, row) for words in columns.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    align = lambda i, text: text.ljust(widths[i]) if i < 3 else text.rjust(widths[i])
    return "\n".join("  ".join(align(i, text) for i, text in enumerate(line)) for line in lines)


def cell(words, row):
    """What a cell says; "-" where a field with a format is None, or is not there."""
    try:
        return words.format(**row)
    except (TypeError, LookupError):
        return "-"
