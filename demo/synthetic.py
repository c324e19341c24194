"""Synthetic videos, their questions, and a scripted teacher."""

import os
import random
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from common import write_jsonl
from video import Frame
from zoom_env import LAST_TURN, EnvConfig, ZoomEnv

# ------------------------------------------------------------------------------------------------ synthetic videos
PALETTE = {"red": (215, 40, 40), "green": (30, 160, 60), "blue": (45, 75, 225), "yellow": (235, 220, 60),
           "purple": (140, 40, 180), "orange": (240, 130, 20), "cyan": (70, 210, 220), "white": (245, 245, 245)}
GREY = (105, 105, 105)
COLOURS, SHAPES = list(PALETTE), ["circle", "square", "triangle", "cross"]
SIDE, VIDEO_FPS = 28, 8  # a frame of 28x28 pixels is one visual token
NUM_SLOTS = len(COLOURS) + 1  # a scene of each colour and a grey end; the overview shows one frame of each
SLOT_S, FLASH_S = (13.5, 15.5), 1.25

TINY_PROMPT = """Answer the question about the video. In each turn first write <think>your thoughts</think>, then \
<video_zoom>{"segment": [start_sec, end_sec], "fps": n}</video_zoom> to look closer, at most ZOOM_MAX_FRAMES frames, \
or <answer>letter</answer> to end."""
TINY_ENV = EnvConfig(overview_fps=1.0, overview_max_frames=NUM_SLOTS, min_pixels=SIDE * SIDE, max_pixels=SIDE * SIDE,
                     system_prompt=TINY_PROMPT)


def draw(background, flash=None, offset=(0, 0)):
    """One frame, (28, 28, 3) uint8. flash: (colour, shape) or None; offset: of the shape, pixels right and down."""
    image = np.empty((SIDE, SIDE, 3), np.uint8)
    image[:] = PALETTE.get(background, GREY)
    if flash:
        y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
        x, y = x - offset[0], y - offset[1]
        inside = {
            "circle": x * x + y * y <= 64,
            "square": (abs(x) <= 8) & (abs(y) <= 8),
            "triangle": (y <= 8) & (abs(x) <= (y + 8) / 1.8),
            "cross": ((abs(x) <= 2.5) | (abs(y) <= 2.5)) & (abs(x) <= 9) & (abs(y) <= 9),
        }[flash[1]]
        image[(abs(x) <= 11) & (abs(y) <= 11)] = 0  # on a black card, which makes shapes easy to tell on any scene
        image[inside] = PALETTE[flash[0]]
    return image


@dataclass
class Scene:
    colour: str  # a colour's name, or "grey" at the end
    start_s: float
    flashes: list  # (start_s, end_s, (colour, shape), offset)


def make_scenes(rng):
    """A random video: (duration_s, 9 scenes), 2 to 2.3 minutes. Each scene begins a little before one slot's middle,
    where a 9-frame overview looks, and its flashes follow before the next scene begins."""
    duration_s = round(rng.uniform(*SLOT_S) * NUM_SLOTS * VIDEO_FPS) / VIDEO_FPS
    slot_s = duration_s / NUM_SLOTS
    starts = [(i + rng.uniform(0.3, 0.46)) * slot_s for i in range(NUM_SLOTS)] + [duration_s]
    colours = [*rng.sample(COLOURS, len(COLOURS)), "grey"]
    num_flashes = [*rng.sample([1, 1, 1, 1, 1, 2, 3, 4], len(COLOURS)), 0]
    scenes = []
    for i in range(NUM_SLOTS):
        colour, flashes = colours[i], []
        if n := num_flashes[i]:
            first_s, last_s = (i + 0.5) * slot_s + 0.15, starts[i + 1] - 0.15
            gaps = sorted(rng.uniform(0, last_s - first_s - n * FLASH_S - (n - 1) * 0.2) for _ in range(n))
            seen = colour
            for k, gap in enumerate(gaps):
                start_s = first_s + gap + k * (FLASH_S + 0.2)
                seen = rng.choice([c for c in COLOURS if c not in (colour, seen)])
                flashes.append((start_s, start_s + FLASH_S, (seen, rng.choice(SHAPES)),
                                (rng.randint(-2, 2), rng.randint(-2, 2))))
        scenes.append(Scene(colour, 0.0 if i == 0 else starts[i], flashes))
    return duration_s, scenes


def write_video(path, frames, fps=VIDEO_FPS):
    """H.264 in MP4 from (H, W, 3) uint8 frames, a key frame every 16."""
    temporary = Path(path).with_suffix(".tmp.mp4")
    with av.open(str(temporary), "w") as container:
        frames = iter(frames)
        first = next(frames)
        stream = container.add_stream("libx264", rate=fps, options={
            "crf": "16", "preset": "ultrafast", "g": "16", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], "yuv420p"
        for image in [first]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    os.replace(temporary, path)


def render(duration_s, scenes):
    """The frames of a video."""
    drawn = {}
    for k in range(round(duration_s * VIDEO_FPS)):
        time_s = k / VIDEO_FPS
        scene = [s for s in scenes if s.start_s <= time_s][-1]
        key = (scene.colour, *next(((f[2], f[3]) for f in scene.flashes if f[0] <= time_s < f[1]), (None, (0, 0))))
        if key not in drawn:
            drawn[key] = draw(*key)
        yield drawn[key]


def uniform_accuracy(question, num_frames):
    """The best accuracy on a synthetic question that `num_frames` uniform frames allow, over 64 phases: 1 where they
    show every flash that it is about, else a guess among the options that are still open."""
    flashes, kind, duration_s = question["evidence"] or [], question["meta"]["kind"], question["meta"]["duration_s"]
    if kind == "holistic":
        return 1.0
    step, total = duration_s / num_frames, 0.0
    for phase in range(64):
        first = (phase + 0.5) / 64 * step
        shown = [np.ceil((start - first) / step) * step + first < end for start, end in flashes]
        if all(shown):
            total += 1
        elif kind == "count":  # at least as many as were seen, and at least one
            total += 1 / (len(question["options"]) + 1 - max(1, sum(shown)))
        else:  # each flash of an order question halves the options
            total += 1 / 2 if any(shown) else 1 / len(question["options"])
    return total / 64


UNIFORM_FRAMES = (8, 16, 32, 64, 128, 256)


def make_questions(rng, video, duration_s, scenes, kinds=("detail", "detail", "count", "order", "holistic")):
    """Question rows about one video."""
    coloured = [s for s in scenes if s.colour != "grey"]
    single = [s for s in coloured if len(s.flashes) == 1]
    details = iter(rng.sample(single, 2))
    rows = []
    for number, kind in enumerate(kinds):
        about = []
        if kind == "detail":
            about = [next(details)]
            colour, shape = about[0].flashes[0][2]
            if number % 2 == 0:
                text = f"What colour is the shape that flashes in the {about[0].colour} scene?"
                right, wrong = colour, [c for c in COLOURS if c not in (colour, about[0].colour)]
            else:
                text = f"Which shape flashes in the {about[0].colour} scene?"
                right, wrong = shape, [s for s in SHAPES if s != shape]
        elif kind == "count":
            n = rng.randint(1, 4)
            about = [rng.choice([s for s in coloured if len(s.flashes) == n])]
            text = f"How many shapes flash in the {about[0].colour} scene?"
            right, wrong = str(n), [str(k) for k in range(1, 5) if k != n]
        elif kind == "order":
            while True:
                about = sorted(rng.sample(single, 2), key=lambda s: s.start_s)
                a, b = (s.flashes[0][2][0] for s in about)
                if a != b:
                    break
            named = rng.sample(about, 2)
            text = (f"One shape flashes in the {named[0].colour} scene and one in the {named[1].colour} scene. "
                    "Which colours, in order of time?")
            c, d = rng.sample([x for x in COLOURS if x not in (a, b)], 2)
            right = f"{a} then {b}"
            wrong = [f"{b} then {a}", f"{a} then {c}", f"{d} then {b}"]
        else:
            k = rng.randrange(len(coloured) - 1)
            text, right = rng.choice([
                ("Which scene comes first?", coloured[0].colour), ("Which scene comes last?", coloured[-1].colour),
                (f"Which scene comes right after the {coloured[k].colour} scene?", coloured[k + 1].colour)])
            wrong = [s.colour for s in coloured if s.colour != right and s.colour not in text]
        options = rng.sample([right, *rng.sample(wrong, 3)], 4)
        question = {
            "id": f"{Path(video).stem}-{number}", "video": video, "question": text, "options": options,
            "answer": "ABCD"[options.index(right)], "answer_type": "multiple_choice", "source": "synthetic",
            "evidence": [[round(f[0], 3), round(f[1], 3)] for s in about for f in s.flashes] or None,
            "meta": {"kind": kind, "duration_s": duration_s},
        }
        question["meta"]["uniform_accuracy"] = {n: round(uniform_accuracy(question, n), 4) for n in UNIFORM_FRAMES}
        rows.append(question)
    return rows


# ------------------------------------------------------------------------------------------------ scripted teacher
def survey(colours):
    """The overview: what is seen before its number, so that a number can be found by what is seen there."""
    return "scenes " + " ".join(f"{colour}{i}" for i, colour in enumerate(colours))


def plan(colours, named):
    """(clauses, scenes in order of time, an ordinal for each) for the one or two scenes that a question names."""
    if len(named) == 1:
        return [], list(named), ["first"]
    first, second = sorted(named, key=colours.index)
    at = {c: f"{c}{colours.index(c)}" for c in named}
    return [" and ".join(at[c] for c in named), f"second {at[second]}"], [first, second], ["first", "second"]


def neighbours(colours, right, question):
    """The part of the survey that answers which scene comes first, last or after another."""
    i = colours.index(right)
    first, last = (i - 1, i) if "right after" in question else (i, i + 1) if "last" in question else (i, i)
    return " ".join(f"{colours[k]}{k}" for k in range(first, last + 1))


def place(colours, scene, tags, ordinal=""):
    """Where a scene is, as tags and in seconds. tags: of the overview's frames, one a slot."""
    i = colours.index(scene)
    start, end = (tag.partition("_time")[2].rstrip("s>") for tag in tags[i:i + 2])
    return [f"{ordinal} {scene}{i}: {tags[i]} to {tags[i + 1]}".strip(), f"from [{start}, {end}]"]


def transcript(scene, flashes):
    """(clause, different flashes): what each frame of a clip shows, given as (colour, shape) or None, again before its
    number. A flash is counted where it begins ("red circle4=1"); the next frame that shows it says "same"."""
    said, runs = [], []
    for i, flash in enumerate(flashes):
        if flash and i and flash == flashes[i - 1]:
            said.append(f"same{i}")
        elif flash:
            runs.append(flash)
            said.append(f"{' '.join(flash)}{i}={len(runs)}")
        else:
            said.append(f"-{i}")
    return f"{scene}: " + " ".join(said), runs


def choose(options, right):
    """The options as the question lists them, each with its letter once more at the end, and the right one: a letter is
    found by the text before it."""
    said = [f"{letter}. {text} {letter}" for text, letter in zip(options, "ABCD")]
    return "\n" + "\n".join(said) + "\nso " + said[options.index(right)][3:]


HASTE = 0.75


class Teacher:
    """Plays a synthetic question through the environment. It finds the scene and reads every frame right, but it is
    careless about how closely to look: with probability HASTE it takes 0.5 frames a second, which can miss a flash, else
    1, which cannot. If it saw none it looks again or guesses. What is left for RL to find out is how closely to look.

    wrong_zooms: zooms into wrong scenes before the right one (a reflection trajectory has 1)."""

    def __init__(self, question, scenes, rng, wrong_zooms=0):
        self.question, self.scenes, self.rng, self.wrong_zooms = question, scenes, rng, wrong_zooms
        named = [w for w in question["question"].replace("?", "").split() if w in COLOURS]
        self.colours = [scene.colour for scene in scenes]
        self.plan, self.targets = [], []
        if question["evidence"]:
            self.plan, in_order, ordinals = plan(self.colours, named)
            self.targets = [(scenes[self.colours.index(c)], ordinal) for c, ordinal in zip(in_order, ordinals)]
        self.found, self.thoughts = [], []

    def turn(self, messages):
        """The next assistant text for what the environment showed."""
        frames = [item for item in messages[-1].content if isinstance(item, Frame)]
        if messages[0].role == "system":
            self.tags = [f"<frame{i}_time{f.time_s:.2f}s>" for i, f in enumerate(frames)]
            self.times = [f"{f.time_s:.2f}" for f in frames]
            self.thoughts = [survey(self.colours)]
            if messages[-1].content[-1].endswith(LAST_TURN):
                return self.answer()
            self.thoughts += self.plan
        else:
            self.read(frames)
        if self.targets:
            return self.zoom()
        return self.answer()

    def zoom(self):
        (target, ordinal), fps = self.targets[0], "0.50" if self.rng.random() < HASTE else "1.00"
        if self.wrong_zooms:
            wanted = {scene.colour for scene, _ in self.targets} | {"grey"}
            target, ordinal = self.rng.choice([s for s in self.scenes if s.colour not in wanted]), ""
        self.looked_at = target
        slot = self.scenes.index(target)
        thoughts = "; ".join(self.thoughts + place(self.colours, target.colour, self.tags, ordinal)[:1])
        return (f"<think>{thoughts}</think><video_zoom>"
                f'{{"segment": [{self.times[slot]}, {self.times[slot + 1]}], "fps": {fps}}}</video_zoom>')

    def read(self, frames):
        shown = [next((f[2] for s in self.scenes for f in s.flashes if f[0] <= frame.time_s < f[1]), None)
                 for frame in frames]
        clause, runs = transcript(self.looked_at.colour, shown)
        self.thoughts = [clause]
        if not self.wrong_zooms and (runs or self.rng.random() < 0.5):
            self.found.append(runs)
            self.targets.pop(0)
        else:
            self.wrong_zooms = max(0, self.wrong_zooms - 1)
            self.thoughts.append("not found")

    def answer(self):
        """The answer that what was found supports, a guess where nothing was."""
        kind, options = self.question["meta"]["kind"], self.question["options"]
        text = None
        if kind == "holistic":
            text = options["ABCD".index(self.question["answer"])]
            self.thoughts.append(neighbours(self.colours, text, self.question["question"]))
        elif self.found and all(self.found):
            colour, shape = self.found[0][0]
            text = {"detail": shape if shape in options else colour, "count": str(len(self.found[0])),
                    "order": " then ".join(runs[0][0] for runs in self.found)}[kind]
            if kind == "order":
                self.thoughts.append(text)
        if text not in options:  # it saw nothing, or missed a flash
            text = self.rng.choice(options)
        thoughts = "; ".join(self.thoughts) + choose(options, text)
        # " B" with a space, so that it is the same token as in the thoughts
        return f"<think>{thoughts}</think><answer> {thoughts[-1]}</answer>"


def teach(question, scenes, rng, config, root, wrong_zooms=0, max_zooms=None):
    """One trajectory row, or None if the environment does not grade it right and well formed."""
    teacher = Teacher(question, scenes, rng, wrong_zooms)
    provenance = {"teacher": "scripted"}
    if max_zooms is not None:
        provenance["max_zooms"] = max_zooms
    env = ZoomEnv(question, replace(config, max_zooms=provenance.get("max_zooms", config.max_zooms)), root)
    messages, turns = env.reset(), []
    while not env.done:
        turns.append(teacher.turn(messages))
        messages = env.step(turns[-1])
    parts = env.rewards
    if not (parts["accuracy"] == 1 and parts["format"] == 1):
        return None
    return {"question": question, "kind": "reflection" if wrong_zooms else "exemplar", "turns": turns,
            "learn": [True] * len(turns), "provenance": provenance}


def synthetic(out, num_train, num_test, seed, config=TINY_ENV):
    """Writes videos, train.jsonl, test.jsonl and sft.jsonl into the folder `out`; prints what it wrote."""
    out = Path(out)
    (out / "videos").mkdir(parents=True, exist_ok=True)
    start, trajectories = time.time(), []
    for split, total in (("train", num_train), ("test", num_test)):
        rows = []
        for v in tqdm(range((total + 4) // 5), desc=f"{split} videos", unit="video", dynamic_ncols=True):
            rng = random.Random(f"{seed} {split} {v}")
            duration_s, scenes = make_scenes(rng)
            name = f"videos/{split}_{v:04d}.mp4"
            write_video(out / name, render(duration_s, scenes))
            questions = make_questions(rng, name, duration_s, scenes)[: total - len(rows)]
            rows += questions
            if split == "test":
                continue
            for question in questions:
                plays = [{}]
                if question["evidence"] and rng.random() < 0.5:
                    plays.append({"wrong_zooms": 1})
                if rng.random() < 0.5:
                    plays.append({"max_zooms": 0})
                for play in plays:
                    if row := teach(question, scenes, rng, config, out, **play):
                        row["provenance"]["seed"] = seed
                        trajectories.append(row)
        write_jsonl(out / f"{split}.jsonl", rows)
    random.Random(seed).shuffle(trajectories)
    write_jsonl(out / "sft.jsonl", trajectories)
    kinds = Counter(row["kind"] for row in trajectories)
    print(f"{out}: {num_train} train and {num_test} test questions, {kinds['exemplar']} exemplar and "
          f"{kinds['reflection']} reflection trajectories, {time.time() - start:.0f} s")


NUM_TRAIN, NUM_TEST = 1200, 300


def ensure_demo(data, seed):
    """Makes the synthetic data of the demo in the folder `data` if it is not there."""
    if not (Path(data) / "sft.jsonl").exists():
        print(f"no {data}/sft.jsonl: making it, as python data_prep.py synthetic --out {data} --seed {seed} would")
        synthetic(data, NUM_TRAIN, NUM_TEST, seed)
