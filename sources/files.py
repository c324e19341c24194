"""Files of data sets: annotations (JSON, JSONL, TSV, CSV, Parquet), videos and subtitles in folders."""

import csv
import io
import json
import os
import re
import unicodedata
from pathlib import Path, PurePosixPath

from tqdm.contrib.concurrent import thread_map

from common import UserError, read_text, write_jsonl
from sources.shapes import RowFault, without_nan

ANNOTATIONS = (".json", ".jsonl", ".tsv", ".csv", ".parquet")
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".qt", ".3gp", ".3g2", ".mj2", ".f4v", ".mk3d",
          ".divx", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".mpe", ".vob", ".flv", ".wmv", ".asf", ".ogv",
          ".ogm", ".ogg", ".gif", ".apng")
BESIDE = (".ogg", ".gif", ".apng")  # perhaps the sound or a preview of the video
SUBTITLES = (".srt", ".vtt", ".json")


# ------------------------------------------------------------------------------------------------ annotations
def read_annotations(paths):
    """(path, where, row) of all rows in annotation files, or in the files of folders; a row is a dict, or the
    RowFault of one that cannot be read. Raises UserError for a file that cannot."""
    files = []
    for path in map(Path, paths):
        inside = [path]
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in ANNOTATIONS)
        if not inside:
            raise UserError(f"{path} has no {', '.join(ANNOTATIONS)} in it")
        files += inside
    for path in files:
        for number, row in enumerate(read_file(path), 1):
            where = f"{path.name} row {number}"
            if not isinstance(row, dict | RowFault):
                row = RowFault("not a row", str(row)[:60])
            yield path, where, without_nan(row)


def read_file(path):
    """The rows of one file."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        return read_parquet(path)
    if kind not in ANNOTATIONS:
        raise UserError(f"{path}: what it is must show in its name: {', '.join(ANNOTATIONS)}")
    text = read_text(path)
    if kind in (".tsv", ".csv"):
        try:
            return read_table(text, "\t" if kind == ".tsv" else ",")
        except RowFault as fault:
            raise UserError(f"cannot read {path}: {fault}") from None
    if kind == ".jsonl":
        return [json_line(line) for line in text.split("\n") if line.strip()]
    try:
        return list(json_rows(json.loads(text)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def read_table(text, delimiter):
    """The rows of a text with tabs or commas between its fields, whose first record has their names; of one
    that cannot be told a RowFault, after which the next line is read. A row over several lines says which, as
    "_lines". Raises RowFault for the names."""
    csv.field_size_limit(1 << 30)
    lines, names, rows, at = list(io.StringIO(text)), [], [], 0
    while at < len(lines):
        fields, end = [], at + 1
        try:
            if lines[at].strip():
                fields, end = read_record(lines, at, delimiter, len(names))
        except RowFault as fault:
            if not names:
                raise
            rows.append(fault)
        if not names:
            names = [name.strip() for name in fields]
            if len(set(filter(None, names))) < sum(map(bool, names)):
                raise RowFault("two fields have the same name", f"line {at + 1}")
        elif any(fields):
            row = {name: field for name, field in zip(names, fields) if name}
            rows.append(row | {"_lines": f"lines {at + 1} to {end}"} if end > at + 1 else row)
        at = end
    return rows


def read_record(lines, at, delimiter, num_fields):
    """(the fields, the number of the line behind it) of the record that begins with a line. num_fields: how
    many names there are, or 0. Raises RowFault.

    As in RFC 4180, a field in quotes may hold delimiters, line breaks and doubled quotes; csv.writer and
    pandas write TSV files so, too. Others know no quotes (IANA, text/tab-separated-values): in a TSV, a quote
    that opens no such field is text. What it would swallow up to another quote tells it."""
    where, line = f"line {at + 1}", lines[at].rstrip("\n")
    reader = csv.reader(map(lines.__getitem__, range(at, len(lines))), delimiter=delimiter, strict=True)
    try:
        fields = without_surplus(next(reader), num_fields)
        fault = RowFault("not as many fields as names", f"{where}: {len(fields)} of {num_fields}")
        if num_fields in (0, len(fields)):
            if not holds_rows(fields, delimiter):
                return fields, at + reader.line_num
            fault = RowFault("a quoted field runs over lines that are rows", where)
    except csv.Error as error:
        fault = RowFault("a field's quotes cannot be read", f"{where}: {error}")
    fields = without_surplus(line.split("\t"), num_fields)
    if delimiter != "\t" or num_fields not in (0, len(fields)):
        raise fault
    for number, field in enumerate(fields):
        if quoted := re.fullmatch(r'"((?:[^"]|"")*)"', field):
            fields[number] = quoted[1].replace('""', '"')
        elif re.match(r'".*(""|\\")', field):  # neither as it is nor as it should be
            raise fault
    return fields, at + 1


def without_surplus(fields, num_fields):
    """Fields without those at the end that have no name and are empty."""
    while len(fields) > num_fields and not fields[-1]:
        fields = fields[:-1]
    return fields


def holds_rows(fields, delimiter):
    """Whether a field over several lines holds rows: in a TSV a tab; in a CSV, where a text may hold commas,
    two lines that by themselves have as many fields as the record."""
    for number, field in enumerate(fields):
        alone = [1 + line.count(delimiter) for line in field.split("\n")]
        if delimiter == "\t" and len(alone) > 1 and max(alone) > 1:
            return True
        alone[0] += number
        alone[-1] += len(fields) - 1 - number
        if alone.count(len(fields)) > 1:
            return True
    return False


def json_rows(value, group=""):
    """The rows of a JSON file: of a list, or of objects of lists or objects, whose keys on the way to a row
    become its "_group"."""
    is_group = isinstance(value, dict) and all(isinstance(inside, dict | list) for inside in value.values())
    if is_group and value:
        for key, inside in value.items():
            yield from json_rows(inside, f"{group}/{key}")
        return
    for row in value if isinstance(value, list) else [value]:
        yield {"_group": group} | row if isinstance(row, dict) else row


def json_line(line):
    try:
        return json.loads(line, strict=False)
    except (ValueError, RecursionError) as error:
        return RowFault("not JSON", str(error))


def read_parquet(path):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: to read Parquet files, pip install pyarrow") from None
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from None


# --------------------------------------------------------------------------------------------- files by names
class FileIndex:
    """The files in a folder and its subfolders, found by what a row calls them: those with some suffixes by a
    name with one of these or none, others by their whole name. How a name's accents are composed (NFC, or NFD
    as a Mac unpacks it) does not matter."""

    def __init__(self, folder, suffixes):
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is not a folder")
        self.folder, self.suffixes, self.by_stem, seen = Path(folder), suffixes, {}, set()
        for place, folders, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(place)
            if real in seen:  # links in a circle
                folders.clear()
                continue
            seen.add(real)
            for name in sorted(names):
                if not name.startswith("._"):
                    self.by_stem.setdefault(self.stem(composed(name)), []).append(Path(place, name))

    def stem(self, name):
        """A file's name without its suffix, where that is one of ours."""
        stem, suffix = os.path.splitext(name)
        return stem if suffix.lower() in self.suffixes else name

    def find(self, name, folder=None):
        """The file that a row calls `name`: with or without folders and suffix. Of several with this name the
        one with the most of its folders, its suffix, a video's suffix, and a folder with `folder` in its
        name. None where there is none; RowFault where two fit."""
        name = PurePosixPath(composed(str(name)))
        parents = [part for part in name.parts[:-1] if part not in (".", "..", "/")]

        def fit(path):
            own = [composed(part) for part in path.relative_to(self.folder).parts[:-1]]
            same = os.path.commonprefix([own[::-1], parents[::-1]])
            suffix = path.suffix.lower()
            same_suffix = (suffix == name.suffix.lower()) + (path.suffix == name.suffix)
            return (len(same), suffix in self.suffixes, same_suffix, suffix not in BESIDE,
                    bool(folder) and any(folder in part for part in own))

        found = self.by_stem.get(self.stem(name.name)) or self.by_stem.get(name.name, [])
        found = sorted(found, key=fit)
        if len(found) > 1 and fit(found[-1]) == fit(found[-2]):
            raise RowFault("two files fit its name", f"{found[-2]}, {found[-1]}")
        return found[-1] if found else None

    def expected(self, name):
        """Where a file that is missing would be."""
        name = str(name).lstrip("/")
        return self.folder / (name if name.lower().endswith(self.suffixes) else name + self.suffixes[0])


def composed(name):
    """A name in NFC."""
    return unicodedata.normalize("NFC", name)


def on_disk(path):
    """A path, or the same one as the disk composes its accents."""
    forms = [path, *(unicodedata.normalize(form, str(path)) for form in ("NFC", "NFD"))]
    return Path(next(filter(os.path.isfile, forms), path))


def relative_to_file(path, file):
    """A path as rows of `file` have it: from its folder on, with forward slashes."""
    return Path(os.path.relpath(os.path.abspath(path), os.path.realpath(Path(file).parent))).as_posix()


def check_out(out, questions):
    """The Path of a trajectory file that is made of a question file. Raises UserError."""
    out = Path(out)
    if out.suffix != ".jsonl" or out.resolve() == Path(questions).resolve():
        raise UserError(f"--out {out}: it must be another file whose name ends with .jsonl")
    return out


def write_skipped(out, skipped):
    """Beside the file `out`: [(row, reason)] of what is not in it."""
    rows = [{"row": where, "reason": reason} for where, reason in skipped]
    write_jsonl(out.with_suffix(".skipped.jsonl"), rows)


def moved_question(question, root, file):
    """A question row as it stands in `file`; its own files are relative to the folder `root`."""
    moved = question | {"video": relative_to_file(Path(root, question["video"]), file)}
    if question.get("images"):
        moved["images"] = [relative_to_file(Path(root, name), file) for name in question["images"]]
    return moved


def of_videos(function, items, what):
    """[function(item), ...], eight at a time, with a bar. what: what the bar calls them."""
    return thread_map(function, items, max_workers=8, desc=what, unit="video", dynamic_ncols=True,
                      disable=not items)
