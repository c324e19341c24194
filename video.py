"""The frame on screen at a time, from any video file, safely.

    frames = read_frames("clip.mp4", (1.0, 3.0), min_pixels, max_pixels, unit)  # a tuple of Frame

What it guarantees: times are seconds of presentation time from the first frame, at any offset and frame rate;
on screen at t is the last frame whose time stamp is not after t, upright, and white where it is transparent.
A file gives true frames or a VideoError with its name. It is read as a plain local file (no URL, no playlist,
nothing that it refers to), and a broken one costs neither endless time nor memory. Sizes are those that
Qwen's image processor gives.

Two ways to take frames: `frames_at` is exact and decodes from the key frame before each time on;
`nearest_keyframes` decodes key frames alone, many times faster where a long video is looked at sparsely.

Decoding is strict: a decoder's habit is to paint over damage with grey or pieces of earlier frames, which the
policy and its reward would take for what was filmed. Here damage costs all frames up to the next key frame.
"""

import io
import math
import os
import stat
import threading
import weakref
from bisect import bisect_left
from collections import OrderedDict
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from itertools import islice

import av
import numpy as np
import torch
from av.sidedata.sidedata import SideDataContainer
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as transforms

from common import UserError

ANIMATIONS = {"gif", "apng"}  # read from their start, as each picture is drawn upon the one before
ALLOWED_FORMATS = ANIMATIONS | {"mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts",
                                "mpeg", "flv", "asf", "ogg"}  # files that hold their own frames, no playlists
REFUSED_FORMATS = {"png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "h264", "hevc", "m4v",
                   "mpegvideo", "ivf", "rm"}  # opened only to be refused by name
MAX_SIDE = 8192  # pixels
MAX_FUTILE_PACKETS = 1000  # packets in a row that give no frame, after which a stream counts as broken
MAX_FUTILE_BYTES = 64e6  # bytes in a row that give no packet, after which it counts as ended


class VideoError(UserError):
    """A video that cannot be opened or decoded; the message names the file and the reason."""


@dataclass
class Frame:
    time_s: float  # since when it is on screen, seconds from the first frame
    image: torch.Tensor  # (3, H, W) uint8 RGB, H and W multiples of the policy's unit


# ------------------------------------------------------------------------------------------ what is asked for
def remember(most, size=lambda result: 1):
    """Decorator: keeps the last results of a function, up to a total `size` of `most`. Arguments by position.

    Threads that ask for the same at once wait for one of them to compute it; an exception goes to all of them
    and is not kept. What was let go of while someone still uses it is given again, not made again."""
    def decorate(function):
        lock, futures, sizes = threading.Lock(), OrderedDict(), {}  # by arguments; sizes: of what is computed
        in_use = weakref.WeakValueDictionary()  # what was let go of, as long as someone uses it

        @wraps(function)
        def remembered(*args):
            with lock:
                mine = args not in futures
                future = futures.setdefault(args, Future())
                futures.move_to_end(args)
            if mine:
                try:
                    result = in_use.get(args) or function(*args)
                except BaseException as error:
                    with lock:
                        del futures[args]
                    future.set_exception(error)
                    raise
                future.set_result(result)
                with lock:
                    sizes[args] = size(result)
                    for oldest in [key for key in futures if key in sizes][:-1]:
                        if sum(sizes.values()) > most:
                            del sizes[oldest]
                            result = futures.pop(oldest).result()
                            if hasattr(result, "__weakref__"):  # a video; a tuple of frames has none
                                in_use[oldest] = result
            return future.result()

        return remembered
    return decorate


@remember(most=16)
def open_video(path):
    """The `Video` at `path`, kept open; a file in use is not opened again. Raises VideoError."""
    return Video(path)


@remember(most=256e6, size=lambda frames: sum(frame.image.nbytes for frame in frames))
def read_frames(path, times_s, min_pixels, max_pixels, unit, keyframes_within_s=None):
    """The frames on screen at the tuple `times_s` (ascending seconds), of `frame_size`: a tuple of Frame,
    each once. The last 256 MB are kept, as the rollouts of one question ask for the same. Raises VideoError.

    keyframes_within_s: take the nearest key frame instead where it is closer than this."""
    video = open_video(path)
    shown = (video.frames_at(times_s) if keyframes_within_s is None
             else video.nearest_keyframes(times_s, keyframes_within_s))
    try:
        return tuple(Frame(time_s, scale(image, video.pixel_shape, min_pixels, max_pixels, unit))
                     for time_s, image in dict(shown).items())
    except VideoError as error:
        raise VideoError(f"{path}: {error}") from None


def read_image(path, min_pixels, max_pixels, unit):
    """An image file as a Frame of the sizes that frames have. Raises VideoError."""
    try:
        with Image.open(path) as image:
            image = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path}: not an image that is read ({error})") from None
    return Frame(0.0, scale(image, (1.0, 1.0), min_pixels, max_pixels, unit))


def scale(image, pixel_shape, min_pixels, max_pixels, unit):
    """(H, W, 3) uint8 with pixels of shape (height, width): a (3, H', W') tensor with square ones."""
    image = torch.from_numpy(image).permute(2, 0, 1)  # (3, H, W)
    height, width = (max(1, round(side * factor)) for side, factor in zip(image.shape[1:], pixel_shape))
    size = frame_size(height, width, min_pixels, max_pixels, unit)
    if size != tuple(image.shape[1:]):
        image = transforms.resize(image, list(size), transforms.InterpolationMode.BICUBIC, antialias=True)
    return image.contiguous()


def frame_size(height, width, min_pixels, max_pixels, unit):
    """(height, width) that Qwen's image processor gives to a frame: near its aspect ratio, from min_pixels to
    max_pixels in area, multiples of `unit` (what becomes a token: patch size x merge of the vision tower)."""
    if max(height, width) > 200 * min(height, width):
        raise VideoError(f"a frame of {width}x{height} is too narrow")
    size = tuple(round(side / unit) * unit for side in (height, width))
    if size[0] * size[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        size = tuple(max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))
    elif size[0] * size[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        size = tuple(math.ceil(side * grow / unit) * unit for side in (height, width))
    return size


# -------------------------------------------------------------------------------------------------- one video
class Video:
    """One open video file: `duration_s`, `fps`, the frame on screen at any time. Threads may share it.

    Only what can be seen is decoded: from the key frame before it on, without frames that no other refers to.
    Raises VideoError, naming the file, for anything but a regular local file with a video stream."""

    def __init__(self, path):
        self.path, self.file, self.container = str(path), None, None
        self.lock = threading.Lock()
        self.pixel_shape = (1.0, 1.0)  # height and width of a pixel on the screen, of the frames last shown
        self.reformatter = av.video.reformatter.VideoReformatter()  # slow to set up
        self.shown = self.ahead = None  # where the decoder stands: the frame on screen, and the one after it
        self.all_pts = None  # time stamps of all frames, once they are asked for by number
        self.options = {"max_pixels": str(MAX_SIDE * MAX_SIDE)}  # of the decoder
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise VideoError(f"{self.path}: not a regular file")
            self.file = VideoFile(self.path)
            del self.file.name  # FFmpeg goes by what is in it
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise VideoError(f"{self.path}: {getattr(error, 'strerror', None) or error}") from None
        try:
            self._open_stream()
            self._read_index()
            if self._closed_gops():  # told to explode, it reports each damage, instead of painting over it
                self.options["err_detect"] = "explode"
            self._read_timing()
        except (VideoError, av.FFmpegError, OSError, ValueError, EOFError, IndexError) as error:
            self.close()
            if isinstance(error, VideoError):
                raise
            raise VideoError(f"{self.path}: not a video in a format that is read ({error}); read are "
                             f"{', '.join(sorted(ALLOWED_FORMATS))}") from None

    def frames_at(self, times_s):
        """[(time_s shown, (H, W, 3) uint8)] at `times_s`, ascending, but damaged ones. Raises VideoError."""
        return self._whole_frames(self._frame_at, times_s)

    def nearest_keyframes(self, times_s, within_s):
        """Like `frames_at`, but the key frame nearest to each time where one lies closer than `within_s`."""
        return self._whole_frames(lambda t: self._nearest_keyframe(t, within_s) or self._frame_at(t), times_s)

    def times_of(self, numbers):
        """Seconds, ascending, at which the frames of these numbers, counted from 0 as they are shown, are on
        screen. At a constant rate from the rate, else from the packets of the whole file."""
        if (rate := self.stream.average_rate) and rate == self.stream.base_rate and not self.animated:
            times_s = {n: (n + 0.5) / self.fps for n in numbers}
        else:
            all_s = dict(enumerate(self.all_times()))
            times_s = {n: all_s.get(n // 1, math.inf) for n in numbers}  # nan is no key
        if beyond := [n for n, time_s in times_s.items() if not 0 <= time_s <= self.duration_s + 1]:
            raise VideoError(f"{self.path}: no frame {beyond[0]:.0f} in {self.duration_s:.2f} s")
        return tuple(sorted(round(t, 6) for t in times_s.values()))

    def all_times(self):
        """Seconds at which each frame comes on screen, from the packets of the whole file."""
        with self.lock:
            if self.all_pts is None:
                self._seek(None)
                self.all_pts = sorted(p.pts for p in self._packets() if p.pts is not None)
                self.ahead = self.shown = None
        return [float((pts - self.start_pts) * self.time_base) for pts in self.all_pts]

    def close(self):
        for opened in filter(None, (self.container, self.file)):
            opened.close()

    __del__ = close  # not left to the garbage collector: PyAV's containers and streams refer to each other

    def _whole_frames(self, frame_of, times_s):
        with self.lock:
            frames = [frame for time_s in times_s if (frame := frame_of(time_s))]
        if not frames:
            raise VideoError(f"{self.path}: no frame can be decoded at {times_s[0]:.2f} s")
        return frames

    # ------------------------------------------------------------------------------------------------ opening
    def _open_stream(self):
        """`container`; `stream`: the one that players choose, but no still picture beside sound or others."""
        self.container = av.open(self.file, io_open=refuse, options={
            "format_whitelist": ",".join(ALLOWED_FORMATS | REFUSED_FORMATS),  # no playlist is followed
            "max_pixels": self.options["max_pixels"]})
        self.formats = set(self.container.format.name.split(","))
        if not self.formats & ALLOWED_FORMATS:
            raise ValueError(f"its format is {self.container.format.name}")
        self.animated = bool(self.formats & ANIMATIONS)
        vfw = b"V_MS/VFW/FOURCC" in os.pread(self.file.fileno(), 1 << 16, 0)  # AVI's kind of Matroska track
        self.file.dts_only = vfw or "avi" in self.formats
        videos, alone = self.container.streams.video, len(self.container.streams) == 1
        best, cover = self.container.streams.best("video"), av.stream.Disposition.attached_pic
        for self.stream in sorted(videos, key=lambda stream: stream is not best):
            if self.stream.codec_context and not self.stream.disposition & cover:
                if alone or self._seek(None) or len(list(islice(self._packets(), 3))) == 3:
                    break  # of a still picture come two packets, the second one empty
        else:
            raise VideoError(f"{self.path}: no video in it with a decoder and more than a still picture")
        self.options |= {"strict": "1"} if self.file.dts_only else {}  # H.264 then reorders as much as it may
        self.stream.codec_context.options = self.options
        self.stream.thread_type = "AUTO"
        self.time_base = self.stream.time_base  # seconds of one unit of a time stamp
        if not 1e-12 < self.time_base < 1e4:
            raise VideoError(f"{self.path}: its time base is {self.time_base} s")

    def _read_index(self):
        """`index`: the container's list of key frames and perhaps other packets, None where it ends too early
        or is a guess; `delay`: what a key frame's time stamp is above the one listed, of decoding in MP4."""
        self.index, self.delay, index = None, 0, self.stream.index_entries
        if self.animated or "mpeg" in self.formats or not index:
            return
        self._seek(None)
        first = list(islice((p for p in self._packets() if p.pts is not None), 3))
        if self.formats & {"mov", "flv"} and self.stream.codec_context.reorder_depth:  # times of presentation
            self.file.dts_only = all(p.pts == p.dts for p in first)  # may have been forgotten at muxing
        listed = index[-1].timestamp - index[0].timestamp
        span = self.stream.duration or (self.container.duration or 0) / av.time_base / self.time_base
        guess = any(e.timestamp == p.dts and e.is_keyframe > p.is_keyframe for e, p in zip(index, first))
        if first and listed >= span / 2 and not guess:  # MPEG-TS lists what was read so far
            self.index, self.delay = index, first[0].pts - index[0].timestamp

    def _closed_gops(self):
        """Whether decoding can begin at key frames as if nothing was before them. H.264's need not be IDR
        pictures; after one that is none the decoder takes references to earlier frames for damage."""
        if self.stream.codec_context.name != "h264":
            return True
        only_idr = av.bitstream.BitStreamFilterContext("filter_units=pass_types=5", self.stream)
        self._seek((self.stream.start_time or 0) + (self.stream.duration or 0) // 2)
        key = next((p for p in self._packets() if p.is_keyframe), None)
        return key is None or bool(only_idr.filter(key))

    def _read_timing(self):
        """`start_pts`: the first frame's time stamp; `fps`, `frame_pts`, `duration_s`."""
        self.needed_pts = -math.inf
        first = self._decode_from(None)
        if first is None:
            raise VideoError(f"{self.path}: no frame can be decoded")
        self.start_pts = first.pts
        if self.gap:  # the first frames are damaged: time starts with them all the same
            self._seek(None)
            keys = (p.pts for p in self._packets() if p.is_keyframe and p.pts is not None)
            self.start_pts = min(first.pts, next(keys, first.pts))
        self.fps = float(self.stream.average_rate or self.stream.guessed_rate or 25)
        self.frame_pts = max(1, round(1 / (self.fps * float(self.time_base))))  # a frame's usual time
        self.duration_s = max(float((self._end_pts() - self.start_pts) * self.time_base), 1 / self.fps)

    def _end_pts(self):
        """When the last frame leaves the screen, from the last packets: headers may count from 0 or from the
        first frame, hold the sound track's length, or stop short of the last B-frame."""
        about = (self.start_pts + self.stream.duration if self.stream.duration
                 else int((self.container.duration or 0) / av.time_base / self.time_base))
        ends = [self.start_pts + 1]
        for pts in (about - int(2 / self.time_base), None):  # the last 2 s; without a packet there, all
            with suppress(av.FFmpegError, IndexError):
                self._seek(pts)
                ends += [p.pts + (p.duration or self.frame_pts) for p in self._packets() if p.pts is not None]
            if len(ends) > 1:
                break
        self.ahead = self.shown = None  # the decoder stands nowhere now
        return max(ends)

    # ------------------------------------------------------------------------------------ the frame on screen
    def _frame_at(self, time_s):
        """(time_s shown, image) or None."""
        want = self.start_pts + math.floor(time_s / float(self.time_base) + 1e-6)
        self.needed_pts = want - 2 * self.frame_pts  # frames before that none refers to are not decoded
        self._go_to(want)
        if self.shown and self.skipped_pts > self.shown.pts:  # it stays for longer: later ones were skipped
            self.needed_pts, self.ahead, self.shown = -math.inf, None, None
            self._go_to(want)
        if self.shown is None:
            return None
        if self.gap and want >= self.shown.pts + (self.shown.duration or self.frame_pts):
            return None  # a lost frame is on screen
        return float((self.shown.pts - self.start_pts) * self.time_base), self._rgb(self.shown)

    def _go_to(self, want):
        """Decodes up to the frame on screen at the time stamp `want`: `shown`, None if it is damaged."""
        if self._worth_a_seek(want):
            back = 0  # further until it is not after `want`: key frames may be listed by time of decoding
            while self._decode_from(want - back) is None or self.ahead.pts > max(want, self.start_pts):
                if self.gap and (self.index or back * self.time_base > 10):
                    break  # damage; without an index it may be a landing between two key frames
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
        return not self.animated and (want - self.ahead.pts) * self.time_base > 5

    def _nearest_keyframe(self, time_s, within_s):
        """(time_s, image) of the key frame nearest to `time_s`, None if it is not closer than `within_s`."""
        if not self.index:
            return None
        want = self.start_pts + round(time_s / float(self.time_base))
        near = [self.index.search_timestamp(want - self.delay, backward=before) for before in (True, False)]
        stamps = [self.index[at].timestamp + self.delay for at in near if at >= 0]  # of key frames around it
        if not stamps:
            return None
        nearest = min(stamps, key=lambda stamp: abs(stamp - want))
        try:
            if self.late:
                frames = filter(None, [self._decode_from(nearest)])
            else:
                self._seek(nearest)
                packet = next(p for p in self._packets() if p.is_keyframe or p.size == 0)
                frames = packet.decode() + self.stream.codec_context.decode(None)
        except (av.FFmpegError, IndexError, StopIteration):
            return None
        finally:
            self.stream.codec_context.flush_buffers()
            self.ahead = self.shown = None  # the decoder has left its place
        whole = [f for f in frames if f.pts is not None and f.pts >= self.start_pts and not f.is_corrupt]
        shown_s = float((whole[0].pts - self.start_pts) * self.time_base) if whole else math.inf
        return (shown_s, self._rgb(whole[0])) if abs(shown_s - time_s) < within_s else None

    # ----------------------------------------------------------------------------------------------- decoding
    def _decode_from(self, pts):
        """Seeks to the last key frame at or before `pts`, decodes one frame into `ahead`. None at the end."""
        self._seek(pts)
        self.packets = self._packets()
        self.key_pts = -math.inf if self.late else None  # of the key frame where decoding began
        self.sent_dts, self.decoded = [], []  # what went in; what came out: (frame, frames before it lost)
        self.damaged = self.lost = False  # what comes refers to damage; frames since the last were lost
        self.skipped_pts = -math.inf  # of the last packet whose frame may have been skipped
        self.shown = None
        self.ahead = self._next()
        return self.ahead

    def _next(self):
        """The next frame that is whole, None at the end; `gap`: whether frames before it were lost. A damaged
        packet costs all frames up to the next key frame, as they refer to it."""
        for _ in range(MAX_FUTILE_PACKETS):
            if self.decoded:
                frame, self.gap = self.decoded.pop(0)
                return frame
            try:
                packet = next(self.packets, None)
                if packet is None:
                    break
                frames = self._decode(packet)
            except (av.FFmpegError, IndexError):  # IndexError: reading came upon a new stream, and ends
                self.stream.codec_context.flush_buffers()  # or its threads report the error again and again
                self.damaged = self.lost = True
                continue
            for frame in frames:
                self.damaged = frame.is_corrupt or self.damaged and not frame.key_frame
                if self.damaged or frame.pts is None:
                    self.lost = True
                else:
                    self.decoded.append((frame, self.lost))
                    self.lost = False
        else:
            self.lost = True
        self.gap = self.lost
        return None

    def _decode(self, packet):
        """The frames that come out of the decoder after this packet, damaged ones among them."""
        if packet.pts is not None:
            if self.key_pts is None and packet.is_keyframe:
                self.key_pts = packet.pts
            if self.key_pts is not None and packet.pts < self.key_pts:
                return []  # shown before the key frame where decoding began: refers to what was not decoded
        if packet.is_corrupt or "gif" in self.formats and bytes(packet)[-1:] not in b"\0;":  # cut off
            self.damaged = self.lost = True
            return []
        skip = packet.pts is not None and packet.pts < self.needed_pts and not self.late
        self.stream.codec_context.skip_frame = "NONREF" if skip else "DEFAULT"
        self.skipped_pts = max(self.skipped_pts, packet.pts) if skip else self.skipped_pts
        frames = packet.decode()
        self.sent_dts += [] if packet.dts is None else [packet.dts]
        if self.late:  # a picture comes when `late` more have gone in, or with all that are left at the end
            sent = self.sent_dts
            for left, frame in zip(range(len(frames), 0, -1), frames):
                at = len(sent) - left if frame.dts is None else bisect_left(sent, frame.dts) - self.late
                cut_off = frame.dts is None and not self.index  # perhaps, and then some of these are missing
                frame.pts = None if at < 0 or cut_off else sent[at]
        return frames

    @property
    def late(self):
        """By how many pictures the decoder delays its output, where its order alone tells times; else 0."""
        return self.file.dts_only and self.stream.codec_context.reorder_depth

    def _seek(self, pts):
        self.file.futile_bytes = 0
        self.file.untimed = pts is not None and "mpeg" in self.formats
        if self.animated:
            self.container.close()
            self.file.seek(0)
            return self._open_stream()
        try:
            self.container.seek(0 if pts is None else pts, stream=self.stream, backward=True)
        except av.FFmpegError:
            self.container.seek(0)

    def _packets(self):  # from where the container stands
        return self.file.count(self.container.demux(self.stream))

    def _rgb(self, frame):
        """A decoded frame as an upright (H, W, 3) uint8 RGB array."""
        if max(frame.width, frame.height) > MAX_SIDE:
            raise VideoError(f"{self.path}: {frame.width}x{frame.height} is above {MAX_SIDE} pixels a side")
        image = self.reformatter.reformat(frame, format="rgba" if self.animated else "rgb24").to_ndarray()
        if self.animated:  # what is transparent shows white
            opaque = image[..., 3:].astype(np.uint16)
            image = ((image[..., :3] * opaque + 255 * (255 - opaque) + 127) // 255).astype(np.uint8)
        self.pixel_shape = 1.0, float(self.stream.sample_aspect_ratio or 1)
        # its pixel at (x, y) is shown at (a x + c y, b x + d y); of that, quarter turns and flips are done
        try:  # not frame.side_data: it and the frame would refer to each other
            matrix = SideDataContainer(frame).get("DISPLAYMATRIX")
            a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist() if matrix else (1, 0, 0, 0, 1)
        except ValueError:  # a kind of side data that PyAV does not know: it gives the angle all the same
            turn = math.radians(frame.rotation)
            a, b, c, d = math.cos(turn), -math.sin(turn), math.sin(turn), math.cos(turn)
        if max(abs(a), abs(d)) < min(abs(b), abs(c)) / 50:  # within about 1 degree
            image, a, d = image.transpose(1, 0, 2), c, b
            self.pixel_shape = self.pixel_shape[::-1]
        elif max(abs(b), abs(c)) > min(abs(a), abs(d)) / 50:
            a = d = 1
        return np.ascontiguousarray(image[::-1 if d < 0 else 1, ::-1 if a < 0 else 1])


# ------------------------------------------------------------------------------------------ what FFmpeg reads
class VideoFile(io.FileIO):
    """What FFmpeg reads from: no name, so that it resolves no URL. Ends where nothing more comes of it."""

    futile_bytes = 0  # read since the last packet
    dts_only = False  # time stamps tell when a picture is decoded, not when it is shown, as in AVI
    untimed = False  # MPEG-PS after a seek: its first time stamp is given to what is left of a picture

    def read(self, size=-1):
        self.futile_bytes += size
        return super().read(size) if self.futile_bytes < MAX_FUTILE_BYTES else b""

    def count(self, packets):  # not in Video: a generator that refers to its Video would keep it open
        for packet in packets:
            self.futile_bytes *= self.futile_bytes >= MAX_FUTILE_BYTES  # what has ended stays so
            packet.pts = packet.dts if self.dts_only else packet.pts
            self.untimed = self.untimed and not (packet.is_keyframe and packet.pos)
            if not self.untimed:
                yield packet


def refuse(url, flags, options):
    raise av.error.PermissionError(13, "it refers to another file")
