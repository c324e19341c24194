"""Subtitle files: what is said and when, and what cannot be read."""

import io
import json
import time

import av
import pytest
from cases import all_hold

from common import UserError
from sources.benchmarks import convert
from sources.subtitles import read_subtitles

SRT = """\ufeff1\r
00:00:00,500 --> 00:00:01,250\r
<font color="white" size=".72c">Hello &amp; welcome</font>\r
to 2024\r
\r
2\r
00:01:02,000 --> 00:01:03,000\r
<i>12</i>\r
"""
ONE, TWO, THREE = ("00:00:01{0}000 --> 00:00:02{0}000\n", "00:00:03{0}000 --> 00:00:04{0}000\n",
                   "00:00:05{0}000 --> 00:00:06{0}000\n")


def write(path, value):
    path.write_bytes(value if isinstance(value, bytes) else
                     (value if isinstance(value, str) else json.dumps(value)).encode())
    return path


def srt(*blocks):
    return "\n".join(blocks).format(",")


def vtt(*blocks):
    return "WEBVTT\n\n" + "\n".join(blocks).format(".")


@pytest.fixture
def holds(tmp_path):
    """A function that checks (file's name, content, what is shown, words of what is left out, in order)."""
    def check(name, content, shown, *named):
        found, faults = read_subtitles(write(tmp_path / name, content))
        assert found == shown, found
        assert len(faults) == len(named) and all(map(str.__contains__, faults, named)), faults

    return check


def test_subtitle_files(tmp_path):
    (tmp_path / "a.srt").write_bytes(SRT.encode())
    shown = [[0.5, 1.25, "Hello & welcome to 2024"], [62, 63, "12"]]
    assert read_subtitles(tmp_path / "a.srt") == (shown, [])
    one = [{"start": "00:00:09.5", "end": "00:00:12", "line": "b"},
           {"start": "00:00:01", "end": "00:00:02", "line": "before"},
           {"start": "00:00:30", "end": "00:00:31", "line": "after"}]
    two = [{"timestamp": [11, None], "text": "c"}, {"timestamp": [10.5, 11.0], "text": " d\n e "}]
    assert read_subtitles(write(tmp_path / "a.json", one), 10, 4.0)[0] == [[0, 2, "b"]]
    assert read_subtitles(write(tmp_path / "b.json", two), 10, 4.0)[0] == [[0.5, 1, "d e"], [1, 4, "c"]]
    for text in ("no times", ""):
        (tmp_path / "c.srt").write_text(text)
        with pytest.raises(ValueError, match="subtitles cannot be read"):
            read_subtitles(tmp_path / "c.srt")
    with pytest.raises(ValueError, match="subtitles cannot be read"):
        read_subtitles(write(tmp_path / "d.json", [{"text": "x"}]))


def test_what_stands_beside_speech_is_not_shown(holds):
    """Comments, styles, identifiers, settings, numbers; and a number that is said is."""
    a, b, c = [1, 2, "a"], [3, 4, "b"], [5, 6, "c"]
    all_hold(holds, [
        ("v.vtt", vtt("Mark one", ONE + "a\n", "NOTE may not translate well\nat all\n", "Mark two", TWO + "b\n"), [a, b]),
        ("v.vtt", "WEBVTT - a title\nKind: captions\nLanguage: en\n\nSTYLE\n::cue {color: red}\n\nREGION\nid:r\n\n"
         + ONE.format(".").strip() + " region:r line:0 align:start\na", [a]),
        ("v.vtt", vtt("STYLE\n::cue {{color: red}}\n" + ONE + "a"), [a]), ("v.vtt", "WEBVTT\n" + ONE.format(".") + "a", [a]),
        ("v.vtt", vtt("NOTE\n\n" + ONE + "NOTE this\n"), [[1, 2, "NOTE this"]]),
        ("v.vtt", vtt("NOTE\n" + ONE + "hidden\n", TWO + "b"), [b], "times in a comment"),
        ("v.vtt", "WEBVTT\nX-TIMESTAMP-MAP=LOCAL:00:00:00.000,MPEGTS:9\n\n" + ONE.format(".") + "a\n\n"
         + "WEBVTT\nX-TIMESTAMP-MAP=LOCAL:00:00:00.000,MPEGTS:9\n\n" + TWO.format(".") + "b", [a, b]),
        ("v.srt", vtt("NOTE x\n", ONE + "a"), [a]), ("v.vtt", ONE.format(".") + "a", [a]), ("v.vtt", "WEBVTT\n", []),
        # numbers
        ("n.vtt", vtt(ONE + "3\n", TWO + "It was in\n1999\n", THREE + "c"), [[1, 2, "3"], [3, 4, "It was in 1999"], c]),
        ("n.srt", srt(ONE + "3\n", TWO + "It was in\n1999\n", THREE + "c"), [[1, 2, "3"], [3, 4, "It was in 1999"], c]),
        ("n.srt", srt("1", ONE + "3\n", "2", TWO + "It was\n\n1999\n", "3", THREE + "c"), [[1, 2, "3"], [3, 4, "It was 1999"], c]),
        ("n.srt", srt("1", ONE + "1999", "2", TWO + "b", "5", THREE + "c"), [[1, 2, "1999"], b, c]),
        ("n.srt", srt(ONE + "1999", TWO + "b"), [[1, 2, "1999"], b]), ("n.srt", srt("1", ONE + "a\n   ", "2", TWO + "b"), [a, b]),
        ("n.srt", srt("1\n", ONE, "a\n", "2\n", TWO, "b\n"), [a, b]),
        # cues without a line between, and lines within a cue
        ("g.vtt", vtt(ONE + "a", TWO + "b"), [a, b]), ("g.vtt", vtt("1", ONE + "a", "2", TWO + "b"), [a, b]),
        ("g.srt", srt("1", ONE + "a\n\na\n", "2", TWO + "b"), [[1, 2, "a a"], b]), ("g.vtt", vtt(ONE, "a\n", TWO, TWO + "b"), [a, b]),
        ("g.vtt", vtt(ONE + "a\n", "more\n", TWO + "b"), [a, b], "text without times: 'more'"),
        ("g.srt", srt("junk\n", "1", ONE + "a"), [a], "text without times: 'junk'")])


def test_times_as_people_write_them(holds, tmp_path):
    all_hold(holds, [
        *(("t.srt", f"1\n{times}\na", [[start_s, end_s, "a"]]) for times, start_s, end_s in [
            ("1:02:03,5 --> 1:02:04,25", 3723.5, 3724.25), ("00:01.000 --> 00:02", 1, 2), ("00:00:01-->00:00:02", 1, 2),
            ("100:00:01,000\t-->\t100:00:02,000 X1:10 X2:20", 360001, 360002), ("00:00:05,000 --> 00:00:05,000", 5, 5),
            ("00:00:01, 500 --> 00:00:02, 000", 1.5, 2), ("00: 00: 01,500 -> 00: 00: 03,000", 1.5, 3),
            ("00:00:01,000 —> 00:00:02,000", 1, 2), ("23:59:59,999 --> 24:00:01,000", 86399.999, 86401)]),
        ("t.vtt", vtt("00:01,000 --> 00:02,000\na\n", TWO + "b"), [[1, 2, "a"], [3, 4, "b"]]),
        ("t.srt", srt("1", ONE + "a\n", "2", "00:00:03,000 -> 00:00:04,000\nb\n", "3", THREE + "c"), [[1, 2, "a"], [3, 4, "b"], [5, 6, "c"]]),
        ("t.srt", srt("1", "00:00:05,000 --> 00:00:09,000\nlate\n", "2", "00:00:01,000 --> 00:00:08,000\nearly"),
         [[1, 8, "early"], [5, 9, "late"]])])
    all_hold(holds, [
        (name, make("1", ONE + "a\n", "2", times + "\nlost one\n", "3", THREE + "c"), [[1, 2, "a"], [5, 6, "c"]], named)
        for make, name in ((srt, "t.srt"), (vtt, "t.vtt")) for times, named in [
            ("00:00:03{0}590 --> NaN:NaN:NaN,NaN", "a time cannot be read"), ("NaN --> NaN", "a time cannot be read"),
            ("-00:00:03{0}000 --> 00:00:04{0}000", "a time cannot be read"), ("00:00:04{0}000 --> 00:00:03{0}000", "ends before it begins"),
            ("00:00:03{0}000 - 00:00:04{0}000", "a time cannot be read"), ("00:00:03:12 --> 00:00:04:12", "a time cannot be read"),
            ("00:00:03{0}000 -->", "a time cannot be read")]])
    with pytest.raises(ValueError, match="subtitles cannot be read: a time cannot"):
        read_subtitles(write(tmp_path / "all.srt", "00:00:01.00,00:00:02.00\na\n"))
    maps = "".join(f"WEBVTT\nX-TIMESTAMP-MAP=LOCAL:00:00:00.000,MPEGTS:{n}\n\n" + vtt(ONE + "a\n\n")[8:] for n in (0, 9))
    with pytest.raises(ValueError, match="begin at different times"):
        read_subtitles(write(tmp_path / "maps.vtt", maps))


def test_markup_is_removed_and_nothing_else(holds):
    all_hold(holds, [("m" + suffix, make(ONE.format("{0}") + text), [[1, 2, plain]]) for text, plain in [
        ("if a < b and c > d then", "if a < b and c > d then"), ("x --> y, <!-- z -->", "x --> y, <!-- z -->"),
        ("<v.loud Ann>Hi</v> <c.yellow.bg>you</c><00:00:01.500><c> all</c>", "Hi you all"), ("<I>a</I> <b>b</b>\n<u>c</u> <s>d</s>", "a b c d"),
        ("<lang en-GB>a</lang> <ruby>b<rt>c</rt></ruby>", "a bc"), ("<font\ncolor='red'>a</font><br/>b", "a b"),
        ("{{\\an8}}{{\\i1}}a{{\\i0}} {{b}}", "a {b}"), ("<video> <unk> <3 <b>", "<video> <unk> <3"),
        ("a &amp; b &lt;i&gt; &amp;lt; &#39; R&notes &nbsp;c", "a & b <i> &lt; ' R&notes c")]
        for suffix, make in ((".srt", srt), (".vtt", vtt))])


def test_captions_that_roll_up_are_said_once(holds):
    """YouTube's automatic ones, as they come, with their spaces stripped, and as .srt without times of words."""
    rolling = ("00:00:00.080 --> 00:00:02.389 align:start position:0%\n \nhello<00:00:00.480><c> world</c>\n\n"
               "00:00:02.389 --> 00:00:02.399 align:start position:0%\nhello world\n \n\n"
               "00:00:02.399 --> 00:00:05.000 align:start position:0%\nhello world\nthis<00:00:03.000><c> is</c>\n\n"
               "00:00:05.000 --> 00:00:05.010 align:start position:0%\nthis is\n \n")
    shown = [[0.08, 2.389, "hello world"], [2.399, 5, "this is"]]
    plain = rolling.replace("<00:00:00.480><c>", "").replace("<00:00:03.000><c>", "").replace("</c>", "")
    all_hold(holds, [
        ("y.vtt", "WEBVTT\nKind: captions\n\n" + rolling, shown), ("y.vtt", "WEBVTT\n\n" + rolling.replace("\n \n", "\n\n"), shown),
        ("y.srt", plain.replace(".", ","), shown),
        ("y.vtt", vtt("00:01.000 --> 00:02.000\nNo.\n", "00:02.000 --> 00:03.000\nNo.\n"), [[1, 2, "No."], [2, 3, "No."]]),
        ("y.vtt", vtt("00:01.000 --> 00:02.000\na\nb\n", "00:05.000 --> 00:06.000\nb\nc\n"), [[1, 2, "a b"], [5, 6, "b c"]])])


def test_ends_of_lines_and_encodings(holds, tmp_path):
    shown = [[1, 2, "é a"], [3, 4, "b"]]
    for make, name in ((srt, "e.srt"), (vtt, "e.vtt")):
        text = make("1", ONE + "é\na\n", "2", TWO + "b\n")
        all_hold(holds, [(name, content, shown) for content in (
            text, text.strip(), text.replace("\n", "\r\n"), text.replace("\n", "\r"), text.replace("\n", "\r\r\n"),
            "\ufeff" + text, text.replace("\n2\n", "\n\ufeff2\n"), text.encode("utf-16"), b"\xfe\xff" + text.encode("utf-16-be"))])
    for content in (srt(ONE + "é").encode("cp1252"), srt(ONE + "a").encode("utf-16-le"), b"\xff\xfea", b"1\n\0"):
        with pytest.raises(UserError, match="cannot read .*f.srt"):
            read_subtitles(write(tmp_path / "f.srt", content))


def test_an_odd_line_of_json_costs_itself(holds):
    good, shown = {"timestamp": [0.5, 1], "text": 5}, [[0.5, 1, "5"]]
    all_hold(holds, [("j.json", [row, good], shown, *named) for row, *named in [
        ({"timestamp": [1.0, 3.0], "text": None},), ({"start": "0:01", "end": "0:02", "line": None},),
        ({"timestamp": ["x", 3], "text": "a"}, "a time cannot be read"), ({"timestamp": [float("inf"), 3], "text": "a"}, "a time"),
        ({"timestamp": [3, 2], "text": "a"}, "ends before it begins"), ({"timestamp": 3, "text": "a"}, "without times"),
        ({"timestamp": [1, 2, 3], "text": "a"}, "without times"), ({"timestamp": [None, 2], "text": "a"}, "a time"),
        ({"timestamp": [1, 2], "text": ["a"]}, "no text"), ({"start": "0:01", "line": "a"}, "without times"),
        (7, "without times"), (None, "without times"), ("text", "without times")]])
    all_hold(holds, [("j.json", [{"timestamp": [start, 0.25], "text": "a"}, good], [[0, 0.25, "a"], *shown])
                     for start in (1e-05, -1, 0, "0:00")])


def test_lines_of_whisper(holds):
    lines = [{"id": n, "seek": 0, "start": 2.5 * n, "end": 2.5 * n + 2, "text": f" Line {n}.", "tokens": [n]} for n in range(2)]
    whole = json.dumps({"text": " Line 0. Line 1.", "segments": lines, "language": "en"})
    holds("a.json", whole, [[0, 2, "Line 0."], [2.5, 4.5, "Line 1."]])


def test_convert_counts_what_is_left_out(tmp_path, capsys):
    raw = {"question_id": "1", "videoID": "a", "question": "What?", "options": ["x", "y"], "answer": "A"}
    for name in ("videos", "subs"):
        (tmp_path / name).mkdir()
    write(tmp_path / "subs" / "a.srt", srt("1", ONE + "a\n", "2", "00:00:03,000 --> NaN\nb\n"))
    (row,), named = convert("videomme", [write(tmp_path / "a.json", [raw])], tmp_path / "videos", tmp_path / "o.jsonl",
                            tmp_path / "subs")
    assert row["subtitles"] == [[1, 2, "a"]]
    assert [line["details"] for line in named if line["reason"] == "some subtitles cannot be read"] == [
        "1: a time cannot be read: '00:00:03,000 --> NaN'"]
    assert "some subtitles cannot be read 1" in capsys.readouterr().out


def test_well_formed_files_are_what_ffmpeg_reads(tmp_path):
    for make, name in ((srt, "srt"), (vtt, "webvtt")):
        text = make(*(f"{n}\n00:{n:02d}:01{{0}}{n:03d} --> 00:{n:02d}:02{{0}}500\nline {n}\nand {n * n}\n" for n in range(1, 60)))
        with av.open(io.BytesIO(text.encode()), format=name) as container:
            packets = [p for p in container.demux() if p.size]
            theirs = [[p.pts / 1000, (p.pts + p.duration) / 1000, " ".join(bytes(p).decode().split())] for p in packets]
        assert len(theirs) == 59 and read_subtitles(write(tmp_path / f"a.{name[-3:]}", text)) == (theirs, [])


def test_a_huge_file_of_nothing_much_takes_no_time(tmp_path):
    began = time.monotonic()
    for text in ("\r" * 200_000, "1" * 200_000 + "-->", "<c " * 100_000, "1\n" * 100_000, "&a" * 100_000,
                 srt(ONE + "a\n" * 50_000, "00:00:02,000 --> 00:00:03,000\n" + "a\n" * 50_000)):
        try:
            read_subtitles(write(tmp_path / "h.srt", text))
        except ValueError:
            pass
    assert time.monotonic() - began < 5
