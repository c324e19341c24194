"""The policy: a Qwen2.5-VL checkpoint, dialogues as the model reads them, and log-probabilities for training.

The decoder layers are transformers' own; what is ours is everything around them:

- `encode` is the only function that turns messages into token ids, a mask and pixels. SFT, RL and evaluation
  all use it. Ids that were sampled are appended as they are, never decoded and encoded again. The mask marks
  the tokens that the policy produces: its text, and its end-of-turn token. After </video_zoom> generation
  stops, so there `encode` writes the end-of-turn token itself and it is not trained.
- `pack` lays pieces of dialogues, prompts and replies, one behind the other as one sequence without padding:
  for training, where the prompt of a group is computed once for all its rollouts, and for the prefill of
  generation.
- `Policy.forward` is the pass from a pack to log pi(token | everything before) at temperature T, for the
  trained tokens only: the vocabulary's logits are computed at those positions, in chunks, and once more in
  the backward pass instead of being kept.

Precision: all compute weights and the residual stream are in one dtype, `--dtype`, for sampling, scoring,
reference and evaluation alike. Float32 are norms, softmax and attention scores inside, everything from the
logits on, and the master weights, which the optimizer changes (training/weights.py) and from which the
compute weights are cast after each step. No autocast.
"""

import copy
import hashlib
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging as transformers_logging

from common import UserError
from protocols import make_env, protocol_of, with_settings
from video import Frame
from zoom_env import Message

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
LOGIT_CHUNK = 512  # trained positions whose logits exist at one time
VISION_BATCH = 64  # frames in one pass of the vision tower


class PolicyError(UserError):
    """A checkpoint that cannot be loaded; the message names it and what to do."""


# ------------------------------------------------------------------------------------------------- the policy
class Policy(torch.nn.Module):
    """A Qwen2.5-VL model with its tokenizer, image processor and the environment settings of its training.

    `hf` is transformers' model and owns all weights, which are of one dtype. What another base model has
    otherwise (names of its parts, the unit of a frame, sizes of heads) is said here, its chat template in
    `encode`, what its vision tower takes and gives in `frame_features`."""

    def __init__(self, hf, tokenizer, image_processor, env_config):
        super().__init__()
        self.hf, self.tokenizer, self.image_processor = hf, tokenizer, image_processor
        self.env_config = replace(env_config, frame_unit=self.frame_unit)
        self.weights_version = 0  # changes when they come to lie elsewhere: captured steps read fixed memory
        self.features_device = None  # where features are kept; None: where they are computed
        self.features = WeakValueDictionary()  # of frames, as long as a dialogue holds them
        self.language_model.config._attn_implementation = "zoom"  # `_attention` below
        # the tokens that frame a message and a picture
        special = {t: tokenizer.convert_tokens_to_ids(t) for t in
                   ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")}
        if missing := [t for t, i in special.items() if i is None or i == tokenizer.unk_token_id]:
            raise PolicyError(f"the tokenizer has no {', '.join(missing)}; name a Qwen2.5-VL checkpoint")
        self.im_start, self.im_end, self.vision_start, self.vision_end, self.image_pad = special.values()
        # models pad the vocabulary beyond the tokenizer's, which must not be the larger one
        vocabulary, rows = tokenizer.get_vocab(), hf.lm_head.out_features
        if (largest := max(vocabulary.values())) >= rows:
            raise PolicyError(f"the tokenizer has ids up to {largest}, the embedding only {rows} rows; "
                              "name the checkpoint with its own tokenizer")
        # where a turn may end: only a token with ">" in it makes us look for the end of a call in the text
        self.can_close_tag = [False] * rows
        for token, i in vocabulary.items():
            self.can_close_tag[i] = ">" in token
        ends = hf.generation_config.eos_token_id  # None, an id or several
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if not all(type(i) is int for i in ends):
            raise PolicyError(f"generation_config.json: eos_token_id must be one id or several, not {ends}")
        self.end_tokens = {*ends, self.im_end, vocabulary.get("<|endoftext|>", self.im_end)}  # of a turn

    @property
    def language_model(self):
        return self.hf.model.language_model

    @property
    def visual(self):
        return self.hf.model.visual

    @property
    def head(self):
        return self.hf.lm_head

    @property
    def frame_unit(self):
        """Sides of frames are multiples of it: an image token is a square of so many pixels."""
        return self.visual.config.patch_size * self.visual.config.spatial_merge_size

    @property
    def head_dim(self):
        return self.language_model.layers[0].self_attn.head_dim

    @property
    def device(self):
        return self.head.weight.device

    @property
    def dtype(self):
        """Of the compute weights; those in shards of a policy that trains are float32 master weights."""
        return self.visual.dtype

    def tokenize(self, text):
        """The ids of a text, which never turns into a special token, whoever wrote it."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def freeze_vision(self):
        """The vision encoder and its projector are not trained. Returns the policy."""
        self.visual.requires_grad_(False)
        return self

    def frozen_copy(self, instead=None):
        """The policy as it is now, without gradients and with the same vision tower: the reference. instead:
        {id of a parameter: what takes its place}."""
        same = {id(self.visual): self.visual}  # deepcopy's memo: for what it takes these, without a copy
        hf = copy.deepcopy(self.hf, same | (instead or {})).eval().requires_grad_(False)
        return Policy(hf, self.tokenizer, self.image_processor, self.env_config)

    def checkpoint_layers(self):
        """Gradient checkpointing: each layer is computed again in the backward pass, not kept."""
        enable = getattr(self.hf, "activation_checkpointing_enable", None)  # its name from transformers 5.2x
        (enable or self.hf.gradient_checkpointing_enable)({"use_reentrant": False})

    def forward(self, pack, attend, predictors, targets, temperature=1.0, entropy=False):
        """Log-probabilities of `targets`, each predicted at a place of the pack, and the entropies there.

        Args:
            pack: a Pack, see `pack`.
            attend: who sees whom, see `hidden_states`.
            predictors, targets: (N,) places in the pack, and the ids that are predicted there.
        Returns: two float32 tensors (N,), the second None without `entropy`."""
        hidden = self.hidden_states(pack.ids, pack.positions, attend, pack.is_image, pack.features)
        return ScoreChunks.apply(self, hidden[0, predictors], self.head.weight, targets, temperature, entropy)

    def hidden_states(self, ids, positions, attend, is_image=None, features=None):
        """The language model's last hidden states, (B, T, hidden).

        Args:
            ids: (B, T).
            positions: (3, B, T), time, row and column for the rotary embedding.
            attend: the attention of each layer, attend(number of the layer, query (B, heads, T, D), key and
                value (B, kv heads, T, D)) -> (B, T, heads, D); queries and keys are rotated already.
            is_image, features: (B, T), and (number of image tokens, hidden) in reading order."""
        lm = self.language_model
        # the embeddings, with the frames' features at their tokens
        hidden = lm.embed_tokens(ids)
        if features is not None:
            hidden = hidden.masked_scatter(is_image[..., None], features.to(hidden.dtype))
        # the layers
        rotary = lm.rotary_emb(hidden, positions)  # angles in float32, cosines and sines in the compute dtype
        for layer in lm.layers:
            hidden = layer(hidden, position_embeddings=rotary, attend=attend)
        return lm.norm(hidden)

    def logits(self, hidden, temperature=1.0, transposed=False):
        """Float32 logits divided by the temperature, (N, vocabulary): sampling and scoring share them.
        hidden (N, hidden). transposed: (vocabulary, N), which takes less time on a CPU if N is small."""
        logits = F.linear(self.head.weight, hidden) if transposed else self.head(hidden)
        return logits.float() if temperature == 1 else logits.float() / temperature

    def score(self, hidden, targets, temperature, entropy):
        """A chunk of `forward`: log-probabilities of `targets` (N,) after `hidden` (N, hidden), entropies."""
        log_p = F.log_softmax(self.logits(hidden, temperature), dim=-1)  # (N, vocabulary)
        chosen = log_p.gather(1, targets[:, None])[:, 0]
        return chosen, -(log_p.exp() * log_p).sum(-1) if entropy else None


class ScoreChunks(torch.autograd.Function):
    """`Policy.score`, LOGIT_CHUNK positions at a time, forward and once more backward. The head's gradient is
    added up in float32: autograd would add the chunks in the compute dtype (1% off at 64 chunks)."""

    @staticmethod
    def forward(ctx, policy, hidden, weight, targets, *how):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.policy, ctx.how = policy, how
        parts = zip(hidden.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK))
        log_probs, entropies = zip(*(policy.score(h, t, *how) for h, t in parts))
        return torch.cat(log_probs), torch.cat(entropies) if how[-1] else None

    @staticmethod
    def backward(ctx, *gradients):
        hidden, weight, targets = ctx.saved_tensors
        of_hidden, trained = torch.empty_like(hidden), weight.requires_grad
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if trained else None
        for first in reversed(range(0, len(hidden), LOGIT_CHUNK)):  # the order of autograd
            chunk = slice(first, first + LOGIT_CHUNK)
            with torch.enable_grad():
                h = hidden[chunk].detach().requires_grad_()
                scores = [x for x in ctx.policy.score(h, targets[chunk], *ctx.how) if x is not None]
            given = [g[chunk] for g in gradients if g is not None]
            inputs = (h, ctx.policy.head.weight) if trained else (h,)
            of_hidden[chunk], *of_head = torch.autograd.grad(scores, inputs, given)
            for g in of_head:
                of_weight += g
        return None, of_hidden, of_weight.to(weight.dtype) if trained else None, None, None, None


def _attention(module, query, key, value, attention_mask=None, attend=None, **kwargs):
    """What transformers' layers call: `attend` decides who sees whom; without it (`generate`), plain SDPA."""
    if attend is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return attend(module.layer_idx, query, key, value), None


AttentionInterface.register("zoom", _attention)


# --------------------------------------------------------------------------------- dialogue to ids and pixels
@dataclass
class Dialogue:
    """A conversation as the model reads it. ids, trained, is_image and positions have one entry a token,
    frames and features one a frame, sampled_log_probs one a sampled token."""

    ids: list = field(default_factory=list)
    trained: list = field(default_factory=list)  # True for a token that the policy produced
    is_image: list = field(default_factory=list)
    positions: list = field(default_factory=list)  # (temporal, height, width) for the rotary embedding
    next_position: int = 0
    frames: list = field(default_factory=list)  # Frame, in the order of their tokens
    features: list = field(default_factory=list)  # (tokens, hidden) of each frame, as far as computed
    prompt_length: int = 0  # tokens before the first assistant turn: shared by the rollouts of a question
    sampled_log_probs: list = field(default_factory=list)  # of the sampled tokens, in order
    advantage: float = 0.0  # of all its sampled tokens, set by rl.py
    old_log_probs: list = field(default_factory=list)  # of the sampled tokens under the policy that played
    mismatch: float = 0.0  # its mean train-inference mismatch, where log-probabilities are recomputed

    def fork(self):
        """An independent copy, as an episode of a group goes on from the shared prompt."""
        return Dialogue(**{f.name: copy.copy(getattr(self, f.name)) for f in fields(self)})

    def add(self, ids, trained=False):
        self.ids += ids
        self.trained += [trained] * len(ids)
        self.is_image += [False] * len(ids)
        self.positions += [(p, p, p) for p in range(self.next_position, self.next_position + len(ids))]
        self.next_position += len(ids)

    def add_frame(self, frame, image_pad, unit):
        """One image: its tokens share a time, and stand at their rows and columns (M-RoPE, arXiv 2409.12191);
        what follows goes on after the largest of them."""
        rows, columns = (side // unit for side in frame.image.shape[1:])
        self.ids += [image_pad] * (rows * columns)
        self.trained += [False] * (rows * columns)
        self.is_image += [True] * (rows * columns)
        p = self.next_position
        self.positions += [(p, p + r, p + c) for r in range(rows) for c in range(columns)]
        self.next_position += max(rows, columns)
        self.frames.append(frame)


@dataclass
class Sampled:
    """An assistant turn as it was sampled."""

    ids: list
    log_probs: list


def encode(policy, messages, dialogue=None, learn=True, rules=None):
    """Appends messages to a dialogue (a new one by default) in Qwen's chat template and returns it:

        <|im_start|>user\\n text and <|vision_start|> image tokens <|vision_end|> in turn <|im_end|>\\n

    After a user message that ends `messages` the header of the assistant's turn follows, ready to generate.
    An assistant message holds either its text or a Sampled. `learn` says whether what the assistant produced
    is trained. `rules`: a ZoomEnv, or its class, that says how turns end; by default that of the policy's
    protocol."""
    dialogue = dialogue or Dialogue()
    rules = rules or protocol_of(policy.env_config)
    for i, message in enumerate(messages):
        # what the policy said, without the header, which stands there already
        if message.role == "assistant":
            said = message.content[0]
            produced, appended = end_turn(policy, said, rules)
            dialogue.add(produced.ids, trained=learn)
            dialogue.add(appended)
            if isinstance(said, Sampled):
                dialogue.sampled_log_probs += produced.log_probs
            continue
        # what it is told and shown: text in one piece between frames, as pieces would be other tokens
        dialogue.add([policy.im_start])
        text = message.role + "\n"
        for item in message.content:
            if isinstance(item, Frame):
                dialogue.add(policy.tokenize(text) + [policy.vision_start])
                dialogue.add_frame(item, policy.image_pad, policy.frame_unit)
                dialogue.add([policy.vision_end])
                text = ""
            else:
                text += item
        dialogue.add(policy.tokenize(text) + [policy.im_end] + policy.tokenize("\n"))
        # the header of the assistant's turn
        if message.role == "user" and (i + 1 == len(messages) or messages[i + 1].role == "assistant"):
            dialogue.add([policy.im_start] + policy.tokenize("assistant\n"))
            dialogue.prompt_length = dialogue.prompt_length or len(dialogue.ids)
    return dialogue


def replay(policy, row, root="."):
    """A trajectory row, for SFT, as a Dialogue: what the policy said is in the row, what it saw is replayed
    by the environment (with `max_zooms` and `protocol` of the row's provenance, where it names them).

    Returns (dialogue, env). Raises VideoError, and ValueError if the turns do not fit the episode."""
    made = row.get("provenance") or {}
    settings = {name: made[name] for name in ("max_zooms", "protocol") if name in made}
    env = make_env(row["question"], with_settings(policy.env_config, settings), root)
    dialogue = encode(policy, env.reset(), rules=env)
    for i, (text, is_learned) in enumerate(zip(row["turns"], row["learn"], strict=True)):
        if env.done:
            raise ValueError(f"the episode is over after {i} of {len(row['turns'])} turns")
        text = until_call(text, env.tools)
        encode(policy, [Message("assistant", [text])], dialogue, learn=is_learned, rules=env)
        encode(policy, env.step(text), dialogue, rules=env)
    if not env.done:
        raise ValueError("the episode does not end with the last turn")
    return dialogue, env


# ------------------------------------------------------------------------------------------- how a turn ends
# A turn ends with an end token, after a whole call such as </video_zoom>, or where it is cut off at a limit.
# The rule for the end token: it is trained if it was sampled, not if it was appended. (The released protocol
# trains an appended one, too; its log-probability of sampling is None.) A text is encoded as if it had been
# sampled: with an end token, but for one that ends with a call, after which nothing more is sampled.
def stop_strings(tools):
    """After these a call is complete, and sampling stops."""
    return tuple(f"</{tag}>" for tag in tools)


def until_call(text, tools):
    """A turn's text up to the end of its first call, where sampling would have stopped."""
    ends = [text.index(stop) + len(stop) for stop in stop_strings(tools) if stop in text]
    return text[:min(ends, default=None)]


def turn_is_over(policy, ids, rules):
    """Whether a turn ends with the last of its sampled `ids`."""
    if ids[-1] in policy.end_tokens:
        return True
    if not policy.can_close_tag[ids[-1]]:
        return False
    stops = stop_strings(rules.tools)
    longest = max(map(len, stops), default=1)  # characters, each of a token at most
    tail = policy.tokenizer.decode(ids[-longest:])
    return any(stop in tail for stop in stops)


def end_turn(policy, said, rules):
    """The tokens with which an assistant turn, a text or Sampled, stands in a dialogue: (Sampled of those
    that the policy produced, ids that are appended)."""
    if isinstance(said, Sampled):
        # the protocol drops ids above its largest one
        kept = [i for i, token in enumerate(said.ids) if token <= rules.largest_id]
        ids, log_probs = [said.ids[i] for i in kept], [said.log_probs[i] for i in kept]
        trains_end = rules.trains_appended_end and policy.im_end not in ids
    else:
        ids = policy.tokenize(said)
        log_probs = [None] * len(ids)
        trains_end = rules.trains_appended_end or not said.endswith(stop_strings(rules.tools))
    if trains_end:
        ids.append(policy.im_end)
        log_probs.append(None)
    appended = policy.tokenize(rules.after_turn)
    if not ids or ids[-1] != policy.im_end:
        appended = [policy.im_end, *appended]
    return Sampled(ids, log_probs), appended


def turn_text(policy, ids, rules):
    """What the environment reads of a turn's sampled `ids`: the text without the end token."""
    ids = [token for token in ids if token <= rules.largest_id]
    if ids and ids[-1] in policy.end_tokens:
        ids.pop()
    return policy.tokenizer.decode(ids, skip_special_tokens=rules.skips_special)


# ------------------------------------------------------------------------------------------- vision features
def frame_features(policy, frames):
    """Vision features of frames, each (tokens, hidden), on `policy.features_device`. A frame whose
    image equals another one, or one whose features are still held, is neither computed nor kept again."""
    digest = lambda image: (image.shape, hashlib.sha256(image.contiguous().numpy()).digest())
    looks = [digest(frame.image) for frame in frames]
    features = {look: policy.features.get(look) for look in looks}
    missing = [(look, f.image) for look, f in dict(zip(looks, frames)).items() if features[look] is None]
    for i in range(0, len(missing), VISION_BATCH):
        keys, images = zip(*missing[i:i + VISION_BATCH])
        # to patches, without resizing: frames have the policy's sizes; then through encoder and projector
        pixels = policy.image_processor([*images], do_resize=False, return_tensors="pt")
        grid = pixels["image_grid_thw"].to(policy.device)  # (frames, 3): time, height and width in patches
        output = policy.visual(pixels["pixel_values"].to(policy.device, policy.dtype), grid_thw=grid)
        # a token is a square of patches, merged by the projector
        sizes = (grid.prod(-1) // policy.visual.config.spatial_merge_size ** 2).tolist()
        parts = output.pooler_output.split(sizes)  # each on its own: a view would keep them all
        features.update((k, part.to(policy.features_device, copy=True)) for k, part in zip(keys, parts))
    policy.features.update(features)
    return [features[look] for look in looks]


def fill_features(policy, dialogues):
    """Computes the features that the dialogues still lack and keeps them there. The vision tower is frozen in
    SFT and RL, so they serve generation and every later pass."""
    missing = [d.frames[len(d.features):] for d in dialogues]
    with torch.no_grad():
        features = iter(frame_features(policy, [frame for frames in missing for frame in frames]))
    for d, frames in zip(dialogues, missing):
        found = [next(features) for _ in frames]
        if len(d.features) < len(d.frames):  # a dialogue that is named twice takes them once
            d.features += found


# ---------------------------------------------------------------------------------------------------- packing
@dataclass
class Pack:
    """Pieces of dialogues, one behind the other, as one sequence of T tokens."""

    ids: torch.Tensor  # (1, T)
    is_image: torch.Tensor  # (1, T)
    positions: torch.Tensor  # (3, 1, T)
    features: torch.Tensor | None  # (image tokens, hidden)
    spans: list  # where each piece is, a slice


class Piece(NamedTuple):
    """Tokens `start` to `stop` of a dialogue that has its features."""

    dialogue: Dialogue
    start: int
    stop: int


def pack(policy, pieces):
    """Packs Pieces, one behind the other.

    Token t of a dialogue is at place span.start + t - start. A piece keeps the positions that it has in its
    dialogue, so where it stands in the pack does not matter; what it sees is decided by attention
    (`attend_pieces`). Features are those of the piece's image tokens: the ones before `start` belong to
    another piece."""
    ids, is_image, positions, features, spans = [], [], [], [], []
    for d, start, stop in pieces:
        spans.append(slice(len(ids), len(ids) + stop - start))
        ids += d.ids[start:stop]
        is_image += d.is_image[start:stop]
        positions += d.positions[start:stop]
        number = sum(d.is_image[start:stop])
        if number:
            before = sum(d.is_image[:start])
            features.append(torch.cat(d.features)[before:before + number].to(policy.device))
    tensor = partial(torch.tensor, device=policy.device)
    return Pack(tensor([ids]), tensor([is_image]), tensor(positions).T[:, None],
                torch.cat(features) if features else None, spans)


def attend_pieces(query, key, value, spans, before):
    """Attention in a pack: a piece sees, causally, itself, and in front of it what `before` says.

    Args:
        query: (1, heads, T, D); key and value: (1, kv heads, T, D).
        before: before(number of the piece) -> (key, value), each (1, kv heads, S, D), or None.
    Returns: (1, T, heads, D)."""
    out = []
    for i, span in enumerate(spans):
        q, k, v = query[:, :, span], key[:, :, span], value[:, :, span]
        earlier = before(i)
        if earlier is not None:
            earlier_k, earlier_v = earlier
            k, v = torch.cat([earlier_k, k], dim=2), torch.cat([earlier_v, v], dim=2)
        # the queries are the last of the keys; this mask takes no memory and lets CUDA use flash attention
        seen = causal_lower_right(q.shape[2], k.shape[2])
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True))
    return torch.cat(out, dim=2).transpose(1, 2)


# ---------------------------------------------------------------------------- log-probabilities, for training
def token_log_probs(policy, groups, temperature=1.0, entropy=False):
    """Log-probabilities of the trained tokens of dialogues, and the entropies where they were predicted.

    All of them run as one packed sequence, a group's prompt once, seen by all that follow from it:

        prompt A | rest of A1 | rest of A2 | rest of A3 | prompt B | rest of B1 | ..

    Args:
        groups: lists of dialogues that share their first `prompt_length` tokens; [[d] for d in dialogues] for
            no group.
        entropy: whether to compute entropies too (else None).
    Returns: (N,) tensors over all trained tokens, dialogue after dialogue."""
    pieces, prompt_of = [], []  # pieces of the pack, and for each the number of the piece that is its prompt
    predictors, targets = [], []  # the place in the pack that predicts, and the id that it has to predict
    length = 0
    for group in groups:
        # the prompt, once for the group, unless there is only one to use it
        shared = group[0].prompt_length if len(group) > 1 else 0
        prompt, prompt_start = None, None  # the number of its piece, its place in the pack
        if shared:
            prompt, prompt_start = len(pieces), length
            pieces.append(Piece(group[0], 0, shared))
            prompt_of.append(None)
            length += shared
        for d in group:
            # what follows it: token t is at `base + t`, and of the prompt at `prompt_start + t`; token t is
            # predicted by the place of t - 1, which for the first of a reply is the last of the prompt
            assert d.ids[:shared] == group[0].ids[:shared] and not any(d.trained[:shared])
            base = length - shared
            for t, trained in enumerate(d.trained):
                if trained:
                    predictors.append(base + t - 1 if t > shared else prompt_start + t - 1)
                    targets.append(d.ids[t])
            pieces.append(Piece(d, shared, len(d.ids)))
            prompt_of.append(prompt)
            length += len(d.ids) - shared
    # one pass, in which each piece sees itself and its prompt
    packed = pack(policy, pieces)

    def attend(layer, query, key, value):
        def before(i):
            if prompt_of[i] is None:
                return None
            span = packed.spans[prompt_of[i]]
            return key[:, :, span], value[:, :, span]
        return attend_pieces(query, key, value, packed.spans, before)

    tensor = partial(torch.tensor, device=policy.device, dtype=torch.long)
    return policy(packed, attend, tensor(predictors), tensor(targets), temperature, entropy)


def packed_length(group):
    """Tokens that one group takes in `token_log_probs`."""
    shared = group[0].prompt_length if len(group) > 1 else 0
    return shared + sum(len(d.ids) - shared for d in group)


def split_by_tokens(groups, max_tokens):
    """Batches of groups, each of at most `max_tokens` packed tokens, but of one dialogue at least; a group
    that is larger is divided."""
    batches, room = [], 0
    for group in groups:
        while group:
            # as many of the group as go into one batch
            size = len(group)
            while size > 1 and packed_length(group[:size]) > max_tokens:
                size -= 1
            part, group = group[:size], group[size:]
            # into the last batch, or a new one
            if packed_length(part) > room:
                batches.append([])
                room = max_tokens
            batches[-1].append(part)
            room -= packed_length(part)
    return batches
