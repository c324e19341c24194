"""Questions and trajectories: synthetic videos with a scripted teacher, and the tiny base model that learns from them.

    python data_prep.py synthetic --out runs/data --train 1200 --test 300 --seed 0
    python data_prep.py tiny_base --out tiny_base

synthetic writes into --out: videos/*.mp4 (H.264), train.jsonl and test.jsonl (questions), sft.jsonl (trajectories).
A video is a row of scenes, each of one background colour. In each of them a coloured shape flashes for about a second,
once or up to four times. The overview shows where each scene is, and almost never a flash, so a question about a flash
needs a zoom:

    detail     which colour or shape flashes in the blue scene?            one zoom
    count      how many shapes flash in the blue scene?                    one zoom, close enough
    order      which colours flash in the blue and in the red scene?       two zooms
    holistic   which scene comes first, last, or right after another?      none

A question's meta says how well N uniform frames could do: `uniform_accuracy[N]` is 1 where they show all the evidence,
and a guess among the options that what they show leaves open elsewhere, averaged over the phase of the sampling.

The scripted teacher plays through the environment like any policy, and a trajectory is kept only if the environment
grades it right and well formed. It knows where to look, but not how closely: see `Teacher`.

tiny_base makes the model that the demo starts from, as the paper starts from a pretrained one: a Qwen2.5-VL of 1.1 M
parameters with a tokenizer of its own, pretrained on descriptions and look-ups over synthetic frames. It can name
colours and shapes, find a scene's time tags and pick an option's letter, and has never seen the zoom tool.
"""

import argparse
import json
import os
import random
import sys
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
from tqdm import tqdm

from model import (Policy, UserError, clip_and_step, encode, fail, frame_features, load_policy, run_main, save_policy,
                   start_processes, sum_over_processes, sync_gradients, token_log_probs)
from zoom_env import LAST_TURN, MAY_ZOOM, EnvConfig, Frame, Message, VideoError, ZoomEnv

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
    parts = env.reward()
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


def write_jsonl(path, rows):
    """One JSON row a line, renamed into place when it is whole."""
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------- the tiny base
BASE_STEPS = 3000
TINY_BASE = os.path.relpath(Path(__file__).with_name("tiny_base"))
BASE_PROMPT = "You are a helpful assistant."
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
                "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
                "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""


def make_tokenizer(texts, vocab_size=640):
    """A byte-level BPE tokenizer with Qwen's splitting rule, special tokens and chat template, trained on `texts`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=QWEN_SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE,
        additional_special_tokens=QWEN_SPECIAL, clean_up_tokenization_spaces=False)


def make_tiny_model(tokenizer):
    """A randomly initialised Qwen2.5-VL of 1.1 M parameters as a Policy."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("image_pad", "video_pad", "vision_start", "vision_end", "im_end", "endoftext")}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.09, max_position_embeddings=4096,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            bos_token_id=ids["endoftext"], eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"]),
        vision_config=dict(
            depth=2, hidden_size=64, initializer_range=0.09, intermediate_size=128, num_heads=2, out_hidden_size=128,
            window_size=112, fullatt_block_indexes=[1], tokens_per_second=2),
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"], tie_word_embeddings=True)
    hf = Qwen2_5_VLForConditionalGeneration(config)
    prepare_for_look_ups(hf.model.language_model)
    size = {"shortest_edge": TINY_ENV.min_pixels, "longest_edge": TINY_ENV.max_pixels}
    return Policy(hf, tokenizer, Qwen2VLImageProcessor(size=size), TINY_ENV)


@torch.no_grad()
def prepare_for_look_ups(language_model, strength=6.0):
    """Initial weights from which finding something by what stands beside it (induction, arXiv 2209.11895) is learned in a
    hundred steps instead of a thousand. Token embeddings are large and the layers' outputs small, so that deeper layers
    still see which token stands where. And the first layer's heads 0 .. 3 attend 1, 2, 3 and 4 tokens back: under RoPE
    the score of a constant query and key is sum_f c_f^2 cos(theta_f * (distance - shift)), a peak at `shift`, so the
    biases of the query and key projections are enough."""
    language_model.embed_tokens.weight.mul_(3)
    for layer in language_model.layers:
        layer.self_attn.o_proj.weight.mul_(0.25)
        layer.mlp.down_proj.weight.mul_(0.25)
    attention, config = language_model.layers[0].self_attn, language_model.config
    half = attention.head_dim // 2
    theta = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    size = torch.where(torch.arange(half) < 6, strength, 0.0)  # the fastest frequencies make the narrowest peak
    attention.q_proj.weight.mul_(0.1)
    attention.k_proj.weight.mul_(0.1)
    attention.k_proj.bias.view(-1, 2, half)[:, 0] = size
    for head, bias in enumerate(attention.q_proj.bias.view(-1, 2, half)):
        shift = -(head + 1) * theta
        bias[0], bias[1] = size * shift.cos(), size * shift.sin()


def make_frame_bank(folder):
    """{(background, flash): frames}, (3, 28, 28) uint8 each: what every scene looks like after H.264."""
    from zoom_env import Video

    rng, keys = random.Random(0), []
    for background in ["grey", *COLOURS]:
        for flash in [None] * 8 + [(c, s) for c in COLOURS for s in SHAPES if c != background and background != "grey"]:
            keys += [(background, flash)] * 3
    path = Path(folder) / "bank.mp4"
    images = [draw(*key, (rng.randint(-2, 2), rng.randint(-2, 2))) for key in keys]
    write_video(path, images)
    video = Video(path)
    bank = {}
    for key, (_, image) in zip(keys, video.frames_at([k / VIDEO_FPS for k in range(len(keys))]), strict=True):
        bank.setdefault(key, []).append(torch.from_numpy(image).permute(2, 0, 1).contiguous())
    video.close()
    path.unlink()
    return bank


class Lessons:
    """Draws pretraining dialogues: what the base can do that the demo's stages build on. No word of the tool."""

    def __init__(self, bank, seed):
        self.bank, self.rng = bank, random.Random(seed)
        self.answers = False  # whether thoughts and answers stand in their tags
        self.any_text = False  # whether any text stands around the lesson

    def picture(self, key):
        noise = torch.randint(-5, 6, (3, 1, 1)) + torch.randint(-3, 4, (3, SIDE, SIDE))
        image = self.rng.choice(self.bank[key]).int() + noise
        return image.clamp(0, 255).to(torch.uint8)

    def show(self, keys, times_s):
        """Message items: tagged frames, as the environment writes them."""
        return [item for i, (key, time_s) in enumerate(zip(keys, times_s))
                for item in ("\n" * (i > 0) + f"<frame{i}_time{time_s:.2f}s>", Frame(time_s, self.picture(key)))]

    def overview(self, num_slots):
        """A video's scenes as one frame a slot: (colours, times, tags, items)."""
        slot_s = self.rng.uniform(7, 25)  # far from the demo's: a time has to be looked up, as no digit can be guessed
        colours = [*self.rng.sample(COLOURS, num_slots - 1), "grey"]
        times = [round((i + 0.5) * slot_s * 8) / 8 for i in range(num_slots)]
        tags = [f"<frame{i}_time{t:.2f}s>" for i, t in enumerate(times)]
        return colours, times, tags, self.show([(c, None) for c in colours], times)

    def clip(self, background, start_s, num_flashes, num_frames):
        """Frames of one scene with flashes in it, often with the next scene's beginning: (flash of each, items)."""
        rng = self.rng
        after = rng.choice([0, 1, 1, 2, 3]) if num_frames > 5 else 0
        flashes, seen, length = [None] * num_frames, background, num_frames - after
        starts = sorted(rng.sample(range(length), min(num_flashes, length)))
        for start in starts:
            seen = rng.choice([c for c in COLOURS if c not in (background, seen)])
            flashes[start] = (seen, rng.choice(SHAPES))
            if rng.random() < 0.4 and start + 1 < length and start + 1 not in starts:
                flashes[start + 1] = flashes[start]
        step = rng.uniform(0.5, 2.2)
        times = [round((start_s + (i + 0.5) * step) * 8) / 8 for i in range(num_frames)]
        next_scene = rng.choice(["grey", *(c for c in COLOURS if c != background)])
        keys = [(background, f) for f in flashes[:length]] + [(next_scene, None)] * after
        return flashes, self.show(keys, times)

    def options(self, right, wrong):
        """(the options' lines, the options in their order)."""
        options = self.rng.sample([right, *self.rng.sample(wrong, 3)], 4)
        return "".join(f"\n{letter}. {o}" for letter, o in zip("ABCD", options)), options

    def ask(self, scene, runs):
        """A question on one clip: (its text, the right option, wrong ones)."""
        return self.rng.choice([
            (f"How many shapes flash in the {scene} scene?", str(len(runs)), [n for n in "1234" if n != str(len(runs))]),
            (f"What colour is the shape that flashes in the {scene} scene?", runs[0][0],
             [c for c in COLOURS if c not in (runs[0][0], scene)]),
            (f"Which shape flashes in the {scene} scene?", runs[0][1], [s for s in SHAPES if s != runs[0][1]])])

    def lesson(self, kind, level):
        """[(user items, assistant text), ...] for one skill; level from 0 (short) to 2 (at full length)."""
        rng = self.rng
        num_slots = (4, rng.randint(4, NUM_SLOTS), NUM_SLOTS)[level]
        num_frames = (4, rng.randint(3, 8), rng.choice([5, 6, 6, 7, 7, 10, 13, 14, 15]))[level]
        if kind == "letter":
            if rng.random() < 0.5:
                a, b, c, d = rng.sample(COLOURS, 4)
                texts = [f"{a} then {b}", f"{b} then {a}", f"{a} then {c}", f"{d} then {b}"]
            else:
                texts = rng.sample(rng.choice([COLOURS, SHAPES, ["1", "2", "3", "4"]]), 4)
            text, options = self.options(texts[0], texts[1:])
            asked = rng.sample(texts, 4)
            said = choose(options, asked[0]) + "".join("\nso" + choose(options, a).partition("\nso")[2] for a in asked[1:])
            return [(["Which option is: " + "; ".join(asked) + "?" + text], said[1:])]
        if kind == "repeat":
            words = rng.choices(COLOURS + SHAPES + list("ABCD1234"), k=rng.randint(8, 24))
            said = " ".join(words)
            return [([f"Repeat: {said}."], f"It is {said}.")]
        if kind == "caption":
            keys = [rng.choice(list(self.bank)) for _ in range(num_frames)]
            times = [round((i + rng.random()) * 80) / 8 for i in range(num_frames)]
            said = " ".join(f"{scene} {' '.join(flash) if flash else '-'}." for scene, flash in keys)
            return [(["Describe each frame.\n", *self.show(keys, times)], said)]
        if kind == "clip":
            scene = rng.choice(COLOURS)
            flashes, items = self.clip(scene, rng.uniform(0, 180), rng.choice([0, 1, 1, 1, 2, 3, 4]), num_frames)
            clause, runs = transcript(scene, flashes)
            if not runs or rng.random() < 0.3:
                return [([f"What flashes in the {scene} scene?\n", *items], clause)]
            question, right, wrong = self.ask(scene, runs)
            text, options = self.options(right, wrong)
            return [([f"{question}{text}\n", *items], clause + choose(options, right))]
        colours, times, tags, items = self.overview(num_slots)
        coloured = colours[:-1]
        head = f"\nThe video lasts {times[-1] + times[0]:.2f} seconds. {num_slots} frames of it:\n"
        if kind == "scenes":
            return [(["Name the scene of each frame.\n", *items], survey(colours))]
        if kind == "whole":
            k = rng.randrange(len(coloured) - 1)
            after = (f"Which scene comes right after the {coloured[k]} scene?", coloured[k + 1])
            question, right = rng.choice([("Which scene comes first?", coloured[0]),
                                          ("Which scene comes last?", coloured[-1]), after, after])
            text, options = self.options(right, [c for c in COLOURS if c != right and c not in question])
            said = f"{survey(colours)}; {neighbours(colours, right, question)}" + choose(options, right)
            return [([question + text + head, *items], said)]
        named = rng.sample(coloured, rng.randint(1, 2))
        clauses, in_order, ordinals = plan(colours, named)
        clauses = [survey(colours), *clauses]
        if kind == "where":
            for c, ordinal in zip(in_order, ordinals):
                clauses += place(colours, c, tags, ordinal)
            scenes = " and ".join(f"the {c} scene" for c in named)
            return [([f"Where is {scenes}?{head}", *items], "; ".join(clauses))]
        one, clips = len(named) == 1, []  # a visit: a place, its clip, perhaps another place and its clip
        for c in in_order:
            clips.append(self.clip(c, times[colours.index(c)], rng.choice([1, 1, 1, 2, 3, 4]) if one else 1, num_frames))
        seen = [transcript(c, flashes)[1] for c, (flashes, _) in zip(in_order, clips)]
        if one:
            question, right, wrong = self.ask(named[0], seen[0])
        else:
            question = (f"One shape flashes in the {named[0]} scene and one in the {named[1]} scene. "
                        "Which colours, in order of time?")
            a, b = (runs[0][0] for runs in seen)
            c, d = rng.sample([x for x in COLOURS if x not in (a, b)], 2)
            right, wrong = f"{a} then {b}", [f"{b} then {a}", f"{a} then {c}", f"{d} then {b}"]
            if a == b:
                wrong[0] = f"{c} then {a}"
        text, options = self.options(right, wrong)
        dialogue, user = [], [question + text + head, *items]
        for c, ordinal, (flashes, clip) in zip(in_order, ordinals, clips):
            dialogue.append((user, "; ".join(clauses + place(colours, c, tags, ordinal))))
            if rng.random() < 0.2:  # the first clip shows nothing
                flashes_before, clip_before = self.clip(c, times[colours.index(c)], 0, num_frames)
                clauses = [transcript(c, flashes_before)[0], "not found", *place(colours, c, tags, ordinal)]
                dialogue.append((clip_before, "; ".join(clauses)))
            user, clauses = clip, [transcript(c, flashes)[0]]
        if not one:
            clauses.append(right)
        return [*dialogue, (user, "; ".join(clauses) + choose(options, right))]

    def dialogue(self, policy, kind, level):
        messages = [Message("system", [self.chatter(policy, 70) or BASE_PROMPT])]
        for user, assistant in self.lesson(kind, level):
            if self.answers and "\nso " in assistant:
                assistant = f"<think>{assistant}</think><answer> {assistant[-1]}</answer>"
            if len(messages) > 1 and (before := self.chatter(policy, 10)):
                user = [before + "\n", *user]
            if after := self.chatter(policy, 25):
                user = [*user, "\n" + after]
            messages += [Message("user", user), Message("assistant", [assistant])]
        return encode(policy, messages)

    def chatter(self, policy, most):
        """Up to `most` random tokens of text if the lessons have such, else "": a model that never saw a word is thrown
        off by it, and a prompt has words that no lesson has."""
        if not self.any_text or self.rng.random() < 0.2:
            return ""
        ids = self.rng.choices(range(len(policy.tokenizer)), k=self.rng.randint(1, most))
        text = policy.tokenizer.decode(ids, skip_special_tokens=True)
        return "".join(c for c in text if c.isascii() and (c.isprintable() or c == "\n"))


# Short and single skills first: a look-up by content in a long dialogue is not found from scratch. The next stage begins
# when each skill of this one is answered right, to the last token, with this probability, or after so many steps.
CURRICULUM = [
    ({("repeat", 0): 1, ("caption", 0): 2}, 0.4, 300),
    ({("repeat", 0): 1, ("letter", 0): 1, ("scenes", 1): 2, ("clip", 0): 1, ("where", 0): 2}, 0.6, 250),
    ({("repeat", 0): 1, ("letter", 0): 2, ("clip", 2): 3, ("where", 2): 3, ("visit", 2): 6, ("whole", 2): 3}, 2.0, 0),
]


def tiny_base(out, steps, seed, init=None):
    """Pretrains the tiny base and writes its checkpoint folder, in bfloat16. Runs on any number of processes. After
    `steps` steps of the curriculum come a tenth as many in which thoughts and answers stand in their tags, and a fifth as
    many in which also any text stands around the lesson; `init` is a folder to begin that last part from."""
    rank, world, device = start_processes("cpu")
    torch.manual_seed(seed)
    folder = Path(out) / f"bank{rank}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    lessons = Lessons(make_frame_bank(folder), seed)
    folder.rmdir()
    if init is None:
        skills = ("clip", "letter", "where", "visit", "whole")
        spoken = [part for i in range(2000) for user, said in lessons.lesson(skills[i % 5], 2)
                  for part in [*(u for u in user if isinstance(u, str)), said]]
        protocol = [TINY_PROMPT, LAST_TURN, MAY_ZOOM, BASE_PROMPT, "<tool_response>\n</tool_response>\n",
                    "system\nuser\nassistant\n",
                    "The video lasts 1 seconds. frames of it:\n; not found; so; One shape flashes in the and one"]
        policy = make_tiny_model(make_tokenizer(spoken + protocol * 300))
        if rank == 0:
            num_parameters = sum(p.numel() for p in policy.hf.parameters())
            print(f"tiny base: {num_parameters:,} parameters, {len(policy.tokenizer)} tokens")
        pretrain(policy, lessons, CURRICULUM, steps, 1.5e-3, seed, out)
        lessons.answers = True
        pretrain(policy, lessons, CURRICULUM[-1:], steps // 10, 1e-3, seed + 1, out)
    else:
        policy = load_policy(init)
    lessons.answers = lessons.any_text = True
    pretrain(policy, lessons, CURRICULUM[-1:], steps // 5, 1e-3, seed + 2, out)
    if rank == 0:
        policy.hf.to(torch.bfloat16)
        save_policy(policy, out)


def pretrain(policy, lessons, curriculum, steps, lr, seed, out, batch_tokens=6144):
    """Trains the whole model on lessons: AdamW, the learning rate constant in the first half and then linear to 0."""
    rank, world, device = start_processes("cpu")
    parameters = list(policy.hf.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    lessons.rng.seed(f"{seed} {rank}")
    torch.manual_seed(seed * 1000 + rank)
    stage, began, exact = 0, 0, defaultdict(lambda: deque(maxlen=100))
    bar = tqdm(range(steps), desc="pretraining", unit="step", dynamic_ncols=True, disable=rank > 0)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50, 0.02 + 2 * (1 - step / steps))
        (shares, enough, most_steps), dialogues, skills, tokens = curriculum[stage], [], [], 0
        while tokens < (3072 if enough <= 1 else batch_tokens) / world:
            skills += lessons.rng.choices(list(shares), list(shares.values()))
            dialogues.append(lessons.dialogue(policy, *skills[-1]))
            tokens += len(dialogues[-1].ids)
        features = iter(frame_features(policy, [f for d in dialogues for f in d.frames]))
        for d in dialogues:
            d.features = [next(features) for _ in d.frames]
        log_probs, _ = token_log_probs(policy, [[d] for d in dialogues])
        total = sum_over_processes({"tokens": len(log_probs)}, device)["tokens"]
        (-log_probs.sum() / total).backward()
        sync_gradients(parameters)
        clip_and_step(optimizer, parameters, 1.0)
        for skill, part in zip(skills, log_probs.detach().split([sum(d.trained) for d in dialogues])):
            exact[skill].append(part.sum().exp().item())
        if step % 25 == 24:
            right = sum_over_processes({k: np.mean(exact[k]) / world if exact[k] else 0 for k in shares}, device)
            if rank == 0:
                tqdm.write(f"step {step + 1}, stage {stage}, loss {-log_probs.mean().item():.3f}, probability of the whole "
                           "answer: " + ", ".join(f"{skill} {level}: {right[skill, level]:.2f}" for skill, level in shares))
            if stage + 1 < len(curriculum) and (min(right.values()) >= enough or step + 1 - began >= most_steps):
                stage, began = stage + 1, step + 1
        if rank == 0 and (step + 1) % 100 == 0:
            save_policy(policy, out)


def ensure_demo(data, seed):
    """Makes the synthetic data of the demo in the folder `data` if it is not there."""
    if not (Path(data) / "sft.jsonl").exists():
        print(f"no {data}/sft.jsonl: making it, as python data_prep.py synthetic --out {data} --seed {seed} would")
        synthetic(data, NUM_TRAIN, NUM_TEST, seed)


NUM_TRAIN, NUM_TEST = 1200, 300


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (see --help)")
    commands = parser.add_subparsers(dest="command", required=True)
    show = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sub = commands.add_parser("synthetic", help="videos, questions and trajectories of the demo", **show)
    sub.add_argument("--out", default="runs/data", help="folder to write")
    sub.add_argument("--train", type=int, default=NUM_TRAIN, help="number of training questions")
    sub.add_argument("--test", type=int, default=NUM_TEST, help="number of held-out questions")
    sub.add_argument("--seed", type=int, default=0, help="seed of videos, questions and the teacher")
    sub = commands.add_parser("tiny_base", help="pretrain the tiny base model", **show)
    sub.add_argument("--out", default="tiny_base", help="checkpoint folder to write")
    sub.add_argument("--steps", type=int, default=BASE_STEPS,
                     help="optimizer steps of the curriculum; three tenths as many follow")
    sub.add_argument("--seed", type=int, default=0, help="seed of weights and lessons")
    sub.add_argument("--init", help="checkpoint folder to begin the last part from")
    args = parser.parse_args()
    if args.command == "synthetic":
        if args.train < 1 or args.test < 1:
            raise UserError("--train and --test must be at least 1")
        synthetic(args.out, args.train, args.test, args.seed)
    else:
        tiny_base(args.out, args.steps, args.seed, args.init)


if __name__ == "__main__":
    run_main(main)
