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
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from common import UserError, check_bad
from video import VideoError, open_video, read_frames

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
class Message:
    role: str  # system, user or assistant
    content: list  # str and Frame items in reading order


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


def use_overview(policy, questions, overview, max_bad):
    """Applies --overview: one of EnvConfig's ways, or a JSON file with the frames that another selector chose, a list of
    {"video_name", "question", "frame_idx"} (TSPO's format; a row belongs to the question with the same file name and the
    same first line). Returns the questions that it has frames for and [(id, reason)] of the others."""
    if overview is None:
        return questions, []
    if not overview.endswith(".json"):
        try:
            policy.env_config = replace(policy.env_config, overview=overview)
        except ValueError as error:
            raise UserError(f"--{error}, or a .json file") from None
        return questions, []
    first_line = lambda text: text.strip().splitlines()[0].strip()
    try:
        chosen = {(Path(row["video_name"]).name, first_line(row["question"])): [float(n) for n in row["frame_idx"]]
                  for row in json.loads(Path(overview).read_text()) if row.get("frame_idx")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"cannot read --overview {overview}: {type(error).__name__}: {error}") from None
    known, bad = [], []
    for question in questions:
        frames = chosen.get((Path(question["video"]).name, first_line(question["question"])))
        if frames:
            question["overview_frames"] = frames
            known.append(question)
        else:
            bad.append((question["id"], "no frames chosen for it"))
    check_bad(bad, len(questions), max_bad, overview)
    return known, bad


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
