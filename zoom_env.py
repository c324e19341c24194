"""The world that the policy acts in: video files, frames, the zoom tool, grading, rewards. No model in it.

One episode (paper, section 3.1): the policy first sees a few frames of the whole video, the overview. In each turn it
thinks, then either calls

    <video_zoom>{"segment": [start_s, end_s], "fps": n}</video_zoom>

and gets that clip as frames, at most 16 a call, or ends the episode with <answer>...</answer>. After `max_zooms` zooms
it has to answer.

    env = ZoomEnv(question, EnvConfig(), root="data")
    messages = env.reset()                      # system and user message, with the overview
    while not env.done:
        messages = env.step(policy(messages))   # the tool's reply, [] once the episode is over
    reward = env.reward()                       # {"reward": ..., "accuracy": ..., "format": ..., "tool": ...}

Anything that maps messages to text can play: our model, a served one, a script (data_prep.py has one).

Times are seconds of presentation time, counted from the video's first frame. A frame's tag holds the time of the frame
that is really shown. Nothing that the policy says can raise: it comes back to it as an error text.

Where the paper is silent: frames stand in the middle of equal slices of the interval that they sample (so a clip never
shows its neighbours); a segment that runs past the end of the video is cut there; a turn with neither a call nor an
answer is told so and costs one round; the question comes before the frames, as text that the frames are read with.
"""

import copy
import io
import json
import math
import os
import re
import stat
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path

import av
import numpy as np
import torch
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import VideoReformatter
from torchvision.transforms.v2 import functional as transforms

SYSTEM_PROMPT = """You answer a question about a video. You first see a few frames of the whole video, each after a tag \
with its number and its time in seconds. If they do not show what you need, look closer with the zoom tool: it returns \
frames of one segment of the video, at the frame rate that you ask for.

In each turn, write your reasoning inside <think> and </think>, and after it exactly one of these:
<video_zoom>{"segment": [start_sec, end_sec], "fps": n}</video_zoom> to look closer, with (end_sec - start_sec) * fps \
not above ZOOM_MAX_FRAMES;
<answer>your final answer</answer> to end. For a multiple-choice question answer with the letter of the option."""
MAY_ZOOM = "You may zoom in {left} more time(s), or answer now."
LAST_TURN = "You cannot zoom in any more. Give your final answer now, without <video_zoom>."


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class VideoError(Exception):
    """A video that cannot be opened or decoded; the message names the file and the reason."""


LONG_S = 600  # longer videos are overviewed by key frames


# ---------------------------------------------------------------------------------------------------- settings
@dataclass(frozen=True)
class EnvConfig:
    """What the policy sees and may do. Saved with each checkpoint (zoom_config.json), so that evaluation repeats it."""

    overview_fps: float = 0.5  # frames a second of the first look at the video
    overview_max_frames: int = 64  # ... and at most so many over the whole video
    overview: str = "auto"  # uniform; nearest_keyframe: the key frame within half a step, where there is one; auto: that
    # for videos of more than 10 minutes, of which an exact overview would decode nearly everything
    zoom_max_frames: int = 16  # a call may ask for (end - start) * fps up to this
    max_zooms: int = 4  # rounds before the last one, in which the policy has to answer; a failed call uses one up, too
    min_pixels: int = 25_088  # a frame is scaled up to at least 32 tokens of 28x28 pixels
    max_pixels: int = 100_352  # ... and down to at most 128
    accuracy_weight: float = 0.9  # reward for a right answer
    format_weight: float = 0.1  # reward when every turn is well formed and every zoom within the limit
    tool_weight: float = 0.5  # bonus when the answer is right and a zoom was made
    system_prompt: str = SYSTEM_PROMPT  # ZOOM_MAX_FRAMES in it is replaced by the number

    def __post_init__(self):
        for name in ("overview_fps", "overview_max_frames", "zoom_max_frames", "min_pixels", "max_pixels"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.overview not in ("auto", "uniform", "nearest_keyframe"):
            raise ValueError(f"overview must be auto, uniform or nearest_keyframe, not {self.overview}")
        if self.max_zooms < 0:
            raise ValueError(f"max_zooms must not be negative, not {self.max_zooms}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")


@dataclass
class Frame:
    time_s: float  # when it is on screen, seconds from the first frame
    image: torch.Tensor  # (3, H, W) uint8 RGB, H and W multiples of 28


@dataclass
class Message:
    role: str  # system, user or assistant
    content: list  # str and Frame items in reading order


# ------------------------------------------------------------------------------------------------------- video
ALLOWED_FORMATS = {"mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "asf",
                   "ogg"}  # containers that hold their own frames; playlists and the like are refused
MAX_SIDE = 8192  # pixels
MAX_FUTILE_PACKETS = 1000  # packets in a row that give no frame, after which a stream counts as broken
MAX_FUTILE_BYTES = 64e6  # bytes in a row that give no packet, after which it counts as ended


class VideoFile(io.FileIO):
    """What FFmpeg reads a video from: a file object, so that it resolves no URL or protocol. Ends where nothing more comes
    of what is read."""

    futile_bytes = 0  # read since the last packet

    def read(self, size=-1):
        self.futile_bytes += size
        return super().read(size) if self.futile_bytes < MAX_FUTILE_BYTES else b""


def count_packets(packets, file):
    for packet in packets:
        file.futile_bytes = 0
        yield packet


def refuse(url, flags, options):
    raise av.error.PermissionError(13, "it refers to another file")


class Video:
    """One open video file: `duration_s`, `fps` and the frame on screen at any time. Safe to share between threads.

    Only what can be seen is decoded: from the key frame before it on, without the frames that no other one refers to.
    Raises VideoError, naming the file, for anything but a regular local file with a video stream."""

    def __init__(self, path):
        self.path, self.file, self.container = str(path), None, None
        self.lock = threading.Lock()
        self.pixel_shape = (1.0, 1.0)  # height and width of a pixel on the screen, of the frames last shown
        self.reformatter = VideoReformatter()  # one a video: setting it up takes longer than converting a small frame
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise VideoError(f"{self.path}: not a regular file")
            self.file = VideoFile(self.path)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise VideoError(f"{self.path}: {getattr(error, 'strerror', None) or error}") from None
        try:  # the white list stops playlists before FFmpeg opens what they name
            self.container = av.open(self.file, options={
                "format_whitelist": ",".join(sorted(ALLOWED_FORMATS)), "max_pixels": str(MAX_SIDE * MAX_SIDE)},
                io_open=refuse)
            if not ALLOWED_FORMATS & set(self.container.format.name.split(",")):
                raise VideoError(f"{self.path}: format {self.container.format.name} is not a video container")
            videos = [s for s in self.container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not videos:
                raise VideoError(f"{self.path}: no video stream in it")
            self.stream = videos[0]
            if self.stream.codec_context is None:
                raise VideoError(f"{self.path}: no decoder for its video stream")
            self.time_base = self.stream.time_base
            if not 1e-12 < self.time_base < 1e4:
                raise VideoError(f"{self.path}: its time base is {self.time_base} s")
            self._read_index()
            # told to explode, the decoder reports each damage that it finds, instead of painting over it
            self.stream.codec_context.options = {"max_pixels": str(MAX_SIDE * MAX_SIDE)} | (
                {"err_detect": "explode"} if self._closed_gops() else {})
            self.stream.thread_type = "AUTO"
            self._read_timing()
        except (av.FFmpegError, OSError, ValueError, EOFError) as error:
            self.close()
            raise VideoError(f"{self.path}: not a video that FFmpeg can read ({error})") from None
        except VideoError:
            self.close()
            raise

    def _packets(self):
        """The video's packets from where the container stands."""
        return count_packets(self.container.demux(self.stream), self.file)

    def _closed_gops(self):
        """Whether decoding can begin at key frames as if nothing was before them. H.264's need not be IDR pictures; after
        one that is none the decoder takes references to earlier frames for damage."""
        if self.stream.codec_context.name != "h264":
            return True
        only_idr = BitStreamFilterContext("filter_units=pass_types=5", self.stream)
        self._seek((self.stream.start_time or 0) + (self.stream.duration or 0) // 2)
        key = next((p for p in self._packets() if p.is_keyframe), None)
        return key is None or bool(only_idr.filter(key))

    def _read_timing(self):
        """First and last presentation time (in stream time stamps)."""
        self.needed_pts = -math.inf
        first = self._decode_from(None)
        if first is None:
            raise VideoError(f"{self.path}: no frame can be decoded")
        self.start_pts = first.pts
        if self.gap:  # the first frames are damaged: time starts with them all the same
            self._seek(None)
            keys = (p.pts for p in self._packets() if p.is_keyframe and p.pts is not None)
            self.start_pts = min(first.pts, next(keys, first.pts))
        self.pts = None  # of all frames, where they are asked for by number
        rate = self.stream.average_rate or self.stream.guessed_rate
        self.fps = float(rate) if rate else 25.0
        self.frame_pts = max(1, round(1 / (self.fps * float(self.time_base))))  # how long a frame is usually shown
        duration = self._end_pts() - self.start_pts
        self.duration_s = max(float(duration * self.time_base), 1 / self.fps)

    def _read_index(self):
        """`index`: the container's list of key frames and perhaps other packets, None where there is none that reaches to
        the end; `delay`: what a key frame's time stamp is above the one listed, which is its decoding time in MP4."""
        self.index, self.delay = getattr(self.stream, "index_entries", None), 0
        if not self.index or len(self.index) == 0:
            self.index = None
            return
        self._seek(None)
        packet = next((p for p in self._packets() if p.pts is not None), None)
        span = self.stream.duration or (self.container.duration or 0) / av.time_base / self.time_base
        if packet is None or self.index[-1].timestamp - self.index[0].timestamp < span / 2:  # MPEG-TS lists what was read
            self.index = None
        else:
            self.delay = packet.pts - self.index[0].timestamp
        self.ahead = self.shown = None

    def _end_pts(self):
        """When the last frame leaves the screen, from the last packets: headers may count from 0 or from the first frame,
        hold the sound track's length, or stop short of the last B-frame."""
        if self.stream.duration:
            about = self.start_pts + self.stream.duration
        else:
            about = int((self.container.duration or 0) / av.time_base / self.time_base)
        ends = [self.start_pts + 1]
        for pts in (about - int(2 / self.time_base), None):
            try:
                self._seek(pts)
                ends += [p.pts + (p.duration or self.frame_pts) for p in self._packets() if p.pts is not None]
            except (av.FFmpegError, IndexError):
                pass
            if len(ends) > 1:
                break
        self.ahead = self.shown = None  # the decoder stands nowhere now
        return max(ends)

    def _seek(self, pts):
        self.file.futile_bytes = 0
        try:
            self.container.seek(0 if pts is None else pts, stream=self.stream, backward=True)
        except av.FFmpegError:
            self.container.seek(0)

    def _decode_from(self, pts):
        """Seeks to the last key frame at or before `pts` and decodes one frame, into `self.ahead`. None at the end."""
        self._seek(pts)
        self.packets = self._packets()
        self.decoded, self.damaged, self.lost, self.key_pts, self.skipped_pts = [], False, False, None, -math.inf
        self.shown = None  # the frame on screen now; `ahead` is the one after it
        self.ahead = self._next()
        return self.ahead

    def _next(self):
        """The next frame that is whole, None at the end; `gap`: whether frames before it were lost. A damaged packet costs
        all frames up to the next key frame, as they refer to it."""
        for _ in range(MAX_FUTILE_PACKETS):
            if self.decoded:
                frame, self.gap = self.decoded.pop(0)
                return frame
            try:
                packet = next(self.packets, None)
                if packet is None:
                    break
                if packet.pts is not None:
                    if self.key_pts is None and packet.is_keyframe:
                        self.key_pts = packet.pts
                    if self.key_pts is not None and packet.pts < self.key_pts:
                        continue  # shown before the key frame where decoding began, it refers to what was not decoded
                if packet.is_corrupt:
                    self.damaged = self.lost = True
                    continue
                skip = packet.pts is not None and packet.pts < self.needed_pts
                self.stream.codec_context.skip_frame = "NONREF" if skip else "DEFAULT"
                if skip:
                    self.skipped_pts = max(self.skipped_pts, packet.pts)
                frames = packet.decode()
            except (av.FFmpegError, IndexError):  # IndexError: reading came upon a new stream, and ends
                self.stream.codec_context.flush_buffers()  # or its threads report the same error again and again
                self.damaged = self.lost = True
                continue
            for frame in frames:
                self.damaged = frame.is_corrupt or self.damaged and not frame.key_frame
                if self.damaged:
                    self.lost = True
                elif frame.pts is not None:
                    self.decoded.append((frame, self.lost))
                    self.lost = False
        else:
            self.lost = True
        self.gap = self.lost
        return None

    def frames_at(self, times_s):
        """The frames on screen at `times_s` (ascending seconds): a list of (time_s shown, (H, W, 3) uint8 array).

        On screen at t is the last frame whose time stamp is not after t. Times whose frame is damaged are left out; raises
        VideoError if no frame is left."""
        with self.lock:
            out = [frame for time_s in times_s if (frame := self._frame_at(time_s))]
        if not out:
            raise VideoError(f"{self.path}: no frame can be decoded at {times_s[0]:.2f} s")
        return out

    def _frame_at(self, time_s):
        """(time_s shown, image) or None."""
        want = self.start_pts + math.floor(time_s / float(self.time_base) + 1e-6)
        self.needed_pts = want - 2 * self.frame_pts  # of the frames before, those that none refers to are not decoded
        self._go_to(want)
        if self.shown and self.skipped_pts > self.shown.pts:  # a frame that stays for longer: it may have been skipped
            self.needed_pts, self.ahead, self.shown = -math.inf, None, None
            self._go_to(want)
        if self.shown is None or self.gap and want >= self.shown.pts + (self.shown.duration or self.frame_pts):
            return None
        return float((self.shown.pts - self.start_pts) * self.time_base), self._rgb(self.shown)

    def _go_to(self, want):
        """Decodes up to the frame on screen at the time stamp `want`: `shown`, None if it is damaged."""
        if self._worth_a_seek(want):
            back = 0  # seek further back until what is decoded is not after `want`: containers may list a key frame by its
            # decoding time, which lies before the time that it is shown at
            while self._decode_from(want - back) is None or self.ahead.pts > max(want, self.start_pts):
                if self.gap and (self.index or back * self.time_base > 10):  # damage; without an index it may be a landing
                    break  # between two key frames
                if want - back <= self.start_pts:
                    self._decode_from(None)  # the first key frame is decoded before start_pts
                    break
                back = 2 * back + max(1, int(1 / self.time_base))
        while self.ahead is not None and (self.ahead.pts <= want or self.shown is None and not self.gap):
            self.shown, self.ahead = self.ahead, self._next()

    def _worth_a_seek(self, want):
        """Seek only if that skips frames: when a key frame lies between the decoder's position and `want`."""
        if self.ahead is None or self.ahead.pts > want:
            return self.shown is None or self.shown.pts > want or self.ahead is None and self.gap
        if self.index:
            at = self.index.search_timestamp(want - self.delay)
            return at >= 0 and self.index[at].timestamp + self.delay > self.ahead.pts
        return (want - self.ahead.pts) * self.time_base > 5

    def nearest_keyframes(self, times_s, within_s):
        """For each time the key frame nearest to it if that lies closer than `within_s`, else the frame on screen; like
        `frames_at`. A key frame is decoded by itself, so this is many times faster for a long video."""
        with self.lock:
            out = [frame for time_s in times_s
                   if (frame := self._nearest_keyframe(time_s, within_s) or self._frame_at(time_s))]
        if not out:
            raise VideoError(f"{self.path}: no frame can be decoded at {times_s[0]:.2f} s")
        return out

    def _nearest_keyframe(self, time_s, within_s):
        """(time_s, image) of the key frame nearest to `time_s`, or None if that is not closer than `within_s`."""
        if self.index:
            want = self.start_pts + round(time_s / float(self.time_base))
            near = [self.index.search_timestamp(want - self.delay, backward=backward) for backward in (True, False)]
            stamps = [self.index[at].timestamp + self.delay for at in near if at >= 0]
            if not stamps:
                return None
            self.ahead = self.shown = None  # the decoder leaves its place
            self._seek(min(stamps, key=lambda stamp: abs(stamp - want)))
            context = self.stream.codec_context
            try:
                packet = next(p for p in self._packets() if p.is_keyframe or p.size == 0)
                frames = packet.decode() + context.decode(None)
            except (av.FFmpegError, IndexError, StopIteration):
                return None
            finally:
                context.flush_buffers()
            frames = [f for f in frames if f.pts is not None and f.pts >= self.start_pts and not f.is_corrupt]
            if not frames:
                return None
            shown_s = float((frames[0].pts - self.start_pts) * self.time_base)
            return (shown_s, self._rgb(frames[0])) if abs(shown_s - time_s) < within_s else None

    def times_of(self, numbers):
        """Seconds at which the frames of these numbers, counted from 0 in the order of presentation, are on screen: a
        tuple, ascending. At a constant rate from the rate, else from the packets of the whole file."""
        with self.lock:
            if self.stream.average_rate and self.stream.average_rate == self.stream.base_rate:
                times_s = {n: (n + 0.5) / self.fps for n in numbers}
            else:
                if self.pts is None:
                    self._seek(None)
                    self.pts = sorted(p.pts for p in self._packets() if p.pts is not None)
                    self.ahead = self.shown = None
                times_s = {n: float((self.pts[int(n)] - self.start_pts) * self.time_base)
                           if 0 <= n < len(self.pts) else math.inf for n in numbers}
        for n, time_s in times_s.items():
            if not 0 <= time_s <= self.duration_s + 1:
                raise VideoError(f"{self.path}: no frame {n:.0f} in {self.duration_s:.2f} s")
        return tuple(sorted(round(t, 6) for t in times_s.values()))

    def _rgb(self, frame):
        """A decoded frame as an upright (H, W, 3) uint8 RGB array."""
        if max(frame.width, frame.height) > MAX_SIDE:
            raise VideoError(f"{self.path}: {frame.width}x{frame.height} is above {MAX_SIDE} pixels a side")
        image = self.reformatter.reformat(frame, format="rgb24").to_ndarray()
        quarter_turns = round((frame.rotation or 0) / 90) % 4
        aspect = float(self.stream.sample_aspect_ratio or 1)
        self.pixel_shape = (aspect, 1.0) if quarter_turns % 2 else (1.0, aspect)
        return np.ascontiguousarray(np.rot90(image, quarter_turns)) if quarter_turns else image

    def close(self):
        if self.container:
            self.container.close()
        if self.file:
            self.file.close()

    __del__ = close  # not left to the garbage collector: PyAV's containers and streams refer to each other


def remember(most, size=lambda result: 1):
    """Decorator: keeps the last results of a function, up to a total `size` of `most`. Unlike lru_cache, threads that ask
    for the same at the same time wait for one of them to compute it. An exception is passed on and not kept."""
    def decorate(function):
        lock, results, sizes, total = threading.Lock(), OrderedDict(), {}, 0  # results: a Future for each arguments

        @wraps(function)
        def remembered(*args):
            nonlocal total
            with lock:
                mine = args not in results
                future = results.setdefault(args, Future())
                results.move_to_end(args)
            if mine:
                try:
                    result = function(*args)
                except BaseException as error:
                    with lock:
                        del results[args]
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    with lock:
                        sizes[args] = size(result)
                        total += sizes[args]
                        while total > most and (old := next((key for key in results if key in sizes), args)) != args:
                            total -= sizes.pop(old)
                            del results[old]
            return future.result()

        return remembered
    return decorate


opened = weakref.WeakValueDictionary()


@remember(most=16)
def open_video(path):
    """The `Video` at `path`, kept open for the next call; a file that is still in use is not opened again. Raises
    VideoError."""
    video = opened[path] = opened.get(path) or Video(path)
    return video


def frame_size(height, width, min_pixels, max_pixels, factor=28):
    """Height and width that Qwen's image processor gives to a frame: multiples of `factor` near the same aspect ratio,
    between min_pixels and max_pixels in area."""
    if max(height, width) > 200 * min(height, width):
        raise VideoError(f"a frame of {width}x{height} is too narrow")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


@remember(most=256e6, size=lambda frames: sum(frame.image.nbytes for frame in frames))
def read_frames(path, times_s, min_pixels, max_pixels, keyframes_within_s=None):
    """Frames of `path` on screen at the tuple `times_s`, scaled for the model: a tuple of Frame. Two times that show
    the same frame give it once. The last 256 MB are kept, as the rollouts of one question ask for the same frames.

    keyframes_within_s: take the nearest key frame instead where it is closer than this."""
    frames, video = {}, open_video(path)
    shown = video.frames_at(times_s) if keyframes_within_s is None else video.nearest_keyframes(times_s, keyframes_within_s)
    for time_s, image in shown:
        if time_s not in frames:
            image = torch.from_numpy(image).permute(2, 0, 1)  # (3, H, W)
            try:
                height, width = (max(1, round(n * scale)) for n, scale in zip(image.shape[1:], video.pixel_shape))
                size = frame_size(height, width, min_pixels, max_pixels)
            except VideoError as error:
                raise VideoError(f"{path}: {error}") from None
            if size != tuple(image.shape[1:]):
                image = transforms.resize(image, list(size), transforms.InterpolationMode.BICUBIC, antialias=True)
            frames[time_s] = Frame(time_s, image.contiguous())
    return tuple(frames.values())


def slice_centres(start_s, end_s, num_frames):
    """The middles of `num_frames` equal slices of [start_s, end_s], in seconds."""
    step = (end_s - start_s) / num_frames
    return tuple(round(start_s + (i + 0.5) * step, 6) for i in range(num_frames))


def overview_times(duration_s, config):
    """Seconds at which the overview looks: uniform, `overview_fps`, at most `overview_max_frames`."""
    num_frames = min(config.overview_max_frames, max(1, math.ceil(duration_s * config.overview_fps)))
    return slice_centres(0.0, duration_s, num_frames)


# ------------------------------------------------------------------------------------------------------- turns
TAGS = ("<think>", "</think>", "<video_zoom>", "</video_zoom>", "<answer>", "</answer>")


@dataclass
class Turn:
    """What one assistant text means. `kind`: zoom, answer or error."""

    text: str
    kind: str
    well_formed: bool  # earns the format reward: <think>..</think>, then exactly one call or answer, nothing else
    error: str | None = None  # what to tell the policy
    segment: tuple[float, float] | None = None  # seconds
    fps: float | None = None
    answer: str | None = None
    num_frames: int = 0  # frames that the zoom showed
    hit: bool | None = None  # whether the zoom overlaps the question's evidence, where that is known


def between(text, tag):
    """Texts inside <tag>..</tag>, in linear time, and whether every tag is closed and none is nested."""
    found, at, clean = [], 0, True
    while (start := text.find(f"<{tag}>", at)) >= 0:
        end = text.find(f"</{tag}>", start)
        if end < 0:
            return found, False
        inside = text[start + len(tag) + 2:end]
        clean &= f"<{tag}>" not in inside
        found.append(inside)
        at = end + len(tag) + 3
    return found, clean and f"</{tag}>" not in text[at:]


def parse_turn(text, duration_s, config):
    """Reads one assistant text: never raises, linear in its length.

    The action is what stands after the last </think>, or anywhere if there is none; what is inside closed thoughts is no
    action. A call that cannot be carried out, or a turn without exactly one action, is of kind "error", with the
    reason."""
    body = text.rpartition("</think>")[2]
    zooms, zooms_clean = between(body, "video_zoom")
    answers, answers_clean = between(body, "answer")
    counts = [text.count(tag) for tag in TAGS]
    stripped = text.strip()
    well_formed = (
        counts in ([1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1])
        and stripped.startswith("<think>")
        and stripped.endswith(("</video_zoom>", "</answer>"))
        and body.strip().startswith(("<video_zoom>", "<answer>"))
    )
    reason = None
    if len(zooms) + len(answers) > 1:
        reason = "the turn has more than one <video_zoom> call or <answer>"
    elif not zooms_clean or not answers_clean:
        reason = "a tag in the turn is not closed or is nested"
    elif not zooms and not answers:
        reason = "the turn has no <video_zoom> call and no <answer>"
    if reason:
        return Turn(text, "error", False, error=f"Error: {reason}. Give exactly one.")
    if answers:
        return Turn(text, "answer", well_formed, answer=answers[0].strip())
    try:
        segment, fps = parse_zoom(zooms[0], duration_s, config)
    except ValueError as error:
        return Turn(text, "error", False, error=f"Error: {error}")
    return Turn(text, "zoom", well_formed, segment=segment, fps=fps)


def parse_zoom(text, duration_s, config):
    """The (start_s, end_s) and fps of a call's JSON. Raises ValueError with a text for the policy."""
    try:
        call = json.loads(text, parse_int=float)  # one type of number, and no integer of a million digits
    except (ValueError, RecursionError):
        raise ValueError('the call is not JSON like {"segment": [12.0, 20.0], "fps": 2}') from None
    if not isinstance(call, dict) or set(call) != {"segment", "fps"}:
        raise ValueError('the call needs exactly the keys "segment" and "fps"')
    segment, fps = call["segment"], call["fps"]
    if not isinstance(segment, list) or len(segment) != 2 or not all(type(x) is float for x in [*segment, fps]):
        raise ValueError('"segment" must be two numbers of seconds and "fps" one number')
    start_s, end_s = segment
    if not all(math.isfinite(x) for x in (start_s, end_s, fps)):
        raise ValueError("the numbers must be finite")
    if fps <= 0:
        raise ValueError("fps must be above 0")
    if not 0 <= start_s < end_s:
        raise ValueError("the segment must start at 0 or later and end after its start")
    if start_s >= duration_s:
        raise ValueError(f"the segment starts after the end of the video at {duration_s:.2f} s")
    end_s = min(end_s, duration_s)
    if (end_s - start_s) * fps > config.zoom_max_frames * (1 + 1e-6):
        raise ValueError(f"(end - start) * fps is {(end_s - start_s) * fps:.4g}, above the limit of "
                         f"{config.zoom_max_frames} frames; ask for a shorter segment or a lower fps")
    return (start_s, end_s), fps


# ----------------------------------------------------------------------------------------------------- grading
def read_letter(text, options):
    """The option letter that an answer text names, or None: B, b, (B), B., B: text, \\boxed{B}, option B, or the text
    of one option. Two different letters name none."""
    letters = LETTERS[: len(options)]
    text = text.strip(" \n\t*\"'`")
    if text.count("\\boxed{") == 1:
        text = text.partition("\\boxed{")[2].rstrip(" \n.$}").strip().removeprefix("\\text{").strip()
    same = [letter for letter, option in zip(letters, options) if normalise(option) == normalise(text)]
    lead = re.match(rf"\(?([{letters}])[.):]\s", text)  # normalise drops it: it must not contradict the text
    if len(same) == 1 and normalise(text) and (not lead or lead[1] == same[0]):
        return same[0]
    text = re.sub(r"^(?:the\s+)?(?:(?:final|correct|best)\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*"
                  r"(?:option\s+)?", "", text, flags=re.IGNORECASE)
    match = re.fullmatch(rf"[\(\[*\s]*([{letters}{letters.lower()}])(?:[\)\]*\s]*|[\)\]*\s]*[.:,)\]]\s*(.*))", text, re.DOTALL)
    if not match:
        match = re.fullmatch(rf"[\(\[]?([{letters}])[\)\]]?\s+(.+)", text, re.DOTALL)  # "B the red one"
        if match and normalise(match[2]) != normalise(options[letters.index(match[1])]):
            return None
    if not match:
        return None
    letter, rest = match[1].upper(), match[2] if match.lastindex == 2 else None
    if rest and normalise(rest) in {normalise(o) for o in options} - {normalise(options[letters.index(letter)])}:
        return None  # the letter of one option with the text of another
    named = {word.strip(".,:;()[]*") for word in rest.split()} if rest else set()
    if named - {letter} and named <= {*letters, "", "and", "or"}:  # "A, B"
        return None
    if rest and re.search(rf"\b(?:or|and)\s+\(?[{letters}]\b", rest):
        return None
    return letter


def normalise(text):
    """Lower case, without articles, punctuation, a leading option letter and extra white space."""
    text = re.sub(r"^\s*\(?[A-Z][.):]\s+", "", str(text))
    text = re.sub(r"[^\w\s.%-]", " ", text.lower())
    text = re.sub(r"\b(?:a|an|the)\b(?=\s+\w)", " ", text)  # an article, not the answer "A"
    return " ".join(word.strip(".") for word in text.split())


NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?|[-+]?\.\d+")


def grade(answer, question):
    """How right an answer text is, from 0 to 1: exact for a letter, a number (relative 1e-6) or normalised text, the
    intersection over union for a time segment."""
    if answer is None:
        return 0.0
    truth, kind = question["answer"], question["answer_type"]
    answer = answer[:10_000]
    if kind == "multiple_choice":
        return float(read_letter(answer, question["options"]) == str(truth).strip().upper())
    if kind == "number":
        numbers = [float(n.replace(",", "")) for n in NUMBER.findall(answer)]
        return float(len(numbers) == 1 and math.isclose(numbers[0], float(truth), rel_tol=1e-6, abs_tol=1e-9))
    if kind == "segment":
        numbers = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", answer)]
        if len(numbers) != 2 or not numbers[0] < numbers[1]:
            return 0.0
        both = max(0.0, min(numbers[1], truth[1]) - max(numbers[0], truth[0]))
        return both / (numbers[1] - numbers[0] + truth[1] - truth[0] - both)
    return float(bool(normalise(truth)) and normalise(answer) == normalise(truth))


# ------------------------------------------------------------------------------------------------- environment
def question_error(question):
    """Why a question row cannot be used, or None."""
    if not isinstance(question, dict):
        return "not a JSON object"
    for key in ("id", "video", "question", "answer", "answer_type"):
        if question.get(key) in (None, ""):
            return f'no "{key}"'
    if not isinstance(question["question"], str) or not question["question"].strip():
        return "empty question"
    if not isinstance(question["video"], str):
        return "video is not a path"
    kind, options, answer = question["answer_type"], question.get("options"), question["answer"]
    if kind not in ("multiple_choice", "open_ended", "number", "segment"):
        return f"unknown answer_type {kind!r}"
    if kind == "multiple_choice":
        if not isinstance(options, list) or not 2 <= len(options) <= 26:
            return "multiple_choice needs 2 to 26 options"
        if not all(isinstance(option, str) for option in options):
            return "an option is not a text"
        if str(answer).strip().upper() not in LETTERS[: len(options)]:
            return f"answer {answer!r} is not the letter of an option"
    try:
        if kind == "number":
            float(answer)
        if kind == "segment" and not (len(answer) == 2 and answer[0] < answer[1] - 0.0):
            return f"answer {answer!r} is not [start_s, end_s]"
    except (TypeError, ValueError, IndexError):
        return f"answer {answer!r} is not a {kind}"
    try:
        if not all(start < end - 0.0 for start, end in question.get("evidence") or []):
            return "evidence has an interval that ends before it starts"
    except (TypeError, ValueError):
        return "evidence is not a list of [start_s, end_s]"
    chosen = question.get("overview_frames") or []
    if not isinstance(chosen, list) or not all(type(n) in (int, float) for n in chosen):
        return "overview_frames is not a list of frame numbers"
    if not isinstance(question.get("meta") or {}, dict):
        return "meta is not an object"
    return None


class ZoomEnv:
    """One episode on one question. `turns` records what was said and what it meant.

    Args:
        question: a row as in question files; `video` is relative to `root`.
        config: EnvConfig.
        root: folder that the video's path is relative to."""

    def __init__(self, question, config, root="."):
        self.question, self.config = question, config
        self.path = str(Path(root) / question["video"])
        self.turns, self.done, self.frames_shown, self.watched = [], False, 0, []

    def reset(self):
        """Starts the episode: the system and the user message. Raises VideoError if the video cannot be read."""
        self.turns, self.done, self.frames_shown, self.watched = [], False, 0, []
        self.duration_s = open_video(self.path).duration_s
        frames = self._overview()
        lines = [self.question["question"].strip()]
        for letter, option in zip(LETTERS, self.question.get("options") or []):
            lines.append(option if re.match(rf"\(?{letter}[.):]\s", option) else f"{letter}. {option}")
        lines.append(f"The video lasts {self.duration_s:.2f} seconds. {len(frames) // 2} frames of it:\n")
        system = self.config.system_prompt.replace("ZOOM_MAX_FRAMES", str(self.config.zoom_max_frames))
        return [Message("system", [system]), Message("user", ["\n".join(lines), *frames, "\n" + self._go_on()])]

    def fork(self):
        """A copy of the running episode that goes on by itself."""
        other = copy.copy(self)
        other.turns, other.watched = list(self.turns), list(self.watched)
        return other

    def step(self, text):
        """Takes one assistant text; returns the user message with the tool's reply, [] when the episode is over."""
        turn = parse_turn(text, self.duration_s, self.config)
        last = len(self.turns) >= self.config.max_zooms
        if turn.kind == "zoom" and last:
            turn = replace(turn, kind="error", well_formed=False, error="Error: no zoom is left.")
        content = [turn.error] if turn.error else []
        if turn.kind == "zoom":
            start_s, end_s = turn.segment
            num_frames = max(1, math.floor((end_s - start_s) * turn.fps + 1e-6))
            try:
                content = self._frames(slice_centres(start_s, end_s, num_frames))
                turn.num_frames, turn.hit = len(content) // 2, self._hits(turn.segment)
            except VideoError:
                turn = replace(turn, kind="error", error="Error: this part of the video cannot be decoded.")
                content = [turn.error]
        self.turns.append(turn)
        self.done = turn.kind == "answer" or last
        if self.done:
            return []
        return [Message("user", ["<tool_response>\n", *content, "\n</tool_response>\n" + self._go_on()])]

    def _overview(self):
        if chosen := self.question.get("overview_frames"):
            return self._frames(open_video(self.path).times_of(tuple(chosen)))
        times_s = overview_times(self.duration_s, self.config)
        by_key = self.config.overview == "nearest_keyframe" or self.config.overview == "auto" and self.duration_s > LONG_S
        return self._frames(times_s, self.duration_s / len(times_s) / 2 if by_key else None)

    def _frames(self, times_s, keyframes_within_s=None):
        """Message items: the tag and the frame for each time."""
        frames = read_frames(self.path, times_s, self.config.min_pixels, self.config.max_pixels, keyframes_within_s)
        self.frames_shown += len(frames)
        self.watched.append(frames)
        return [item for index, frame in enumerate(frames)
                for item in ("\n" * (index > 0) + f"<frame{index}_time{frame.time_s:.2f}s>", frame)]

    def _go_on(self):
        left = self.config.max_zooms - len(self.turns)
        return MAY_ZOOM.format(left=left) if left > 0 else LAST_TURN

    def answer(self):
        """The final answer's text, or None."""
        return self.turns[-1].answer if self.turns else None

    def num_zooms(self):
        """Zooms that were carried out."""
        return sum(turn.kind == "zoom" for turn in self.turns)

    def num_invalid(self):
        """Turns that could not be carried out."""
        return sum(turn.kind == "error" for turn in self.turns)

    def describe(self):
        """The episode for a reader: what was asked, looked at, said and answered."""
        times = lambda frames: f"{len(frames)} frames, {frames[0].time_s:.2f} s to {frames[-1].time_s:.2f} s"
        lines = [f"{self.question['video']}: {self.question['question']}"]
        lines += [f"  {letter}. {option}" for letter, option in zip(LETTERS, self.question.get("options") or [])]
        lines.append(f"  overview: {times(self.watched[0])}")
        clips = iter(self.watched[1:])
        for number, turn in enumerate(self.turns, 1):
            lines.append(f"  turn {number}: {turn.text.strip()[:1000]}")
            if turn.kind == "zoom":
                lines.append(f"    looked at {times(next(clips))}")
            elif turn.error:
                lines.append(f"    {turn.error}")
        return "\n".join(lines)

    def _hits(self, segment):
        evidence = self.question.get("evidence")
        return any(segment[0] < end and start < segment[1] for start, end in evidence) if evidence else None

    def reward(self):
        """The episode's reward and its parts (paper, section 3.3): accuracy_weight * accuracy + format_weight * format
        + tool_weight * (right and zoomed)."""
        accuracy = grade(self.answer(), self.question)
        format_ok = float(self.done and self.turns[-1].kind == "answer" and all(t.well_formed for t in self.turns))
        tool = float(accuracy >= 0.5 and self.num_zooms() > 0)
        c = self.config
        total = c.accuracy_weight * accuracy + c.format_weight * format_ok + c.tool_weight * tool
        return {"reward": total, "accuracy": accuracy, "format": format_ok, "tool": tool}
