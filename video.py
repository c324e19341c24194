"""The frame on screen at a time, from any video file, safely.

    frames = read_frames("clip.mp4", (1.0, 3.0), min_pixels, max_pixels, unit)  # a tuple of Frame

What it guarantees: times are seconds of presentation time from the first frame, at any offset and frame rate;
on screen at t is the last frame whose time stamp is not after t, upright, and white where it is transparent.
A file gives true frames or a VideoError with its name. It is read as a plain local file (no URL, no playlist,
nothing that it refers to), and a broken one costs neither endless time nor memory. Sizes are those that
Qwen's image processor gives.

Two ways to take frames: `Video.frames_at` is exact and decodes from the key frame before each time on; with
keyframes_within_s it takes key frames alone, many times faster where a long video is looked at sparsely.

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
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from itertools import chain, islice

import av
import numpy as np
import torch
from av.sidedata.sidedata import SideDataContainer
from PIL import ExifTags, Image, ImageOps
from torchvision.transforms.v2 import functional as transforms
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from common import UserError

ANIMATIONS = {"gif", "apng"}  # read from their start, as each picture is drawn upon the one before
ALLOWED_FORMATS = ANIMATIONS | {"mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts",
                                "mpeg", "flv", "asf", "ogg"}  # files that hold their own frames, no playlists
REFUSED_FORMATS = {"png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "h264", "hevc", "m4v",
                   "mpegvideo", "ivf", "rm"}  # opened only to be refused by name
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own leave out what is transparent
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
@dataclass
class Remembered:
    lock: threading.Lock  # held by the thread that computes the result
    result: object = None
    size: float = 0


def remember(most, size=lambda result: 1):
    """Decorator: keeps the last results of a function, up to a total `size` of `most`. Arguments by position.

    Of threads that ask for the same at once one computes it and the others wait. An exception is not kept."""
    def decorate(function):
        lock = threading.Lock()
        entries = OrderedDict()  # {arguments: Remembered}, the one used longest ago first

        @wraps(function)
        def remembered(*args):
            with lock:
                entry = entries.setdefault(args, Remembered(threading.Lock()))
                entries.move_to_end(args)
            with entry.lock:
                if entry.result is None:
                    entry.result = function(*args)
                    entry.size = size(entry.result)
                    with lock:
                        total = sum(kept.size for kept in entries.values())
                        for key in list(entries):
                            if total > most and not entries[key].lock.locked():
                                total -= entries.pop(key).size
                return entry.result

        return remembered
    return decorate


videos_in_use = weakref.WeakValueDictionary()  # {path: Video}, as long as someone holds it


@remember(most=16)
def open_video(path):
    """The `Video` at `path`, kept open; a file in use is not opened again. Raises VideoError."""
    video = videos_in_use.get(path)
    if video is None:
        video = Video(path)
        videos_in_use[path] = video
    return video


def total_bytes(frames):
    return sum(frame.image.nbytes for frame in frames)


@remember(most=256e6, size=total_bytes)
def read_frames(path, times_s, min_pixels, max_pixels, unit, keyframes_within_s=None):
    """The frames on screen at the tuple `times_s` (ascending seconds), each once, in the sizes of `scale`: a
    tuple of Frame. The last 256 MB are kept, as the rollouts of one question ask for the same.

    keyframes_within_s: the nearest key frame instead where it is closer than this. Raises VideoError."""
    video = open_video(path)
    shown = video.frames_at(times_s, keyframes_within_s)
    try:
        return tuple(Frame(time_s, scale(image, video.pixel_shape, min_pixels, max_pixels, unit))
                     for time_s, image in dict(shown).items())
    except VideoError as error:
        raise VideoError(f"{path}: {error}") from None


def read_image(path, min_pixels, max_pixels, unit):
    """An image file as a Frame of the sizes that frames have. Raises VideoError."""
    return Frame(0.0, scale(np.array(open_image(path)), (1.0, 1.0), min_pixels, max_pixels, unit))


def open_image(path):
    """An image file as `to_rgb` gives it. Raises VideoError."""
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path}: not an image that is read ({error})") from None


def to_rgb(image):
    """A PIL image of any mode as viewers show it: in RGB, upright, white where it is transparent; the first of
    several pages or frames. Grey values of 16 bits count up to 65,535. Floats and whole numbers beyond that
    have no white of their own: the least in the picture is black, the greatest white. Colour profiles are not
    applied. Raises OSError, ValueError, SyntaxError."""
    clear = image.info.get("transparency")  # of a grey or RGB PNG: the colour that is, in samples of the file
    tiles = getattr(image, "tile", None)  # of a file that is not read yet
    stored = tiles[0][3] if tiles else None
    if clear is not None and stored in GREY_STEPS:
        image.info["transparency"] = clear * GREY_STEPS[stored]
    elif clear is not None and stored == "RGB;16B":  # of which PIL reads the upper eight bits
        image.info["transparency"] = tuple(sample >> 8 for sample in clear)
    tags = image.getexif()  # of TIFF, too
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # I;16, I;16B, I and F, which PIL cuts off at 255
        values = np.array(image)
        if image.mode == "I" and tags.get(ExifTags.Base.SampleFormat) != SIGNED:
            values = values.view(np.uint32)
        from_white = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
        image = Image.fromarray(eight_bits(values, from_white))
        if clear is not None:
            image.putalpha(Image.fromarray(values != clear).convert("L"))
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


GREY_STEPS = {"L;2": 85, "L;4": 17}  # between the levels of a PNG's pixels of 2 and 4 bits
SIGNED = 2  # TIFF's number for numbers below 0, too


def eight_bits(values, from_white):
    """Grey values of `to_rgb`'s wide kinds as uint8. from_white: the greatest is black. Raises ValueError."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("its pixels are no numbers")
    ends = (0, 65_535)
    if values.dtype.kind == "f" or finite.min() < 0 or finite.max() > 65_535:
        ends = (finite.min(), finite.max())
    levels = np.interp(values, ends, [255, 0] if from_white else [0, 255])
    return np.nan_to_num(levels).round().astype(np.uint8)


def scale(image, pixel_shape, min_pixels, max_pixels, unit):
    """(H, W, 3) uint8 with pixels of shape (height, width): a (3, H', W') tensor with square ones.

    H' and W' are what Qwen's image processor gives: near the aspect ratio, from min_pixels to max_pixels in
    area, multiples of `unit` (a token's side in pixels: patch size x merge of the vision tower). Raises
    VideoError."""
    image = torch.from_numpy(image).permute(2, 0, 1)  # (3, H, W)
    height, width = (max(1, round(side * factor)) for side, factor in zip(image.shape[1:], pixel_shape))
    try:
        size = smart_resize(height, width, unit, min_pixels, max_pixels)
    except ValueError:
        raise VideoError(f"a frame of {width}x{height} is too narrow") from None
    if size != tuple(image.shape[1:]):
        image = transforms.resize(image, list(size), transforms.InterpolationMode.BICUBIC, antialias=True)
    return image.contiguous()


# -------------------------------------------------------------------------------------------------- one video
class Video:
    """One open video file: `duration_s`, `fps`, the frame on screen at any time. Threads may share it.

    Only what can be seen is decoded: from the key frame before it on, without frames that no other refers to.
    Raises VideoError, naming the file, for anything but a regular local file with a video stream."""

    def __init__(self, path):
        self.path = str(path)
        self.file = None
        self.container = None
        self.codec = None
        self.lock = threading.Lock()
        self.pixel_shape = (1.0, 1.0)  # height and width of a pixel on the screen, of the frames last shown
        self.times_s = None  # of all frames, once they are asked for
        self.rewinds = False  # whether it is opened again for each seek, and read from its start
        self.options = {"max_pixels": str(MAX_SIDE * MAX_SIDE)}  # of the decoder
        try:
            self.file = open_file(self.path)
            self._open_stream()
            self._read_index()
            if self._closed_gops():
                self.options["err_detect"] = "explode"  # damage is reported, not painted over
            self._read_timing()
        except (av.FFmpegError, OSError, ValueError, EOFError, IndexError) as error:
            raise VideoError(f"{self.path}: not a video in a format that is read ({error}); read are "
                             f"{', '.join(sorted(ALLOWED_FORMATS))}") from None

    def frames_at(self, times_s, keyframes_within_s=None):
        """[(time_s shown, (H, W, 3) uint8)] at `times_s`, ascending, but damaged ones. Raises VideoError.

        keyframes_within_s: the nearest key frame instead where it is closer than this."""
        frames = []
        with self.lock:
            for time_s in times_s:
                frame = self._nearest_keyframe(time_s, keyframes_within_s)
                if frame is None:
                    frame = self._frame_at(time_s)
                if frame is not None:
                    frames.append(frame)
        if not frames:
            raise VideoError(f"{self.path}: no frame can be decoded at {times_s[0]:.2f} s")
        return frames

    def times_of(self, numbers):
        """Seconds, ascending, at which the frames of these numbers, counted from 0 as they are shown, are on
        screen. At a constant rate from the rate, else from the packets of the file. Raises VideoError."""
        rate = self.stream.average_rate
        if rate and rate == self.stream.base_rate and not self.animated:
            times_s = {n: (n + 0.5) / self.fps for n in numbers}
        else:
            all_s = self.all_times()
            times_s = {n: all_s[int(n)] if 0 <= n < len(all_s) else math.inf for n in numbers}
        for n, time_s in times_s.items():
            if not 0 <= time_s <= self.duration_s + 1:
                raise VideoError(f"{self.path}: no frame {n:.0f} in {self.duration_s:.2f} s")
        return tuple(sorted(round(time_s, 6) for time_s in times_s.values()))

    def all_times(self):
        """Seconds at which each frame comes on screen, from the packets of the whole file."""
        with self.lock:
            if self.times_s is None:
                self._seek(None)
                self.times_s = sorted(self._seconds(p.pts) for p in self._packets() if p.pts is not None)
            return self.times_s

    def close(self):
        for opened in (self.container, self.file):
            if opened is not None:
                opened.close()

    __del__ = close  # not left to the garbage collector: PyAV's containers and streams refer to each other

    def _seconds(self, pts):
        """Seconds from the first frame to a time stamp."""
        return float((pts - self.start_pts) * self.time_base)

    # ------------------------------------------------------------------------------------------------ opening
    def _open_stream(self):
        """Opens `container` and sets the decoder of its `stream` up."""
        self.container = av.open(self.file, io_open=refuse, options={
            "format_whitelist": ",".join(ALLOWED_FORMATS | REFUSED_FORMATS),  # no playlist is followed
            "max_pixels": self.options["max_pixels"]})
        self.formats = set(self.container.format.name.split(","))
        if not self.formats & ALLOWED_FORMATS:
            raise ValueError(f"its format is {self.container.format.name}")
        self.animated = bool(self.formats & ANIMATIONS)
        if self.rewinds:
            self.stream = self.container.streams[self.chosen]
        else:
            beginning = os.pread(self.file.fileno(), 1 << 16, 0)
            avi_in_matroska = b"V_MS/VFW/FOURCC" in beginning  # the name of such a track
            self.file.dts_only = "avi" in self.formats or avi_in_matroska
            self._choose_stream()
            self.chosen = self.stream.index
            pixels = self.stream.codec_context.format  # None where no packet told it
            # a palette comes with the first packet and, after a seek, not again
            self.rewinds = self.animated or bool(pixels and pixels.has_palette)
        if self.file.dts_only:
            self.options["strict"] = "1"  # H.264 then reorders as much as it may
        self.codec = self.stream.codec_context
        if self.stream.metadata.get("alpha_mode") == "1":  # of WebM
            self.codec = av.CodecContext.create(ALPHA_DECODERS[self.codec.name], "r")
        self.codec.options = self.options
        self.codec.thread_type = "AUTO"
        self.time_base = self.stream.time_base  # seconds of one unit of a time stamp
        if not 1e-12 < self.time_base < 1e4:
            raise ValueError(f"its time base is {self.time_base} s")
        of_all = (self.container.duration or 0) / av.time_base  # seconds
        self.said_duration = self.stream.duration or int(of_all / self.time_base)  # what the headers tell

    def _choose_stream(self):
        """`stream` is the one that players choose, but no still picture beside sound or other streams."""
        best = self.container.streams.best("video")
        cover = av.stream.Disposition.attached_pic
        for stream in sorted(self.container.streams.video, key=lambda stream: stream is not best):
            if stream.codec_context is None or stream.disposition & cover:
                continue
            self.stream = stream
            if len(self.container.streams) == 1:
                return
            self._seek(None)
            if len(list(islice(self._packets(), 3))) == 3:  # a still picture gives two, the second one empty
                return
        raise VideoError(f"{self.path}: no video in it with a decoder and more than a still picture")

    def _read_index(self):
        """Sets `index`, the container's list of key frames and perhaps other packets, None where it ends too
        early or is a guess. Sets `index_delay`, what a key frame's time stamp is above the one listed: in MP4
        times of decoding are listed."""
        self.index = None
        self.index_delay = 0
        index = self.stream.index_entries
        if self.rewinds or "mpeg" in self.formats or not index:
            return
        self._seek(None)
        first = [packet for packet in islice(self._packets(), 3) if packet.pts is not None]
        if self.formats & {"mov", "flv"} and self.codec.reorder_depth:
            # times of presentation were left out; that takes three pictures at three times to tell
            self.file.dts_only = len({p.dts for p in first}) == 3 and all(p.pts == p.dts for p in first)
        listed = index[-1].timestamp - index[0].timestamp
        guessed = any(entry.timestamp == packet.dts and entry.is_keyframe and not packet.is_keyframe
                      for entry, packet in zip(index, first))
        whole = len(first) == 1 or listed >= self.said_duration / 2  # MPEG-TS lists what was read so far
        if first and whole and not guessed:
            self.index = index
            self.index_delay = first[0].pts - index[0].timestamp

    def _closed_gops(self):
        """Whether decoding can begin at key frames as if nothing was before them. H.264's need not be IDR
        pictures; after one that is none the decoder takes references to earlier frames for damage."""
        if self.codec.name != "h264":
            return True
        only_idr = av.bitstream.BitStreamFilterContext("filter_units=pass_types=5", self.stream)
        self._seek((self.stream.start_time or 0) + (self.stream.duration or 0) // 2)
        for packet in self._packets():
            if packet.is_keyframe:
                return bool(only_idr.filter(packet))
        return True

    def _read_timing(self):
        """Sets `start_pts`, the first frame's time stamp, `fps`, `frame_pts` and `duration_s`."""
        self.needed_pts = -math.inf
        first = self._decode_from(None)
        if first is None and not self.rewinds:
            self.rewinds = True  # as in an FLV of one frame, whose index lists the end in that one's place
            self.index = None
            first = self._decode_from(None)
        if first is None:
            raise VideoError(f"{self.path}: no frame can be decoded")
        self.start_pts = first.pts
        if self.lost_before:  # the first frames are damaged: time starts with them all the same
            self._seek(None)
            keys = (p.pts for p in self._packets() if p.is_keyframe and p.pts is not None)
            self.start_pts = min(first.pts, next(keys, first.pts))
        self.fps = float(self.stream.average_rate or self.stream.guessed_rate or 25)
        self.frame_pts = max(1, round(1 / (self.fps * float(self.time_base))))  # a frame's usual time
        self.duration_s = max(self._seconds(self._end_pts()), 1 / self.fps)

    def _end_pts(self):
        """When the last frame leaves the screen, from the last packets: headers may count from 0 or from the
        first frame, hold the sound track's length, or stop short of the last B-frame."""
        about = self.start_pts + self.said_duration
        ends = [self.start_pts + 1]
        for pts in (about - int(2 / self.time_base), None):  # the last 2 s; without a packet there, all
            with suppress(av.FFmpegError, IndexError):
                self._seek(pts)
                for packet in self._packets():
                    if packet.pts is not None:
                        ends.append(packet.pts + (packet.duration or self.frame_pts))
            if len(ends) > 1:
                break
        return max(ends)

    # ------------------------------------------------------------------------------------ the frame on screen
    def _frame_at(self, time_s):
        """(time_s shown, image), None if what is on screen then is damaged."""
        # the time stamp then; what is less than a microsecond away counts, as times may be rounded to that
        want = self.start_pts + max(0, math.floor((time_s + 1e-6) / float(self.time_base)))
        self.needed_pts = want - 2 * self.frame_pts  # frames before that none refers to are not decoded
        self._go_to(want)
        if self.shown is not None and self.skipped_pts > self.shown.pts:
            # it stays on screen for longer than usual, or one that was skipped has followed it: decode all
            self.needed_pts = -math.inf
            self._forget_place()
            self._go_to(want)
        if self.shown is None:
            return None
        if self.lost_before and want >= self.shown.pts + (self.shown.duration or self.frame_pts):
            return None  # a lost frame is on screen
        return self._seconds(self.shown.pts), self._rgb(self.shown)

    def _go_to(self, want):
        """Decodes up to the frame on screen at the time stamp `want`: `shown`, None if it is damaged."""
        if self._worth_a_seek(want):
            back = 0  # further until it is not after `want`: key frames may be listed by time of decoding
            while self._decode_from(want - back) is None or self.ahead.pts > want:
                if self.lost_before and (self.index or back * self.time_base > 10):
                    break  # damage; without an index it may be a landing between two key frames
                if want - back <= self.start_pts:
                    self._decode_from(None)  # the first key frame is decoded before start_pts
                    break
                back = 2 * back + max(1, int(1 / self.time_base))
        while self.ahead is not None and self.ahead.pts <= want:
            self.shown = self.ahead
            self._next()

    def _worth_a_seek(self, want):
        """Seek only if that skips frames: when a key frame lies between the decoder's position and `want`."""
        if self.ahead is None and self.lost_before:
            return True  # decoding ended in damage; whole frames may come after it
        if self.ahead is None or self.ahead.pts > want:
            return self.shown is None or self.shown.pts > want
        if self.index:
            at = self.index.search_timestamp(want - self.index_delay)
            return at >= 0 and self.index[at].timestamp + self.index_delay > self.ahead.pts
        return not self.rewinds and (want - self.ahead.pts) * self.time_base > 5

    def _nearest_keyframe(self, time_s, within_s):
        """(time_s shown, image) of the nearest key frame, None if none is closer than `within_s`."""
        if within_s is None or not self.index:
            return None
        want = self.start_pts + round(time_s / float(self.time_base)) - self.index_delay
        around = [self.index.search_timestamp(want, backward=backward) for backward in (True, False)]
        listed = [self.index[at].timestamp for at in around if at >= 0]
        if not listed:
            return None
        nearest = min(listed, key=lambda stamp: abs(stamp - want))
        self.needed_pts = -math.inf
        frame = self._decode_from(nearest + self.index_delay, alone=True)
        self._forget_place()
        if frame is None or frame.pts < self.start_pts:
            return None
        shown_s = self._seconds(frame.pts)
        if abs(shown_s - time_s) >= within_s:
            return None
        return shown_s, self._rgb(frame)

    # ----------------------------------------------------------------------------------------------- decoding
    def _decode_from(self, pts, alone=False):
        """Seeks to the last key frame at or before `pts`, decodes one frame into `ahead`. None at the end.

        alone: decodes nothing but that key frame, where it takes no others to tell its time."""
        self._seek(pts)
        packets = self._packets()
        if alone and not self.late:
            end = av.Packet()  # at an empty packet the decoder gives what it holds back
            end.stream = self.stream
            packets = chain(islice((p for p in packets if p.is_keyframe), 1), [end])
        self.skipped_pts = -math.inf  # of the last packet whose frame may have been skipped
        # by a proxy, as a generator that holds its Video would keep it open
        self.frames = Video._whole_frames(weakref.proxy(self), packets)
        return self._next()

    def _next(self):
        """The next frame that is whole, into `ahead`; `lost_before`: whether frames before it were lost."""
        self.ahead, self.lost_before = next(self.frames)
        return self.ahead

    def _whole_frames(self, packets):
        """Yields each frame that is whole, None at the end, and whether frames before it were lost. A damaged
        packet costs all frames up to the next key frame, as they refer to it."""
        key_pts = -math.inf if self.late else None  # of the key frame where decoding began
        sent_dts = []  # of the packets that went into the decoder
        damaged = False  # whether what comes refers to damage
        lost = False  # whether frames since the last one that was whole were lost
        futile = 0  # packets since then
        while futile < MAX_FUTILE_PACKETS:
            futile += 1
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                if packet.pts is not None:
                    if key_pts is None and packet.is_keyframe:
                        key_pts = packet.pts
                    if key_pts is not None and packet.pts < key_pts:
                        continue  # shown before that key frame: refers to what was not decoded
                cut_off = "gif" in self.formats and bytes(packet)[-1:] not in b"\0;"
                if packet.is_corrupt or cut_off:
                    damaged = True
                    lost = True
                    continue
                frames = self._decode(packet, sent_dts)
            except (av.FFmpegError, IndexError):  # IndexError: reading came upon a new stream, and ends
                self.codec.flush_buffers()  # or its threads report the error again and again
                damaged = True
                lost = True
                continue
            for frame in frames:
                damaged = frame.is_corrupt or damaged and not frame.key_frame
                if damaged or frame.pts is None:
                    lost = True
                else:
                    yield frame, lost
                    lost = False
                    futile = 0
        yield None, lost or futile == MAX_FUTILE_PACKETS

    def _decode(self, packet, sent_dts):
        """The frames that come out of the decoder after this packet, damaged ones among them."""
        self.codec.skip_frame = "DEFAULT"
        if packet.pts is not None and packet.pts < self.needed_pts and not self.late:
            self.codec.skip_frame = "NONREF"
            self.skipped_pts = max(self.skipped_pts, packet.pts)
        frames = self.codec.decode(packet)
        if packet.dts is not None:
            sent_dts.append(packet.dts)
        if self.late:  # a picture comes when `late` more have gone in, or with all that are left at the end
            for number, frame in enumerate(frames):
                if frame.dts is not None:
                    at = bisect_left(sent_dts, frame.dts) - self.late
                elif self.index:
                    at = len(sent_dts) - len(frames) + number
                else:
                    at = -1  # the file may be cut off, and then some of these are missing
                frame.pts = sent_dts[at] if at >= 0 else None
        return frames

    @property
    def late(self):
        """By how many pictures the decoder delays its output, where its order alone tells times; else 0."""
        return self.file.dts_only and self.codec.reorder_depth

    def _seek(self, pts):
        """Goes to the last key frame at or before a time stamp, or with None to the start of the file."""
        self._forget_place()
        self.file.futile_bytes = 0
        self.file.untimed = pts is not None and "mpeg" in self.formats
        if self.rewinds:
            self.container.close()
            self.file.seek(0)
            self._open_stream()
            return
        try:
            self.container.seek(0 if pts is None else pts, stream=self.stream, backward=True)
        except av.FFmpegError:
            self.container.seek(0)
        if self.codec is not None:
            self.codec.flush_buffers()

    def _forget_place(self):
        """The decoder stands nowhere now: what comes next begins with a seek."""
        self.shown = None  # the frame on screen
        self.ahead = None  # the one after it

    def _packets(self):  # from where the container stands
        return self.file.count(self.container.demux(self.stream))

    def _rgb(self, frame):
        """A decoded frame as an upright (H, W, 3) uint8 RGB array."""
        if max(frame.width, frame.height) > MAX_SIDE:
            raise VideoError(f"{self.path}: {frame.width}x{frame.height} is above {MAX_SIDE} pixels a side")
        if self._has_alpha(frame.format):
            image = np.array(to_rgb(Image.fromarray(frame.to_ndarray(format="rgba"))))
        else:
            image = frame.to_ndarray(format="rgb24")
        self.pixel_shape = (1.0, float(self.stream.sample_aspect_ratio or 1))
        matrix = display_matrix(frame)
        large = np.abs(matrix) > np.abs(matrix).max() / 50  # what is smaller is an angle of about 1 degree
        if np.array_equal(large, np.eye(2)[::-1]):
            image = image.transpose(1, 0, 2)
            matrix = matrix[::-1]
            self.pixel_shape = self.pixel_shape[::-1]
        elif not np.array_equal(large, np.eye(2)):
            matrix = np.eye(2)  # other angles are not turned
        if matrix[0, 0] < 0:
            image = image[:, ::-1]
        if matrix[1, 1] < 0:
            image = image[::-1]
        return np.ascontiguousarray(image)

    def _has_alpha(self, pixels):
        """Whether a pixel format says what is transparent."""
        if self.codec.name == "rawvideo" and "avi" in self.formats:
            return False  # the fourth byte of these pixels is not used
        return pixels.has_palette or any(component.is_alpha for component in pixels.components)


def display_matrix(frame):
    """[[a, b], [c, d]]: the frame's pixel at (x, y) is shown at (a x + c y, b x + d y)."""
    try:  # not frame.side_data: it and the frame would refer to each other
        matrix = SideDataContainer(frame).get("DISPLAYMATRIX", np.eye(3, dtype=np.int32))
    except ValueError:  # a kind of side data that PyAV does not know: it gives the angle all the same
        cos, sin = math.cos(math.radians(frame.rotation)), math.sin(math.radians(frame.rotation))
        return np.array([[cos, -sin], [sin, cos]])
    return np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2].astype(float)


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
            if self.futile_bytes < MAX_FUTILE_BYTES:  # what has ended stays so
                self.futile_bytes = 0
            if self.dts_only:
                packet.pts = packet.dts
            if packet.is_keyframe and packet.pos:
                self.untimed = False
            if not self.untimed:
                yield packet


def open_file(path):
    """The regular local file at `path`, as FFmpeg reads it. Raises VideoError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise VideoError(f"{path}: not a regular file")
        file = VideoFile(path)
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror}") from None
    del file.name  # FFmpeg goes by what is in it
    return file


def refuse(url, flags, options):
    raise av.error.PermissionError(13, "it refers to another file")
