"""Stage 0 of the demo: the tiny base model, as the paper starts from Qwen2.5-VL-7B.

    python data_prep.py tiny_base --out tiny_base
    torchrun --standalone --nproc_per_node=2 data_prep.py tiny_base     three quarters of an hour on two cores

Nobody has to run this: the folder demo/tiny_base/ holds the checkpoint that it made. It is a Qwen2.5-VL by
transformers' own classes, with 1.1 M parameters and a tokenizer of its own.

What it learns are skills that the demo's stages build on, as dialogues over frames of synthetic scenes:

    repeat    say a text again
    letter    find an option's letter
    caption   name the background and the figure of each frame
    scenes    name the scenes of an overview
    where     find one or two scenes in an overview, their tags and their seconds
    whole     tell which scene of an overview comes first, last or after another
    clip      write down what flashes in a clip, and answer a question on it
    visit     all of it: the question, an overview, where to look; then a clip, what flashes in it, the answer

Questions and thoughts are worded as in synthetic.py. It never sees a call of the tool, nor the system prompt
that asks for one: that is left to the later stages.

The loss is that of stage 1, but all weights are trained, the vision encoder's too: on short single skills
first (CURRICULUM), then with thoughts and answers in their tags, then amid random text. So small a model
needs help to find anything by what stands beside it: see `prepare_for_look_ups`.
"""

import os
import random
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import start_processes, sum_over_processes
from demo.synthetic import (
    COLOURS,
    NUM_SLOTS,
    SHAPES,
    SIDE,
    TINY_ENV,
    TINY_PROMPT,
    VIDEO_FPS,
    ask_colour,
    ask_count,
    ask_order,
    ask_scene,
    ask_shape,
    choose,
    draw,
    neighbours,
    order_visits,
    place,
    survey,
    transcript,
    write_video,
)
from model import Policy, encode, frame_features, token_log_probs
from training.checkpoints import load_policy, save_policy
from training.weights import MasterWeights
from video import Frame, Video
from zoom_env import LAST_TURN, MAY_ZOOM, Message

TINY_BASE = os.path.relpath(Path(__file__).with_name("tiny_base"))  # the shipped checkpoint
BASE_STEPS = 3000  # optimizer steps of the curriculum
BASE_PROMPT = "You are a helpful assistant."

# Short and single skills first: a look-up by content in a long dialogue is not found from scratch.
# A stage: ({(skill, level): share of the dialogues}, enough, most_steps). The next one begins when each skill
# of this one is answered right, to the last token, with probability `enough`, or after `most_steps`.
CURRICULUM = [
    ({("repeat", 0): 1, ("caption", 0): 2}, 0.4, 300),
    ({("repeat", 0): 1, ("letter", 0): 1, ("scenes", 1): 2, ("clip", 0): 1, ("where", 0): 2}, 0.6, 250),
    ({("repeat", 0): 1, ("letter", 0): 2, ("clip", 2): 3, ("where", 2): 3, ("visit", 2): 6, ("whole", 2): 3},
     None, None),  # to the end
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
def make_frame_bank(folder):
    """{(background, figure or None): frames}, (3, 28, 28) uint8 each: what every scene looks like after
    H.264, 24 frames without a figure and 3 of each figure. folder: for a video that is deleted again."""
    # all frames in one video
    rng, keys = random.Random(0), []
    for background in ["grey", *COLOURS]:
        figures = [None] * 8
        if background != "grey":
            figures += [(colour, shape) for colour in COLOURS for shape in SHAPES if colour != background]
        keys += [(background, figure) for figure in figures for _ in range(3)]
    path = Path(folder) / "bank.mp4"
    write_video(path, [draw(*key, (rng.randint(-2, 2), rng.randint(-2, 2))) for key in keys])
    # decoded
    video, bank = Video(path), {}
    shown = video.frames_at([k / VIDEO_FPS for k in range(len(keys))])
    for key, (_, image) in zip(keys, shown, strict=True):
        bank.setdefault(key, []).append(torch.from_numpy(image).permute(2, 0, 1).contiguous())
    video.close()
    path.unlink()
    return bank


@dataclass
class Overview:
    """A random video as one frame a slot."""

    colours: list  # of the scenes, by name, in order of time; the last is grey
    times: list  # of the frames, in seconds
    tags: list  # of the frames
    items: list  # tags and Frames, as in a Message

    def head(self):
        """The line before the frames, as the environment has it."""
        duration_s = self.times[-1] + self.times[0]
        return f"\nThe video lasts {duration_s:.2f} seconds. {len(self.times)} frames of it:\n"


class Lessons:
    """Draws pretraining dialogues, each of one skill (see the module's docstring).

    bank: as make_frame_bank returns it. What it draws depends on the seed and, for the noise in pictures, on
    torch's own random generator."""

    def __init__(self, bank, seed):
        self.bank, self.rng = bank, random.Random(seed)
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
        """One lesson, [(user's items, assistant's text), ...]. kind: the skill; level: 0 short, 1 any length,
        2 as long as in the demo."""
        rng = self.rng
        num_slots = (4, rng.randint(4, NUM_SLOTS), NUM_SLOTS)[level]
        num_frames = (4, rng.randint(3, 8), rng.choice([5, 6, 6, 7, 7, 10, 13, 14, 15]))[level]  # of a clip
        if kind == "repeat":
            return self.repeat()
        if kind == "letter":
            return self.letter()
        if kind == "caption":
            return self.caption(num_frames)
        if kind == "clip":
            return self.clip(num_frames)
        overview = self.draw_overview(num_slots)
        if kind == "scenes":
            return [(["Name the scene of each frame.\n", *overview.items], survey(overview.colours))]
        if kind == "whole":
            return self.whole(overview)
        named = rng.sample(overview.colours[:-1], rng.randint(1, 2))
        if kind == "where":
            return self.where(overview, named)
        return self.visit(overview, named, num_frames)

    # The skills, in the order of the module's docstring.
    def repeat(self):
        words = self.rng.choices(COLOURS + SHAPES + list("ABCD1234"), k=self.rng.randint(8, 24))
        text = " ".join(words)
        return [([f"Repeat: {text}."], f"It is {text}.")]

    def letter(self):
        rng = self.rng
        # options as questions have them
        if rng.random() < 0.5:
            a, b, c, d = rng.sample(COLOURS, 4)
            texts = [f"{a} then {b}", f"{b} then {a}", f"{a} then {c}", f"{d} then {b}"]
        else:
            texts = rng.sample(rng.choice([COLOURS, SHAPES, ["1", "2", "3", "4"]]), 4)
        lines, options = self.draw_options(texts[0], texts[1:])
        # all of them are asked for, one after another; the list of options is said once
        asked = rng.sample(texts, 4)
        said = choose(options, asked[0])
        said += "".join("\nso" + choose(options, text).partition("\nso")[2] for text in asked[1:])
        return [(["Which option is: " + "; ".join(asked) + "?" + lines], said[1:])]

    def caption(self, num_frames):
        rng = self.rng
        keys = [rng.choice(list(self.bank)) for _ in range(num_frames)]
        times = [round((i + rng.random()) * 80) / 8 for i in range(num_frames)]
        said = " ".join(f"{scene} {' '.join(figure) if figure else '-'}." for scene, figure in keys)
        return [(["Describe each frame.\n", *self.show(keys, times)], said)]

    def where(self, overview, named):
        clauses, visits = order_visits(overview.colours, named)
        clauses = [survey(overview.colours), *clauses]
        for scene, ordinal in visits:
            clauses += place(overview.colours, scene, overview.tags, ordinal)
        scenes = " and ".join(f"the {scene} scene" for scene in named)
        return [([f"Where is {scenes}?{overview.head()}", *overview.items], "; ".join(clauses))]

    def whole(self, overview):
        colours = overview.colours
        first, last, after = ask_scene(colours[:-1], self.rng.randrange(len(colours) - 2))
        question, right = self.rng.choice([first, last, after, after])
        lines, options = self.draw_options(right, [c for c in COLOURS if c != right and c not in question])
        said = f"{survey(colours)}; {neighbours(colours, right, question)}" + choose(options, right)
        return [([question + lines + overview.head(), *overview.items], said)]

    def clip(self, num_frames):
        rng = self.rng
        scene = rng.choice(COLOURS)
        start_s, num_flashes = rng.uniform(0, 180), rng.choice([0, 1, 1, 1, 2, 3, 4])
        figures, items = self.draw_clip(scene, start_s, num_flashes, num_frames)
        clause, flashes = transcript(scene, figures)
        if not flashes or rng.random() < 0.3:
            return [([f"What flashes in the {scene} scene?\n", *items], clause)]
        question, right, wrong = self.draw_question(scene, flashes)
        lines, options = self.draw_options(right, wrong)
        return [([f"{question}{lines}\n", *items], clause + choose(options, right))]

    def visit(self, overview, named, num_frames):
        rng, colours = self.rng, overview.colours
        order_clauses, visits = order_visits(colours, named)
        # a clip of each scene; of two scenes each has one flash
        clips = []
        for scene, _ in visits:
            num_flashes = rng.choice([1, 1, 1, 2, 3, 4]) if len(named) == 1 else 1
            clips.append(self.draw_clip(scene, overview.times[colours.index(scene)], num_flashes, num_frames))
        transcripts = [transcript(scene, figures) for (scene, _), (figures, _) in zip(visits, clips)]
        # the question on them
        if len(named) == 1:
            question, right, wrong = self.draw_question(named[0], transcripts[0][1])
        else:
            question, right, wrong = ask_order(rng, named, *(flashes[0][0] for _, flashes in transcripts))
        lines, options = self.draw_options(right, wrong)
        # a turn says what the frames before it show, and where to look next
        dialogue, user = [], [question + lines + overview.head(), *overview.items]
        clauses = [survey(colours), *order_clauses]
        for (scene, ordinal), (_, clip), (clause, _) in zip(visits, clips, transcripts):
            there = place(colours, scene, overview.tags, ordinal)
            dialogue.append((user, "; ".join(clauses + there)))
            if rng.random() < 0.2:  # a clip that shows nothing comes first: look again
                no_figures, empty = self.draw_clip(scene, overview.times[colours.index(scene)], 0, num_frames)
                dialogue.append((empty, "; ".join([transcript(scene, no_figures)[0], "not found", *there])))
            user, clauses = clip, [clause]
        # the last one answers
        if len(named) == 2:
            clauses.append(right)
        return [*dialogue, (user, "; ".join(clauses) + choose(options, right))]

    # What lessons are made of.
    def show(self, keys, times):
        """Message items: tagged frames as the environment writes them. keys: of the bank; times: seconds."""
        items = []
        for i, (key, time_s) in enumerate(zip(keys, times)):
            items += ["\n" * (i > 0) + f"<frame{i}_time{time_s:.2f}s>", Frame(time_s, self.draw_picture(key))]
        return items

    def draw_picture(self, key):
        """(3, 28, 28) uint8: a frame of the bank, with noise in its colour and in each pixel."""
        noise = torch.randint(-5, 6, (3, 1, 1)) + torch.randint(-3, 4, (3, SIDE, SIDE))
        image = self.rng.choice(self.bank[key]).int() + noise
        return image.clamp(0, 255).to(torch.uint8)

    def draw_overview(self, num_slots):
        slot_s = self.rng.uniform(7, 25)  # far from the demo's: no digit of a time can be guessed
        colours = [*self.rng.sample(COLOURS, num_slots - 1), "grey"]
        times = [round((i + 0.5) * slot_s * 8) / 8 for i in range(num_slots)]
        tags = [f"<frame{i}_time{t:.2f}s>" for i, t in enumerate(times)]
        return Overview(colours, times, tags, self.show([(c, None) for c in colours], times))

    def draw_clip(self, background, start_s, num_flashes, num_frames):
        """Frames of one scene with flashes in it, often with the next scene's beginning: (for each frame its
        figure or None, message items)."""
        rng = self.rng
        after = rng.choice([0, 1, 1, 2, 3]) if num_frames > 5 else 0  # frames of the next scene
        length = num_frames - after
        # a flash is seen in one frame or in two
        figures, colour = [None] * num_frames, background
        starts = sorted(rng.sample(range(length), min(num_flashes, length)))
        for start in starts:
            colour = rng.choice([c for c in COLOURS if c not in (background, colour)])
            figures[start] = (colour, rng.choice(SHAPES))
            if rng.random() < 0.4 and start + 1 < length and start + 1 not in starts:
                figures[start + 1] = figures[start]
        # the frames, at any rate
        step_s = rng.uniform(0.5, 2.2)
        times = [round((start_s + (i + 0.5) * step_s) * 8) / 8 for i in range(num_frames)]
        next_scene = rng.choice(["grey", *(c for c in COLOURS if c != background)])
        keys = [(background, figure) for figure in figures[:length]] + [(next_scene, None)] * after
        return figures, self.show(keys, times)

    def draw_question(self, scene, flashes):
        """A question on one clip: (its text, the right option, wrong ones). flashes: as from `transcript`."""
        colour, shape = flashes[0]
        return self.rng.choice([
            ask_count(scene, len(flashes)), ask_colour(scene, colour), ask_shape(scene, shape)])

    def draw_options(self, right, wrong):
        """(the options' lines, the options in their order): the right one and three wrong ones."""
        options = self.rng.sample([right, *self.rng.sample(wrong, 3)], 4)
        return "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options)), options

    def random_text(self, policy, most):
        """Up to `most` random tokens as text, sometimes none; "" if lessons do not stand amid text. A model
        that never saw a word is thrown off by it, and a prompt has words that no lesson has."""
        if not self.amid_text or self.rng.random() < 0.2:
            return ""
        ids = self.rng.choices(range(len(policy.tokenizer)), k=self.rng.randint(1, most))
        text = policy.tokenizer.decode(ids, skip_special_tokens=True)
        return "".join(c for c in text if c.isascii() and (c.isprintable() or c == "\n"))


# ------------------------------------------------------------------------------------------------ pretraining
def tiny_base(out, steps, seed, init=None):
    """Pretrains the tiny base and writes its checkpoint folder `out`, in bfloat16. Runs on any number of
    processes.

    `steps` steps of the curriculum; then a tenth as many in which thoughts and answers stand in their tags;
    then a fifth as many in which random text stands around the lesson, too. init: a checkpoint folder to
    begin that last part from. Raises UserError if it cannot be loaded."""
    rank, _, _ = start_processes("cpu")
    torch.manual_seed(seed)
    folder = Path(out) / f"bank{rank}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    lessons = Lessons(make_frame_bank(folder), seed)
    folder.rmdir()
    if init is None:
        policy = make_tiny_model(make_tokenizer(tokenizer_texts(lessons)))
        if rank == 0:
            num_parameters = sum(p.numel() for p in policy.parameters())
            print(f"tiny base: {num_parameters:,} parameters, {len(policy.tokenizer)} tokens")
        pretrain(policy, lessons, CURRICULUM, steps, 1.5e-3, seed, out)
        lessons.in_tags = True
        pretrain(policy, lessons, CURRICULUM[-1:], steps // 10, 1e-3, seed + 1, out)
    else:
        policy = load_policy(init)
    lessons.in_tags = lessons.amid_text = True
    pretrain(policy, lessons, CURRICULUM[-1:], steps // 5, 1e-3, seed + 2, out)
    if rank == 0:
        policy.to(torch.bfloat16)
        save_policy(policy, out)


def tokenizer_texts(lessons):
    """What the tokenizer is trained on: texts of lessons, and words of the environment, so that prompts are
    not spelled out in bytes."""
    skills = ("clip", "letter", "where", "visit", "whole")
    texts = []
    for i in range(2000):
        for user, said in lessons.lesson(skills[i % 5], 2):
            texts += [item for item in user if isinstance(item, str)] + [said]
    protocol = [TINY_PROMPT, LAST_TURN, MAY_ZOOM, BASE_PROMPT, "<tool_response>\n</tool_response>\n",
                "system\nuser\nassistant\n",
                "The video lasts 1 seconds. frames of it:\n; not found; so; One shape flashes in the and one"]
    return texts + protocol * 300


def pretrain(policy, lessons, curriculum, steps, lr, seed, out, batch_tokens=6144):
    """Trains all weights of a policy on lessons, in place; saves to the folder `out` every 100 steps.

    AdamW; the learning rate rises for 50 steps, is `lr` until half of the steps, and then falls to almost 0.
    batch_tokens: of a step's dialogues over all processes; half as many before the last stage."""
    rank, world, device = start_processes("cpu")
    masters = MasterWeights(policy)
    optimizer = torch.optim.AdamW(masters.parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    lessons.rng.seed(f"{seed} {rank}")
    torch.manual_seed(seed * 1000 + rank)
    stage, began = 0, 0  # in the curriculum, and the step at which it began
    exact = defaultdict(lambda: deque(maxlen=100))  # by skill: probabilities of whole answers
    for step in tqdm(range(steps), desc="pretraining", unit="step", dynamic_ncols=True, disable=rank > 0):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50, 0.02 + 2 * (1 - step / steps))
        shares, enough, most_steps = curriculum[stage]
        is_last = stage + 1 == len(curriculum)
        # lessons
        dialogues, skills, tokens = [], [], 0
        while tokens < (batch_tokens if is_last else batch_tokens / 2) / world:
            skills += lessons.rng.choices(list(shares), list(shares.values()))
            dialogues.append(lessons.dialogue(policy, *skills[-1]))
            tokens += len(dialogues[-1].ids)
        # the mean over all trained tokens of all processes
        log_probs = lesson_log_probs(policy, dialogues)
        total = sum_over_processes({"tokens": len(log_probs)}, device)["tokens"]
        (-log_probs.sum() / total).backward()
        masters.step(optimizer, 1.0)
        # how well each skill is answered, and whether the next stage begins
        for skill, part in zip(skills, log_probs.detach().split([sum(d.trained) for d in dialogues])):
            exact[skill].append(part.sum().exp().item())
        if step % 25 == 24:
            own = {skill: np.mean(exact[skill]) / world if exact[skill] else 0 for skill in shares}
            right = sum_over_processes(own, device)
            if rank == 0:
                shown = ", ".join(f"{kind} {level}: {p:.2f}" for (kind, level), p in right.items())
                tqdm.write(f"step {step + 1}, stage {stage}, loss {-log_probs.mean().item():.3f}, "
                           f"probability of the whole answer: {shown}")
            if not is_last and (min(right.values()) >= enough or step + 1 - began >= most_steps):
                stage, began = stage + 1, step + 1
        if rank == 0 and (step + 1) % 100 == 0:
            save_policy(policy, out)


def lesson_log_probs(policy, dialogues):
    """(N,) log-probabilities of the dialogues' trained tokens, one dialogue after another. Gradients reach
    the vision encoder, which the later stages freeze."""
    features = iter(frame_features(policy, [f for d in dialogues for f in d.frames]))
    for d in dialogues:
        d.features = [next(features) for _ in d.frames]
    log_probs, _ = token_log_probs(policy, [[d] for d in dialogues])
    return log_probs
