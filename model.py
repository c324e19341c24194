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

import copy
import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging as transformers_logging

from common import UserError
from video import Frame
from zoom_env import EnvConfig, Message, ZoomEnv

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
LOGIT_CHUNK = 512  # trained positions whose logits exist at one time


class PolicyError(UserError):
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
