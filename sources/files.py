"""Files of data sets: annotations (JSON, JSONL, TSV, CSV, Parquet), videos and subtitles in folders."""

import csv
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from common import UserError, read_text
from sources.shapes import RowFault, without_nan

ANNOTATIONS = (".json", ".jsonl", ".tsv", ".csv", ".parquet")
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
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
        csv.field_size_limit(1 << 30)
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if kind == ".tsv" else ",")
        try:
            return [{key: value for key, value in row.items() if key} for row in rows]
        except csv.Error as error:
            raise UserError(f"cannot read {path}: {error}") from None
    if kind == ".jsonl":
        return [json_line(line) for line in text.split("\n") if line.strip()]
    try:
        return list(json_rows(json.loads(text)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


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
    """The files with some suffixes in a folder and its subfolders, found by what a row calls them."""

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
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in suffixes and not name.startswith("._"):
                    self.by_stem.setdefault(stem, []).append(Path(place, name))

    def find(self, name, folder=None):
        """The file that a row calls `name`: with or without folders and suffix. Of several with this name the
        one with the most of its folders, its suffix, and a folder with `folder` in its name. None where there
        is none; RowFault where two fit."""
        name = PurePosixPath(str(name))
        stem = name.stem if name.suffix.lower() in self.suffixes else name.name
        parents = [part for part in name.parts[:-1] if part not in (".", "..", "/")]

        def fit(path):
            own = list(path.relative_to(self.folder).parts[:-1])
            same = os.path.commonprefix([own[::-1], parents[::-1]])
            return len(same), path.suffix == name.suffix, bool(folder) and any(folder in part for part in own)

        found = sorted(self.by_stem.get(stem, []), key=fit)
        if len(found) > 1 and fit(found[-1]) == fit(found[-2]):
            raise RowFault("two files fit its name", f"{found[-2]}, {found[-1]}")
        return found[-1] if found else None

    def expected(self, name):
        """Where a file that is missing would be."""
        name = str(name).lstrip("/")
        return self.folder / (name if name.lower().endswith(self.suffixes) else name + self.suffixes[0])


def relative_to_file(path, file):
    """A path as rows of `file` have it: from its folder on, with forward slashes."""
    return Path(os.path.relpath(os.path.abspath(path), os.path.realpath(Path(file).parent))).as_posix()


def in_threads(function, items, what):
    """[function(item), ...], eight at a time, with a bar. what: what the bar calls them."""
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(function, items)
        bar = tqdm(results, total=len(items), desc=what, unit="video", dynamic_ncols=True, disable=not items)
        return list(bar)
