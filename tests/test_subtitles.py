"""Subtitle files: what is said and when, and what cannot be read."""

import json

import pytest

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


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_subtitle_files(tmp_path):
    (tmp_path / "a.srt").write_bytes(SRT.encode())
    assert read_subtitles(tmp_path / "a.srt") == [[0.5, 1.25, "Hello & welcome to 2024"], [62, 63, "12"]]
    one = [{"start": "00:00:09.5", "end": "00:00:12", "line": "b"},
           {"start": "00:00:01", "end": "00:00:02", "line": "before"},
           {"start": "00:00:30", "end": "00:00:31", "line": "after"}]
    two = [{"timestamp": [11, None], "text": "c"}, {"timestamp": [10.5, 11.0], "text": " d\n e "}]
    assert read_subtitles(write(tmp_path / "a.json", one), 10, 4.0) == [[0, 2, "b"]]
    assert read_subtitles(write(tmp_path / "b.json", two), 10, 4.0) == [[0.5, 1, "d e"], [1, 4, "c"]]
    for text in ("no times", ""):
        (tmp_path / "c.srt").write_text(text)
        with pytest.raises(ValueError, match="subtitles cannot be read"):
            read_subtitles(tmp_path / "c.srt")
    with pytest.raises(ValueError, match="subtitles cannot be read"):
        read_subtitles(write(tmp_path / "d.json", [{"text": "x"}]))
