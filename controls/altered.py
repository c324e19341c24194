"""Environments for controls: another clip in place of a zoom's, or no answer before a zoom.

Each is a mixin for whatever protocol a checkpoint plays. Clips are altered when a call was carried out, so
errors, times, tags and tokens are those of the true clip, and whether it hit the evidence is, too.
"""

import functools
import os
import random
from dataclasses import replace
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as transforms

from common import UserError
from protocols import protocol_of
from video import VideoError, open_video, read_frames
from zoom_env import Turn

GREY = 128  # of 255
OTHERS = "other_videos"  # a question's key: paths whose frames stand in for its clips, the first readable one
MOST_OTHERS = 20  # of a question
ZOOM_FIRST = "Error: zoom in before you answer."


class GreyClips:
    """Each clip is as many frames of one grey, of the same times and sizes."""

    def carry_out(self, call):
        frames = super().carry_out(call)
        return tuple(replace(frame, image=torch.full_like(frame.image, GREY)) for frame in frames)


class OtherClips:
    """Each clip shows another video at the same times, moved into it; tags and sizes stay."""

    def carry_out(self, call):
        frames = super().carry_out(call)
        errors = []
        for path in self.question[OTHERS] if frames else ():
            try:
                return self.stand_in(frames, path)
            except VideoError as error:
                errors.append(error)
        if errors:
            raise UserError(f"no other video can stand in for {self.path}: {errors[0]}")
        return frames

    def stand_in(self, frames, path):
        """The frames with the images of another video. Raises VideoError."""
        c, images = self.config, []
        for time_s in moved([frame.time_s for frame in frames], open_video(path).duration_s):
            images.append(read_frames(path, (time_s,), c.min_pixels, c.max_pixels, c.frame_unit)[0].image)
        return tuple(replace(frame, image=resized(image, frame.image.shape[1:]))
                     for frame, image in zip(frames, images))


def moved(times_s, duration_s):
    """Ascending times, moved so that all lie within a video of `duration_s`; closer together where it is
    shorter than they are."""
    first, length = times_s[0], times_s[-1] - times_s[0]
    closer = min(1.0, duration_s / length) if length else 1.0
    start_s = max(0.0, min(first, duration_s - length * closer))
    return [round(start_s + (time_s - first) * closer, 6) for time_s in times_s]


def resized(image, size):
    return image if image.shape[1:] == size else transforms.resize(image, list(size), antialias=True)


class NoClips:
    """The reply to a zoom has no frames."""

    def carry_out(self, call):
        super().carry_out(call)
        call.num_frames = 0
        return ()


class ZoomFirst:
    """An answer before any zoom is an error, which costs a round; in the last round it counts."""

    def parse(self, text):
        turn = super().parse(text)
        if turn.kind != "answer" or self.num_calls() or self.is_last():
            return turn
        return Turn(text, "error", turn.well_formed, error=ZOOM_FIRST)


MIXINS = {"grey": GreyClips, "other": OtherClips, "none": NoClips, "always": ZoomFirst}


@functools.cache
def altered(protocol, mode):
    """The class that plays a Mode by the rules of a protocol, itself where nothing is altered."""
    mixins = tuple(MIXINS[word] for word in (mode.clips, mode.zoom) if word in MIXINS)
    return type(protocol.__name__, (*mixins, protocol), {}) if mixins else protocol


def maker(mode):
    """What makes the environments of a Mode, called as protocols.make_env is."""
    def make_env(question, env_config, root="."):
        return altered(protocol_of(env_config), mode)(question, env_config, root)

    return make_env


def num_refused(env):
    """Answers that came before a zoom, and were refused for that."""
    return sum(turn.error == ZOOM_FIRST for turn in env.turns)


def with_other_videos(questions, rows, root, seed):
    """{number: question} with the other videos of the file, in an order of chance that depends on the
    question's place in the file and the seed alone. rows: all of the file. Raises UserError where there is
    no other video."""
    paths = {}
    for row in rows:
        path = Path(root, row["video"])
        paths.setdefault(os.path.realpath(path), str(path))
    if len(paths) < 2:
        raise UserError("--clips other needs questions about two videos and more")
    known, with_others = list(paths), {}
    places = {path: place for place, path in enumerate(known)}
    for number, question in questions.items():
        own = places[os.path.realpath(Path(root, question["video"]))]
        first = random.Random(f"{seed} {number}").randrange(1, len(known))
        order = [(own + first + step) % len(known) for step in range(min(len(known), MOST_OTHERS))]
        with_others[number] = question | {OTHERS: [paths[known[place]] for place in order if place != own]}
    return with_others
