"""The demo's data: synthetic videos, questions about them, and a scripted teacher that plays them.

    python data_prep.py synthetic --out runs/data --train 1200 --test 300 --seed 0

writes videos/*.mp4 (H.264), train.jsonl and test.jsonl (questions), sft.jsonl (trajectories) and data.json,
which remembers the numbers and the seed. The same of these give the same bytes.

A video is a row of nine scenes in 2 to 2.3 minutes: eight background colours in random order, then grey.
In each coloured scene a figure, which is a shape in some colour, flashes for 1.25 seconds: once in most
scenes, up to four times in some. The overview has one frame of each scene and shows no flash, so a question
about a flash needs a zoom:

    detail     which colour or shape flashes in the blue scene?            one zoom
    count      how many shapes flash in the blue scene?                    one zoom, close enough
    order      which colours flash in the blue and in the red scene?       two zooms
    holistic   which scene comes first, last, or right after another?      none

A question's meta says how well N uniform frames could do: `uniform_accuracy[N]` is 1 where they show all the
evidence, and elsewhere a guess among the options that what they show leaves open, averaged over the phase of
the sampling.

The teacher plays through the environment like any policy, and a trajectory is kept only if the environment
grades it right and well formed. Its overview has 5 to 33 frames, drawn for each question, in half of them 9;
more of them can miss no scene, and happen to show a flash. It surveys the overview and answers where that
shows all that is asked; else it zooms from the first frame of the scene asked about to the next scene's, writes
down what each frame of the clip shows, and answers. It knows where to look but not how closely: often it
takes half of the frames that it may, and a flash can fall between two of those. Then it looks again or
guesses. How closely to look is left for RL to find out. In some plays its first zoom goes to a wrong scene. A
play that looks again after a zoom that did not show it is a reflection trajectory, another one an exemplar.
There are plays in which no zoom is left from the start, where it guesses if it must, and plays by the protocol
without a tool (direct), none of which guesses.
"""

import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from tqdm import tqdm

from common import UserError, read_text, write_jsonl
from protocols import make_env, with_settings
from training.run_folder import disown_folder, own_folder
from zoom_env import EnvConfig, slice_centres

NUM_TRAIN, NUM_TEST = 1200, 300  # questions of the demo
MADE = "data.json"  # file of a data folder that remembers its seed and numbers
QUESTIONS_PER_VIDEO = 5  # two details, a count, an order, a holistic one
UNIFORM_FRAMES = (8, 16, 32, 64, 128, 256)  # for which meta has a uniform_accuracy
HASTE = 0.75  # how often the teacher zooms at half, or two thirds, of the frames a second that it may
FPS = "0.25", "0.50", "0.75", "1.00", "2.00"  # that it asks for

PALETTE = {"red": (215, 40, 40), "green": (30, 160, 60), "blue": (45, 75, 225), "yellow": (235, 220, 60),
           "purple": (140, 40, 180), "orange": (240, 130, 20), "cyan": (70, 210, 220),
           "white": (245, 245, 245)}
GREY = (105, 105, 105)
COLOURS, SHAPES = list(PALETTE), ["circle", "square", "triangle", "cross"]
SIDE = 28  # pixels; a frame of 28x28 is one visual token
VIDEO_FPS = 8
NUM_SLOTS = len(COLOURS) + 1  # equal slices of a video; the demo's overview has one frame of each
NUM_FRAMES = 9, 9, 9, 9, 9, 5, 17, 17, 33, 33  # of the teacher's overviews, drawn for each question
SLOT_S = (13.5, 15.5)  # a slot's least and greatest length
FLASH_S = 1.25  # a flash's length: above 1, so that 1 frame a second shows each
NUM_FLASHES = (1, 1, 1, 1, 1, 2, 3, 4)  # of the coloured scenes, in some order
PAUSE_S = 0.2  # least time between two flashes
MARGIN_S = 0.15  # least time between a flash and the overview's frame before it, or the next scene

TINY_PROMPT = """Answer the question about the video. In each turn first write <think>your thoughts</think>, \
then <video_zoom>{"segment": [start_sec, end_sec], "fps": n}</video_zoom> to look closer, at most \
ZOOM_MAX_FRAMES frames, or <answer>letter</answer> to end."""
TINY_ENV = EnvConfig(overview_fps=1.0, overview_max_frames=NUM_SLOTS, min_pixels=SIDE * SIDE,
                     max_pixels=SIDE * SIDE, system_prompt=TINY_PROMPT, max_turn_tokens=160, preset="demo")


# ----------------------------------------------------------------------------------------------------- videos
class Figure(NamedTuple):
    colour: str
    shape: str


class Picture(NamedTuple):
    """What a frame shows."""

    background: str  # a colour
    figure: Figure | None = None
    offset: tuple = (0, 0)  # of card and figure from the frame's middle, pixels right and down
    card: bool = True  # whether the figure is on a black card; such a one is asked about
    cue: bool = False  # a card without a figure


class Flash(NamedTuple):
    start_s: float
    end_s: float
    picture: Picture


class Scene(NamedTuple):
    colour: str  # of the background; "grey" at the end
    start_s: float
    flashes: list  # of Flash, in order of time, that questions are about
    others: list = []  # of Flash: what else is to be seen, behind these (the suite "search")


def make_scene(rng, colour, start_s, number, overview_s, last_s, slot_s):
    """A scene with `number` flashes, all between the time of its frame in the overview and last_s."""
    return Scene(colour, start_s, make_flashes(rng, colour, number, overview_s + MARGIN_S, last_s))


def make_scenes(rng, limits_s=SLOT_S, make_scene=make_scene):
    """A random video: (duration in seconds, its NUM_SLOTS scenes in order of time).

    A scene begins a little before the middle of its slot, where the overview looks. Its flashes come after
    that frame and before the next scene. So the overview shows every scene and no flash, and where to zoom is
    from a scene's frame to the next one. limits_s: of a slot's length. make_scene: fills a scene."""
    duration_s = round(rng.uniform(*limits_s) * NUM_SLOTS * VIDEO_FPS) / VIDEO_FPS
    slot_s = duration_s / NUM_SLOTS
    starts = [(i + rng.uniform(0.3, 0.46)) * slot_s for i in range(NUM_SLOTS)] + [duration_s]
    colours = [*rng.sample(COLOURS, len(COLOURS)), "grey"]
    num_flashes = rng.sample(NUM_FLASHES, len(COLOURS))
    scenes = []
    for i, number in enumerate(num_flashes):
        start_s, overview_s, last_s = starts[i] if i else 0.0, (i + 0.5) * slot_s, starts[i + 1] - MARGIN_S
        scenes.append(make_scene(rng, colours[i], start_s, number, overview_s, last_s, slot_s))
    return duration_s, [*scenes, Scene("grey", starts[-2], [])]


def make_flashes(rng, background, n, first_s, last_s):
    """n random flashes between two times, in order of time, two in a row never of one colour."""
    # n sorted points in the time that is left over part the flashes at random
    left_over_s = last_s - first_s - n * FLASH_S - (n - 1) * PAUSE_S
    points = sorted(rng.uniform(0, left_over_s) for _ in range(n))
    flashes, colour = [], background
    for k, point in enumerate(points):
        start_s = first_s + point + k * (FLASH_S + PAUSE_S)
        figure = draw_figure(rng, background, colour)
        offset = (rng.randint(-2, 2), rng.randint(-2, 2))
        flashes.append(Flash(start_s, start_s + FLASH_S, Picture(background, figure, offset)))
        colour = figure.colour
    return flashes


def draw_figure(rng, *other_colours):
    """A random figure in none of these colours."""
    colours = [colour for colour in COLOURS if colour not in other_colours]
    return Figure(rng.choice(colours), rng.choice(SHAPES))


@lru_cache(maxsize=100)  # most frames of a video are the same as the one before
def paint(picture):
    """A Picture as a frame, (28, 28, 3) uint8 RGB, which the caller must not change."""
    image = np.empty((SIDE, SIDE, 3), np.uint8)
    image[:] = PALETTE.get(picture.background, GREY)
    right, down = picture.offset
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    x, y = x - right, y - down
    nearer, farther = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
    if picture.cue or picture.figure and picture.card:
        image[farther <= 11] = 0  # a black card, on which shapes are easy to tell apart
    if picture.figure:
        inside = {
            "circle": x * x + y * y <= 64,
            "square": farther <= 8,
            "triangle": (y <= 8) & (abs(x) <= (y + 8) / 1.8),
            "cross": (nearer <= 2.5) & (farther <= 9),
        }[picture.figure.shape]
        image[inside] = PALETTE[picture.figure.colour]
    return image


def on_screen(scenes, time_s):
    """What a video shows at a time, a Picture."""
    scene = [s for s in scenes if s.start_s <= time_s][-1]
    for flash in [*scene.flashes, *scene.others]:
        if flash.start_s <= time_s < flash.end_s:
            return flash.picture
    return Picture(scene.colour)


def render(duration_s, scenes):
    """A video's frames, (28, 28, 3) uint8, VIDEO_FPS a second."""
    return [paint(on_screen(scenes, k / VIDEO_FPS)) for k in range(round(duration_s * VIDEO_FPS))]


def write_video(path, frames, fps=VIDEO_FPS):
    """Writes H.264 in MP4, with a key frame every 16; renamed into place when it is whole.

    frames: any iterable of (H, W, 3) uint8 RGB frames, with at least one."""
    frames = list(frames)
    height, width = frames[0].shape[:2]
    # one thread, so that the bytes are always the same
    options = {"crf": "16", "preset": "ultrafast", "g": "16", "threads": "1"}
    temporary = Path(path).with_suffix(".tmp.mp4")
    with av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", fps, options=options, pix_fmt="yuv420p",
                                      height=height, width=width)
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())  # what the encoder still holds
    os.replace(temporary, path)


# -------------------------------------------------------------------------------------------------- questions
class Draft(NamedTuple):
    """A question before its options are drawn. The lessons of the tiny base ask in the same words."""

    text: str
    right: str  # the right option
    wrong: list  # at least three wrong ones


def ask_colour(scene, colour, on=""):
    """scene: the name of its background colour, and on: words that say where the shapes are, as in all of
    these."""
    text = f"What colour is the shape that flashes{on} in the {scene} scene?"
    return Draft(text, colour, [c for c in COLOURS if c not in (colour, scene)])


def ask_shape(scene, shape, on=""):
    return Draft(f"Which shape flashes{on} in the {scene} scene?", shape, [s for s in SHAPES if s != shape])


def ask_count(scene, n, on=""):
    text = f"How many shapes flash{on} in the {scene} scene?"
    return Draft(text, str(n), [str(k) for k in range(1, 5) if k != n])


def ask_order(rng, named, first, second, on=""):
    """named: the two scenes as the question names them; first, second: the colours of their flashes in order
    of time. The options are all pairs of two colours, neither of them a named scene's: so none of them tells
    the right one, and either flash alone leaves two open."""
    text = (f"One shape flashes{on} in the {named[0]} scene and one in the {named[1]} scene. "
            "Which colours, in order of time?")
    others = [colour for colour in COLOURS if colour not in (first, *named)]
    other = second if second != first else rng.choice(others)
    pairs = product((first, other), repeat=2)
    return Draft(text, f"{first} then {second}",
                 [f"{a} then {b}" for a, b in pairs if (a, b) != (first, second)])


def ask_scene(scenes, k, options):
    """The holistic questions: the first scene, the last, the one after number k.

    scenes: names of the coloured ones in order of time. options: those from which wrong ones are taken."""
    asked = {"Which scene comes first?": scenes[0], "Which scene comes last?": scenes[-1],
             f"Which scene comes right after the {scenes[k]} scene?": scenes[k + 1]}
    return [Draft(text, right, [option for option in options if option != right and option not in text])
            for text, right in asked.items()]


def draw_options(rng, draft):
    """The right option and three wrong ones, in random order."""
    return rng.sample([draft.right, *rng.sample(draft.wrong, 3)], 4)


def make_questions(rng, video, number, duration_s, scenes, on=""):
    """QUESTIONS_PER_VIDEO question rows about one video. video: its path relative to the question file.
    number: the video's; in four of them each count is right once. on: words that say where the shapes are."""
    rows = []

    def add(kind, about, draft):
        """about: the scenes whose flashes the question is about."""
        options = draw_options(rng, draft)
        flashes = [flash for scene in about for flash in scene.flashes]
        question = {
            "id": f"{Path(video).stem}-{len(rows)}", "video": video, "question": draft.text,
            "options": options, "answer": "ABCD"[options.index(draft.right)],
            "answer_type": "multiple_choice", "source": "synthetic",
            "evidence": [[round(flash.start_s, 3), round(flash.end_s, 3)] for flash in flashes] or None,
            "meta": {"kind": kind, "duration_s": duration_s}}
        question["meta"]["uniform_accuracy"] = {
            n: round(uniform_accuracy(question, n), 4) for n in UNIFORM_FRAMES}
        rows.append(question)

    coloured = [scene for scene in scenes if scene.colour != "grey"]
    single = [scene for scene in coloured if len(scene.flashes) == 1]
    first, second = rng.sample(single, 2)
    add("detail", [first], ask_colour(first.colour, figure_of(first).colour, on))
    add("detail", [second], ask_shape(second.colour, figure_of(second).shape, on))
    n = 1 + number % 4
    scene = rng.choice([scene for scene in coloured if len(scene.flashes) == n])
    add("count", [scene], ask_count(scene.colour, n, on))
    first, second = draw_pair(rng, single)
    named = rng.sample([first.colour, second.colour], 2)
    colours = figure_of(first).colour, figure_of(second).colour
    add("order", [first, second], ask_order(rng, named, *colours, on))
    names = [scene.colour for scene in coloured]
    k = rng.randrange(len(names) - 1)
    add("holistic", [], rng.choice(ask_scene(names, k, names)))
    return rows


def figure_of(scene):
    """The figure of a scene's first flash."""
    return scene.flashes[0].picture.figure


def draw_pair(rng, single):
    """Two of the scenes with one flash, in order of time; the flashes are of one colour as often as not."""
    pairs = pairs_of_flashes(single)
    alike = rng.random() < 0.5
    return rng.choice(pairs[alike] or pairs[not alike])


def pairs_of_flashes(scenes):
    """{whether the flashes are of one colour: pairs of scenes with one flash, in order of time}. No flash has
    the colour of either scene."""
    pairs = {True: [], False: []}
    for first, second in combinations([scene for scene in scenes if len(scene.flashes) == 1], 2):
        colours = figure_of(first).colour, figure_of(second).colour
        if not {first.colour, second.colour} & {*colours}:
            pairs[colours[0] == colours[1]].append((first, second))
    return pairs


def draw_scenes(rng, suite):
    """A random video of a suite, as its `make_scenes`, with flashes of one colour and of several."""
    while True:
        duration_s, scenes = suite.make_scenes(rng)
        if all(pairs_of_flashes(scenes).values()):
            return duration_s, scenes


def uniform_bound(row, questions):
    """A table row: the best accuracy of any uniform sampler with as many frames a question as `row` has."""
    frames = max(1, round(row["frames_per_question"]))
    scores = [uniform_accuracy(question, frames) for question in questions]
    return dict.fromkeys(row) | {
        "policy": f"best uniform sampler for {row['policy']}", "mode": "bound", "kind": "all",
        "num_questions": len(scores), "accuracy": sum(scores) / len(scores), "frames_per_question": frames,
        "zooms_per_question": 0.0}


def uniform_accuracy(question, num_frames):
    """The best accuracy on a synthetic question that `num_frames` uniform frames allow, mean of 64 phases: 1
    where they show every flash that it is about, else a guess among the options that are still open."""
    flashes, kind = question["evidence"] or [], question["meta"]["kind"]
    if kind == "holistic":
        return 1.0  # an upper bound: fewer than nine frames can miss a scene
    step_s, total = question["meta"]["duration_s"] / num_frames, 0.0
    for phase in range(64):
        first_s = (phase + 0.5) / 64 * step_s
        # a flash is shown if the first frame at or after its start comes before its end
        shown = [math.ceil((start - first_s) / step_s) * step_s + first_s < end for start, end in flashes]
        if all(shown):
            total += 1
        elif kind == "count":  # at least as many as were seen, and at least one
            total += 1 / (len(question["options"]) + 1 - max(1, sum(shown)))
        elif any(shown):  # each flash of an order question halves the options
            total += 1 / 2
        else:
            total += 1 / len(question["options"])
    return total / 64


# ------------------------------------------------------------------------------------- the teacher's thoughts
# Its wording, which the lessons of the tiny base share. So small a model finds things by induction, by what
# stood after the same words before: so what is seen is written before its number ("blue3" for frame 3 of the
# overview), and an option before its letter. In all of them, colours: the scenes' names in order of time.
class Visit(NamedTuple):
    """A scene to look at."""

    scene: str  # its colour
    ordinal: str  # "first" or "second" in order of time; "" for a wrong one
    is_wrong: bool = False  # whether the question is not about it


class Overview:
    """What the first look at a video shows: a Picture and a time for each frame. numbered: whether frames
    have tags, so that a thought can name them by number."""

    def __init__(self, pictures, times_s, duration_s, numbered=True):
        self.pictures, self.times_s, self.duration_s, self.numbered = pictures, times_s, duration_s, numbered
        self.scenes = {}  # {colour: the number of its first frame}, in order of time
        for i, picture in enumerate(pictures):
            self.scenes.setdefault(picture.background, i)

    def name(self, i):
        """What a thought calls frame i: its scene's colour, and its number."""
        return f"{self.pictures[i].background}{i}" if self.numbered else self.pictures[i].background

    def survey(self):
        """All of it: each scene where it begins, and each frame with a shape."""
        firsts, said = set(self.scenes.values()), []
        for i, picture in enumerate(self.pictures):
            if figure := figure_on_card(picture):
                said.append(f"{self.name(i)} {figure.colour} {figure.shape}")
            elif i in firsts:
                said.append(self.name(i))
        return "scenes " + " ".join(said)

    def order_visits(self, named):
        """Which scenes to look at, in order of time, for the one or two that a question names, of which two
        are shown: (clauses that find this order, [Visit, ...])."""
        if len(named) == 1:
            return [], [Visit(named[0], "first")]
        first, second = sorted(named, key=self.scenes.get)
        name = lambda scene: self.name(self.scenes[scene])
        clauses = [" and ".join(map(name, named)), f"second {name(second)}"]
        return clauses, [Visit(first, "first"), Visit(second, "second")]

    def answer_whole(self, question):
        """(the part of the survey that answers a holistic question, the scene that is the answer), or None
        where it does not show that."""
        scenes = list(self.scenes)
        coloured = [scene for scene in scenes if scene != "grey"]
        if "first" in question:
            asked = coloured[:1]
        elif "last" in question:
            asked = scenes[scenes.index(coloured[-1]):]
        else:
            named = [word for word in question.split() if word in COLOURS][0]
            asked = scenes[scenes.index(named):][:2] if named in scenes else []
            if len(asked) < 2:
                return None
        right = asked[1] if "right after" in question else asked[0]
        return " ".join(self.name(self.scenes[scene]) for scene in asked), right

    def figures_in(self, scene):
        """(the clause that names and counts them, [Figure, ...]) of the shapes that are shown in a scene, or
        None."""
        said, figures = [], []
        for i, picture in enumerate(self.pictures):
            figure = figure_on_card(picture)
            if figure and picture.background == scene:
                figures.append(figure)
                said.append(f"{self.name(i)} {figure.colour} {figure.shape}={len(figures)}")
        return (f"{self.name(self.scenes[scene])}: {' '.join(said)}", figures) if figures else None

    def place(self, visit, rng):
        """Where to look for a scene: from its first frame to that of the next scene; where it is not shown,
        between any two frames. Returns (clause, start_s, end_s)."""
        if visit.scene in self.scenes:
            i = self.scenes[visit.scene]
            j = min((number for number in self.scenes.values() if number > i), default=len(self.pictures))
            clause = f"{visit.ordinal} {self.name(i)}".strip()
        else:
            i = rng.randrange(len(self.pictures) - 1)
            j, clause = i + 1, f"unseen {visit.scene}"
        if j < len(self.pictures):
            end_s, end = self.times_s[j], frame_tag(j, self.times_s[j])
        else:
            end_s, end = self.duration_s, f"end {self.duration_s:.2f}"
        return f"{clause}: {frame_tag(i, self.times_s[i])} to {end}", self.times_s[i], end_s


def figure_on_card(picture):
    """The Figure that a question can be about, or None."""
    return picture.figure if picture.card else None


def frame_tag(i, time_s):
    """What stands before a frame, as the environment writes it."""
    return f"<frame{i}_time{time_s:.2f}s>"


def transcript(scene, pictures):
    """What each frame of a clip shows of a scene: (clause, the figures of the flashes, each flash once).

    A flash is counted where it begins, as in "red circle4=1", the first flash in frame 4; the next frame
    that shows it says "same5", a card without a shape is "card6", and all else "-7"."""
    said, flashes, before = [], [], None
    for i, picture in enumerate(pictures):
        figure = figure_on_card(picture) if picture.background == scene else None
        if figure and figure == before:
            said.append(f"same{i}")
        elif figure:
            flashes.append(figure)
            said.append(f"{figure.colour} {figure.shape}{i}={len(flashes)}")
        else:
            said.append(f"card{i}" if picture.cue and picture.background == scene else f"-{i}")
        before = figure
    return f"{scene}: " + " ".join(said), flashes


def between_cards(scene, i, times_s):
    """Where a flash can be: between frame i of a clip, an empty card, and the next one; the last one has none,
    so there it is the one before. times_s: the clip's. Returns (clause, start_s, end_s)."""
    first = min(i, len(times_s) - 2)
    start, end = (frame_tag(k, times_s[k]) for k in (first, first + 1))
    return f"{scene} card{i}: {start} to {end}", times_s[first], times_s[first + 1]


def choose(options, right):
    """The options as the question lists them, each with its letter once more at the end, and the right one: a
    letter is found by the text before it."""
    lines = [f"{letter}. {option} {letter}" for option, letter in zip(options, "ABCD")]
    return "\n" + "\n".join([*lines, chosen(options, right)])


def chosen(options, right):
    return f"so {right} {'ABCD'[options.index(right)]}"


# ------------------------------------------------------------------------------------------------ the teacher
def teach(question, scenes, rng, root, wrong_first=False, **settings):
    """Plays a synthetic question through the environment; the module's docstring says how. The teacher knows
    the video (`scenes`), so it finds the scene and reads every frame right.

    wrong_first: whether its first zoom goes to a wrong scene. settings: max_zooms and protocol, in place of
    TINY_ENV's; they stand in the row so that a replay has them, too.
    Returns a trajectory row, or None if the environment does not grade it right and well formed, or where by
    the protocol without a tool it could only guess."""
    env = make_env(question, with_settings(TINY_ENV, settings), root)
    env.reset()
    overview = overview_of(env, scenes)
    turns, thoughts = [], [overview.survey()]  # thoughts: clauses of the next turn
    kind = "exemplar" if env.tools else "direct"
    to_visit, found = [], []  # found: for each scene that was visited, its flashes' figures
    if question["evidence"]:
        named = named_scenes(question)
        if len(named) > 1 and not {*named} <= {*overview.scenes}:
            return None
        clauses, visits = overview.order_visits(named)
        thoughts += clauses
        shown = [overview.figures_in(visit.scene) for visit in visits]
        if not all(shown) and not env.tools:
            return None
        # an overview may miss some of several flashes
        if all(shown) and (question["meta"]["kind"] != "count" or env.config.max_zooms == 0):
            thoughts += [f"{visit.ordinal} {clause}" for visit, (clause, _) in zip(visits, shown)]
            found = [figures for _, figures in shown]
        elif env.config.max_zooms:
            to_visit = visits
    while to_visit:
        # look at the next scene, or at a wrong one
        visit = to_visit[0]
        if wrong_first and not turns:
            right = ["grey", *(visit.scene for visit in to_visit)]
            wrong = rng.choice([colour for colour in overview.scenes if colour not in right])
            visit = Visit(wrong, "", is_wrong=True)
        clause, start_s, end_s = overview.place(visit, rng)
        fps = choose_fps(rng, end_s - start_s)
        pictures = look(env, turns, thoughts + [clause], start_s, end_s, fps, scenes)
        if env.done:  # no zoom was left
            return None
        # write down what the clip shows; where a right scene shows nothing, look again or let it be
        clause, flashes = transcript(visit.scene, pictures)
        thoughts = [clause]
        if not visit.is_wrong and (flashes or rng.random() < 0.5):
            found.append(flashes)
            to_visit.pop(0)
        else:
            thoughts.append("not found")
            kind = "reflection"
    return answer(question, env, rng, turns, thoughts, found, overview, kind, settings)


def overview_of(env, scenes):
    """The Overview that an environment has shown of a video with these scenes."""
    frames = env.watched[0]
    pictures = [on_screen(scenes, frame.time_s) for frame in frames]
    return Overview(pictures, [frame.time_s for frame in frames], env.duration_s, numbered=bool(env.tools))


def named_scenes(question):
    """The scenes that a question is about, as it names them."""
    return [word for word in question["question"].replace("?", "").split() if word in COLOURS]


def choose_fps(rng, length_s):
    """How closely the teacher looks: as closely as it may, or more often half so."""
    closest = max(float(fps) for fps in FPS if length_s * float(fps) <= TINY_ENV.zoom_max_frames)
    hasty = [fps for fps in FPS if float(fps) < 0.7 * closest]
    return hasty[-1] if hasty and rng.random() < HASTE else f"{closest:.2f}"


def look(env, turns, thoughts, start_s, end_s, fps, scenes):
    """Says a turn that zooms, appended to `turns`. Returns the Pictures of the clip, [] once it is over."""
    call = f'{{"segment": [{start_s:.2f}, {end_s:.2f}], "fps": {fps}}}'
    turns.append(f"<think>{'; '.join(thoughts)}</think><video_zoom>{call}</video_zoom>")
    env.step(turns[-1])
    return [] if env.done else [on_screen(scenes, frame.time_s) for frame in env.watched[-1]]


def answer(question, env, rng, turns, thoughts, found, overview, row_kind, settings):
    """Says the last turn: the answer that was found, or a guess. Returns the row, or None, as `teach`."""
    kind, options = question["meta"]["kind"], question["options"]
    text = None
    if kind == "holistic":
        clause, text = overview.answer_whole(question["question"]) or ("", None)
        if text not in options:
            return None
        thoughts.append(clause)
    elif found and all(found):
        text = conclude(kind, options, found)
        if kind == "order":
            thoughts.append(text)
    guessed = text not in options  # it saw nothing, or missed a flash
    if guessed:
        text = rng.choice(options)
    said = "; ".join(thoughts) + choose(options, text)
    # " B" with a space, so that it is the same token as in the thoughts
    turns.append(f"<think>{said}</think><answer> {said[-1]}</answer>")
    env.step(turns[-1])
    if env.rewards["accuracy"] < 1 or env.rewards["format"] < 1:
        return None
    return {"question": question, "kind": row_kind, "turns": turns, "learn": [True] * len(turns),
            "provenance": {"teacher": "scripted", "guessed": guessed, **settings}}


def conclude(kind, options, found):
    """The answer that the flashes found in each scene, lists of Figure, support."""
    if kind == "count":
        return str(len(found[0]))
    if kind == "order":
        return " then ".join(flashes[0].colour for flashes in found)
    colour, shape = found[0][0]
    return shape if shape in options else colour


# ------------------------------------------------------------------------------------------------- data files
def teach_all(questions, scenes, rng, root, seed):
    """The trajectory rows of a video's questions: of plain plays, and about half as many of other ones."""
    rows = []
    for question in questions:
        shown = with_frames(question, rng.choice(NUM_FRAMES))
        # as many plays as flashes, as each can be missed
        rows += [teach(shown, scenes, rng, root) for _ in question["evidence"] or [None]]
        if question["evidence"] and rng.random() < 0.5:
            rows.append(teach(shown, scenes, rng, root, wrong_first=True))
        numbers = rng.sample(range(NUM_SLOTS, 49), 3)
        plays = len(question["evidence"] or []) or rng.randrange(2)
        rows += teach_without_zooms(question, scenes, rng, root, plays, numbers)
    return signed(rows, seed)


def teach_without_zooms(question, scenes, rng, root, plays, numbers):
    """The rows of so many plays in which no zoom is left from the start, and in half of the cases one by the
    protocol that has none. There the overview shows all that is asked for; numbers: of frames, from which the
    first such one is taken."""
    rows = []
    for _ in range(plays):
        shown = with_frames(question, rng.choice(NUM_FRAMES))
        rows.append(teach(shown, scenes, rng, root, max_zooms=0))
    if rng.random() < 0.5:
        enough = [n for n in numbers if would_show(question, scenes, n)][:1]
        rows += [teach(with_frames(question, n), scenes, rng, root, max_zooms=0, protocol="direct")
                 for n in enough]
    return rows


def with_frames(question, num_frames):
    """A question whose overview has so many frames."""
    return question if num_frames == NUM_SLOTS else question | {"num_frames": num_frames}


def signed(rows, seed):
    """The rows that there are, of some that are None, with the seed in their provenance."""
    return [row | {"provenance": row["provenance"] | {"seed": seed}} for row in rows if row is not None]


def would_show(question, scenes, num_frames):
    """Whether an overview of so many frames shows all that a question asks for, before any is decoded."""
    duration_s, kind = question["meta"]["duration_s"], question["meta"]["kind"]
    times_s = slice_centres(0.0, duration_s, num_frames)
    overview = Overview([on_screen(scenes, time_s) for time_s in times_s], times_s, duration_s)
    if kind == "holistic":
        return overview.answer_whole(question["question"]) is not None
    shown = [overview.figures_in(scene) for scene in named_scenes(question)]
    if kind == "count" and shown[0]:
        return question["options"]["ABCD".index(question["answer"])] == str(len(shown[0][1]))
    return all(shown)


class Suite(NamedTuple):
    """A kind of synthetic videos and questions."""

    name: str
    make_scenes: Callable  # rng -> (duration in seconds, Scenes)
    make_questions: Callable  # as `make_questions`
    teach_all: Callable  # as `teach_all`


DEMO = Suite("demo", make_scenes, make_questions, teach_all)


def synthetic(out, num_train, num_test, seed, suite=DEMO):
    """Writes the files that the module's docstring names into the folder `out`, and prints what it wrote. The
    numbers are of questions; the last video of a split may have fewer than others. Raises UserError where the
    folder cannot be written to, or another process makes data there and does not end in time."""
    own_folder(out)
    out, began = Path(out), time.time()
    (out / "videos").mkdir(parents=True, exist_ok=True)
    for name in ("sft.jsonl", MADE):  # of other data
        (out / name).unlink(missing_ok=True)
    trajectories = []
    for split, total in (("train", num_train), ("test", num_test)):
        rows = []
        num_videos = math.ceil(total / QUESTIONS_PER_VIDEO)
        for v in tqdm(range(num_videos), desc=f"{split} videos", unit="video", dynamic_ncols=True):
            rng = random.Random(f"{seed} {split} {v}")
            duration_s, scenes = draw_scenes(rng, suite)
            name = f"videos/{split}_{v:04d}.mp4"
            write_video(out / name, render(duration_s, scenes))
            questions = suite.make_questions(rng, name, v, duration_s, scenes)[: total - len(rows)]
            rows += questions
            if split == "train":
                trajectories += suite.teach_all(questions, scenes, rng, out, seed)
        write_jsonl(out / f"{split}.jsonl", rows)
    random.Random(seed).shuffle(trajectories)
    # which data this is; then the file whose being there says that the data is whole
    made = {"suite": suite.name, "seed": seed, "train": num_train, "test": num_test}
    (out / MADE).write_text(json.dumps(made))
    write_jsonl(out / "sft.jsonl", trajectories)
    kinds = Counter(row["kind"] for row in trajectories)
    disown_folder(out)
    guessed = sum(row["provenance"]["guessed"] for row in trajectories)
    told = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    print(f"{out}: {num_train} train and {num_test} test questions, {len(trajectories)} trajectories ({told}; "
          f"{guessed} right by a guess), {time.time() - began:.0f} s")


def ensure_demo(data, seed):
    """Makes the synthetic data of the demo in the folder `data` if it is not there. Raises UserError where
    there is data of another seed: a run would train and test on that."""
    there = Path(data) / "sft.jsonl"
    if not there.exists():
        own_folder(data)  # another start may be about to make it
    if not there.exists():
        print(f"no {data}/sft.jsonl: making it, as python data_prep.py synthetic --out {data} --seed {seed} "
              "would")
        return synthetic(data, NUM_TRAIN, NUM_TEST, seed)
    disown_folder(data)
    try:
        made = json.loads(read_text(Path(data) / MADE))["seed"]
    except (UserError, ValueError, KeyError, TypeError):
        made = "unknown"
    if made != seed:
        raise UserError(f"{data} holds data of seed {made}, not {seed}: work in another folder, remove it, "
                        f"or make other data (python data_prep.py synthetic --out DIR --seed {seed}) and "
                        "name its files with --data")
