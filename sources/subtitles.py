"""Subtitles of a video as [[start_s, end_s, text], ...], in order: of .srt, .vtt and LongVideoBench's files.

LongVideoBench's JSON files are lists of {"start": "00:00:01.5", "end": "00:00:03", "line": text} or of
{"timestamp": [1.5, 3.0], "text": text}, in the time of the film that the video was cut from; its
`starting_timestamp_for_subtitles` is where the cut begins.
Format: https://github.com/longvideobench/LongVideoBench longvideobench/longvideobench_dataset.py
"""

import html
import json
import math
import re

from common import read_text
from sources.shapes import RowFault, seconds, without_nan

TIMES = re.compile(r"^\s*([\d:.,]+)\s*-->\s*([\d:.,]+).*$", re.MULTILINE)


def read_subtitles(path, begin_s=0.0, duration_s=None):
    """The subtitles in a file that are on screen between `begin_s`, which becomes 0, and `duration_s` later.
    Raises RowFault, UserError where it cannot be read."""
    text = read_text(path)
    lines = read_json(text, begin_s, duration_s) if str(path).lower().endswith(".json") else read_srt(text)
    last_s, shown = math.inf if duration_s is None else duration_s, []
    for start_s, end_s, line in lines:
        start_s, end_s, line = start_s - begin_s, end_s - begin_s, " ".join(line.split())
        if line and start_s <= end_s and end_s >= 0 and start_s < last_s:
            shown.append([round(max(0.0, start_s), 3), round(min(last_s, end_s), 3), line])
    return sorted(shown)


def read_srt(text):
    """(start_s, end_s, text) of the blocks of a .srt or .vtt file, without markup."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    times = list(TIMES.finditer(text))
    if not times:
        raise RowFault("subtitles cannot be read", "no line with times in them")
    for match, following in zip(times, times[1:] + [None]):
        block = text[match.end():following.start() if following else None]
        if following:  # before its times stands the number of the next one
            block = re.sub(r"\n\s*\d+\s*$", "\n", block)
        block = re.sub(r"<[^<>]{1,100}>|\{\\[^{}]{1,100}\}", "", block)
        yield seconds(match[1]), seconds(match[2]), html.unescape(block)


def read_json(text, begin_s, duration_s):
    """(start_s, end_s, text) of LongVideoBench's lists. An end that is missing is the video's."""
    try:
        rows = without_nan(json.loads(text))
        for row in rows:
            start, end = row["timestamp"] if "timestamp" in row else (row["start"], row["end"])
            if end is None:
                end = begin_s + duration_s if duration_s else start
            yield seconds(start), seconds(end), str(row["text"] if "text" in row else row["line"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, RecursionError) as error:
        raise RowFault("subtitles cannot be read", f"{type(error).__name__}: {error}") from None
