"""Tables with quotes as people write them, lists written as text, and files found by what rows call them."""

import csv
import json
import unicodedata

import av
import numpy as np
import pytest
from cases import all_hold

from common import UserError
from sources.benchmarks import convert
from sources.files import VIDEOS, FileIndex, read_annotations
from sources.images import save_image
from sources.read import read_questions
from sources.shapes import RowFault, read_list
from video import open_video

NAMES = ["id", "video", "question", "options", "answer"]


def table(tmp_path, text, suffix=".tsv"):
    """The rows of a file as lists, with the fault's reason and details where one cannot be read."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(text.encode())
    rows = [row for _, _, row in read_annotations([path])]
    return [row.args if isinstance(row, RowFault) else [row[name] for name in row if name[:1] != "_"]
            for row in rows]


def lines(*rows):
    return "".join("\t".join(row) + "\n" for row in rows)


# ----------------------------------------------------------------------------------------------------- tables
def test_quotes_that_are_text_in_a_tsv_stay(tmp_path):
    def holds(text):
        rows = [["q1", "v", "first?", "['a', 'b']", "A"],
                ["q2", "v", text, "['a', 'b']", "B"],
                ["q3", "v", 'how long is 12"', "['a', 'b']", "A"],
                ["q4", "v", 'The "last"', "['a', 'b']", "B"]]
        assert table(tmp_path, lines(NAMES, *rows)) == rows
        last = [[*row[:2], *row[3:], row[2]] for row in rows]  # a text at a line's end
        assert table(tmp_path, lines(NAMES, *last)) == last

    all_hold(holds, [[text] for text in (
        '"Hello is said by whom?', '"Hello" is said by whom?', '"Yes" or "no"', '"', 'a "b" c', 'is 12"',
        '"Stop", he says: "go"', 'it\'s "', '12" or 13"?')])


def test_what_csv_writers_quote_is_read_as_they_meant_it(tmp_path):
    """Both quotings of pandas and csv.writer, and the line ends of Windows, with or without the last."""
    rows = [["q1", "v", "Who?\n(A) Ann, or\n(B) Bob", "['a', \"it's\"]", 'say "B"'],
            ["", "v", "", '""', "\n"],
            ["q2", "v", 'a\ttab, a comma and a "quote"', '["a", "b"]', '"B"'],
            ["q3", "v", "x", "y", "last\nline"]]
    for suffix, delimiter in ((".tsv", "\t"), (".csv", ",")):
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
            with open(tmp_path / "w", "w", newline="", encoding="utf-8") as file:
                csv.writer(file, delimiter=delimiter, quoting=quoting).writerows([NAMES, *rows])
            text = (tmp_path / "w").read_bytes().decode()
            for written in (text, text.replace("\r\n", "\n"), text.rstrip("\r\n"), "\ufeff" + text):
                assert table(tmp_path, written, suffix) == rows


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_rows_that_cannot_be_told_are_named_by_their_line_and_the_next_are_read(tmp_path, suffix):
    good = "q,v,x,y,B\n"

    def holds(text, reason, line, num_more=0):
        written = ",".join(NAMES) + "\n" + good + text + good
        written = written.replace(",", "\t" if suffix == ".tsv" else ",")
        first, fault, *more, last = table(tmp_path, written, suffix)
        assert first == last == ["q", "v", "x", "y", "B"] and len(more) == num_more
        assert reason in fault[0] and f"line {line}" in fault[1]

    all_hold(holds, [
        ("q,v,x,y\n", "not as many", 3), ("q,v,x,y,B,C\n", "not as many", 3), ("q\n", "not as many", 3),
        ("\n\nq,v,x,y,,B\n", "not as many", 5), ('q,v,"say ""x"" now" then,y,B\n', "quotes", 3),
        ('q,v,"say \\"x\\" now",y,B\n', "quotes", 3), ('q,v,"x\ny" z,y,B\n', "quotes", 3, 1),
        ('q,v,"a ""b"" c,y,B\n', "quotes", 3)])
    if suffix == ".tsv":  # a line that was cut
        holds('q,v,"x,y\nq,v,is 12",y,B\n', "lines that are rows", 3, 1)


def test_a_quote_that_swallows_rows_of_a_csv_is_named(tmp_path):
    def holds(second, third, reason):
        rows = table(tmp_path, f"{','.join(NAMES)}\nq1,v,x,y,A\n{second}\n{third}\nq4,v,x,y,A\n", ".csv")
        assert [row[0] for row in rows[::3]] == ["q1", "q4"] and len(rows) == 4
        assert reason in rows[1][0] and "line 3" in rows[1][1]
        assert rows[2] == next(csv.reader([third]))

    all_hold(holds, [
        ('q2,v,"Hello?,y,B', "q3,v,x,y,A", "quotes"), ('q2,v,"Hello?,y,B', 'q3,v,say "x",y,A', "quotes"),
        ('q2,v,"Hello?,y,B', 'q3,v,is 12",y,A', "lines that are rows"),
        ('q2,v,x,y,"Hello?', 'q3,v,x,y,is 12"', "lines that are rows"),
        ('q2,v,"Hello" is said,y,B', "q3,v,x,y,A", "quotes")])


def test_odd_tables(tmp_path):
    good = ["q", "v", "x", "y", "B"]
    expected = [dict(zip(NAMES, good))]
    for text, rows in (
            (lines(NAMES + [""], good + [""]), expected), (lines(NAMES, good + ["", ""]), expected),
            (lines([""] + NAMES, ["0"] + good), expected),
            ("\n" + lines(NAMES, [""] * 5, good) + "\n\t\n", expected),
            (lines(NAMES, good).replace("\n", "\r"), expected), (lines(NAMES), []), ("", []), ("\n", [])):
        (tmp_path / "a.TSV").write_bytes(text.encode())
        assert [row for _, _, row in read_annotations([tmp_path / "a.TSV"])] == rows

    def is_refused(text, why):
        (tmp_path / "a.csv").write_bytes(text.encode())
        with pytest.raises(UserError, match=why):
            list(read_annotations([tmp_path / "a.csv"]))

    all_hold(is_refused, [("id,video,id\n1,2,3\n", "a.csv: two fields have the same name: line 1"),
                          ('id,"vi"deo\n', "a.csv: a field's quotes.*line 1"), ("id\n\0\n", "UTF-16")])


def test_a_swallowed_question_comes_out_of_convert_and_a_faulty_line_is_counted(tmp_path, capsys):
    (tmp_path / "v.mp4").touch()
    row = lambda number, text: [f"q{number}", "v", text, "['a', 'b']", "AB"[number % 2]]
    texts = ["What?", '"Hello is said by whom?', "x", '"over\nlines"', 'The "last"?']
    rows = [row(number, text) for number, text in enumerate(texts)]
    (tmp_path / "a.tsv").write_text(lines(["question_id", *NAMES[1:]], *rows, ["q9", "v"]))
    made, named = convert("videomme", [tmp_path / "a.tsv"], tmp_path, tmp_path / "o.jsonl")
    assert [q["question"] for q in made] == [text.replace('"over\nlines"', "over\nlines") for text in texts]
    assert [q["answer"] for q in made] == [row[4] for row in rows]
    assert [(line["row"], line["details"], line["kept"]) for line in named] == [
        ("q3", "lines 5 to 6", True), ("a.tsv row 6", "line 8: 2 of 5", False)]
    assert "5 of 6 questions" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- backslashes in lists
def test_backslashes_in_a_list_written_as_text():
    def holds(text, *expected):
        assert read_list(text) == list(expected)

    latex = [r"$\frac{1}{2}$", r"\beta_1", r"3 \times 10^8", r"\nu", r"\rho", r"\alpha", r"\text{m}",
             r"x \to 0", r"\neq", r"\nsim", r"\nonumber", r"\nRightarrow", r"\b", r"\{x\}", r"\tan x",
             r"\right)", r"\xi", r"\underline{u}", r"C:\temp\new"]
    all_hold(holds, [
        ("['" + "', '".join(latex) + "']", *latex), ('["' + '", "'.join(latex) + '"]', *latex),
        (repr(latex), *latex), (json.dumps(latex), *latex),
        *((f"['{text}', 'b']", text, "b") for text in latex),
        *((json.dumps([text]), text) for text in latex), *((repr([text]), text) for text in latex)])
    all_hold(holds, [
        (r"['it\'s', 'a\"b']", "it's", 'a"b'), (r'["a\"b", "c\/d"]', 'a"b', "c/d"),
        (r"['\u03b1', '\x41']", "α", "A"), (r'["\u03b1", "\ud83d\ude00"]', "α", "😀"),
        (r"['one\ntwo', 'a\tb']", "one\ntwo", "a\tb"), (r'["one\r\ntwo", "\\frac"]', "one\r\ntwo", r"\frac"),
        (r"['one\ntwo', '\frac', '\\beta']", "one\ntwo", r"\frac", r"\beta"),
        (r"['D:\\', 'a\\\\b']", "D:\\", r"a\\b"),
        (r"['\begin{pmatrix}1 \\ 2\end{pmatrix}', 'b']", r"\begin{pmatrix}1 \\ 2\end{pmatrix}", "b"),
        ('["one\ntwo", "b"]', "one\ntwo", "b")])


def test_what_json_made_of_a_backslash_is_mended_or_named(tmp_path, capsys):
    """A file written by hand has "\\frac" with one backslash. Of a question file it is said, and stays."""
    (tmp_path / "v.mp4").touch()
    texts = {r"$\frac{1}{2}$": r"$\frac{1}{2}$", r"\beta or \rho": r"\beta or \rho",
             r"2 \times 3": r"2 \times 3", r"a\u000bb\u0000": "a b",
             r"a\tbig\none\r\n": "a\tbig\none", "plain": "plain"}
    row = ('{"question_id": "%s", "video": "v", "question": "Is it %s", "options": ["%s", "x"], '
           '"answer": "A"}\n')
    (tmp_path / "a.jsonl").write_text("".join(row % (n, text, text) for n, text in enumerate(texts)))
    rows, named = convert("videomme", [tmp_path / "a.jsonl"], tmp_path, tmp_path / "o.jsonl")
    assert [(q["question"], q["options"]) for q in rows] == [
        (f"Is it {text}", [text, "x"]) for text in texts.values()]
    assert [(line["row"], line["kept"]) for line in named] == [(str(n), True) for n in range(4)]
    assert read_questions(tmp_path / "o.jsonl", 0)[0] == rows
    # at the beginning of an option, where white space is cut off
    latex = [r"\frac{1}{2}", r"\theta", r"\nabla f", r"\neq 0"]
    marked = [f"{letter}. {text}" for letter, text in zip("ABCD", latex)]
    for options in (latex, marked, dict(zip("ABCD", latex)), "\n".join(marked).replace("\n", "\\n")):
        raw = {"question_id": "1", "video": "v", "question": "Is it?", "options": options, "answer": "A"}
        (tmp_path / "b.jsonl").write_text(json.dumps(raw).replace(r"\\", "\\"))
        (question,), named = convert("videomme", [tmp_path / "b.jsonl"], tmp_path, tmp_path / "p.jsonl")
        assert question["options"] == latex
        assert [line["reason"] for line in named] == ["a control character was in its text"]

    good = json.dumps(rows[-1])
    (tmp_path / "q.jsonl").write_text("".join(good.replace("plain", text) + "\n" for text in texts))
    capsys.readouterr()
    usable, bad = read_questions(tmp_path / "q.jsonl", 0)
    assert len(usable) == len(texts) and not bad
    assert r"q.jsonl: 4 questions hold control characters (5: '\x0c')" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- files by name
def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return FileIndex(folder, VIDEOS)


def test_videos_of_each_suffix_are_found_and_opened(tmp_path):
    """The containers that video.py opens, by the suffixes under which their muxers write them."""
    written = {"mp4": ".m4v .mp4 .f4v", "mov": ".mov .qt .MOV", "3gp": ".3gp", "3g2": ".3g2",
               "matroska": ".mkv", "webm": ".webm", "avi": ".avi .divx", "mpegts": ".ts .m2ts .mts",
               "mpeg": ".mpg .mpeg", "vob": ".vob", "flv": ".flv", "asf": ".wmv .asf",
               "ogg": ".ogv .ogm .ogg", "gif": ".gif", "apng": ".apng"}
    codecs = {"webm": "libvpx", "ogg": "libvpx", "mpegts": "mpeg2video", "mpeg": "mpeg2video",
              "vob": "mpeg2video", "flv": "flv", "asf": "wmv2", "gif": "gif", "apng": "apng"}

    def holds(form, suffix):
        folder = tmp_path / form
        folder.mkdir(exist_ok=True)
        with av.open(str(folder / f"x{suffix}"), "w", format=form) as container:
            stream = container.add_stream(codecs.get(form, "mpeg4"), 25)
            stream.width, stream.height = 32, 32
            stream.pix_fmt = {"gif": "rgb8", "apng": "rgb24"}.get(form, "yuv420p")
            for image in np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
            container.mux(stream.encode())
        index = FileIndex(folder, VIDEOS)
        found = index.find(f"elsewhere/x{suffix}")
        assert found == folder / f"x{suffix}" and open_video(str(found)).frames_at((0.0,))
        assert index.expected(f"y{suffix}") == folder / f"y{suffix}"
        found.rename(folder / "alone.dat")  # what it is does not hang on its name
        assert FileIndex(folder, VIDEOS).find("alone.dat")
        (folder / "alone.dat").rename(folder / f"only{suffix}")
        assert FileIndex(folder, VIDEOS).find("only") and FileIndex(folder, VIDEOS).find("only.mp4")
        (folder / f"only{suffix}").unlink()

    all_hold(holds, [(form, suffix) for form, suffixes in written.items() for suffix in suffixes.split()])


def test_names_with_dots_suffixes_and_capitals(tmp_path):
    index = put(tmp_path, "a.b.c.mp4", "video_1.5x.flv", "lecture.ts.mp4", "UP.M4V",
                "two.mp4", "two.m4v", "bare",
                "with.mp4", "with", "film.mp4", "film.gif", "film.ogg", "v.dat", "w.webm")

    def holds(name, found):
        assert index.find(name) == (found and tmp_path / found)

    all_hold(holds, [
        ("a.b.c", "a.b.c.mp4"), ("a.b.c.mp4", "a.b.c.mp4"),
        ("video_1.5x", "video_1.5x.flv"), ("video_1", None),
        ("lecture.ts", "lecture.ts.mp4"), ("UP", "UP.M4V"), ("UP.m4v", "UP.M4V"), ("UP.mp4", "UP.M4V"),
        ("two.M4V", "two.m4v"), ("two.mp4", "two.mp4"), ("bare", "bare"), ("with", "with.mp4"),
        ("film", "film.mp4"), ("film.gif", "film.gif"), ("v.dat", "v.dat"), ("v", None), ("w.wmv", "w.webm")])
    for name in ("two", "two.avi"):
        with pytest.raises(RowFault, match="two files fit its name"):
            index.find(name)
    for name, path in (("x", "x.mp4"), ("x.m4v", "x.m4v"), ("/d/x.MPG", "d/x.MPG"), ("a.b", "a.b.mp4")):
        assert index.expected(name) == tmp_path / path


def test_a_name_is_found_however_its_accents_are_composed(tmp_path):
    name, forms = "d\u00e9fil\u00e9_\ud55c", ("NFC", "NFD")
    written = {form: unicodedata.normalize(form, name) for form in forms}
    assert written["NFC"] != written["NFD"]
    for of_row, of_file in (forms, forms[::-1]):
        folder = tmp_path / of_row
        index = put(folder, f"{written[of_file]}/{written[of_file]}.m4v", f"other/{written[of_file]}.m4v")
        found = index.find(f"{written[of_row]}/{written[of_row]}.m4v")
        assert found == folder / written[of_file] / f"{written[of_file]}.m4v"
        (folder / f"{written[of_file]}.png").touch()
        image = save_image(f"{written[of_row]}.png", folder / "a.json", folder / "o.jsonl", "q")
        assert image == f"{written[of_file]}.png"
