"""The policy: a Qwen2.5-VL checkpoint, the one encoder of dialogues, log-probabilities, generation and rollouts.

The decoder layers are transformers' own; what is ours is everything around them:

- `encode`: the only function that turns messages into token ids, a mask and pixels. SFT, RL and evaluation all use it.
  Ids that were sampled are appended as they are, never decoded and encoded again. The mask marks the tokens that the
  policy produces: its text, and its end-of-turn token. After </video_zoom> generation stops, so there the environment
  writes the end-of-turn token and it is not trained.
- `token_log_probs`: log pi(token | everything before) at temperature T, for the trained tokens only: the vocabulary's
  logits are computed at those positions, in chunks, and once more in the backward pass instead of being kept. The
  rollouts of one question run as one packed sequence [prompt, reply 1, reply 2, ...], in which each reply attends to
  the prompt and to itself, so the prompt and its frames are computed once a group.
- `rollout`: many episodes at once on one KV cache. The prompt is prefilled once a question and its cache copied to
  the group; a tool reply is appended to the cache; rows call, wait and finish independently of each other.

Temperature: sampled from softmax(logits / T), scored as log softmax(logits / T). T = 0 takes the most likely token.
"""

import argparse
import copy
import inspect
import json
import os
import re
import shutil
import sys
import types
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging as transformers_logging

from zoom_env import EnvConfig, Frame, Message, VideoError, ZoomEnv

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
SAMPLE_LOGITS = 4_000_000  # logits that exist at one time when sampling; more than 32 MB would be fresh memory every time
BLOCK = 512  # tokens of the vocabulary that are one block in sampling
LOGIT_CHUNK = 2048  # trained positions whose logits exist at one time


class PolicyError(Exception):
    """A checkpoint that cannot be loaded; the message names it and what to do."""


# ------------------------------------------------------------------------------------------------ load and save
class Policy:
    """A Qwen2.5-VL model with its tokenizer, image processor and the environment settings that it was trained with.

    `hf` is transformers' model and owns all weights. On CUDA the forward pass runs in bfloat16 while the weights that
    the optimizer changes stay in float32."""

    def __init__(self, hf, tokenizer, image_processor, env_config):
        self.hf, self.tokenizer, self.image_processor, self.env_config = hf, tokenizer, image_processor, env_config
        self.language_model, self.visual = hf.model.language_model, hf.model.visual
        self.language_model.config._attn_implementation = "zoom"
        batched = copy.copy(self.visual.config)  # of the layers alone: transformers could not make a model of this config
        batched._attn_implementation = "zoom_flash_vision"
        for block in self.visual.blocks:
            block.attn.config = batched
        special = {t: tokenizer.convert_tokens_to_ids(t) for t in
                   ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")}
        if missing := [t for t, i in special.items() if i is None or i == tokenizer.unk_token_id]:
            raise PolicyError(f"the tokenizer has no {', '.join(missing)}; is this a Qwen2.5-VL checkpoint?")
        self.im_start, self.im_end, self.vision_start, self.vision_end, self.image_pad = special.values()
        # which tokens can end </video_zoom>; models pad the vocabulary
        self.can_close_tag = [False] * hf.lm_head.out_features
        for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
            self.can_close_tag[i] = ">" in (token or "")

    @property
    def device(self):
        return self.hf.lm_head.weight.device

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def trainable_parameters(self):
        """The language model's parameters: the vision encoder and its projector are frozen (paper, section 4.1)."""
        return [p for p in self.hf.parameters() if p.requires_grad]

    def checkpoint_layers(self):
        """Gradient checkpointing: each layer is computed again in the backward pass, not kept."""
        enable = getattr(self.hf, "activation_checkpointing_enable", None)  # its name from transformers 5.2x on
        (enable or self.hf.gradient_checkpointing_enable)({"use_reentrant": False})

    def freeze_vision(self):
        self.visual.requires_grad_(False)
        return self


def load_policy(name_or_path, device="cpu", dtype=torch.float32, system_prompt_file=None):
    """Loads a Qwen2.5-VL checkpoint by its name on the Hugging Face hub or its folder.

    Environment settings come from the folder's zoom_config.json, else from the paper; the text of `system_prompt_file`
    replaces its system prompt. Raises PolicyError."""
    path = Path(name_or_path)
    if not path.exists() and (str(name_or_path).startswith((".", "/", "~", "runs/")) or "/" not in str(name_or_path)):
        raise PolicyError(f"no checkpoint folder {name_or_path}")
    if path.exists() and not (path / "config.json").is_file():
        raise PolicyError(f"{name_or_path} is not a checkpoint folder (it has no config.json)")
    try:
        if path.exists() and (kind := json.loads((path / "config.json").read_text()).get("model_type")) != "qwen2_5_vl":
            raise PolicyError(f"{name_or_path} holds a model of type {kind}, not qwen2_5_vl")
        hf, loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            name_or_path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
        if loaded["missing_keys"]:
            raise PolicyError(f"{name_or_path} lacks weights: {', '.join(sorted(loaded['missing_keys'])[:3])}, ...")
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        image_processor = Qwen2VLImageProcessor.from_pretrained(name_or_path)
        settings = json.loads((path / "zoom_config.json").read_text()) if (path / "zoom_config.json").is_file() else {}
        env_config = EnvConfig(**settings)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PolicyError(f"cannot load {name_or_path}: {reason}") from None
    if system_prompt_file:
        try:
            env_config = replace(env_config, system_prompt=Path(system_prompt_file).read_text().strip())
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(f"cannot read the system prompt {system_prompt_file}: {error}") from None
    return Policy(hf.to(device).eval(), tokenizer, image_processor, env_config)


def save_policy(policy, path):
    """Writes a Hugging Face checkpoint into the folder `path`: whole files under a temporary name first, then renamed,
    config.json last, so that a folder that loads is complete. Other files in the folder stay."""
    path = Path(path)
    temporary = path / "saving.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    policy.hf.save_pretrained(temporary)
    policy.tokenizer.save_pretrained(temporary)
    policy.image_processor.save_pretrained(temporary)
    (temporary / "zoom_config.json").write_text(json.dumps(asdict(policy.env_config), indent=1))
    (path / "config.json").unlink(missing_ok=True)
    for old in path.glob("*.safetensors*"):
        old.unlink()
    for file in sorted(temporary.iterdir(), key=lambda f: f.name == "config.json"):
        os.replace(file, path / file.name)
    temporary.rmdir()


# ------------------------------------------------------------------------------------- dialogue to ids and pixels
@dataclass
class Dialogue:
    """A conversation as the model reads it. All lists but `frames` have one entry a token."""

    ids: list = field(default_factory=list)
    trained: list = field(default_factory=list)  # True for a token that the policy produced
    is_image: list = field(default_factory=list)
    positions: list = field(default_factory=list)  # (temporal, height, width) for the rotary embedding
    next_position: int = 0
    frames: list = field(default_factory=list)  # Frame, in the order of their tokens
    features: list = field(default_factory=list)  # (tokens of the frame, hidden) of the first frames, once computed
    prompt_length: int = 0  # tokens before the first assistant turn: shared by the rollouts of a question
    sampled_log_probs: list = field(default_factory=list)  # of the sampled tokens, in order
    advantage: float = 0.0  # of all its sampled tokens, set by rl.py

    def fork(self):
        """A copy that grows on its own."""
        return Dialogue(**{f.name: copy.copy(getattr(self, f.name)) for f in fields(self)})

    def add(self, ids, trained=False):
        self.ids += ids
        self.trained += [trained] * len(ids)
        self.is_image += [False] * len(ids)
        self.positions += [(p, p, p) for p in range(self.next_position, self.next_position + len(ids))]
        self.next_position += len(ids)

    def add_frame(self, frame, image_pad):
        """One image: its tokens share a time, and stand at their rows and columns (M-RoPE, arXiv 2409.12191)."""
        rows, columns = frame.image.shape[1] // 28, frame.image.shape[2] // 28
        self.ids += [image_pad] * (rows * columns)
        self.trained += [False] * (rows * columns)
        self.is_image += [True] * (rows * columns)
        p = self.next_position
        self.positions += [(p, p + r, p + c) for r in range(rows) for c in range(columns)]
        self.next_position += max(rows, columns)
        self.frames.append(frame)


@dataclass
class Sampled:
    """An assistant turn as it was sampled: token ids and their log-probabilities."""

    ids: list
    log_probs: list


def encode(policy, messages, dialogue=None, learn=True):
    """Appends messages to a dialogue (a new one by default) in Qwen's chat template and returns it.

    After a system or user message that ends `messages`, the header of the assistant's turn follows, ready to generate.
    An assistant message holds either its text or a Sampled. `learn` says whether what the assistant produced is
    trained."""
    dialogue = Dialogue() if dialogue is None else dialogue
    # split_special_tokens: text, whoever wrote it, never turns into a special token
    tokenize = lambda text: policy.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    for i, message in enumerate(messages):
        if message.role == "assistant":
            said = message.content[0]
            if isinstance(said, Sampled):
                ids = said.ids
                dialogue.sampled_log_probs += said.log_probs
            else:
                ids = tokenize(said) + ([] if said.endswith("</video_zoom>") else [policy.im_end])
            dialogue.add(ids, trained=learn)
            dialogue.add(([] if ids and ids[-1] == policy.im_end else [policy.im_end]) + tokenize("\n"))
            continue
        dialogue.add([policy.im_start])
        text = message.role + "\n"
        for item in message.content:
            if isinstance(item, Frame):
                dialogue.add(tokenize(text) + [policy.vision_start])
                dialogue.add_frame(item, policy.image_pad)
                dialogue.add([policy.vision_end])
                text = ""
            else:
                text += item
        dialogue.add((tokenize(text) if text else []) + [policy.im_end] + tokenize("\n"))
        if message.role == "user" and (i + 1 == len(messages) or messages[i + 1].role == "assistant"):
            dialogue.add([policy.im_start] + tokenize("assistant\n"))
            dialogue.prompt_length = dialogue.prompt_length or len(dialogue.ids)
    return dialogue


def replay(policy, row, root="."):
    """A trajectory row as a Dialogue: what the policy said is in the row, what it saw is replayed by the environment
    (with the `max_zooms` of the row's provenance, where it names one).

    Returns (dialogue, env). Raises VideoError, and ValueError if the turns do not fit the episode."""
    max_zooms = (row.get("provenance") or {}).get("max_zooms", policy.env_config.max_zooms)
    config = replace(policy.env_config, max_zooms=max_zooms)
    env = ZoomEnv(row["question"], config, root)
    dialogue = encode(policy, env.reset())
    for i, (text, is_learned) in enumerate(zip(row["turns"], row["learn"], strict=True)):
        if env.done:
            raise ValueError(f"the episode is over after {i} of {len(row['turns'])} turns")
        if "</video_zoom>" in text:  # where generation stops
            text = text.partition("</video_zoom>")[0] + "</video_zoom>"
        encode(policy, [Message("assistant", [text])], dialogue, learn=is_learned)
        encode(policy, env.step(text), dialogue)
    if not env.done:
        raise ValueError("the episode does not end with the last turn")
    return dialogue, env


def frame_features(policy, frames):
    """Vision features of frames, each (tokens, hidden). A frame that occurs twice is computed once."""
    distinct = list({id(frame): frame for frame in frames}.values())
    features = {}
    for i in range(0, len(distinct), 64):
        chunk = distinct[i:i + 64]
        pixels = policy.image_processor([f.image for f in chunk], do_resize=False, return_tensors="pt")
        grid = pixels["image_grid_thw"].to(policy.device)
        with policy.autocast():
            output = policy.visual(pixels["pixel_values"].to(policy.device, policy.visual.dtype), grid_thw=grid)
        sizes = (grid.prod(-1) // 4).tolist()
        features.update(zip(map(id, chunk), output.pooler_output.float().split(sizes)))
    return [features[id(frame)] for frame in frames]


def fill_features(policy, dialogues):
    """Computes the features that the dialogues still lack and keeps them there. The vision tower is frozen in SFT and
    RL, so they serve generation and every later pass."""
    missing = [frame for d in dialogues for frame in d.frames[len(d.features):]]
    with torch.no_grad():
        features = iter(frame_features(policy, missing))
    for d in dialogues:
        d.features += [next(features) for _ in d.frames[len(d.features):]]


# ----------------------------------------------------------------------------------------------- one forward pass
def _attention(module, query, key, value, attention_mask=None, attend=None, **kwargs):
    """What transformers' layers call: `attend` decides who sees whom. Without it, plain SDPA, so that transformers'
    own forward and generate keep working on our model."""
    if attend is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return attend(module.layer_idx, query, key, value), None


def _vision_attention(module, query, key, value, attention_mask=None, cu_seq_lens_q=None, scaling=None, **kwargs):
    """Attention inside each piece of a sequence, windows or whole frames: all pieces of one length are one batch, where
    transformers' SDPA path loops over them. query (1, heads, T, D); cu_seq_lens_q: where pieces begin and the last ends."""
    plan = getattr(cu_seq_lens_q, "plan", None)  # places of the tokens for each length, (pieces, length), once for all layers
    if plan is None:
        starts, lengths = cu_seq_lens_q[:-1].long(), cu_seq_lens_q.diff()
        plan = cu_seq_lens_q.plan = [starts[lengths == n, None] + torch.arange(n, device=starts.device)
                                     for n in set(lengths.tolist()) if n]
    out = torch.empty_like(query[0])  # (heads, T, D)
    for at in plan:
        q, k, v = (x[0][:, at].transpose(0, 1) for x in (query, key, value))  # (pieces, heads, length, D)
        out[:, at] = F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(0, 1)
    return out.transpose(0, 1)[None], None


AttentionInterface.register("zoom", _attention)
AttentionInterface.register("zoom_flash_vision", _vision_attention)  # "flash": transformers passes all pieces in one call


def run_layers(policy, ids, is_image, features, positions, attend):
    """Hidden states of the language model, (B, T, hidden).

    Args: ids and is_image (B, T); features (number of image tokens, hidden) in reading order; positions (3, B, T);
    attend(layer, query (B, heads, T, D), key and value (B, kv heads, T, D)) -> (B, T, heads, D)."""
    lm = policy.language_model
    with policy.autocast():
        hidden = lm.embed_tokens(ids)
        if features is not None:
            hidden = hidden.masked_scatter(is_image[..., None], features.to(hidden.dtype))
        rotary = lm.rotary_emb(hidden, positions)
        for layer in lm.layers:
            hidden = layer(hidden, position_embeddings=rotary, attend=attend)
        return lm.norm(hidden)


def logits_at(policy, hidden, temperature):
    """log softmax(logits / temperature) in float32, for hidden (N, hidden): (N, vocabulary)."""
    with policy.autocast():
        logits = policy.hf.lm_head(hidden)
    return F.log_softmax(logits.float() / temperature, dim=-1)


# ---------------------------------------------------------------------------------- log-probabilities, for training
def token_log_probs(policy, groups, temperature=1.0, entropy=False):
    """Log-probabilities of the trained tokens of dialogues, and the entropies of the distributions that they came from.

    Args:
        groups: lists of dialogues that share their first `prompt_length` tokens; [[d] for d in dialogues] for no group.
            All of them run as one packed sequence.
        entropy: whether to compute entropies too (else None).
    Returns: (N,) tensors over all trained tokens, dialogue after dialogue."""
    ids, is_image, positions, features, spans = [], [], [], [], []
    predictors, targets = [], []  # place in the pack of the position that predicts, and the id that it has to predict
    for group in groups:
        shared = group[0].prompt_length if len(group) > 1 else len(group[0].ids)
        offset, lengths = len(ids), []
        for d in group:
            packed = 0 if d is group[0] else shared  # its first tokens that are in the pack already
            if packed:
                assert d.ids[:shared] == group[0].ids[:shared] and not any(d.trained[:shared])
            base = len(ids) - packed  # token t of the reply is at base + t, token t of the prompt at offset + t
            ids += d.ids[packed:]
            is_image += d.is_image[packed:]
            positions += d.positions[packed:]
            skip = sum(d.is_image[:packed])
            features.append((d.features, skip))
            lengths.append(len(d.ids) - shared)
            for t, trained in enumerate(d.trained):
                if trained:
                    predictors.append(offset + t - 1 if t - 1 < shared else base + t - 1)
                    targets.append(d.ids[t])
        spans.append((offset, shared, lengths if len(group) > 1 else []))
    device = policy.device
    features = [torch.cat(f)[skip:] for f, skip in features if f]
    hidden = run_layers(
        policy,
        torch.tensor([ids], device=device),
        torch.tensor([is_image], device=device),
        torch.cat(features) if features else None,
        torch.tensor(positions, device=device).T[:, None],  # (3, 1, T)
        lambda layer, q, k, v: attend_packed(q, k, v, spans),
    )
    hidden = hidden[0, torch.tensor(predictors, device=device, dtype=torch.long)]  # (N, hidden)
    targets = torch.tensor(targets, device=device, dtype=torch.long)
    parts = [checkpoint(score, policy, h, t, temperature, entropy, use_reentrant=False)
             for h, t in zip(hidden.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK))]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]) if entropy else None


def score(policy, hidden, targets, temperature, entropy):
    log_p = logits_at(policy, hidden, temperature)  # (N, vocabulary)
    chosen = log_p.gather(1, targets[:, None])[:, 0]
    return chosen, -(log_p.exp() * log_p).sum(-1) if entropy else None


def attend_packed(query, key, value, spans):
    """Attention over packed groups, each (offset, length of the prompt, lengths of the replies): the prompt is causal;
    a reply sees the prompt and, causally, itself. query (1, heads, T, D), returns (1, T, heads, D)."""
    out = []
    for offset, shared, lengths in spans:
        part = slice(offset, offset + shared)
        out.append(F.scaled_dot_product_attention(query[:, :, part], key[:, :, part], value[:, :, part],
                                                  is_causal=True, enable_gqa=True))
        at = offset + shared
        for length in lengths:
            own = slice(at, at + length)
            k, v = (torch.cat([x[:, :, part], x[:, :, own]], dim=2) for x in (key, value))
            seen = torch.ones(length, shared + length, dtype=torch.bool, device=query.device).tril(shared)
            out.append(masked_attention(query[:, :, own], k, v, seen))
            at += length
    return torch.cat(out, dim=2).transpose(1, 2)


def masked_attention(query, key, value, seen):
    """SDPA with a mask; key heads are repeated, as with enable_gqa and a mask CUDA would fall back to the kernel that
    stores all scores."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)


def packed_length(group):
    """Tokens that one group takes in `token_log_probs`."""
    shared = group[0].prompt_length if len(group) > 1 else 0
    return shared + sum(len(d.ids) - shared for d in group)


def split_by_tokens(groups, max_tokens):
    """Batches of groups of at most `max_tokens` packed tokens each; a group that is larger is divided."""
    batches, room = [], 0
    for group in groups:
        while group:
            size = len(group)
            while size > 1 and packed_length(group[:size]) > max_tokens:
                size -= 1
            part, group = group[:size], group[size:]
            if packed_length(part) > room:
                batches.append([])
                room = max_tokens
            batches[-1].append(part)
            room -= packed_length(part)
    return batches


# --------------------------------------------------------------------------------------------- generation, rollouts
class KVCache:
    """Keys and values of many rows of unequal length: (layers, 2, slots, kv heads, capacity, D)."""

    def __init__(self, policy, slots, capacity):
        config = policy.language_model.config
        heads = config.num_key_value_heads
        dtype = torch.bfloat16 if policy.device.type == "cuda" else policy.hf.lm_head.weight.dtype
        self.data = torch.zeros(config.num_hidden_layers, 2, slots, heads, capacity,
                                config.hidden_size // config.num_attention_heads, dtype=dtype, device=policy.device)

    def reserve(self, capacity):
        if capacity > self.data.shape[4]:
            grown = capacity + capacity // 4
            self.data = F.pad(self.data, (0, 0, 0, grown - self.data.shape[4]))

    def swap(self, a, b):
        if a != b:
            self.data[:, :, [a, b]] = self.data[:, :, [b, a]]

    def attend(self, slots, starts, lengths):
        """Attention for new tokens of the rows in `slots` (a slice), row i's being the `lengths[i]` ones that follow
        `starts[i]` cached ones: stores their keys and values, and lets each see all of its row up to itself."""
        width, device = max(lengths), self.data.device
        starts = torch.tensor(starts, device=device)
        at = starts[:, None] + torch.arange(width, device=device)  # (B, T) place of each token in its row
        longest = int(max(s + n for s, n in zip(starts.tolist(), lengths)))
        self.reserve(int(at.max()) + 1)
        rows = torch.arange(slots.start, slots.stop, device=device)[:, None]
        seen = torch.arange(longest, device=device) <= at[:, :, None]  # (B, T, longest)
        fresh = not starts.any()  # a prefill: plain causal attention, as the padding is on the right

        def attend(layer, query, key, value):
            keys, values = self.data[layer]
            keys[rows, :, at] = key.transpose(1, 2).to(keys.dtype)
            values[rows, :, at] = value.transpose(1, 2).to(values.dtype)
            k, v = keys[slots, :, :longest], values[slots, :, :longest]  # (B, kv heads, longest, D)
            query = query.to(k.dtype)
            if fresh:
                out = F.scaled_dot_product_attention(query, k, v, is_causal=True, enable_gqa=True)
            elif width > 1:
                out = masked_attention(query, k, v, seen[:, None])
            else:  # the heads that share a key as several queries of it
                B, heads, _, D = query.shape
                grouped = query.view(B, k.shape[1], -1, D)
                mask = seen[:, None].expand(-1, 1, grouped.shape[2], -1)
                out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(B, heads, 1, D)
            return out.transpose(1, 2)

        return attend


@dataclass
class Episode:
    """One rollout: its environment, which records turns and rewards, and its dialogue."""

    env: ZoomEnv
    dialogue: Dialogue
    truncated: bool = False  # a turn was cut off at the token limit
    cached: int = 0  # tokens of the dialogue that are in the KV cache
    turn_ids: list = field(default_factory=list)
    turn_log_probs: list = field(default_factory=list)
    reply: Future | None = None  # the environment's next message, while its frames are decoded

    def end_turn(self, policy, stopped, decoders):
        """Gives the sampled turn to the environment, which answers in a thread of `decoders`."""
        text = policy.tokenizer.decode(self.turn_ids[:-1] if self.turn_ids[-1] == policy.im_end else self.turn_ids)
        encode(policy, [Message("assistant", [Sampled(self.turn_ids, self.turn_log_probs)])], self.dialogue)
        self.turn_ids, self.turn_log_probs = [], []
        self.reply, self.truncated = decoders.submit(self.env.step, text), not stopped

    def take_reply(self, policy, max_response_tokens):
        """Waits for the reply and appends it, unless the episode is over."""
        reply, self.reply = self.reply.result(), None
        self.env.done |= self.truncated
        if not self.env.done:
            longer = encode(policy, reply, self.dialogue.fork())
            if len(longer.ids) - longer.prompt_length > max_response_tokens:
                self.env.done = self.truncated = True
            else:
                self.dialogue = longer


@torch.no_grad()
def rollout(policy, questions, group_size=1, *, env_config=None, root=".", temperature=1.0, max_turn_tokens=1024,
            max_response_tokens=32_768, max_rows=64, generator=None, progress=None):
    """Plays `group_size` episodes of each question. Returns (groups, skipped): a list of Episode for each question,
    empty for one whose video cannot be read, and the (question id, reason) of those.

    Args:
        temperature: 0 for the most likely token.
        max_turn_tokens, max_response_tokens: an episode ends, truncated, where a turn or all after the prompt is longer.
        max_rows: episodes that run at one time.
        generator: torch.Generator on the policy's device.
        progress: called with the number of episodes that ended."""
    def begin(question):
        env = ZoomEnv(question, env_config or policy.env_config, root)
        try:
            return env, env.reset()
        except VideoError as error:
            return env, error

    groups, skipped, at_once = [[] for _ in questions], [], max(1, max_rows // group_size)
    waves = [range(i, min(i + at_once, len(questions))) for i in range(0, len(questions), at_once)]
    with ThreadPoolExecutor(4) as decoders:
        ahead = deque()  # the next wave's videos are decoded while this one plays
        for number in range(len(waves)):
            while len(ahead) < min(2, len(waves) - number):
                ahead.append([decoders.submit(begin, questions[i]) for i in waves[number + len(ahead)]])
            playing = []
            for i, started in zip(waves[number], ahead.popleft()):
                env, messages = started.result()
                if isinstance(messages, VideoError):
                    skipped.append((questions[i]["id"], str(messages)))
                    continue
                dialogue = encode(policy, messages)
                groups[i] += [Episode(env.fork(), dialogue.fork()) for _ in range(group_size)]
                playing.append(groups[i])
            if playing:
                _play(policy, playing, temperature, max_turn_tokens, max_response_tokens, generator, progress, decoders)
    return groups, skipped


def _extend(policy, cache, episodes, first_slot):
    """Runs all tokens of the episodes that are not in the cache yet; episode i is in slot first_slot + i. Returns the
    hidden states from which each one's next token is sampled, (B, hidden)."""
    device = policy.device
    lengths = [len(e.dialogue.ids) + len(e.turn_ids) - e.cached for e in episodes]
    width = max(lengths)
    slots = slice(first_slot, first_slot + len(episodes))
    attend = cache.attend(slots, [e.cached for e in episodes], lengths)
    if width == 1 and all(e.turn_ids for e in episodes):  # decoding
        ids = torch.tensor([[e.turn_ids[-1]] for e in episodes], device=device)
        at = [e.dialogue.next_position + len(e.turn_ids) - 1 for e in episodes]
        positions = torch.tensor(at, device=device)[None, :, None].expand(3, -1, 1)
        hidden = run_layers(policy, ids, None, None, positions, attend)
    else:
        fill_features(policy, [e.dialogue for e in episodes])
        ids = torch.zeros(len(episodes), width, dtype=torch.long)
        is_image = torch.zeros(len(episodes), width, dtype=torch.bool)
        positions = torch.zeros(3, len(episodes), width, dtype=torch.long)
        features = []
        for i, (e, length) in enumerate(zip(episodes, lengths)):
            d = e.dialogue
            ids[i, :length] = torch.tensor(d.ids[e.cached:])
            is_image[i, :length] = torch.tensor(d.is_image[e.cached:])
            positions[:, i, :length] = torch.tensor(d.positions[e.cached:]).T
            seen = sum(d.is_image[:e.cached])
            if d.features:
                features.append(torch.cat(d.features)[seen:])
        features = torch.cat(features) if features else None
        hidden = run_layers(policy, ids.to(device), is_image.to(device), features, positions.to(device), attend)
    for e, length in zip(episodes, lengths):
        e.cached += length
    return hidden[torch.arange(len(episodes)), torch.tensor(lengths) - 1]


def sample(policy, hidden, temperature, generator=None):
    """Token ids and their log-probabilities, (B,) each, for hidden (B, hidden); temperature 0: the most likely token.

    First which block of the vocabulary, then which token of it, so that few random numbers are drawn."""
    tokens, log_probs = [], []
    for rows in hidden.split(max(1, SAMPLE_LOGITS // policy.hf.lm_head.weight.shape[0])):
        with policy.autocast():
            logits = policy.hf.lm_head(rows).float()  # (B, vocabulary)
        p = (logits / (temperature or 1.0) if temperature != 1 else logits).softmax(dim=1)
        if temperature == 0:
            token = logits.argmax(dim=1, keepdim=True)
        else:
            B, V = p.shape
            whole = V // BLOCK * BLOCK
            mass = torch.cat([p[:, :whole].view(B, whole // BLOCK, BLOCK).sum(2), p[:, whole:].sum(1, keepdim=True)], dim=1)
            first = torch.multinomial(mass, 1, generator=generator) * BLOCK  # (B, 1)
            at = first + torch.arange(BLOCK, device=p.device)  # (B, BLOCK)
            inside = p.gather(1, at.clamp(max=V - 1)).masked_fill(at >= V, 0.0)
            token = first + torch.multinomial(inside, 1, generator=generator)
        tokens.append(token[:, 0])
        log_probs.append(p.gather(1, token)[:, 0].log())
    return torch.cat(tokens), torch.cat(log_probs)


def _sample(policy, episodes, hidden, temperature, generator):
    """Samples one token for each episode and notes its log-probability. Returns which turns ended with it."""
    tokens, log_probs = sample(policy, hidden, temperature, generator)
    ended = []
    for e, token, log_prob in zip(episodes, tokens.tolist(), log_probs.tolist()):
        e.turn_ids.append(token)
        e.turn_log_probs.append(log_prob)
        ended.append(token == policy.im_end or bool(policy.can_close_tag[token])
                     and "</video_zoom>" in policy.tokenizer.decode(e.turn_ids[-16:]))
    return ended


def _play(policy, groups, temperature, max_turn_tokens, max_response_tokens, generator, progress, decoders):
    """Plays one wave of groups to the end. live[i] has slot i of the cache. The first `decoding` ones are in the middle
    of a turn, and only their last token, just sampled, is not in the cache; the others wait for a reply or to read it."""
    prompts = [group[0] for group in groups]
    cache = KVCache(policy, len(groups), max(len(e.dialogue.ids) for e in prompts))
    hidden = _extend(policy, cache, prompts, 0)
    sizes = torch.tensor([len(group) for group in groups], device=policy.device)
    for group in groups:
        for e in group:
            e.dialogue.features, e.cached = list(group[0].dialogue.features), group[0].cached
    cache.data = cache.data.repeat_interleave(sizes, dim=2)
    cache.reserve(cache.data.shape[4] + max_turn_tokens)
    hidden = hidden.repeat_interleave(sizes, dim=0)
    live = [e for group in groups for e in group]
    decoding, to_sample = len(live), slice(0, len(live))
    while live:
        ended = _sample(policy, live[to_sample], hidden, temperature, generator)
        for i in reversed(range(to_sample.start, to_sample.stop)):  # from the back: swaps move only what was handled
            e = live[i]
            if not ended[i - to_sample.start] and len(e.turn_ids) < max_turn_tokens:
                continue
            e.end_turn(policy, ended[i - to_sample.start], decoders)
            decoding -= 1
            cache.swap(i, decoding)
            live[i], live[decoding] = live[decoding], live[i]
        waiting = len(live) - decoding
        if waiting and (decoding == 0 or waiting >= max(4, len(live) // 4)):
            for i in reversed(range(decoding, len(live))):
                live[i].take_reply(policy, max_response_tokens)
                if live[i].env.done:
                    cache.swap(i, len(live) - 1)
                    live[i] = live[-1]
                    live.pop()
                    if progress:
                        progress(1)
        if decoding < len(live) and (decoding == 0 or live[-1].reply is None):
            to_sample = slice(decoding, len(live))
            hidden = _extend(policy, cache, live[to_sample], decoding)
            decoding = len(live)
        elif decoding:
            to_sample = slice(0, decoding)
            hidden = _extend(policy, cache, live[to_sample], 0)


# --------------------------------------------------------------------------------- what the stages share: processes
def start_processes(device=None):
    """Joins torchrun's process group where there is one. Returns (rank, world size, torch.device).

    Everything distributed here is: each process computes the gradient of its own share of a sum whose denominator is
    counted over all processes, and `sync_gradients` adds the shares up."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {device} is no device; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda") or device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: there is none here; use cpu or cuda")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    elif world > 1:  # torchrun starts each process with one thread; share the cores instead
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def sync_gradients(parameters):
    """Adds the gradients of all processes up, in place. A process without tokens takes part with zeros."""
    if dist.is_initialized():
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(grad.view_as(p))


def sum_over_processes(values, device):
    """A dict of numbers, each summed over all processes; all of them must have the same keys."""
    total = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def gather(items):
    """The lists of all processes, joined."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def clip_and_step(optimizer, parameters, max_norm):
    """One optimizer step on gradients of norm at most `max_norm`. Returns the norm before clipping; a step whose norm
    is not finite is left out."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    if norm == norm and norm != float("inf"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ------------------------------------------------------------------------------- what the stages share: command line
class UserError(Exception):
    """Wrong input: shown as one line, exit status 2."""


def fail(message):
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def run_main(main):
    """Runs a script's main; wrong input ends it with one line and exit status 2."""
    try:
        main()
    except (UserError, PolicyError, VideoError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


def parse_flags(config_class, description, demo, at_least_one, argv=None):
    """A config from the command line. Each field of the dataclass is a flag, with its comment as help; where --model is
    not given, the values in `demo` (the tiny model's) take the place of the defaults (the paper's). No number
    may be negative or nan, and those in `at_least_one` not below 1."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config_class), re.MULTILINE))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (see --help)")
    for f in fields(config_class):
        default = f"default {f.default}" + (f"; without --model {demo[f.name]}" if f.name in demo else "")
        text = f"{comments[f.name]} ({default})".replace("%", "%%")
        kind = f.type.__args__[0] if isinstance(f.type, types.UnionType) else f.type  # int | None: int
        if kind is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        elif getattr(kind, "__origin__", None) is list:
            parser.add_argument(f"--{f.name}", nargs="+", type=kind.__args__[0], default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(f"--{f.name}", type=kind, metavar=kind.__name__, default=argparse.SUPPRESS, help=text)
    given = vars(parser.parse_args(argv))
    config = config_class(**(demo if given.get("model") is None else {}) | given)
    for f in fields(config_class):
        value, least = getattr(config, f.name), int(f.name in at_least_one)
        if isinstance(value, int | float) and not value >= least:  # nan, too
            fail(f"--{f.name} must be at least {least}, not {value}")
    return config


def read_rows(path, max_bad, check):
    """Rows of a .jsonl file, and [(line number or id, reason)] of those that are left out: not JSON, or `check(row)`
    names a reason. Raises UserError if the file cannot be read or more than the share `max_bad` is bad."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    rows, bad = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            reason = check(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            bad.append((f"line {number}", reason))
        else:
            rows.append(row)
    check_bad(bad, len(rows) + len(bad), max_bad, path)
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows, bad


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


def check_bad(bad, total, max_bad, path):
    """Raises UserError, naming the first ones, when more than the share `max_bad` of `total` rows is bad."""
    if len(bad) > max_bad * total:
        first = "; ".join(f"{where}: {reason}" for where, reason in bad[:3])
        raise UserError(f"{path}: {len(bad)} of {total} rows cannot be used ({first}); fix them or raise --max_bad")
