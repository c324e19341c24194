"""Subtitles of a video as [[start_s, end_s, text], ...], in order: of .srt, .vtt and LongVideoBench's files.

LongVideoBench's JSON files are lists of {"start": "00:00:01.5", "end": "00:00:03", "line": text} or of
{"timestamp": [1.5, 3.0], "text": text}, in the time of the film that the video was cut from; its
`starting_timestamp_for_subtitles` is where the cut begins. Whisper's have {"segments": [...]} of such lines.
Formats: https://github.com/longvideobench/LongVideoBench longvideobench/longvideobench_dataset.py,
https://www.w3.org/TR/webvtt1; SubRip has no specification. FFmpeg's demuxers are not used: they lose much
without a word, as all of a .vtt file behind a time that cannot be read, a number as caption of a .srt file,
minus signs, and that a cue ends before it begins.
"""

import codecs
import html
import json
import math
import re
from pathlib import Path

from common import UserError
from sources.rows import is_number
from sources.shapes import RowFault, seconds, without_nan

MARKS_OF_UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
CLOCK = r"\d{1,9}(?:\s?:\s?\d{1,9}){1,2}(?:\s?[.,]\s?\d{1,9})?"  # with spaces, as machines translate
TIMES = re.compile(rf"\s*({CLOCK})[\s\-–—=]*(?:>|→|&gt;)\s*({CLOCK})(?:\s.*)?")
BEGINS_WITH_CLOCK = re.compile(r"\s*-?\d+\s?:\s?\d\d\s?:\s?\d\d(\s?[.,]\s?\d+)?")
NUMBER = re.compile(r"\s*(\d{1,9})\s*")
HEADER = re.compile(r"(WEBVTT|STYLE|REGION)(\s|$)")  # blocks of a .vtt file that hold no speech
COMMENT = re.compile(r"(?<=\n\n)NOTE(?:\s.*?)??(?=\n\n|\Z)", re.DOTALL)
STREAM_TIME = re.compile(r"^X-TIMESTAMP-MAP=.*", re.MULTILINE)  # of a segment of a stream (RFC 8216, 3.5)
MARKUP = re.compile(r"</?(?:i|b|u|s|font|c|v|lang|ruby|rt)(?:[.\s][^<>]*)?/?>"  # tags of WebVTT and SubRip
                    r"|<[\d:.]+>|\{\\[^{}]*\}", re.IGNORECASE)  # times of words, and {\an8}
LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
ENTITY = re.compile(r"&(?:#\d+|#x[\da-f]+|[a-z]\w*);", re.IGNORECASE)


def read_subtitles(path, begin_s=0.0, duration_s=None):
    """The subtitles in a file that are on screen between `begin_s`, which becomes 0, and `duration_s` later.

    Returns ([[start_s, end_s, text], ...], [what is left out as it cannot be read, and why, ...]). Raises
    RowFault, UserError where none can be read."""
    text = re.sub(r"\r{0,2}\n|\r", "\n", read_unicode(path).replace("\ufeff", ""))  # files that were joined
    if str(path).lower().endswith(".json"):
        lines, faults = read_json(text, begin_s, duration_s)
    else:
        lines, faults = read_cues(text, str(path).lower().endswith(".vtt") or text.startswith("WEBVTT"))
    if faults and not lines:
        raise RowFault("subtitles cannot be read", faults[0])
    last_s, shown = math.inf if duration_s is None else duration_s, []
    for start_s, end_s, line in lines:
        start_s, end_s, line = start_s - begin_s, end_s - begin_s, " ".join(line.split())
        if line and end_s >= 0 and start_s < last_s:
            shown.append([round(max(0.0, start_s), 3), round(min(last_s, end_s), 3), line])
    return sorted(shown), faults


def read_unicode(path):
    """A file's text, in UTF-8, or in UTF-16 with a byte order mark: other encodings do not say which one they
    are. Raises UserError."""
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-16" if content.startswith(MARKS_OF_UTF16) else "utf-8")
        if "\0" in text:
            raise ValueError
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8, and not UTF-16 with a byte order mark"
        raise UserError(f"cannot read {path}: {reason}") from None
    return text


def checked(start, end, text, where):
    """(start_s, end_s, text) of times as texts or numbers. Raises RowFault."""
    start_s, end_s = (time if is_number(time) else seconds(time) for time in (start, end))
    if start_s > end_s:
        raise RowFault("it ends before it begins", where)
    return start_s, end_s, text


# ---------------------------------------------------------------------------------------------- .srt and .vtt
def read_cues(text, is_vtt):
    """([(start_s, end_s, text), ...], faults) of a .srt or .vtt file, without markup. Raises RowFault."""
    if len(set(STREAM_TIME.findall(text))) > 1:
        raise RowFault("subtitles cannot be read", "segments of a stream that begin at different times")
    cues, found, faults = [], [], []
    if is_vtt:
        faults = [f"times in a comment: {note[:60]!r}" for note in COMMENT.findall(text) if "-->" in note]
        text = COMMENT.sub("", text)
    for times, lines in cut_cues(text, is_vtt):
        if times is not None:
            cues.append((times, lines))
        elif cues and (not is_vtt or not cues[-1][1]):
            cues[-1][1].extend(lines)  # behind an empty line in its text
        elif any(lines):
            faults.append(f"text without times: {' '.join(lines)[:60]!r}")
    if not cues and not text.startswith("WEBVTT"):
        raise RowFault("subtitles cannot be read", "no line with times in them")
    for times, lines in cues:
        try:
            if not (match := TIMES.fullmatch(times)):
                raise RowFault("a time cannot be read", repr(times.strip()[:60]))
            start, end = (re.sub(r"\s", "", time) for time in match.groups())
            found.append(checked(start, end, plain_lines("\n".join(lines)), times.strip()[:60]))
        except RowFault as fault:
            faults.append(str(fault))
    return without_carried_lines(found), faults


def cut_cues(text, is_vtt):
    """[(its line of times, [its lines])] of all cues; the line is None of text that has none before it. What
    is no speech is left out: headers, identifiers, numbers of cues."""
    pieces = []
    for block in re.split(r"\n\n+", text.strip("\n")):
        if not (pieces and pieces[-1][0] is None and NUMBER.fullmatch("\n".join(pieces[-1][1]))):
            pieces.append((None, []))
        for line in block.split("\n"):
            times, lines = pieces[-1]
            if is_times(line, times is None and len(lines) < 2):
                pieces.append((line, []))
            else:
                lines.append(line)
    # the last line before the times of the next cue may be its number or identifier
    number = None  # of the cue
    for (times, lines), (following, _) in zip(pieces, pieces[1:]):
        if following is None or not lines:
            number = None
            continue
        match = NUMBER.fullmatch(lines[-1])
        if times is None:
            is_name = is_vtt or bool(match)
        else:  # no empty line between: where cues have numbers, and not a caption that is one
            is_name = bool(match) and number is not None and (len(lines) > 1 or int(match[1]) == number + 1)
        number = int(match[1]) if is_name and match else None
        if is_name:
            lines.pop()
    return [(times, lines) for times, lines in pieces
            if times is not None or not (is_vtt and HEADER.match("\n".join(lines)))]


def is_times(line, begins_block):
    """Whether a line is meant to hold the times of a cue. begins_block: it is one of the first two lines
    behind an empty one."""
    if "-->" in line:
        return begins_block or re.search(CLOCK, line) is not None
    match = BEGINS_WITH_CLOCK.match(line)
    return match is not None and (begins_block or match[1] is not None)


def plain_lines(text):
    """A text without markup: tags of WebVTT and SubRip, positions as {\\an8}; entities are read once."""
    text = MARKUP.sub("", LINE_BREAK.sub("\n", text))
    text = ENTITY.sub(lambda match: html.unescape(match[0]), text)
    return "\n".join(filter(None, map(str.strip, text.split("\n"))))


def without_carried_lines(cues):
    """Cues without the lines that only stay on screen from the cue before: captions that roll up, as those
    that YouTube makes, say each line again above the next one, and once more alone for a hundredth of a
    second."""
    fresh, before, before_end_s = [], [], None
    for start_s, end_s, text in cues:
        lines = text.split("\n") if text else []
        carried = 0
        if before_end_s is not None and abs(before_end_s - start_s) < 0.1:
            most = min(len(before), len(lines), 4)  # rows on screen
            carried = next(n for n in range(most, -1, -1) if before[len(before) - n:] == lines[:n])
        if carried == len(lines) and end_s - start_s > 0.1:
            carried = 0  # said again
        fresh.append((start_s, end_s, "\n".join(lines[carried:])))
        before, before_end_s = lines, end_s
    return fresh


# ------------------------------------------------------------------------------------------------------- JSON
def read_json(text, begin_s, duration_s):
    """([(start_s, end_s, text), ...], faults) of LongVideoBench's lists, or Whisper's. An end that is
    missing is the video's, a text that is null is none. Raises RowFault."""
    try:
        rows = without_nan(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise RowFault("subtitles cannot be read", f"{type(error).__name__}: {error}") from None
    if isinstance(rows, dict) and "segments" in rows:  # Whisper's
        rows = rows["segments"]
    if not isinstance(rows, list):
        raise RowFault("subtitles cannot be read", "not a list of lines")
    found, faults = [], []
    for row in rows:
        try:
            start, end = row["timestamp"] if "timestamp" in row else (row["start"], row["end"])
            line = row["text"] if "text" in row else row["line"]
            if end is None:
                end = begin_s + duration_s if duration_s else start
            if not isinstance(line, str | int | float | None):
                raise RowFault("its text is no text", str(row)[:60])
            found.append(checked(start, end, "" if line is None else str(line), str(row)[:60]))
        except RowFault as fault:
            faults.append(str(fault))
        except (LookupError, TypeError, ValueError):
            faults.append(f"a line without times or text: {str(row)[:60]}")
    return found, faults
