"""Stage 0: the tiny base model, its lessons and its pretraining."""

import os
import random
from collections import defaultdict, deque
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import start_processes, sum_over_processes
from demo.synthetic import (COLOURS, NUM_SLOTS, SHAPES, SIDE, TINY_ENV, TINY_PROMPT, VIDEO_FPS, choose, draw, neighbours,
                            place, plan, survey, transcript, write_video)
from model import MasterWeights, Policy, encode, frame_features, load_policy, save_policy, token_log_probs
from video import Frame, Video
from zoom_env import LAST_TURN, MAY_ZOOM, Message

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
            num_parameters = sum(p.numel() for p in policy.parameters())
            print(f"tiny base: {num_parameters:,} parameters, {len(policy.tokenizer)} tokens")
        pretrain(policy, lessons, CURRICULUM, steps, 1.5e-3, seed, out)
        lessons.answers = True
        pretrain(policy, lessons, CURRICULUM[-1:], steps // 10, 1e-3, seed + 1, out)
    else:
        policy = load_policy(init)
    lessons.answers = lessons.any_text = True
    pretrain(policy, lessons, CURRICULUM[-1:], steps // 5, 1e-3, seed + 2, out)
    if rank == 0:
        policy.to(torch.bfloat16)
        save_policy(policy, out)


def pretrain(policy, lessons, curriculum, steps, lr, seed, out, batch_tokens=6144):
    """Trains the whole model on lessons: AdamW, the learning rate constant in the first half and then linear to 0."""
    rank, world, device = start_processes("cpu")
    masters = MasterWeights(policy.parameters())
    optimizer = torch.optim.AdamW(masters.parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
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
        masters.step(optimizer, 1.0)
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
