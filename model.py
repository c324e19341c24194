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
- `rollout`: many episodes at once on one KV cache. The prompt is prefilled and cached once a question, and the rows of
  its group all read it; replies are appended; rows call, wait, end and make room for others independently.

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
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging as transformers_logging

from zoom_env import EnvConfig, Frame, Message, VideoError, ZoomEnv

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
BLOCK = 128  # tokens of the vocabulary that are one block in sampling
DECODE_STEPS = {"cpu": 1, "cuda": 8}  # tokens that are decoded before the CPU reads them and checks for ends of turns
PREFILL_TOKENS = 16_384  # tokens of prompts and replies in one pass
LOGIT_CHUNK = 512  # trained positions whose logits exist at one time


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
    plan = getattr(cu_seq_lens_q, "plan", None)  # where the tokens of each length are, (pieces, length), for all layers
    if plan is None:
        starts, lengths = cu_seq_lens_q[:-1].long(), cu_seq_lens_q.diff()
        plan = cu_seq_lens_q.plan = [starts[lengths == n, None] + torch.arange(n, device=starts.device)
                                     for n in set(lengths.tolist()) if n]
    if len(plan) == 1:
        query, key, value = (x[0].unflatten(1, plan[0].shape) for x in (query, key, value))  # (heads, pieces, length, D)
        out = F.scaled_dot_product_attention(query, key, value, scale=scaling).flatten(1, 2)
    else:
        out = torch.empty_like(query[0])  # (heads, T, D)
        for at in plan:
            q, k, v = (x[0][:, at] for x in (query, key, value))  # (heads, pieces, length, D)
            out[:, at] = F.scaled_dot_product_attention(q, k, v, scale=scaling)
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
    with policy.autocast():
        logits = policy.hf.lm_head(hidden / temperature)
    log_p = F.log_softmax(logits.float(), dim=-1)  # (N, vocabulary)
    chosen = log_p.gather(1, targets[:, None])[:, 0]
    return chosen, -(log_p.exp() * log_p).sum(-1) if entropy else None


def attend_packed(query, key, value, spans):
    """Attention over packed groups, each (offset, length of the prompt, lengths of the replies): the prompt is causal;
    a reply sees the prompt and, causally, itself. query (1, heads, T, D), returns (1, T, heads, D)."""
    out = []
    for offset, shared, lengths in spans:
        part = slice(offset, offset + shared)
        out.append(causal_attention(query[:, :, part], key[:, :, part], value[:, :, part]))
        at = offset + shared
        for length in lengths:
            own = slice(at, at + length)
            k, v = (torch.cat([x[:, :, part], x[:, :, own]], dim=2) for x in (key, value))
            out.append(causal_attention(query[:, :, own], k, v))
            at += length
    return torch.cat(out, dim=2).transpose(1, 2)


def causal_attention(query, key, value):
    """SDPA of the last T of S tokens, each seeing those up to itself: query (1, heads, T, D), key and value (1, kv heads,
    S, D). On CUDA that is flash attention, which neither makes a mask nor computes what it hides."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the rotary embedding is float32
    seen = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)


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
    """Keys and values of a batch: `prompts` holds those of each prompt once, `own` those of what follows it in each row.
    Both have a tensor a layer, (2, prompts or rows, kv heads, capacity, D), so that growing never needs room for two
    caches. Row i of `own` is that of the i-th live episode."""

    def __init__(self, policy, group_size, max_bytes):
        config = policy.language_model.config
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        D = config.hidden_size // config.num_attention_heads
        dtype = torch.bfloat16 if policy.device.type == "cuda" else policy.hf.lm_head.weight.dtype
        self.prompts = [torch.zeros(2, 0, heads, 0, D, dtype=dtype, device=policy.device)] * layers
        self.own = list(self.prompts)
        self.group_size = group_size
        self.users = []  # for each slot of `prompts`: how many unfinished episodes share it
        self.hidden = {}  # for each slot: the prompt's last hidden state
        self.max_tokens = max_bytes // (layers * 2 * heads * D * dtype.itemsize)
        self.graphs, self.graph_pool = {}, None  # captured decode steps by their number of rows, and their memory

    def fits(self, rows, length, prompts=0, prompt_length=0):
        """Whether `rows` rows of `length` own tokens stay within the budget, with `prompts` prompts of such a length."""
        _, P, _, capacity, _ = self.prompts[0].shape
        return max(P, prompts) * max(capacity, prompt_length) + rows * length <= self.max_tokens

    def add_prompt(self, group, rows, length):
        """Gives the prompt that a group of episodes shares a slot. `rows`, `length`: what `own` has to keep if it must
        shrink for that."""
        slot = self.users.index(0) if 0 in self.users else len(self.users)
        self.users[slot:slot + 1] = [len(group)]
        for number, e in enumerate(group):
            e.slot, e.number, e.cached = slot, number, e.dialogue.prompt_length
        _, P, _, capacity, _ = self.prompts[0].shape
        if len(self.users) > P or e.cached > capacity:
            _, now, _, own_capacity, _ = self.own[0].shape
            P, capacity = max(P, len(self.users)), max(capacity, e.cached)
            if not self.fits(now, own_capacity, P, capacity):
                self._resize(self.own, rows, length)
            self._resize(self.prompts, P, capacity)

    def reserve(self, rows, length):
        """Room for `length` own tokens in each of `rows` rows, and where the budget allows it for some more."""
        _, P, _, prompt_capacity, _ = self.prompts[0].shape
        _, allocated, _, capacity, _ = self.own[0].shape
        if rows and (rows > allocated or length > capacity):
            if length > capacity:
                capacity = length + length // 4
            most = (self.max_tokens - P * prompt_capacity) // rows
            if length <= most:
                capacity = min(capacity, most)
            self._resize(self.own, allocated if allocated > rows and self.fits(allocated, capacity) else rows, capacity)

    def _resize(self, tensors, places, capacity):
        self.graphs.clear()
        for layer, old in enumerate(tensors):
            tensors[layer] = old.new_zeros(2, places, old.shape[2], capacity, old.shape[4])
            tensors[layer][:, :old.shape[1], :, :old.shape[3]] = old[:, :places, :, :capacity]

    def clear(self):
        """Gives all memory back."""
        self.users.clear()
        self.hidden.clear()
        for tensors in (self.prompts, self.own):
            self._resize(tensors, 0, 0)

    def swap(self, a, b, length):
        """The first `length` tokens of rows a and b change places."""
        if a != b:
            for own in self.own:
                own[:, [a, b], :, :length] = own[:, [b, a], :, :length]


@dataclass
class Episode:
    """One rollout: its environment, which records turns and rewards, and its dialogue."""

    env: ZoomEnv
    dialogue: Dialogue
    truncated: bool = False  # a turn was cut off at the token limit
    cached: int = 0  # tokens, from the start, that need not be run for it again; at least the prompt
    slot: int = 0  # of its prompt in the KV cache
    number: int = 0  # among the episodes that share the prompt
    turn_ids: list = field(default_factory=list)
    turn_log_probs: list = field(default_factory=list)
    reply: Future | None = None  # the environment's next message, while its frames are decoded

    def total(self):
        """Tokens, with those of the turn."""
        return len(self.dialogue.ids) + len(self.turn_ids)

    def add_token(self, policy, token, log_prob, max_turn_tokens, video_threads):
        """Appends a sampled token to the turn. Returns whether the turn is over; then the environment answers, in a
        thread of `video_threads`."""
        self.turn_ids.append(token)
        self.turn_log_probs.append(log_prob)
        stopped = turn_ended(policy, self)
        if not stopped and len(self.turn_ids) < max_turn_tokens:
            return False
        text = policy.tokenizer.decode(self.turn_ids[:-1] if token == policy.im_end else self.turn_ids)
        encode(policy, [Message("assistant", [Sampled(self.turn_ids, self.turn_log_probs)])], self.dialogue)
        self.turn_ids, self.turn_log_probs = [], []
        self.reply, self.truncated = video_threads.submit(self.env.step, text), not stopped
        return True

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


def turn_ended(policy, episode):
    """Whether the turn ends with the token that was sampled last."""
    token = episode.turn_ids[-1]
    return token == policy.im_end or (policy.can_close_tag[token]
                                      and "</video_zoom>" in policy.tokenizer.decode(episode.turn_ids[-16:]))


@torch.no_grad()
def rollout(policy, questions, group_size=1, *, env_config=None, root=".", temperature=1.0, max_turn_tokens=1024,
            max_response_tokens=32_768, max_rows=64, cache_gb=16.0, cuda_graphs=True, generator=None, on_end=None):
    """Plays `group_size` episodes of each question. Returns (groups, skipped): a list of Episode for each question,
    empty for one whose video cannot be read, and the (question id, reason) of those.

    Args:
        temperature: 0 for the most likely token.
        max_turn_tokens: a turn that is longer is cut off there, and the episode ends, truncated.
        max_response_tokens: an episode ends, truncated, before a reply with which all after the prompt were longer.
        max_rows: episodes that run at one time.
        cache_gb: memory for keys and values, 1e9 bytes. Fewer episodes run at one time where it is too small for them.
        cuda_graphs: on CUDA, run the layers by kernels.py, a decode step as a CUDA graph, not operation by operation.
        generator: torch.Generator on the policy's device.
        on_end: called with each episode that ended."""
    def begin(question):
        env = ZoomEnv(question, env_config or policy.env_config, root)
        try:
            return env, env.reset()
        except VideoError as error:
            return env, error

    groups, skipped, upcoming = [[] for _ in questions], [], deque(enumerate(questions))
    with ThreadPoolExecutor(4) as video_threads:
        batch = Batch(policy, group_size, max_rows, cache_gb, temperature, max_turn_tokens, max_response_tokens,
                      generator, cuda_graphs, video_threads, on_end)
        ahead = deque()  # questions whose videos are decoded while others are played
        new = None  # the next question's group, once its video is decoded
        try:
            while upcoming or ahead or new or batch.live or batch.outside:
                batch.take_replies()
                admitted = []
                while upcoming or ahead or new:
                    while upcoming and len(ahead) < max(4, max_rows // group_size):
                        i, question = upcoming.popleft()
                        ahead.append((i, video_threads.submit(begin, question)))
                    if not new:
                        i, opened = ahead.popleft()
                        env, messages = opened.result()
                        if isinstance(messages, VideoError):
                            skipped.append((env.question["id"], str(messages)))
                            continue
                        dialogue = encode(policy, messages)
                        new = groups[i] = [Episode(env.fork(), dialogue.fork()) for _ in range(group_size)]
                    if not batch.admit(new):
                        break
                    admitted.append(new)
                    new = None
                batch.enter(admitted)
                while batch.decoding and not batch.should_pause():
                    batch.decode()
        except BaseException:
            video_threads.shutdown(wait=False, cancel_futures=True)  # else the videos ahead would be waited for
            raise
    return groups, skipped


class Batch:
    """The episodes that are being played. live[i] has row i of the cache. The first `decoding` ones are within a turn:
    the cache holds all their tokens except the one that was sampled last. The others wait for a reply. Those `outside`
    are admitted, their prompt has a slot, but have no row: they have not entered yet, or had to leave. What runs when
    depends on no clock, so a seed gives one result."""

    def __init__(self, policy, group_size, max_rows, cache_gb, temperature, max_turn_tokens, max_response_tokens, generator,
                 cuda_graphs, video_threads, on_end):
        on_cuda = policy.device.type == "cuda"
        self.policy = generation_copy(policy) if on_cuda else policy
        self.cache = KVCache(policy, group_size, int(cache_gb * 1e9))
        self.max_rows, self.temperature, self.generator = max_rows, temperature, generator
        self.max_turn_tokens, self.max_response_tokens = max_turn_tokens, max_response_tokens
        self.video_threads, self.on_end = video_threads, on_end
        self.kernels = load_kernels() if cuda_graphs and on_cuda else None
        self.steps = DECODE_STEPS[policy.device.type]
        self.live, self.decoding, self.outside = [], 0, deque()

    def should_pause(self):
        """Whether enough rows wait for a reply, a quarter and at least 4, to stop decoding and run them."""
        waiting = len(self.live) - self.decoding
        return waiting >= max(4, len(self.live) // 4)

    def take_replies(self):
        for i in reversed(range(self.decoding, len(self.live))):
            e = self.live[i]
            e.take_reply(self.policy, self.max_response_tokens)
            if e.env.done:
                self.swap(i, len(self.live) - 1)
                self.finish(self.live.pop())

    def finish(self, episode):
        self.cache.users[episode.slot] -= 1
        if self.on_end:
            self.on_end(episode)

    def admit(self, group):
        """Takes in a new group if there is room for it. Returns whether it did; where nothing else runs it always does."""
        rows, prompt_length = len(self.live) + len(self.outside) + len(group), group[0].dialogue.prompt_length
        prompts, length = sum(map(bool, self.cache.users)) + 1, self.longest(*self.outside)
        fits = self.cache.fits(rows, max(length, self.max_turn_tokens), prompts, prompt_length)
        if self.live or self.outside:
            if rows > self.max_rows or not fits:
                return False
        elif not fits:
            self.cache.clear()  # nothing is running: earlier prompts and rows are not needed
        self.cache.add_prompt(group, len(self.live), length)
        self.outside.extend(group)
        return True

    def enter(self, new_groups):
        """Gives episodes outside a row as long as there is room, runs all that the cache lacks of the prompts of the new
        groups and of the episodes that are not decoding, and samples the first token of the latter's next turn."""
        while self.outside and len(self.live) < max(1, self.max_rows):
            e = self.outside[0]
            if e.reply:
                e.take_reply(self.policy, self.max_response_tokens)
            if e.env.done:
                self.finish(self.outside.popleft())
            elif self.live and not self.cache.fits(len(self.live) + 1, self.longest(e) + self.max_turn_tokens):
                break  # it would have to leave again soon
            else:
                self.live.append(self.outside.popleft())
        self.make_room()
        hidden = prefill(self.policy, self.cache, new_groups, self.live[self.decoding:], self.decoding, self.kernels)
        if self.decoding < len(self.live):
            tokens, log_probs = sample(self.policy, hidden, self.temperature, self.generator)
            first, self.decoding = self.decoding, len(self.live)
            self.settle(first, tokens[:, None].tolist(), log_probs[:, None].tolist())

    def longest(self, *more):
        """Own tokens of the longest row, with the next `steps` ones."""
        return max((e.total() - e.dialogue.prompt_length for e in (*self.live, *more)), default=0) + self.steps

    def make_room(self):
        """Room for the longest row in each row; where the budget is too small for that, rows leave from the back, those
        that wait first, and run again later."""
        while len(self.live) > 1 and not self.cache.fits(len(self.live), self.longest()):
            e = self.live.pop()
            e.cached = e.dialogue.prompt_length
            self.outside.appendleft(e)
        self.decoding = min(self.decoding, len(self.live))
        self.cache.reserve(len(self.live), self.longest())

    def decode(self):
        """The next tokens of all that are within a turn."""
        self.make_room()
        sampled = decode(self.policy, self.cache, self.live[:self.decoding], self.steps, self.temperature, self.generator,
                         self.kernels)
        for e in self.live[:self.decoding]:
            e.cached += self.steps
        self.settle(0, *sampled)

    def settle(self, first, tokens, log_probs):
        """Appends what was sampled for the rows from `first` to the last one that is decoding, lists of lists; rows whose
        turn is over change places with the last ones decoding; from the back: the row that is swapped in is settled."""
        for i in reversed(range(first, self.decoding)):
            e, sampled = self.live[i], list(zip(tokens[i - first], log_probs[i - first]))
            for number, (token, log_prob) in enumerate(sampled, 1):
                if e.add_token(self.policy, token, log_prob, self.max_turn_tokens, self.video_threads):
                    e.cached -= len(sampled) - number  # what came after the end is not part of it
                    self.decoding -= 1
                    self.swap(i, self.decoding)
                    break

    def swap(self, a, b):
        live = self.live
        self.cache.swap(a, b, max(live[i].cached - live[i].dialogue.prompt_length for i in (a, b)))
        live[a], live[b] = live[b], live[a]


def generation_copy(policy, dtype=torch.bfloat16):
    """The policy with linear layers in `dtype`, so that autocast need not cast them for every token. Those of one input lie
    in one tensor, `qkv` and `gate_up`, (weight, bias), for one product. All other weights are shared with the policy."""
    fast = copy.copy(policy)
    fast.hf = copy.deepcopy(policy.hf, {id(t): t for t in (*policy.hf.parameters(), *policy.hf.buffers())})
    fast.language_model, fast.visual = fast.hf.model.language_model, fast.hf.model.visual

    def convert(*linears):
        joined = []
        for name in ("weight", "bias"):
            old = [getattr(linear, name) for linear in linears]
            if old[0] is None:
                joined.append(None)
                continue
            whole = torch.cat([p.detach().to(dtype) for p in old]) if len(old) > 1 else old[0].detach().to(dtype)
            for linear, p, part in zip(linears, old, whole.split([len(p) for p in old])):
                if p.dtype == dtype:
                    p.data = part  # the policy's own, too: no second copy
                setattr(linear, name, torch.nn.Parameter(part, requires_grad=False))
            joined.append(whole)
        return tuple(joined)

    for layer in fast.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.qkv = convert(attention.q_proj, attention.k_proj, attention.v_proj)
        mlp.gate_up = convert(mlp.gate_proj, mlp.up_proj)
        convert(attention.o_proj), convert(mlp.down_proj)
    convert(fast.hf.lm_head)
    return fast


def prefill(policy, cache, new_groups, episodes, first_row, kernels=None):
    """Runs the prompts of new groups and, in the rows from `first_row` on, all tokens of the episodes that the cache
    lacks: one packed sequence. Returns the hidden states from which each episode's next token is sampled, (B, hidden)."""
    fill_features(policy, [e.dialogue for e in (*(e for group in new_groups for e in group), *episodes)])
    pieces = deque((group[0], None, slice(0, group[0].dialogue.prompt_length)) for group in new_groups)
    pieces.extend((e, row, slice(e.cached, e.total())) for row, e in enumerate(episodes, first_row) if e.cached < e.total())
    last = {}  # hidden state of the last token in each row
    while pieces:
        ids, is_image, positions, features, spans = [], [], [], [], []
        while pieces and (not ids or len(ids) + pieces[0][2].stop - pieces[0][2].start <= PREFILL_TOKENS):
            e, row, part = pieces.popleft()
            d = e.dialogue
            turn = [] if row is None else e.turn_ids  # of an episode that had to leave within a turn
            begin = len(ids)
            ids += d.ids[part] + turn
            is_image += d.is_image[part] + [False] * len(turn)
            positions += d.positions[part] + [(p, p, p) for p in range(d.next_position, d.next_position + len(turn))]
            if any(d.is_image[part]):
                seen = sum(d.is_image[:part.start])
                features.append(torch.cat(d.features)[seen:seen + sum(d.is_image[part])])
            spans.append((slice(begin, len(ids)), e, row))
        hidden = (kernels.run_layers if kernels else run_layers)(
            policy,
            torch.tensor([ids], device=policy.device),
            torch.tensor([is_image], device=policy.device),
            torch.cat(features) if features else None,
            torch.tensor(positions, device=policy.device).T[:, None],  # (3, 1, T)
            lambda layer, q, k, v: attend_prefill(cache, layer, q, k, v, spans),
        )
        for span, e, row in spans:
            if row is None:
                cache.hidden[e.slot] = hidden[0, span.stop - 1].clone()  # a view would keep the whole pass
            else:
                last[row], e.cached = hidden[0, span.stop - 1], e.total()
    rows = [last.get(row, cache.hidden[e.slot]) for row, e in enumerate(episodes, first_row)]
    return torch.stack(rows) if rows else None


def attend_prefill(cache, layer, query, key, value, spans):
    """Attention over packed pieces, each (where it is in the pack, episode, its row or None for its prompt): stores keys
    and values; a prompt is causal, and what stands in a row sees the prompt, the row's earlier tokens and, causally,
    itself. query (1, heads, T, D), returns (1, T, heads, D)."""
    prompts, own = cache.prompts[layer], cache.own[layer]
    new, out = torch.stack([key[0], value[0]]).to(own.dtype), []  # (2, kv heads, T, D)
    for span, e, row in spans:
        seen, length = new[:, :, span], span.stop - span.start
        if row is None:
            prompts[:, e.slot, :, :length] = seen
        else:
            prompt_length = e.dialogue.prompt_length
            start = e.cached - prompt_length
            own[:, row, :, start:start + length] = seen
            seen = torch.cat([prompts[:, e.slot, :, :prompt_length], own[:, row, :, :start + length]], dim=2)
        out.append(causal_attention(query[:, :, span].to(own.dtype), seen[None, 0], seen[None, 1]))
    return torch.cat(out, dim=2).transpose(1, 2)


def decode(policy, cache, episodes, steps, temperature, generator=None, kernels=None):
    """Samples the next `steps` tokens of each episode; episode i is in row i and all but its last token is in the cache.
    Returns token ids and log-probabilities, lists (B, steps). With `kernels`, on CUDA, a step is captured once for each
    number of rows, rounded up, and replayed; surplus rows write to their last position, which no real row uses yet."""
    _, rows, _, capacity, _ = cache.own[0].shape
    own = [e.cached - e.dialogue.prompt_length for e in episodes]
    values = {"tokens": ([e.turn_ids[-1] for e in episodes], 0),
              "positions": ([e.dialogue.next_position + len(e.turn_ids) - 1 for e in episodes], 0),
              "own_lengths": (own, capacity - 1),
              "prompt_lengths": ([e.dialogue.prompt_length for e in episodes], 1),
              "slots": ([e.slot * cache.group_size + e.number for e in episodes], -1)}
    B = min(rows, -(-len(episodes) // 4) * 4) if kernels else len(episodes)
    tensor = lambda x, fill: torch.tensor(x + [fill] * (B - len(x)), device=policy.device)
    fresh = {name: tensor(*value) for name, value in values.items()}
    if not kernels:
        P, L = max(e.dialogue.prompt_length for e in episodes), max(own) + steps
        sampled = [decode_step(policy, cache, fresh, P, L, temperature, generator) for _ in range(steps)]
    else:
        if B not in cache.graphs:
            cache.graphs[B] = capture_step(policy, cache, fresh, temperature, generator, kernels)
        graph, state, result = cache.graphs[B]
        for name, value in fresh.items():
            state[name].copy_(value)
        sampled = []
        for _ in range(steps):
            graph.replay()
            sampled.append([x.clone() for x in result])
    return [torch.stack(x, dim=1)[:len(episodes)].tolist() for x in zip(*sampled)]


def capture_step(policy, cache, state, temperature, generator, kernels):
    """A decode step as a CUDA graph: (graph, the state that it reads and changes, what it returns)."""
    state = {name: value.clone() for name, value in state.items()}
    start = {name: value.clone() for name, value in state.items()}
    P, L = cache.prompts[0].shape[3], cache.own[0].shape[3]
    step = lambda: decode_step(policy, cache, state, P, L, temperature, generator, kernels)
    generator_state = (generator or torch.cuda.default_generators[policy.device.index]).get_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up in their first calls
        step()
    torch.cuda.current_stream().wait_stream(stream)
    (generator or torch.cuda.default_generators[policy.device.index]).set_state(generator_state)
    for name, value in start.items():
        state[name].copy_(value)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    cache.graph_pool = cache.graph_pool or torch.cuda.graph_pool_handle()  # one for all: they never run at the same time
    with torch.cuda.graph(graph, pool=cache.graph_pool):
        result = step()
    return graph, state, result


def load_kernels():
    """The module kernels.py. Raises UserError where it cannot run."""
    try:
        import kernels
    except ImportError as error:
        raise UserError(f"kernels.py needs Triton ({error}); --no-cuda_graphs does without") from None
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise UserError("kernels.py needs a C compiler, gcc or clang; --no-cuda_graphs does without")
    return kernels


def decode_step(policy, cache, state, P, L, temperature, generator, kernels=None):
    """One token for each row, without synchronising with the CPU: reads and advances `state`, a dict of (B,) tensors: the
    last tokens, their positions, how many own tokens are cached, the prompts' lengths, and slots: the prompt's slot *
    group_size + the episode's number in the group, -1 for a surplus row. P, L: how many positions of the prompts, and of
    the rows' own tokens, are looked at. Returns token ids and log-probabilities, (B,) each."""
    hidden = (kernels.decode_layers if kernels else decode_layers)(policy, cache, state, P, L)
    tokens, log_probs = sample(policy, hidden, temperature, generator)
    state["tokens"].copy_(tokens)
    state["positions"] += 1
    state["own_lengths"].add_(1).clamp_(max=cache.own[0].shape[3] - 1)
    return tokens, log_probs


def decode_layers(policy, cache, state, P, L):
    """Stores the keys and values of the last tokens in the cache and returns hidden states, (B, hidden). For the arguments
    see decode_step; kernels.py has the one that CUDA runs."""
    own_lengths, slots, device = state["own_lengths"], state["slots"], policy.device
    B = len(slots)
    rows = torch.arange(B, device=device)
    unseen = torch.cat([torch.arange(P, device=device) >= state["prompt_lengths"][:, None],
                        torch.arange(L, device=device) > own_lengths[:, None]], dim=1)[:, None, None]

    def attend(layer, query, key, value):
        """A prompt's keys are read once for all rows that share it; the softmax is over the prompt and the row's own."""
        own, prompts = cache.own[layer], cache.prompts[layer][:, :, :, :P]
        G, heads, D = prompts.shape[1], own.shape[2], own.shape[4]
        own[0][rows, :, own_lengths] = key[:, :, 0].to(own.dtype)
        own[1][rows, :, own_lengths] = value[:, :, 0].to(own.dtype)
        query = query.reshape(B, heads, -1, D).to(own.dtype)  # the heads that share a key are several queries of it
        n = query.shape[2]

        def by_prompt(x):  # (B, heads, n, any) to (G, heads, group * n, any); a surplus row goes nowhere
            x = x.new_zeros(G * cache.group_size + 1, *x.shape[1:]).index_copy(0, slots % (G * cache.group_size + 1), x)
            return x[:-1].view(G, cache.group_size, heads, n, -1).transpose(1, 2).reshape(G, heads, cache.group_size * n, -1)

        def by_row(x):
            x = x.view(G, heads, cache.group_size, n, -1).transpose(1, 2).reshape(G * cache.group_size, heads, n, -1)
            return x[slots.clamp(min=0)]

        scores = torch.cat([by_row(product(by_prompt(query), prompts[0].transpose(2, 3))),
                            product(query, own[0][:B, :, :L].transpose(2, 3))], dim=3)  # (B, heads, n, P + L)
        p = (scores * D ** -0.5).masked_fill(unseen, float("-inf")).softmax(dim=3).to(own.dtype)
        out = by_row(product(by_prompt(p[..., :P]), prompts[1])) + product(p[..., P:], own[1][:B, :, :L])
        return out.to(own.dtype).view(B, 1, -1, D)

    positions = state["positions"].expand(3, B)[..., None]
    return run_layers(policy, state["tokens"][:, None], None, None, positions, attend)[:, 0]


def product(a, b):
    """Batched matrix product in float32, as attention kernels keep their scores: (X, Y, T, D) and (X, Y, D, S)."""
    if not a.is_cuda:
        return a.float() @ b.float()
    if a.dtype == torch.float32:
        return a @ b
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).view(*a.shape[:3], b.shape[3])


def sample(policy, hidden, temperature, generator=None):
    """Samples from softmax(logits / temperature), 0: takes the most likely token. hidden (B, hidden). Returns token ids
    and their log-probabilities (of temperature 1 at 0), (B,) each.

    First a block of the vocabulary is drawn, then a token of it (Gumbel-max), so that few random numbers are needed."""
    weight, hidden = policy.hf.lm_head.weight, hidden / (temperature or 1.0)
    V, B = len(weight), len(hidden)
    if policy.device.type == "cuda":
        with policy.autocast():
            logits = policy.hf.lm_head(hidden)  # (B, V)
        logits = F.pad(logits.float(), (0, -V % BLOCK), value=float("-inf")).view(B, -1, BLOCK).transpose(0, 1)
    else:  # for few rows many small products are faster than one
        whole = V // BLOCK * BLOCK
        blocks = weight[:whole].view(-1, BLOCK, weight.shape[1]).transpose(1, 2)
        logits = torch.bmm(hidden.expand(len(blocks), -1, -1), blocks)  # (blocks, B, BLOCK)
        if whole < V:
            rest = F.pad(hidden @ weight[whole:].T, (0, -V % BLOCK), value=float("-inf"))
            logits = torch.cat([logits, rest[None]])

    def draw(log_p):  # (B, choices)
        if temperature == 0:
            return log_p.argmax(1)
        return (log_p - torch.empty_like(log_p).exponential_(generator=generator).log()).argmax(1)

    most = logits.amax(2)  # (blocks, B)
    log_mass = (most - logits.softmax(2).amax(2).log()).T  # (B, blocks): logsumexp, in less than half the time
    block = draw(most.T if temperature == 0 else log_mass)
    inside = logits[block, torch.arange(B, device=hidden.device)]  # (B, BLOCK)
    token = draw(inside)
    return block * BLOCK + token, inside.gather(1, token[:, None])[:, 0] - log_mass.logsumexp(1)


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
