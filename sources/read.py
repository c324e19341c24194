"""Reads a file of questions or of trajectories, in our format or as the paper's data sets were released."""

from pathlib import Path

from common import read_rows, warn
from sources.released_data import SUFFIXES, either_row, message_row, read_released, released_question
from sources.rows import is_trajectory, question_error, question_of, trajectory_error
from sources.shapes import control_in


def read_questions(path, max_bad):
    """The question rows of a .jsonl file, or of a released data set (sources/released_data.py), and [(line,
    reason)] of those left out. Raises UserError."""
    if is_released(path):
        return warned(path, *read_released(path, max_bad, released_question))
    return warned(path, *read_rows(path, max_bad, question_error))


def read_trajectories(path, max_bad):
    """The trajectory rows of a .jsonl file, or the released set's messages, and the same. Raises
    UserError."""
    if is_released(path):
        return warned(path, *read_released(path, max_bad, message_row))
    return warned(path, *read_rows(path, max_bad, trajectory_error))


def read_either(path):
    """The rows of a file that one of these two reads, and [(line, reason)] of those that cannot be used,
    however many. Raises UserError."""
    if is_released(path):
        return read_released(path, 1.0, either_row)
    check = lambda row: trajectory_error(row) if is_trajectory(row) else question_error(row)
    return read_rows(path, 1.0, check)


def warned(path, rows, bad):
    """(rows, bad), with a warning where texts of the rows hold control characters. These stay, but
    in question and options of a released row, which come from its problem."""
    found = []
    for question in map(question_of, rows):
        problem = (question.get("meta") or {}).get("problem")
        control = control_in([question["question"], question.get("options"), problem])
        if control:
            found.append(f"{question['id']}: {control!r}")
    if found:
        warn(f"{path}: {len(found)} questions hold control characters ({found[0]}); "
             "was a backslash not escaped?")
    return rows, bad


def is_released(path):
    return Path(path).suffix.lower() in SUFFIXES
