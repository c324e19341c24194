"""The frame on screen at a time, from any video file, safely."""

import io
import math
import os
import stat
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from functools import wraps

import av
import numpy as np
import torch
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import VideoReformatter
from torchvision.transforms.v2 import functional as transforms

from common import UserError


class VideoError(UserError):
    """A video that cannot be opened or decoded; the message names the file and the reason."""


@dataclass
class Frame:
    time_s: float  # when it is on screen, seconds from the first frame
    image: torch.Tensor  # (3, H, W) uint8 RGB, H and W multiples of 28


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
