"""The world that the policy acts in: overview, tools, turns, rounds and rewards. No model in it.

One episode (paper, section 3.1): the policy first sees a few frames of the whole video, the overview. In each
turn it thinks, then either calls the tool

    <video_zoom>{"segment": [start_s, end_s], "fps": n}</video_zoom>

and gets that clip, at most 16 frames, or ends with <answer>...</answer>; after `max_zooms` turns, failed
calls among them, it has to.

    env = ZoomEnv(question, EnvConfig(), root="data")
    messages = env.reset()                      # system and user message, with the overview
    while not env.done:
        messages = env.step(policy(messages))   # the tool's reply, [] once the episode is over
    env.rewards                                 # {"reward": ..., "accuracy": ..., "format": ..., "tool": ...}

Anything that maps messages to text can play: our model, a served one, a script (demo/synthetic.py has one).
Another tool is a parser, a function that runs it and a row of TOOLS, and words in the system prompt. What
other agents meet (other words, frames, rules) is a subclass that has a name, see protocols.
Nothing that the policy says can raise: it comes back to it as an error text.

Where the paper is silent: frames stand in the middle of equal slices of the interval that they sample (so a
clip never shows its neighbours); a segment that runs past the end of the video is cut there; a turn without
call or answer is told so and costs a round; the question comes before the frames, to be read with it in mind.
"""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from grading import LETTERS, grade, option_texts, read_untagged
from video import VideoError, open_video, read_frames, read_image

# Trained checkpoints know these words, and those of the errors below: another text needs new training.
SYSTEM_PROMPT = """You answer a question about a video. You first see a few frames of the whole video, each \
after a tag with its number and its time in seconds. If they do not show what you need, look closer with the \
zoom tool: it returns frames of one segment of the video, at the frame rate that you ask for.

In each turn, write your reasoning inside <think> and </think>, and after it exactly one of these:
<video_zoom>{"segment": [start_sec, end_sec], "fps": n}</video_zoom> to look closer, with \
(end_sec - start_sec) * fps not above ZOOM_MAX_FRAMES;
<answer>your final answer</answer> to end. For a multiple-choice question answer with the letter of the \
option."""
MAY_ZOOM = "You may zoom in {left} more time(s), or answer now."
LAST_TURN = "You cannot zoom in any more. Give your final answer now, without <video_zoom>."

LONG_S = 600  # longer videos are overviewed by key frames
ANY_FPS = 1e6  # overview_fps with which an overview always has overview_max_frames


# --------------------------------------------------------------------------------------------------- settings
@dataclass(frozen=True)
class RewardWeights:
    """The reward is the sum of weight x part over these parts, each from 0 to 1 (paper, section 3.3)."""

    accuracy_weight: float = 0.9  # reward for a right answer
    format_weight: float = 0.1  # reward when every turn is well formed and every zoom within the limit
    tool_weight: float = 0.5  # bonus when the answer is right and a zoom was made
    hit_weight: float = 0.0  # reward for the share of the zooms that hit the question's evidence


REWARD_PARTS = tuple(f.name.removesuffix("_weight") for f in fields(RewardWeights))


@dataclass(frozen=True)
class EnvConfig(RewardWeights):
    """What the policy sees and may do. Saved with a checkpoint (zoom_config.json): evaluation repeats it."""

    overview_fps: float = 0.5  # frames a second of the first look at the video
    overview_max_frames: int = 64  # ... and at most so many over the whole video
    overview: str = "auto"  # uniform; nearest_keyframe: the key frame within half a step, where there is one;
    # auto: that for videos of more than 10 minutes, of which an exact overview would decode nearly everything
    zoom_fps: float = 0.0  # frames a second of each zoom, whatever its call asks for; 0: what it asks for
    zoom_max_frames: int = 16  # a call may ask for (end - start) * fps up to this
    max_zooms: int = 4  # rounds before the last one, which has to answer; a failed call uses one up, too
    min_pixels: int = 25_088  # a frame is scaled up to at least 32 tokens of 28x28 pixels
    max_pixels: int = 100_352  # ... and down to at most 128
    max_turn_tokens: int = 1024  # an assistant turn is cut off here, which ends the episode
    frame_unit: int = 28  # sides of frames are multiples of it; the policy sets it (patch x merge)
    system_prompt: str = SYSTEM_PROMPT  # ZOOM_MAX_FRAMES in it is replaced by the number
    protocol: str = "videozoomer"  # whose rules: a subclass of ZoomEnv
    texts: dict = field(default_factory=dict)  # its sentences, where they are not in our code
    preset: str = "paper"  # whose settings a run on this checkpoint takes where no flag says: paper, demo

    def __post_init__(self):
        for name in ("overview_fps", "overview_max_frames", "zoom_max_frames", "min_pixels", "max_pixels",
                     "frame_unit", "max_turn_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.overview not in ("auto", "uniform", "nearest_keyframe"):
            raise ValueError(f"overview must be auto, uniform or nearest_keyframe, not {self.overview}")
        for name in ("max_zooms", "zoom_fps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")


# ------------------------------------------------------------------------------------------------ the episode
@dataclass
class Message:
    role: str  # system, user or assistant
    content: list  # str and Frame items in reading order


class ZoomEnv:
    """One episode on one question, a row as in question files; `video` in it is relative to `root`.

    turns: a Turn for each text of the policy. rewards: {"reward": total, and each of REWARD_PARTS} once the
    episode is over, {} before. watched: the Frames of the overview and of each call; frames_shown in all.

    Another protocol has another `protocol` and overrides what it does otherwise."""

    protocol = "videozoomer"
    tools = {}  # {tag: Tool}: TOOLS below
    settings, needs = {}, ()  # of EnvConfig where --protocol takes it; names of texts that have to be given
    after_turn = "\n"  # text between an assistant turn's end token and what follows
    trains_appended_end = False  # whether an end token is trained that was not sampled, but appended
    largest_id = math.inf  # sampled token ids above are dropped
    skips_special = False  # whether the text of a turn is without special tokens that were sampled

    def __init__(self, question, config, root="."):
        if number := question.get("num_frames"):
            config = replace(config, overview_max_frames=number, overview_fps=ANY_FPS)
        self.question, self.config, self.root = question, config, root
        self.path = str(Path(root) / question["video"])
        self.turns, self.done, self.rewards = [], False, {}
        self.watched, self.frames_shown = [], 0

    def reset(self):
        """Starts the episode: the system and the user message. Raises VideoError if it cannot be read."""
        self.turns, self.done, self.rewards = [], False, {}
        self.watched, self.frames_shown = [], 0
        self.duration_s = open_video(self.path).duration_s
        system = self.config.system_prompt.replace("ZOOM_MAX_FRAMES", str(self.config.zoom_max_frames))
        return [Message("system", [system]), Message("user", self.opening(self.overview()))]

    def step(self, text):
        """Takes one assistant text; returns the user message with the reply, [] when the episode is over."""
        turn = self.parse(text)
        # the last round is for the answer
        last = self.is_last()
        if turn.kind == "call" and last:
            turn = replace(turn, kind="error", well_formed=False, error="Error: no zoom is left.")
        # carry its calls out
        frames = ()
        if turn.kind == "call":
            try:
                for call in turn.calls:
                    frames += self.carry_out(call)
            except VideoError as error:  # the format was right all the same
                turn = replace(turn, kind="error", error=self.unreadable(error))
        # end, or go on
        self.turns.append(turn)
        if turn.kind == "answer" or last:
            self.end()
            return []
        return [Message("user", self.reply(turn, frames if turn.kind == "call" else None))]

    def carry_out(self, call):
        """The frames of a Call, a tuple of Frame; notes in it how many they are, and whether they hit. Raises
        VideoError."""
        tool = self.tools[call.tool]
        frames = tool.run(self, call.arguments)
        call.num_frames = len(frames)
        call.hit = self._hits(tool.looks_at(call.arguments))
        return frames

    def end(self):
        """Ends the episode and grades it, once: from `step`, or where an episode is cut off. A reply that the
        policy has not seen is dropped then."""
        if not self.done:
            if self.turns and self.turns[-1].kind == "call":
                self.frames_shown -= len(self.watched.pop())
                unseen = [replace(call, hit=None, num_frames=0) for call in self.turns[-1].calls]
                self.turns[-1] = replace(self.turns[-1], kind="dropped", calls=unseen,
                                         error="The episode was too long for this zoom.")
            self.done, parts = True, reward_parts(self)
            total = sum(getattr(self.config, f"{name}_weight") * value for name, value in parts.items())
            self.rewards = {"reward": total, **parts}

    def fork(self):
        """A copy of the running episode that goes on by itself."""
        other = copy.copy(self)
        other.turns, other.watched = list(self.turns), list(self.watched)
        return other

    def frames_at(self, times_s, keyframes_within_s=None):
        """What tools look with: a tuple of Frame in the policy's sizes, see `read_frames`."""
        c = self.config
        return read_frames(self.path, times_s, c.min_pixels, c.max_pixels, c.frame_unit, keyframes_within_s)

    def when_watched(self):
        """What was watched without the images, whose memory is free then."""
        return [tuple(replace(frame, image=None) for frame in frames) for frames in self.watched]

    def answer(self):
        """The final answer's text, or None."""
        return self.turns[-1].answer if self.turns else None

    def num_calls(self):
        """Calls that were carried out, of any tool."""
        return sum(len(turn.calls) for turn in self.turns if turn.kind == "call")

    def num_invalid(self):
        """Turns that could not be carried out."""
        return sum(turn.kind == "error" for turn in self.turns)

    def describe(self):
        """The episode for a reader: what was asked, looked at, said and answered."""
        times = lambda frames: f"{len(frames)} frames" + (
            f", {frames[0].time_s:.2f} s to {frames[-1].time_s:.2f} s" if frames else "")
        lines = [f"{self.question['video']}: {self.question['question']}"]
        lines += ["  " + line for line in self.options()]
        lines.append(f"  overview: {times(self.watched[0])}")
        clips = iter(self.watched[1:])
        for number, turn in enumerate(self.turns, 1):
            lines.append(f"  turn {number}: {turn.text.strip()[:1000]}")
            if turn.kind == "call":
                lines.append(f"    looked at {times(next(clips))}")
            elif turn.error:
                lines.append(f"    {turn.error}")
        return "\n".join(lines)

    # ------------------------------------------------------------ what is another protocol's to do otherwise
    def opening(self, frames):
        """The first user message, a list of str and Frame."""
        length = f"The video lasts {self.duration_s:.2f} seconds. {len(frames)} frames of it:\n"
        asked = self.with_images("\n".join([*self.question_lines(), length]))
        return [*asked, *self.show(frames), "\n" + self._go_on()]

    def parse(self, text):
        """What an assistant text means: a Turn. A call in the last round ends the episode, too."""
        return parse_turn(text, self.duration_s, self.config, self.tools)

    def is_last(self):
        """Whether the turn that comes is the last one, where no tool is left."""
        return len(self.turns) >= self.config.max_zooms

    def reply(self, turn, frames):
        """The user message after a call, or an error, where `frames` is None: a list of str and Frame."""
        shown = [turn.error] if frames is None else self.show(frames)
        return ["<tool_response>\n", *shown, "\n</tool_response>\n" + self._go_on()]

    def unreadable(self, error):
        """What the policy is told of a VideoError."""
        return "Error: this part of the video cannot be decoded."

    def is_well_formed(self):
        """Whether the finished episode earns the format reward."""
        return self.answer() is not None and all(turn.well_formed for turn in self.turns)

    def tag(self, index, frame):
        """What stands before a frame."""
        return "\n" * (index > 0) + f"<frame{index}_time{frame.time_s:.2f}s>"

    def options(self):
        """The options as lines."""
        options = option_texts(self.question.get("options") or [])
        return [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]

    def question_lines(self):
        """What is asked: subtitles, where the question has some, the question itself, its options."""
        said = [f"[{start_s:.1f} - {end_s:.1f}] {text}" for start_s, end_s, text in
                self.question.get("subtitles") or []]
        return [*(["Subtitles, with their seconds:"] + said if said else []),
                self.question["question"].strip(), *self.options()]

    def with_images(self, text):
        """A text with the question's images in place of its <image>: a list of str and Frame."""
        c, images = self.config, self.question.get("images") or []
        first, *parts = text.split("<image>", len(images)) if images else [text]
        read = lambda name: read_image(Path(self.root, name), c.min_pixels, c.max_pixels, c.frame_unit)
        return [first, *(item for name, part in zip(images, parts) for item in (read(name), part))]

    def overview(self):
        """The frames of the first look, a tuple of Frame."""
        # a data set may name the frames, by their numbers in the video
        if chosen := self.question.get("overview_frames"):
            return self.frames_at(open_video(self.path).times_of(tuple(chosen)))
        # else uniform ones, or the key frames next to them
        times_s = overview_times(self.duration_s, self.config)
        how = self.config.overview
        by_key = how == "nearest_keyframe" or how == "auto" and self.duration_s > LONG_S
        return self.frames_at(times_s, self.duration_s / len(times_s) / 2 if by_key else None)

    def show(self, frames):
        """Message items: the tag and the frame for each of them, which then have been watched."""
        self.frames_shown += len(frames)
        self.watched.append(frames)
        return [item for index, frame in enumerate(frames) for item in (self.tag(index, frame), frame)]

    def _go_on(self):
        """What ends each message: may it zoom, or must it answer."""
        left = self.config.max_zooms - len(self.turns)
        return MAY_ZOOM.format(left=left) if left > 0 else LAST_TURN

    def _hits(self, segment):
        """Whether a segment overlaps the question's evidence, [start_s, end_s] pairs, or holds one of its
        moments, whose times are equal; None if it has none."""
        evidence, (first, last) = self.question.get("evidence"), segment
        sees = lambda start, end: first < end and start < last or first <= start == end <= last
        return any(sees(start, end) for start, end in evidence) if evidence else None


def overview_times(duration_s, config):
    """Seconds at which the overview looks: uniform, `overview_fps`, at most `overview_max_frames`."""
    num_frames = min(config.overview_max_frames, max(1, math.ceil(duration_s * config.overview_fps)))
    return slice_centres(0.0, duration_s, num_frames)


def slice_centres(start_s, end_s, num_frames):
    """The middles of `num_frames` equal slices of [start_s, end_s], in seconds."""
    step = (end_s - start_s) / num_frames
    return tuple(round(start_s + (i + 0.5) * step, 6) for i in range(num_frames))


# ------------------------------------------------------------------------------------------ what a turn means
@dataclass
class Call:
    """One use of a tool."""

    tool: str  # its tag
    arguments: dict  # what it asks for: of a zoom, segment and fps
    num_frames: int = 0  # frames that it showed
    hit: bool | None = None  # whether it looked at the question's evidence, where that is known


@dataclass
class Turn:
    """What one assistant text means."""

    text: str
    kind: str  # call, answer, error, or dropped: calls whose reply was not shown
    well_formed: bool  # earns the format reward: <think>..</think>, then one call or answer, nothing else
    error: str | None = None  # what to tell the policy
    calls: list = field(default_factory=list)  # of Call; in our protocol one at most
    answer: str | None = None
    untagged: bool = False  # the answer stood there without its tag, which counts where there is no tool


def parse_turn(text, duration_s, config, tools=None):
    """Reads one assistant text: never raises, linear in its length.

    The action is what stands after the last </think>, or anywhere if there is none; a thought holds none.
    A call that cannot be carried out, or a turn without exactly one action, is of kind "error"."""
    tools = TOOLS if tools is None else tools
    tags, calls = [*tools, "answer"], " or ".join(f"<{tag}>" for tag in tools)
    body = text.rpartition("</think>")[2]
    # the format: one thought, one action, nothing around them
    counts = [(text.count(f"<{tag}>"), text.count(f"</{tag}>")) for tag in tags]
    well_formed = (
        (text.count("<think>"), text.count("</think>")) == (1, 1)
        and sorted(counts) == [(0, 0)] * (len(tags) - 1) + [(1, 1)]
        and text.strip().startswith("<think>")
        and text.strip().endswith(tuple(f"</{tag}>" for tag in tags))
        and body.strip().startswith(tuple(f"<{tag}>" for tag in tags))
    )
    # the action: there is one
    found = {tag: between(body, tag) for tag in tags}
    actions = [(tag, inside) for tag, (insides, _) in found.items() for inside in insides]
    reason = None
    if len(actions) > 1:
        reason = f"the turn has more than one {calls} call or <answer>"
    elif not all(clean for _, clean in found.values()):
        reason = "a tag in the turn is not closed or is nested"
    elif not actions:
        reason = f"the turn has no {calls} call and no <answer>"
    if reason:
        bare = not (config.max_zooms or actions or any(f"<{tag}>" in body for tag in ("think", *tools)))
        answer = read_untagged(body) if bare else None
        return Turn(text, "error", False, error=f"Error: {reason}. Give exactly one.", answer=answer,
                    untagged=answer is not None)
    # what it asks for
    (tag, inside), = actions
    if tag == "answer":
        return Turn(text, "answer", well_formed, answer=inside.strip())
    try:
        arguments = tools[tag].parse(inside, duration_s, config)
    except ValueError as error:
        return Turn(text, "error", False, error=f"Error: {error}")
    return Turn(text, "call", well_formed, calls=[Call(tag, arguments)])


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


# ------------------------------------------------------------------------------------------------------ tools
@dataclass(frozen=True)
class Tool:
    """A way to look closer, called by <tag>...</tag>, where the tag is its name in TOOLS."""

    # parse: (text inside the tags, duration_s, config) -> dict; raises ValueError with a text for the policy.
    # None where the protocol reads its calls itself
    parse: Callable | None
    run: Callable  # (env, that dict) -> tuple of Frame; raises VideoError
    looks_at: Callable  # that dict -> (start_s, end_s), to tell whether it saw the question's evidence


def read_call(text, example):
    """The JSON object in a call, with the keys of the JSON `example`; all its numbers are floats. Raises
    ValueError with a text for the policy."""
    try:
        call = json.loads(text, parse_int=float)  # one type of number, and no integer of a million digits
    except (ValueError, RecursionError):
        raise ValueError(f"the call is not JSON like {example}") from None
    keys = list(json.loads(example))
    if not isinstance(call, dict) or set(call) != set(keys):
        raise ValueError("the call needs exactly the keys " + " and ".join(f'"{key}"' for key in keys))
    return call


def parse_zoom(text, duration_s, config):
    """{"segment": (start_s, end_s), "fps": frames a second}, within the video and the limit of frames."""
    call = read_call(text, '{"segment": [12.0, 20.0], "fps": 2}')
    segment, fps = call["segment"], call["fps"]
    is_pair = isinstance(segment, list) and len(segment) == 2
    if not is_pair or not all(type(x) is float for x in [*segment, fps]):
        raise ValueError('"segment" must be two numbers of seconds and "fps" one number')
    start_s, end_s = segment
    if not all(math.isfinite(x) for x in (start_s, end_s, fps)):
        raise ValueError("the numbers must be finite")
    if fps <= 0:
        raise ValueError("fps must be above 0")
    fps = config.zoom_fps or fps
    if not 0 <= start_s < end_s:
        raise ValueError("the segment must start at 0 or later and end after its start")
    if start_s >= duration_s:
        raise ValueError(f"the segment starts after the end of the video at {duration_s:.2f} s")
    end_s = min(end_s, duration_s)
    if (end_s - start_s) * fps > config.zoom_max_frames * (1 + 1e-6):
        less = "a shorter segment" if config.zoom_fps else "a shorter segment or a lower fps"
        raise ValueError(f"(end - start) * fps is {(end_s - start_s) * fps:.4g}, above the limit of "
                         f"{config.zoom_max_frames} frames; ask for {less}")
    return {"segment": (start_s, end_s), "fps": fps}


def run_zoom(env, arguments):
    """The frames of a zoom: one in the middle of each of (end - start) * fps slices, and one at least."""
    (start_s, end_s), fps = arguments["segment"], arguments["fps"]
    num_frames = max(1, math.floor((end_s - start_s) * fps + 1e-6))
    return env.frames_at(slice_centres(start_s, end_s, num_frames))


TOOLS = {"video_zoom": Tool(parse_zoom, run_zoom, looks_at=lambda arguments: arguments["segment"])}
ZoomEnv.tools = TOOLS


# ---------------------------------------------------------------------------------------------------- rewards
def reward_parts(env):
    """{part: from 0 to 1} for each of REWARD_PARTS, of an episode that is over."""
    accuracy = grade(env.answer(), env.question)
    # right from 0.5 on: a time segment may be partly right (grading.py)
    used_tool = accuracy >= 0.5 and env.num_calls() > 0
    hits = [bool(call.hit) for turn in env.turns if turn.kind == "call" for call in turn.calls]
    return {
        "accuracy": accuracy,
        "format": float(env.is_well_formed()),
        "tool": float(used_tool),
        "hit": sum(hits) / max(1, len(hits)),
    }
