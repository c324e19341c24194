"""Stage 0 of the demo: the tiny base model, as the paper starts from Qwen2.5-VL-7B.

    python data_prep.py tiny_base --out tiny_base
    torchrun --standalone --nproc_per_node=2 data_prep.py tiny_base     three quarters of an hour on two cores

Nobody has to run this: the folder demo/tiny_base/ holds the checkpoint that it made. It is a Qwen2.5-VL by
transformers' own classes, with 1.1 M parameters and a tokenizer of its own.

What it learns are skills that the demo's stages build on, as dialogues over frames of synthetic scenes:

    repeat    say a text again
    letter    find an option's letter
    caption   name the background and the figure of each frame
    scenes    name the scenes of an overview, and the figures in it
    where     find one or two scenes in an overview, their tags and their seconds
    whole     tell which scene of an overview comes first, last or after another
    clip      write down what flashes in a clip, and answer a question on it
    visit     all of it: the question, an overview, where to look; then a clip, what flashes in it, the answer;
              or the answer at once, where the overview shows it
    direct    the answer from an overview whose frames have no tags

Questions and thoughts are worded as in synthetic.py. It never sees a call of the tool, nor the system prompt
that asks for one: that is left to the later stages.

The loss is that of stage 1, but all weights are trained, the vision encoder's too, the layers' matrices by
Muon: on short single skills first (CURRICULUM), then with thoughts and answers in their tags, then amid
random text. So small a model needs help to find anything by what stands beside it: see
`prepare_for_look_ups`.
"""

import math
import os
import random
import tempfile
from collections import defaultdict, deque
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common import start_processes, sum_over_processes
from demo.synthetic import (COLOURS, NUM_SLOTS, SHAPES, SIDE, TINY_ENV, TINY_PROMPT, VIDEO_FPS, Draft, Figure,
                            Overview, Picture, Visit, ask_colour, ask_count, ask_order, ask_scene, ask_shape,
                            between_cards, choose, chosen, draw_figure, draw_options, frame_tag, paint,
                            transcript, write_video)
from model import Policy, encode, frame_features, token_log_probs
from protocols.direct import ASKS
from training.checkpoints import save_policy
from training.weights import MasterWeights
from video import Frame, read_frames
from zoom_env import LAST_TURN, MAY_ZOOM, Message

TINY_BASE = os.path.relpath(Path(__file__).with_name("tiny_base"))  # the shipped checkpoint
BASE_STEPS = 4000  # optimizer steps of the curriculum
BASE_PROMPT = "You are a helpful assistant."


class Stage(NamedTuple):
    """A part of the curriculum. It ends once each of its skills is answered right, to the last token, with
    probability `enough`, or after `most_steps`."""

    skills: dict  # {(skill, level): share of the lessons}
    batch_tokens: int  # of a step's lessons, over all processes
    enough: float = math.inf
    most_steps: float = math.inf


# One skill after the other, in short lessons: what frames show is learned in 200 steps where nothing else is
# asked for, and in 2,000 amid other skills; to find a text by what stands beside it is alike. Then the demo's
# overviews and clips, and last those of any size with anything in them.
LAST_STAGE = Stage({("repeat", 0): 1, ("letter", 0): 1, ("clip", 2): 1, ("clip", 3): 3, ("where", 2): 1,
                    ("where", 3): 3, ("visit", 2): 2, ("visit", 3): 6, ("whole", 2): 1, ("whole", 3): 2,
                    ("direct", 3): 3}, 6144)
CURRICULUM = [
    Stage({("caption", 0): 1}, 3072, 0.9, 400),
    Stage({("clip", 0): 1, ("clip", 1): 2}, 3072, 0.4, 300),
    Stage({("repeat", 0): 1}, 3072, 0.4, 200),
    Stage({("repeat", 0): 1, ("letter", 0): 1, ("clip", 1): 1}, 3072, 0.6, 300),
    Stage({("clip", 1): 2, ("repeat", 0): 1, ("letter", 0): 1, ("scenes", 1): 2, ("where", 0): 2},
          3072, 0.6, 300),
    Stage({("repeat", 0): 1, ("letter", 0): 2, ("clip", 2): 3, ("where", 2): 3, ("visit", 2): 6,
           ("whole", 2): 3, ("direct", 2): 1}, 6144, 0.6, 600),
    LAST_STAGE,
]

# Qwen2.5's rule to split text before BPE, its special tokens, and its chat template for text and images.
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
                "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
                "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""


# -------------------------------------------------------------------------------------- tokenizer and weights
def make_tokenizer(texts, vocab_size=640):
    """A byte-level BPE tokenizer with Qwen's splitting rule, special tokens and chat template, trained on
    `texts`, strings. It has a token for each byte, so it can encode any text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=QWEN_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=QWEN_SPECIAL, chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False)


def make_tiny_model(tokenizer):
    """A randomly initialised Qwen2.5-VL of 1.1 M parameters as a Policy."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("image_pad", "video_pad", "vision_start", "vision_end", "im_end", "endoftext")}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.09,
            max_position_embeddings=4096, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            bos_token_id=ids["endoftext"], eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"]),
        vision_config=dict(
            depth=2, hidden_size=64, initializer_range=0.09, intermediate_size=128, num_heads=2,
            out_hidden_size=128, window_size=112, fullatt_block_indexes=[1], tokens_per_second=2),
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True)
    hf = Qwen2_5_VLForConditionalGeneration(config)
    prepare_for_look_ups(hf.model.language_model)
    size = {"shortest_edge": TINY_ENV.min_pixels, "longest_edge": TINY_ENV.max_pixels}
    return Policy(hf, tokenizer, Qwen2VLImageProcessor(size=size), TINY_ENV)


@torch.no_grad()
def prepare_for_look_ups(language_model, strength=6.0):
    """Initial weights from which finding something by what stands beside it (induction, arXiv 2209.11895) is
    learned in a hundred steps instead of a thousand.

    The first layer's heads 0 .. 3 attend 1, 2, 3 and 4 tokens back, so that a token knows those before it.
    Under RoPE the score of a constant query and key is sum_f c_f^2 cos(theta_f * (distance - shift)), a peak
    at `shift`; so the biases of the query and key projections are enough. strength: c_f."""
    # large embeddings and small outputs of layers: deeper ones still see which token stands where
    language_model.embed_tokens.weight.mul_(3)
    for layer in language_model.layers:
        layer.self_attn.o_proj.weight.mul_(0.25)
        layer.mlp.down_proj.weight.mul_(0.25)
    # the first layer: queries and keys that hardly depend on the token, and that RoPE turns into a shift
    attention, config = language_model.layers[0].self_attn, language_model.config
    half = attention.head_dim // 2
    theta = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    # the fastest frequencies make the narrowest peak
    size = torch.where(torch.arange(half) < 6, strength, 0.0)
    attention.q_proj.weight.mul_(0.1)
    attention.k_proj.weight.mul_(0.1)
    attention.k_proj.bias.view(-1, 2, half)[:, 0] = size
    for head, bias in enumerate(attention.q_proj.bias.view(-1, 2, half)):
        shift = -(head + 1) * theta
        bias[0], bias[1] = size * shift.cos(), size * shift.sin()


# ---------------------------------------------------------------------------------------------------- lessons
def make_frame_bank():
    """{Picture: frames}, (3, 28, 28) uint8 each: what every scene looks like after H.264, 24 frames without a
    figure, 12 of an empty card and 3 of each figure, on a card and without, which lie at various offsets and
    are kept under none."""
    rng, pictures = random.Random(0), []
    for background in ["grey", *COLOURS]:
        kinds = [Picture(background)] * 8 + [Picture(background, cue=True)] * 4
        for colour, shape in product(COLOURS, SHAPES):
            if background not in ("grey", colour):
                kinds += [Picture(background, Figure(colour, shape), card=card) for card in (True, False)]
        for kind in kinds:
            for _ in range(3):
                pictures.append(kind._replace(offset=(rng.randint(-2, 2), rng.randint(-2, 2))))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bank.mp4")
        write_video(path, map(paint, pictures))
        times_s = tuple(k / VIDEO_FPS for k in range(len(pictures)))
        frames = read_frames(path, times_s, TINY_ENV.min_pixels, TINY_ENV.max_pixels, SIDE)
    bank = defaultdict(list)
    for picture, frame in zip(pictures, frames, strict=True):
        bank[picture._replace(offset=(0, 0))].append(frame.image)
    return bank


class Exchange(NamedTuple):
    """What is shown and what is said then."""

    user: list  # str and Frame items, as in a Message
    said: str  # by the assistant


class Clip:
    """Frames of one scene, and of its neighbours: what they show, as `transcript` says it; cards: the numbers
    of those with an empty card of the scene; said: what to say of it where it does not answer."""

    numbered = True

    def __init__(self, pictures, times_s, clause, flashes, scene):
        self.pictures, self.times_s, self.clause, self.flashes = pictures, times_s, clause, flashes
        self.cards = [i for i, picture in enumerate(pictures) if picture.cue and picture.background == scene]
        self.said = clause
        if self.cards and not flashes:
            place, start_s, end_s = between_cards(scene, self.cards[0], times_s)
            self.said = f"{clause}; {place}; from [{start_s:.2f}, {end_s:.2f}]"


class Lessons:
    """Draws pretraining dialogues, each of one skill (see the module's docstring).

    bank: as make_frame_bank returns it. What it draws depends on the seed and, for the noise in pictures, on
    torch's own random generator."""

    def __init__(self, bank, seed):
        self.bank, self.rng = bank, random.Random(seed)
        self.anything = True  # whether overviews and clips have any size and show anything: see `lesson`
        self.in_tags = False  # whether thoughts and answers stand in their tags
        self.amid_text = False  # whether random text stands around the lesson

    def dialogue(self, policy, kind, level):
        """A lesson as a Dialogue, with the assistant's tokens trained."""
        messages = [Message("system", [self.random_text(policy, 70) or BASE_PROMPT])]
        for user, said in self.lesson(kind, level):
            if self.in_tags and "\nso " in said:  # the last turn, which ends with an option's letter
                said = f"<think>{said}</think><answer> {said[-1]}</answer>"
            if len(messages) > 1 and (before := self.random_text(policy, 10)):
                user = [before + "\n", *user]
            if after := self.random_text(policy, 25):
                user = [*user, "\n" + after]
            messages += [Message("user", user), Message("assistant", [said])]
        return encode(policy, messages)

    def lesson(self, kind, level):
        """One lesson, a list of Exchange. kind: the skill; level: 0 short, 1 any length, 2 as long as
        in the demo, 3 with overviews of any size, and anything that there is in overviews and clips."""
        rng = self.rng
        self.anything = level == 3
        level = min(level, 2)
        num_slots = (4, rng.randint(4, NUM_SLOTS), NUM_SLOTS)[level]
        num_frames = (4, rng.randint(3, 8), rng.choice([5, 6, 6, 7, 7, 10, 12, 13, 14, 15]))[level]  # of a clip
        return getattr(self, f"{kind}_lesson")(num_slots, num_frames)

    # The skills, in the order of the module's docstring.
    def repeat_lesson(self, num_slots, num_frames):
        words = self.rng.choices(COLOURS + SHAPES + list("ABCD1234"), k=self.rng.randint(8, 24))
        text = " ".join(words)
        return [Exchange([f"Repeat: {text}."], f"It is {text}.")]

    def letter_lesson(self, num_slots, num_frames):
        rng = self.rng
        # options as questions have them
        if rng.random() < 0.5:
            texts = [f"{a} then {b}" for a, b in product(rng.sample(COLOURS, 2), repeat=2)]
        else:
            texts = rng.sample(rng.choice([COLOURS, SHAPES, ["1", "2", "3", "4"]]), 4)
        options = draw_options(rng, Draft("", texts[0], texts[1:]))
        # all of them are asked for, one after another; the list of options is said once
        asked = rng.sample(texts, 4)
        said = [choose(options, asked[0])[1:], *(chosen(options, text) for text in asked[1:])]
        return [Exchange([f"Which option is: {'; '.join(asked)}?" + option_lines(options)], "\n".join(said))]

    def caption_lesson(self, num_slots, num_frames):
        rng = self.rng
        # figures without a card are hard to see: beside them no shape is learned
        kinds = [picture for picture in self.bank if picture.card]
        pictures = rng.choices(kinds, k=num_frames)
        times_s = [round((i + rng.random()) * 80) / 8 for i in range(num_frames)]
        shown, captions = Overview(pictures, times_s, times_s[-1]), []
        for picture in pictures:
            figure = " ".join(picture.figure) if picture.figure else "card" if picture.cue else "-"
            captions.append(f"{picture.background} {figure}.")
        return [Exchange(["Describe each frame.\n", *self.show(shown)], " ".join(captions))]

    def scenes_lesson(self, num_slots, num_frames):
        overview = self.draw_overview(num_slots)
        return [Exchange(["Name the scene of each frame.\n", *self.show(overview)], overview.survey())]

    def where_lesson(self, num_slots, num_frames):
        overview = self.draw_overview(num_slots)
        named = self.draw_named(overview)
        order_clauses, visits = overview.order_visits(named)
        clauses = [overview.survey(), *order_clauses]
        for visit in visits:
            clauses += self.locate(overview, visit)
        scenes = " and ".join(f"the {scene} scene" for scene in named)
        return [Exchange(self.opening(f"Where is {scenes}?", overview), "; ".join(clauses))]

    def whole_lesson(self, num_slots, num_frames):
        overview = self.draw_overview(num_slots)
        question, said = self.answer_whole(overview)
        return [Exchange(self.opening(question, overview), said)]

    def answer_whole(self, overview):
        """(a holistic question, the thoughts that answer it)."""
        scenes = [scene for scene in overview.scenes if scene != "grey"]
        first, last, after = ask_scene(scenes, self.rng.randrange(len(scenes) - 1), COLOURS)
        draft = self.rng.choice([first, last, after, after])
        question, choice = self.pose(draft)
        clause, _ = overview.answer_whole(draft.text)
        return question, f"{overview.survey()}; {clause}{choice}"

    def direct_lesson(self, num_slots, num_frames):
        overview = self.draw_overview(num_slots, numbered=False)
        shown = [scene for scene in overview.scenes if overview.figures_in(scene)]
        if not shown or self.rng.random() < 0.4:
            question, said = self.answer_whole(overview)
        else:
            named = self.rng.sample(shown, min(len(shown), self.rng.randint(1, 2)))
            question, said = self.answer_shown(overview, named)
        return [Exchange([*self.show(overview), question], said)]

    def answer_shown(self, overview, named):
        """(a question on figures that the overview shows, the thoughts that answer it)."""
        clauses, visits = overview.order_visits(named)
        shown = [overview.figures_in(visit.scene) for visit in visits]
        clauses = [overview.survey(), *clauses]
        clauses += [f"{visit.ordinal} {clause}" for visit, (clause, _) in zip(visits, shown)]
        figures = [figures for _, figures in shown]
        if len(named) == 2:
            draft = ask_order(self.rng, named, *(first.colour for first, *_ in figures), self.draw_on())
            clauses.append(draft.right)
        else:  # how many there are an overview cannot tell, but nobody looks closer without a tool
            draft = self.draw_draft(named[0], figures[0], count=not overview.numbered and len(figures[0]) <= 4)
        question, choice = self.pose(draft)
        return question, "; ".join(clauses) + choice

    def clip_lesson(self, num_slots, num_frames):
        rng = self.rng
        scene = rng.choice(COLOURS)
        clip = self.draw_clip(scene, rng.uniform(0, 600), rng.choice([0, 1, 1, 1, 2, 3, 4]), num_frames)
        if not clip.flashes or rng.random() < 0.3:
            return [Exchange([f"What flashes in the {scene} scene?\n", *clip.items], clip.said)]
        question, choice = self.pose(self.draw_draft(scene, clip.flashes))
        return [Exchange([question + "\n", *clip.items], clip.clause + choice)]

    def visit_lesson(self, num_slots, num_frames):
        rng = self.rng
        overview = self.draw_overview(num_slots)
        named = self.draw_named(overview)
        if all(overview.figures_in(scene) for scene in named):
            question, said = self.answer_shown(overview, named)
            return [Exchange(self.opening(question, overview), said)]
        order_clauses, visits = overview.order_visits(named)

        def draw_clip(scene, num_flashes, **how):
            start_s = overview.times_s[overview.scenes.get(scene, 0)]
            return self.draw_clip(scene, start_s, num_flashes, num_frames, **how)

        # a clip of each scene, and the question on them
        if len(named) == 1:
            clips = [draw_clip(named[0], rng.choice([1, 1, 1, 2, 3, 4]))]
            draft = self.draw_draft(named[0], clips[0].flashes)
        else:
            clips = [draw_clip(visit.scene, 1) for visit in visits]
            draft = ask_order(rng, named, *(clip.flashes[0].colour for clip in clips), self.draw_on())
        question, choice = self.pose(draft)
        # a turn says what the frames before it show, and where to look next
        exchanges, user, clauses = [], self.opening(question, overview), [overview.survey(), *order_clauses]
        for visit, clip in zip(visits, clips):
            there = self.locate(overview, visit)
            exchanges.append(Exchange(user, "; ".join(clauses + there)))
            how = rng.random()
            if how < 0.35:  # a clip that shows nothing comes first, or empty cards: look again, or between them
                first = draw_clip(visit.scene, 0, cards=self.anything and how < 0.2)
                again = [first.said]
                if not first.cards:
                    again = [first.clause, "not found", *self.locate(overview, visit)]
                exchanges.append(Exchange(first.items, "; ".join(again)))
            user, clauses = clip.items, [clip.clause]
        # the last one answers
        if len(named) == 2:
            clauses.append(draft.right)
        return [*exchanges, Exchange(user, "; ".join(clauses) + choice)]

    # What lessons are made of.
    def show(self, shown):
        """Message items: tagged frames as the environment writes them, one of the bank for each Picture of
        an Overview or a Clip; of an Overview that is not numbered without tags."""
        items = []
        for i, (picture, time_s) in enumerate(zip(shown.pictures, shown.times_s)):
            tag = frame_tag(i, time_s) if shown.numbered else ""
            items += ["\n" + tag if i and tag else tag, Frame(time_s, self.draw_frame(picture))]
        return items

    def opening(self, question, overview):
        """A user's items: the question, and the frames, as the environment has them."""
        number = len(overview.times_s)
        head = f"\nThe video lasts {overview.duration_s:.2f} seconds. {number} frames of it:\n"
        return [question + head, *self.show(overview)]

    def locate(self, overview, visit):
        """Where a scene's flashes are, in two clauses: as tags, in seconds."""
        clause, start_s, end_s = overview.place(visit, self.rng)
        return [clause, f"from [{start_s:.2f}, {end_s:.2f}]"]

    def draw_frame(self, picture):
        """(3, 28, 28) uint8: a frame of the bank, with noise in its colour and in each pixel."""
        noise = torch.randint(-5, 6, (3, 1, 1)) + torch.randint(-3, 4, (3, SIDE, SIDE))
        image = self.rng.choice(self.bank[picture]).int() + noise
        return image.clamp(0, 255).to(torch.uint8)

    def draw_overview(self, num_slots, numbered=True):
        """The Overview of a random video: with a frame for each scene, or, where there is anything, with any
        number, so that scenes are shown more than once, or not at all, and some frames show a figure."""
        rng = self.rng
        number, chance = num_slots, 0.0
        if self.anything:
            number = rng.choice([9, 9, 9, 9, 9, 5, 17, 33, rng.randint(4, 48)])
            chance = rng.choice([0.0, 0.15, 0.3])
        slot_s = rng.choice([rng.uniform(7, 25), rng.uniform(7, 70)])  # no digit of a time can be guessed
        duration_s = round(slot_s * num_slots * 8) / 8
        # a frame in the middle of each slice; a scene begins before the middle of its slot
        starts = [(i + rng.uniform(0.1, 0.48)) / num_slots for i in range(num_slots)]
        colours = [*rng.sample(COLOURS, num_slots - 1), "grey"]
        pictures, times_s = [], []
        for k in range(number):
            at = (k + 0.5) / number
            colour = colours[max(0, sum(start <= at for start in starts) - 1)]
            pictures.append(self.draw_picture(colour) if rng.random() < chance else Picture(colour))
            times_s.append(round(at * duration_s * 8) / 8)
        return Overview(pictures, times_s, duration_s, numbered)

    def draw_picture(self, scene):
        """Something in a scene: mostly a figure on a card; else an empty card, or a figure without one."""
        if scene == "grey":
            return Picture(scene)
        kind = self.rng.random()
        if kind < 0.15:
            return Picture(scene, cue=True)
        return Picture(scene, draw_figure(self.rng, scene), card=kind > 0.3)

    def draw_named(self, overview):
        """One or two of the coloured scenes, as a question names them; one alone may be not shown."""
        scenes = [scene for scene in overview.scenes if scene != "grey"]
        unseen = [colour for colour in COLOURS if colour not in scenes]
        if unseen and len(overview.pictures) < NUM_SLOTS and self.rng.random() < 0.1:
            return [self.rng.choice(unseen)]
        return self.rng.sample(scenes, self.rng.randint(1, 2))

    def draw_clip(self, scene, start_s, num_flashes, num_frames, cards=None):
        """A Clip that shows a scene and flashes in it, often with other scenes before or after, at any frame
        rate. cards: whether some of its frames are empty cards, by default at random."""
        rng = self.rng
        step_s = rng.uniform(0.5, 2.2)
        if self.anything:
            step_s = rng.choice([rng.uniform(0.125, 0.6), step_s, rng.uniform(2, 12)])
        # other scenes: some frames behind or in front, which may have figures of their own
        number = rng.choice([0, 1, 1, 2, 3, 4]) if num_frames > 5 else 0
        number = max(0, min(number, num_frames - num_flashes))
        others = []
        for _ in range(number):
            other = rng.choice(["grey", *(colour for colour in COLOURS if colour != scene)])
            shows = self.anything and rng.random() < 0.15
            others.append(self.draw_picture(other) if shows else Picture(other))
        in_front = rng.choice([0, 0, number // 2]) if self.anything else 0
        # the scene: flashes that are seen in one frame or in several, at random places
        length = num_frames - number
        frames = [Picture(scene)] * length
        starts = sorted(rng.sample(range(length), min(num_flashes, length)))
        before = scene
        for start, following in zip(starts, [*starts[1:], length]):
            figure = draw_figure(rng, scene, before)
            before = figure.colour
            seen = rng.choice([1, 1, 1, 1, 2, 2, 3, 4, 8]) if self.anything else rng.choice([1, 1, 2])
            seen = min(seen, following - start)
            frames[start:start + seen] = [Picture(scene, figure)] * seen
        # empty cards around the flashes or alone, and figures without a card
        empty = [i for i, picture in enumerate(frames) if not picture.figure]
        if cards is None:
            cards = self.anything and rng.random() < 0.3
        if cards and empty:
            first = starts[0] if starts else rng.choice(empty)
            last = starts[-1] if starts else first + rng.choice([0, 1, 1, 1, 1, 2])
            around = rng.choice([0, 1, num_frames]) if starts else 0
            for i in empty:
                if first - around <= i <= last + around:
                    frames[i] = Picture(scene, cue=True)
        for i in empty:
            if self.anything and not frames[i].cue and rng.random() < 0.05:
                frames[i] = Picture(scene, draw_figure(rng, scene), card=False)
        pictures = others[:in_front] + frames + others[in_front:]
        times_s = [round((start_s + (i + 0.5) * step_s) * 8) / 8 for i in range(num_frames)]
        clip = Clip(pictures, times_s, *transcript(scene, pictures), scene)
        clip.items = self.show(clip)
        return clip

    def draw_on(self):
        """Where a question says that the shapes are."""
        return self.rng.choice(["", " on the card"])

    def draw_draft(self, scene, flashes, count=True):
        """A Draft on one clip. flashes: its figures; count: whether it may ask how many."""
        (colour, shape), on = flashes[0], self.draw_on()
        drafts = [ask_colour(scene, colour, on), ask_shape(scene, shape, on)]
        return self.rng.choice([ask_count(scene, len(flashes), on), *drafts] if count else drafts)

    def pose(self, draft):
        """(the question with its options, the thoughts that choose the right one)."""
        options = draw_options(self.rng, draft)
        return draft.text + option_lines(options), choose(options, draft.right)

    def random_text(self, policy, most):
        """Up to `most` random tokens as text, sometimes none; "" if lessons do not stand amid text. A model
        that never saw a word is thrown off by it, and a prompt has words that no lesson has."""
        if not self.amid_text or self.rng.random() < 0.2:
            return ""
        ids = self.rng.choices(range(len(policy.tokenizer)), k=self.rng.randint(1, most))
        text = policy.tokenizer.decode(ids, skip_special_tokens=True)
        return "".join(c for c in text if c.isascii() and (c.isprintable() or c == "\n"))


def option_lines(options):
    """The options as the environment has them."""
    return "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options))


# ------------------------------------------------------------------------------------------------ pretraining
def tiny_base(out, steps, seed):
    """Pretrains the tiny base and writes its checkpoint folder `out`, in bfloat16. Runs on any number of
    processes.

    `steps` steps of the curriculum; then a tenth as many in which thoughts and answers stand in their tags;
    then a fifth as many in which random text stands around the lesson, too."""
    rank, _, _ = start_processes("cpu")
    torch.manual_seed(seed)
    lessons = Lessons(make_frame_bank(), seed)
    policy = make_tiny_model(make_tokenizer(tokenizer_texts(lessons)))
    pretrain(policy, lessons, CURRICULUM, steps, 1.0, seed)
    lessons.in_tags = True
    pretrain(policy, lessons, [LAST_STAGE], steps // 10, 0.7, seed + 1)
    lessons.amid_text = True
    pretrain(policy, lessons, [LAST_STAGE], steps // 5, 0.7, seed + 2)
    if rank == 0:
        policy.to(torch.bfloat16)
        save_policy(policy, out)


def tokenizer_texts(lessons):
    """What the tokenizer is trained on: texts of lessons, and words of the environment, so that prompts are
    not spelled out in bytes."""
    skills = ("clip", "letter", "where", "visit", "whole", "direct")
    texts = []
    for i in range(2000):
        for user, said in lessons.lesson(skills[i % len(skills)], 3):
            texts += [item for item in user if isinstance(item, str)] + [said]
    protocol = [TINY_PROMPT, LAST_TURN, MAY_ZOOM, BASE_PROMPT, "<tool_response>\n</tool_response>\n",
                "system\nuser\nassistant\n",
                ASKS["multiple_choice"],
                "The video lasts 1 seconds. frames of it:\n; not found; so; One shape flashes in the and one"]
    return texts + protocol * 300


def pretrain(policy, lessons, curriculum, steps, scale, seed):
    """Trains all weights of a policy on lessons, in place.

    The learning rates rise for 50 steps, are `scale` of those of `make_optimizers` until half of the steps,
    and then fall to almost 0. curriculum: a list of Stage, the last of which goes on to the end."""
    rank, world, device = start_processes("cpu")
    weights = MasterWeights(policy)
    optimizers = make_optimizers(policy, weights)
    peaks = [group["lr"] for group in optimizers.param_groups]
    lessons.rng.seed(f"{seed} {rank}")
    torch.manual_seed(seed * 1000 + rank)
    number, began = 0, 0  # of the stage, and the step at which it began
    exact = defaultdict(lambda: deque(maxlen=100))  # by skill: probabilities of whole answers
    for step in tqdm(range(steps), desc="pretraining", unit="step", dynamic_ncols=True, disable=rank > 0):
        for group, peak in zip(optimizers.param_groups, peaks):
            group["lr"] = peak * scale * min(1, (step + 1) / 50, 0.02 + 2 * (1 - step / steps))
        stage = curriculum[number]
        # lessons
        dialogues, skills, tokens = [], [], 0
        while tokens < stage.batch_tokens / world:
            skills += lessons.rng.choices(list(stage.skills), list(stage.skills.values()))
            dialogues.append(lessons.dialogue(policy, *skills[-1]))
            tokens += len(dialogues[-1].ids)
        # the mean over all trained tokens of all processes
        log_probs = lesson_log_probs(policy, dialogues)
        total = sum_over_processes({"tokens": len(log_probs)}, device)["tokens"]
        (-log_probs.sum() / total).backward()
        weights.step(optimizers, 1.0)
        # how well each skill is answered, and whether the next stage begins
        for skill, probability in zip(skills, answer_probabilities(log_probs, dialogues)):
            exact[skill].append(probability)
        if step % 25 == 24:
            own = {skill: np.mean(exact[skill]) / world if exact[skill] else 0 for skill in stage.skills}
            right = sum_over_processes(own, device)
            if rank == 0:
                shown = ", ".join(f"{kind} {level}: {p:.2f}" for (kind, level), p in right.items())
                tqdm.write(f"step {step + 1}, stage {number}, loss {-log_probs.mean().item():.3f}, "
                           f"probability of the whole answer: {shown}")
            if min(right.values()) >= stage.enough or step + 1 - began >= stage.most_steps:
                number, began = number + 1, step + 1


class Optimizers:
    """Several optimizers as one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


def make_optimizers(policy, weights):
    """Muon (https://kellerjordan.github.io/posts/muon) for the layers' matrices, with AdamW for the rest: so
    clips are read after half as many steps as by AdamW alone."""
    vocabulary = len(policy.language_model.embed_tokens.weight)
    matrices = [p for p in weights.parameters if p.ndim == 2 and len(p) != vocabulary]
    others = [p for p in weights.parameters if p.ndim != 2 or len(p) == vocabulary]
    muon = torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.0, adjust_lr_fn="original")
    adamw = torch.optim.AdamW(others, lr=6e-4, betas=(0.9, 0.98), weight_decay=0.01)
    return Optimizers(muon, adamw)


def lesson_log_probs(policy, dialogues):
    """(N,) log-probabilities of the dialogues' trained tokens, one dialogue after another. Gradients reach
    the vision encoder, which the later stages freeze."""
    features = iter(frame_features(policy, [f for d in dialogues for f in d.frames]))
    for d in dialogues:
        d.features = [next(features) for _ in d.frames]
    log_probs, _ = token_log_probs(policy, [[d] for d in dialogues])
    return log_probs


def answer_probabilities(log_probs, dialogues):
    """Of each dialogue, the probability of all that its assistant says. log_probs: of `lesson_log_probs`."""
    parts = log_probs.detach().split([sum(d.trained) for d in dialogues])
    return [part.sum().exp().item() for part in parts]
