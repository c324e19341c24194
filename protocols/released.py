"""What the checkpoint that came with the paper was trained on, token for token.

Facts from the public repository zsgvivo/VideoZoomer (a fork of verl), read there in
verl/workers/rollout/vllm_rollout/{vllm_async_engine,function_tools}.py, verl/utils/dataset/
multimodal_dataset.py and verl/utils/reward_score/toolcall_format.py. Its sentences are not here: official.py
reads them out of a clone of it (TEXTS below). What it does otherwise than we:

    frames     counted in the order of presentation; their time is number / average rate, also where the rate
               varies. Overview: every round(rate / 0.5)-th frame, or if that is more than 64, 64 from first
               to last; a zoom: int(fps * (end - start)) frames from the segment's first to its last, both
               moved into the video; none if that is 0. A frame may be shown twice
    size       scaled down to max_pixels (PIL's Lanczos), sides cut to whole numbers; then to the nearest
               multiples of 28, as the processor does with its own limits
    a call     JSON objects {..} without inner braces, exactly one; numbers may be texts, other keys are
               ignored; the limit holds for int(fps * length) before the segment is moved. Carried out
               wherever it stands, beside an answer, too
    the end    a turn without a call, a call in the last round, or one when 128 images have been shown
    tokens     no line break between an assistant's end token and what follows; an end token that was not
               sampled is appended and trained; ids above 151,664 are dropped
    format     see `is_well_formed`

Not as there: an unreadable video is skipped and named, where the released code shows a blank frame; answers
are graded as everywhere here, more kindly to "(b)" or an option's text. --overview's ways do not apply.
"""

import json
import re

import numpy as np
from PIL import Image

from grading import last_answer
from video import Frame, VideoError, open_video, remember, scale, total_bytes
from zoom_env import Call, Tool, Turn, ZoomEnv, between

# names of the sentences; {index}, {time}, {error}, .. in them are filled in
TEXTS = ("frame", "before_frames", "after_frames", "bad_call", "bad_input", "too_many", "not_shown",
         "after_error", "last_round")
MOST_IMAGES = 128  # in an episode
PROCESSOR_MIN, PROCESSOR_MAX = 3_136, 12_845_056  # pixels, of Qwen2.5-VL's image processor
SQUARE = (1, 1)  # shape of a pixel


def fill(text, **values):
    """A text with {name} replaced, of these names only; what is put in is not read again."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: str(values[match[1]]), text)


# ----------------------------------------------------------------------------------------------------- frames
def overview_numbers(total, rate, fps, most):
    """Numbers of the frames of the first look at a video of `total` frames at `rate` a second."""
    numbers = list(range(0, total, max(1, round(rate / fps))))
    return numbers if len(numbers) <= most else np.linspace(0, total - 1, most, dtype=int).tolist()


def zoom_numbers(start_s, end_s, count, total, rate):
    """Numbers of the frames of a zoom. Raises ValueError and OverflowError as NumPy and Python do."""
    first = max(0, min(int(start_s * rate), total - 1))
    last = max(first, min(int(end_s * rate), total - 1))
    return np.linspace(first, last, count).astype(int).tolist()


def shrunk(height, width, min_pixels, max_pixels):
    """(height, width) of an image after the first resize."""
    if height * width > max_pixels:
        factor = np.sqrt(max_pixels / (height * width))
        height, width = max(1, int(height * factor)), max(1, int(width * factor))
        if height * width < min_pixels:
            factor = np.sqrt(min_pixels / (height * width))
            height, width = int(height * factor), int(width * factor)
    return height, width


def resized(image, min_pixels, max_pixels, unit, resample=Image.Resampling.LANCZOS):
    """A PIL image in RGB as a (3, H', W') uint8 tensor, resized in the two steps. Raises VideoError where it
    is too narrow for the second one."""
    height, width = shrunk(image.height, image.width, min_pixels, max_pixels)
    if (width, height) != image.size:
        image = image.resize((width, height), resample)
    return scale(np.array(image), SQUARE, PROCESSOR_MIN, PROCESSOR_MAX, unit)


@remember(most=256e6, size=total_bytes)
def numbered_frames(path, numbers, min_pixels, max_pixels, unit):
    """The frames of a tuple of numbers, ascending, a Frame each. Raises VideoError."""
    video = open_video(path)
    times_s = video.all_times()
    images = {}
    for n in dict.fromkeys(numbers):
        [(_, image)] = video.frames_at([times_s[n]])
        images[n] = resized(Image.fromarray(image), min_pixels, max_pixels, unit)
    return tuple(Frame(n / video.fps, images[n]) for n in numbers)


# ---------------------------------------------------------------------------------------------------- a turn
def objects_in(text):
    """JSON texts {..} without inner braces, of one line each; in linear time, as a line is cut after its last
    brace."""
    lines = [line[:line.rfind("}") + 1] for line in text.split("\n")]
    return [found for line in lines for found in re.findall(r"\{[^}]*\}", line)]


def calls_in(text):
    """What stands inside the tags of each call, the shortest way."""
    return between(text, "video_zoom")[0]


def asked(call):
    """(start_s, end_s, fps) of a call's JSON object. Raises exceptions of any kind."""
    return float(call["segment"][0]), float(call["segment"][1]), float(call["fps"])


def run_zoom(env, arguments):
    return env.frames_of(arguments["numbers"])


class Released(ZoomEnv):
    """An episode as the released checkpoint knows it."""

    protocol = "released"
    tools = {"video_zoom": Tool(None, run_zoom, looks_at=lambda arguments: arguments["segment"])}
    needs = TEXTS
    settings = {}
    after_turn = ""
    trains_appended_end = True
    largest_id = 151_664
    skips_special = True

    def overview(self):
        video, c = open_video(self.path), self.config
        total = len(video.all_times())
        chosen = self.question.get("overview_frames")
        if not chosen:
            return self.frames_of(overview_numbers(total, video.fps, c.overview_fps, c.overview_max_frames))
        if beyond := [n for n in chosen if not 0 <= n < total]:
            raise VideoError(f"{self.path}: no frame {beyond[0]:.0f} of {total}")
        return self.frames_of(sorted(map(int, chosen)))

    def frames_of(self, numbers):
        """Frames by their numbers, ascending, a tuple of Frame."""
        if not numbers:
            return ()
        c = self.config
        return numbered_frames(self.path, tuple(numbers), c.min_pixels, c.max_pixels, c.frame_unit)

    def opening(self, frames):
        """The data set's own text, frames where it has <image>; of other questions frames come first."""
        problem = (self.question.get("meta") or {}).get("problem")
        problem = problem or "\n".join(["<image>", *self.question_lines()])
        before, _, after = problem.partition("<image>")
        return [before, *self.show(frames), *self.with_images(after)]

    def tag(self, index, frame):
        return fill(self.config.texts["frame"], index=index, time=f"{frame.time_s:.2f}")

    def is_last(self):
        return super().is_last() or self.frames_shown >= MOST_IMAGES

    def parse(self, text):
        contents = calls_in(text)
        if not contents:
            return Turn(text, "answer", True, answer=last_answer(text), untagged="<answer>" not in text)
        try:
            return Turn(text, "call", True, calls=[Call("video_zoom", self.read_call(contents))])
        except ValueError as error:
            return Turn(text, "error", True, error=str(error))

    def read_call(self, contents):
        """{"segment", "fps", "numbers"} of a call. Raises ValueError with what the policy is told."""
        texts = self.config.texts
        try:
            objects = [json.loads(found) for content in contents for found in objects_in(content)]
            if len(objects) != 1:
                raise ValueError("")
            start_s, end_s, fps = self.read_numbers(objects[0])
        except (ValueError, RecursionError) as reason:
            raise ValueError(fill(texts["bad_call"], error=reason)) from None
        try:
            count, limit = int(fps * (end_s - start_s)), self.config.zoom_max_frames
            if count > limit:
                raise ValueError(fill(texts["too_many"], count=count, limit=limit))
            video = open_video(self.path)
            numbers = zoom_numbers(start_s, end_s, count, len(video.all_times()), video.fps)
        except (ValueError, OverflowError, VideoError) as reason:
            raise ValueError(self.unreadable(reason)) from None
        return {"segment": (start_s, end_s), "fps": fps, "numbers": numbers}

    def read_numbers(self, call):
        """(start_s, end_s, fps) of a call's JSON object. Raises ValueError with what the policy is told."""
        try:
            return asked(call)
        except Exception as reason:  # of any kind: the checkpoint was told what Python said
            raise ValueError(fill(self.config.texts["bad_input"], error=reason, input=call)) from None

    def unreadable(self, error):
        error = str(error).replace(self.path, self.question["video"])
        return fill(self.config.texts["not_shown"], error=error)

    def reply(self, turn, frames):
        texts = self.config.texts
        last = texts["last_round"] if len(self.turns) == self.config.max_zooms else ""
        if frames is None:
            return [turn.error + texts["after_error"] + last]
        return [texts["before_frames"], *self.show(frames), texts["after_frames"] + last]

    def answer(self):
        """What stands in the last <answer> of all turns, or all that was said where there is none."""
        return last_answer(" ".join(turn.text for turn in self.turns)) if self.turns else None

    def is_well_formed(self):
        """All turns but the last one are calls that start with a thought, stand alone in the turn, are JSON
        and within the limit; the last one is <think>..</think>..<answer>..</answer> without a call."""
        texts = [turn.text for turn in self.turns]
        if not texts:
            return False
        last = texts[-1].strip() if len(texts) == 1 else texts[-1]
        return all(self.is_good_call(text.strip()) for text in texts[:-1]) and is_good_answer(last)

    def is_good_call(self, text):
        try:
            start_s, end_s, fps = asked(json.loads(calls_in(text)[-1]))
            count = int(fps * (end_s - start_s))
        except Exception:  # of any kind, as there
            return False
        answers = "<answer>" in text or "</answer>" in text
        return (count <= self.config.zoom_max_frames and not answers and stands_once(text, "video_zoom")
                and bool(GOOD_CALL.match(text)))


# (?>..) takes the first of what it looks for and no other: linear in the length of the text
GOOD_CALL = re.compile(r"<think>(?>.*?</think>)(?>.*?<video_zoom>)(?>.*?</video_zoom>)", re.DOTALL)
GOOD_ANSWER = re.compile(r"<think>(?>.*?</think>)(?>.*?<answer>)(?>.*?</answer>)\n?\Z", re.DOTALL)


def is_good_answer(text):
    return stands_once(text, "answer") and "<video_zoom>" not in text and bool(GOOD_ANSWER.match(text))


def stands_once(text, tag):
    return (text.count(f"<{tag}>"), text.count(f"</{tag}>")) == (1, 1)
