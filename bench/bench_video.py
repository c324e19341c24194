"""How fast frames come out of a long video, beside other decoders that are installed.

    python bench/bench_video.py                    ours, and torchcodec, decord2, OpenCV where they can be imported
    python bench/bench_video.py --json rows.json   also writes the rows: name, ours, peer, ratio, goal, met

The files are 720p H.264 at 30 frames a second, a key frame every 250 (x264's default), of 1 minute, 1 hour and 10 hours:
the packets of one encoded minute again and again. Each trial asks everyone for the same times, one after the other, of
a file that each has open; a row compares medians over the trials. A frame is wrong if another one of the five frames
around the right one is more like it.

    zoom               16 frames of 8 s, somewhere
    overview           64 frames spread over the hour, each the one on screen
    by key frames      the same 64, each the nearest key frame with its true time; the peer takes the exact frames
    independence       a zoom into the hour, into its end, and into 10 hours, against one into the minute

    pip install torchcodec decord2 opencv-python-headless       (torchcodec needs FFmpeg's shared libraries)
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from video import Video  # noqa: E402
from zoom_env import slice_centres  # noqa: E402

FPS, MINUTE = 30, 60
SIZE = (720, 1280)


def encode_minute(path):
    """One minute of moving colours, every frame unlike its neighbours, 2.6 MB."""
    coarse = torch.randint(0, 256, (3, 3, 24, 48), generator=torch.Generator().manual_seed(0)).float()
    smooth = torch.nn.functional.interpolate(coarse, scale_factor=40, mode="bilinear").byte()  # few bytes a frame
    fields = smooth.permute(0, 2, 3, 1).repeat(1, 2, 2, 1).numpy()  # (3, 1920, 3840, 3), to cut frames of 720x1280 from
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "28"})
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for k in range(FPS * MINUTE):
            field, speed = fields[k // 300 % 3], (3, 7, 11)[k // 600 % 3]
            y, x = k * speed % 960, k * 5 % 1920
            image = field[y:y + SIZE[0], x:x + SIZE[1]]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


def repeat(source, path, times):
    """The packets of `source` `times` times in a row."""
    with av.open(str(source)) as reader:
        stream = reader.streams.video[0]
        packets = [(bytes(p), p.pts, p.dts, p.is_keyframe, p.duration) for p in reader.demux(stream) if p.size]
        length = round(MINUTE / stream.time_base)
        with av.open(str(path), "w") as writer:
            copy = writer.add_stream_from_template(stream)
            for n in range(times):
                for data, pts, dts, key, duration in packets:
                    packet = av.Packet(data)
                    packet.pts, packet.dts, packet.duration = pts + n * length, dts + n * length, duration
                    packet.time_base, packet.is_keyframe, packet.stream = stream.time_base, key, copy
                    writer.mux(packet)


class Ours:
    name = "ours"

    def __init__(self, path):
        self.video = Video(path)

    def frames(self, times_s):
        return [image for _, image in self.video.frames_at(times_s)]

    def keyframes(self, times_s, within_s):
        return self.video.frames_at(times_s, within_s)


class TorchCodec:
    def __init__(self, path, mode):
        from torchcodec.decoders import VideoDecoder
        self.name = f"torchcodec {mode}"
        self.decoder = VideoDecoder(str(path), seek_mode=mode, dimension_order="NHWC", num_ffmpeg_threads=0)

    def frames(self, times_s):
        return list(self.decoder.get_frames_played_at(list(times_s)).data.numpy())


class Decord:
    name = "decord2"

    def __init__(self, path):
        import decord
        self.reader = decord.VideoReader(str(path))

    def frames(self, times_s):
        return list(self.reader.get_batch([int(t * FPS + 1e-6) for t in times_s]).asnumpy())


class OpenCV:
    name = "OpenCV"

    def __init__(self, path):
        import cv2
        self.cv2, self.capture = cv2, cv2.VideoCapture(str(path))

    def frames(self, times_s):
        out, at = [], None
        for t in times_s:
            frame = int(t * FPS + 1e-6)
            if at is None or not 0 <= frame - at < 100:
                self.capture.set(self.cv2.CAP_PROP_POS_FRAMES, frame)
            else:
                for _ in range(frame - at):
                    self.capture.grab()
            out.append(self.cv2.cvtColor(self.capture.read()[1], self.cv2.COLOR_BGR2RGB))
            at = frame + 1
        return out


def peers(path):
    makers = {"torchcodec approximate": lambda: TorchCodec(path, "approximate"),
              "torchcodec exact": lambda: TorchCodec(path, "exact"),
              "decord2": lambda: Decord(path), "OpenCV": lambda: OpenCV(path)}
    found = []
    for name, make in makers.items():
        try:
            found.append(make())
        except (ImportError, RuntimeError, OSError) as error:
            print(f"{name} left out: {str(error).splitlines()[0]}")
    return found


def small(image):
    """An image's signature: rows and columns thinned out."""
    return np.asarray(image)[::16, ::16].astype(np.int16)


def count_wrong(images, times_s, truth):
    """How many images look more like a neighbour of the frame on screen than like it. truth: signatures of a minute."""
    wrong = 0
    for image, t in zip(images, times_s, strict=True):
        right = int(t * FPS + 1e-6)
        around = [abs(small(image) - truth[(right + d) % len(truth)]).mean() for d in (0, -2, -1, 1, 2)]
        wrong += around[0] > min(around)
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--trials", type=int, default=9, help="segments to zoom into (default 9)")
    parser.add_argument("--folder", help="where to keep the files; without it, a temporary folder")
    args = parser.parse_args()
    temporary = tempfile.TemporaryDirectory()
    folder = Path(args.folder or temporary.name)
    folder.mkdir(parents=True, exist_ok=True)
    files = {1: folder / "1m.mp4", 60: folder / "1h.mp4", 600: folder / "10h.mp4"}
    if not files[1].exists():
        encode_minute(files[1])
    for minutes, path in files.items():
        if not path.exists():
            repeat(files[1], path, minutes)
    with av.open(str(files[1])) as container:
        truth = [small(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    rng, rows = random.Random(0), []

    def compare(name, tasks, trials, goals):
        """tasks: {who: function of the trial's times, giving images or (time, image)s}; goals: {peer: ratio}."""
        seconds, wrong, shown = {who: [] for who in tasks}, dict.fromkeys(tasks, 0), 0
        for times_s in trials:
            for who, task in tasks.items():
                began = time.perf_counter()
                images = task(times_s)
                seconds[who].append(time.perf_counter() - began)
                wrong[who] += (count_wrong([i for _, i in images], [t for t, _ in images], truth)
                               if isinstance(images[0], tuple) else count_wrong(images, times_s, truth))
            shown += len(times_s)
        ours = statistics.median(seconds.pop("ours"))
        for who, taken in seconds.items():
            ratio = ours / statistics.median(taken)
            goal = goals.get(who)
            rows.append({"name": f"{name}, against {who}", "ours": ours, "peer": statistics.median(taken),
                         "ratio": ratio, "goal": goal, "met": None if goal is None else ratio <= goal,
                         "wrong_ours": wrong["ours"] / shown, "wrong_peer": wrong[who] / shown})

    hour = [Ours(files[60]), *peers(files[60])]
    starts = [rng.uniform(0, 3590) for _ in range(args.trials)]
    compare("zoom", {w.name: w.frames for w in hour}, [slice_centres(s, s + 8, 16) for s in starts],
            {"torchcodec approximate": 0.95})
    times_s = slice_centres(0, 3600, 64)
    compare("overview", {w.name: w.frames for w in hour}, [times_s] * 3, {"torchcodec approximate": 1.0})

    def by_keyframes(times_s):
        return hour[0].keyframes(times_s, 3600 / 64 / 2)

    exact = {w.name: w.frames for w in hour[1:2]}
    compare("overview by key frames", {"ours": by_keyframes} | exact, [times_s] * 3, {"torchcodec approximate": 0.2})

    long, minute = Ours(files[600]), Ours(files[1])
    offsets = [rng.uniform(0, 50) for _ in range(2 * args.trials)]  # the same place in the minute, so the same packets
    for name, video, minutes in (("zoom at the start of the hour", hour[0], 1),
                                 ("zoom at the end of the hour", hour[0], 59), ("zoom in 10 hours", long, 555)):
        def shifted(times_s, video=video, minutes=minutes):
            return video.frames([t + minutes * MINUTE for t in times_s])
        compare(name, {"ours": shifted, "the same in one minute": minute.frames},
                [slice_centres(s, s + 8, 16) for s in offsets], {"the same in one minute": 1.1})
    print(f"{'':52}{'ours s':>8}{'peer s':>8}{'ratio':>7}{'goal':>6}{'met':>5}{'wrong % ours':>14}{'peer':>6}")
    for r in rows:
        met = {None: "", True: "yes", False: "NO"}[r["met"]]
        print(f"{r['name']:52}{r['ours']:8.3f}{r['peer']:8.3f}{r['ratio']:7.2f}{r['goal'] or '':>6}{met:>5}"
              f"{100 * r['wrong_ours']:14.1f}{100 * r['wrong_peer']:6.1f}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
