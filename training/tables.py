"""What evaluation reports: how many were right, of what kind and duration, and with which settings.

    table_rows(name, mode, episodes, questions, num_bad)    rows of the tables, from what eval.py wrote
    run_settings(config, env), questions_hash(questions)    what else a number depends on
    report(by_kind, by_duration, skipped)                   all of it as text

Accuracy is a mean over questions, as the paper's is (row "all"), and over tasks: the mean of what each kind
has (row "task mean"; MLVU's own M-Avg). Skipped questions are left out in `right`, and count as wrong in
`skips wrong`, a column that stands where there are any. A question whose meta has "judge": true is played,
but has no grade until a judge gives one: it is in no accuracy, and counted in the column `for a judge`. Of
questions without evidence no zoom is known to hit: they are in no hit rate. Intervals are Wilson's, 95%.
"""

import hashlib
import json
import math
from bisect import bisect
from collections import defaultdict
from pathlib import Path

from training.environment import chosen_by_file
from zoom_env import ANY_FPS

# {title: what a cell says, with fields of a row}
COLUMNS = {
    "policy": "{policy}", "mode": "{mode}", "kind": "{kind:s}", "duration": "{duration}",
    "n": "{num_questions}", "skipped": "{skipped:d}", "for a judge": "{waits_for_judge:d}",
    "right": "{accuracy:.1%}",
    "95% interval": "{accuracy_low:.1%} - {accuracy_high:.1%}", "skips wrong": "{accuracy_skipped_wrong:.1%}",
    "frames": "{frames_per_question:.1f}", "zooms": "{zooms_per_question:.2f}", "hit": "{hit_rate:.1%}",
    "invalid": "{invalid_call_rate:.1%}", "no tool": "{calls_without_tool:d}",
    "refused": "{refused:d}", "untagged": "{untagged:d}", "said": "{generated_per_question:.0f}",
    "tokens": "{tokens_per_question:.0f}", "s": "{seconds_per_question:.3f}"}
SETTINGS = {
    "policy": "{policy}", "mode": "{mode}", "served": "{settings[served_model]}",
    "refused": "{settings[refused]}", "judge": "{settings[judge]}", "protocol": "{settings[protocol]}",
    "overview": "{settings[overview]}", "frames": "{settings[overview_max_frames]:d}",
    "fps": "{settings[overview_fps]:g}", "zooms": "{settings[max_zooms]:d} x {settings[zoom_max_frames]:d}",
    "pixels": "{settings[min_pixels]:d} - {settings[max_pixels]:d}",
    "clips": "{settings[clips]}", "votes": "{settings[votes]:d}", "gate": "{settings[gate]}",
    "temperature": "{settings[temperature]:g}", "dtype": "{settings[dtype]}", "seed": "{settings[seed]:d}",
    "videos missing": "{missing_videos:d}", "evidence": "{num_with_evidence:d}",
    "questions": "{questions_sha256:.12}", "played": "{played_sha256:.12}"}
ONLY_WITH = {  # columns that stand only where a row has any of these
    "skips wrong": "skipped", "for a judge": "waits_for_judge", "played": "skipped"}
TASK_MEAN = "task mean"  # a row beside those of the kinds
DURATION_LIMITS_S = (60, 180, 600, 1800, 3600)  # a video of 60 s is in the second group
DURATIONS = ("under 1 min", "1 to 3 min", "3 to 10 min", "10 to 30 min", "30 to 60 min", "60 min and more")
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
    groups (meta's duration_group) where any question has one, names in the file's order; else DURATIONS where
    all have a duration_s; {} where not."""
    groups, lengths_s = {}, {}
    for number, question in questions.items():
        meta = question.get("meta") or {}
        groups[number], lengths_s[number] = meta.get("duration_group"), meta.get("duration_s")
    if any(group is not None for group in groups.values()):
        return {number: group_name(groups[number])
                for number in sorted(groups, key=lambda number: group_rank(groups[number]))}
    if not all(map(is_length, lengths_s.values())):
        return {}
    return {number: DURATIONS[bisect(DURATION_LIMITS_S, lengths_s[number])]
            for number in sorted(lengths_s, key=lengths_s.get)}


def is_length(value):
    return type(value) in (int, float) and 0 <= value < math.inf


def group_rank(group):
    """Names come first, then numbers in order, then the questions that have no group."""
    if group is None:
        return math.inf
    return group if is_length(group) else -1


def group_name(group):
    if group is None:
        return "unknown"
    return f"group {group}" if is_length(group) else str(group)


# --------------------------------------------------------------------------------------------------- figures
def interval(right, total):
    """Wilson's 95% interval of a share. total: above 0."""
    z, p = 1.96, right / total
    centre, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, (centre - half) / (1 + z * z / total)), min(1.0, (centre + half) / (1 + z * z / total))


def table_rows(name, mode, episodes, questions, num_bad=0):
    """Rows of the tables for one policy and mode.

    Args:
        episodes: the dicts that eval.py's `evaluate` wrote of those that were played.
        questions: {number: question}, all that were asked; the video of one without an episode was missing or
            could not be read.
        num_bad: rows of the file that are no question, of unknown kind.
    Returns: (by_kind, by_duration). by_kind: all questions, each kind, the mean over kinds where there are
        several, and rows that count what was skipped ("no video", "bad row"). by_duration: each group of
        `durations`, with "duration" in words."""
    played = {e["number"] for e in episodes}
    skipped = {number: question for number, question in questions.items() if number not in played}
    seconds = ratio(sum(e["seconds"] for e in episodes), len(episodes))
    labels = {"policy": name, "mode": mode, "kind": "all"}

    def rows_by(title, groups):
        """A row for each of the groups, {number: its group}."""
        rows = []
        for group in dict.fromkeys(groups.values()):
            numbers = {number for number in groups if groups[number] == group}
            row = figures([e for e in episodes if e["number"] in numbers],
                          [question for number, question in skipped.items() if number in numbers], 0, seconds)
            row["skipped"] = row["skipped"] or None  # 0 is not shown
            rows.append(labels | {title: group} | row)
        return rows

    kinds = rows_by("kind", {number: kind_of(question) for number, question in questions.items()})
    total = labels | figures(episodes, list(skipped.values()), num_bad, seconds) | {
        "task_mean": mean(row["accuracy"] for row in kinds),
        "task_mean_skipped_wrong": mean(row["accuracy_skipped_wrong"] for row in kinds),  # without bad rows
        "num_tasks": len(kinds),
        "num_with_evidence": sum(bool(questions[number].get("evidence")) for number in played),
        "missing_videos": len({question["video"] for question in skipped.values()}),
        "questions_sha256": questions_hash(questions.values()),
        "played_sha256": questions_hash(questions[number] for number in played)}
    # rows without episodes of their own
    empty, more = dict.fromkeys(total) | labels, []
    if len(kinds) > 1:
        more.append(empty | {"kind": TASK_MEAN, "num_questions": total["num_questions"],
                             "accuracy": total["task_mean"],
                             "accuracy_skipped_wrong": total["task_mean_skipped_wrong"]})
    for kind, number in (("no video", len(skipped)), ("bad row", num_bad)):
        if number:
            more.append(empty | {"kind": kind, "num_questions": 0, "skipped": number})
    return [total, *kinds, *more], rows_by("duration", durations(questions))


def figures(episodes, skipped, num_bad, seconds):
    """The numbers in a row. skipped: the questions without an episode. seconds: a question's."""
    graded = [grade >= 0.5 for grade in known(e["right"] for e in episodes)]
    low, high = interval(sum(graded), len(graded)) if graded else (None, None)
    skipped_wrong = num_bad + sum(not waits_for_judge(question) for question in skipped)
    zooms, invalid = known_sum(episodes, "zooms"), known_sum(episodes, "invalid")
    return {
        "num_questions": len(episodes), "skipped": len(skipped) + num_bad,
        "accuracy": ratio(sum(graded), len(graded)), "accuracy_low": low, "accuracy_high": high,
        "invalid_call_rate": None if invalid is None else invalid / max(1, invalid + zooms),
        "hit_rate": ratio(known_sum(episodes, "hits"), known_sum(episodes, "hits_known")),
        "refused": known_sum(episodes, "refused") or None,
        "untagged": known_sum(episodes, "untagged"),
        "calls_without_tool": known_sum(episodes, "calls_without_tool"),
        "seconds_per_question": seconds if episodes else None,
        "frames_per_question": ratio(known_sum(episodes, "frames"), len(episodes)),
        "zooms_per_question": ratio(zooms, len(episodes)),
        "generated_per_question": ratio(known_sum(episodes, "generated"), len(episodes)),
        "tokens_per_question": ratio(known_sum(episodes, "tokens"), len(episodes)),
        "waits_for_judge": len(episodes) - len(graded),
        "accuracy_skipped_wrong": ratio(sum(graded), len(graded) + skipped_wrong)}


def known(values):
    return [value for value in values if value is not None]


def known_sum(episodes, key):
    """The sum over the episodes that have a number there; None where none has."""
    values = known(e.get(key) for e in episodes)
    return sum(values) if values else None


def mean(values):
    """Of those that are not None."""
    values = known(values)
    return ratio(sum(values), len(values))


def ratio(part, whole):
    """None where nothing is divided by, or there is nothing to divide."""
    return part / whole if whole and part is not None else None


# -------------------------------------------------------------------------------------------------- settings
def environment_settings(env_config):
    """What of an EnvConfig a number depends on; the system prompt as its hash."""
    names = ("protocol", "overview", "overview_fps", "overview_max_frames", "max_zooms", "zoom_max_frames",
             "zoom_fps", "min_pixels", "max_pixels", "frame_unit", "max_turn_tokens")
    settings = {name: getattr(env_config, name) for name in names}
    if env_config.overview_fps >= ANY_FPS:  # as many frames, whatever the length
        settings["overview_fps"] = None
    prompt = env_config.system_prompt.encode()
    return settings | {"system_prompt_sha256": hashlib.sha256(prompt).hexdigest()}


def run_settings(config, environment):
    """What stands beside a number: of eval.py's Config, with its dtype, and of `environment_settings`."""
    names = "temperature", "dtype", "seed", "max_response_tokens", "max_questions"
    settings = environment | {name: getattr(config, name) for name in names}
    if chosen_by_file(config):
        settings["overview"] = Path(config.overview).name
    return settings


def questions_hash(questions):
    """sha256 of the id, question, options and answer of question rows, in whatever order they are."""
    lines = sorted(json.dumps([q["id"], q["question"], q.get("options") or None, q["answer"]])
                   for q in questions)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------ text
def report(by_kind, by_duration, skipped):
    """All that is printed: the table by kind, and by duration where they differ; what was skipped, by name;
    then all questions, and what they were played with."""
    whole = [row for row in by_kind if row["kind"] in ("all", TASK_MEAN)]
    played = [row for row in whole if row.get("settings")]
    parts = [short_table(COLUMNS, by_kind)]
    if len({row["duration"] for row in by_duration}) > 1:
        parts.append(short_table(COLUMNS, [row | {"kind": None} for row in by_duration]))
    if skipped:
        parts.append("\n".join(skipped_lines(skipped)))
    parts.append(short_table(COLUMNS, whole))
    if played:
        parts.append(short_table(SETTINGS, played))
    return "\n\n".join(parts)


def skipped_lines(skipped):
    """A line for each reason, as a missing video is, with the questions that it kept from being played."""
    by_reason = defaultdict(list)
    for row in skipped:
        by_reason[row["reason"]].append(row["row"])
    lines = []
    for reason, names in by_reason.items():
        lines.append(f"skipped {', '.join(shortened(names, '{} more'))}: {reason}")
    return shortened(lines, "and {} more reasons, see skipped.jsonl")


def shortened(items, more):
    """The first MOST_SHOWN items; then, where some are left, the text `more` with their number."""
    left = len(items) - MOST_SHOWN
    return [*items[:MOST_SHOWN], more.format(left)] if left > 0 else items


def short_table(columns, rows):
    """A table without the columns that would say nothing of any row."""
    def says(title, words, row):
        if title in ONLY_WITH:
            return row.get(ONLY_WITH[title])
        return cell_text(words, row) != "-"

    return text_table({title: words for title, words in columns.items()
                       if any(says(title, words, row) for row in rows)}, rows)


def text_table(columns, rows):
    """Dicts as an aligned table, the first three columns to the left. columns: as COLUMNS."""
    lines = [list(columns)] + [[cell_text(words, row) for words in columns.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = []
    for line in lines:
        left = [text.ljust(width) for text, width in zip(line[:3], widths[:3])]
        right = [text.rjust(width) for text, width in zip(line[3:], widths[3:])]
        texts.append("  ".join(left + right))
    return "\n".join(texts)


def cell_text(words, row):
    """What a cell says; "-" where a field with a format is None, or is not there."""
    try:
        return words.format(**row)
    except (TypeError, LookupError):
        return "-"
