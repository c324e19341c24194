"""What a model's configuration alone says: sizes of its parts, what passes need, how long a step takes.

The counts follow transformers' Qwen2.5-VL layers and the passes of model.py and generation.py;
bench/bench_plan.py holds those of an update against PyTorch's memory trackers. Memory is in bytes of one GPU.
Times are arithmetic: operations and bytes over an assumed share of what a card's data sheet says."""

from dataclasses import dataclass

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from generation import PREFILL_TOKENS
from model import LOGIT_CHUNK, VISION_BATCH

FLOAT = 4  # bytes of a float32
PATCHES_PER_TOKEN = 4  # the vision tower's, merged into one token of the language model


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model, in parameters and elements, not bytes."""

    total: int  # all parameters
    vision: int  # of the vision tower with its projector: frozen, in each process
    trained: int  # of the language model and the head, or of its adapters
    largest: int  # of the largest trained tensor
    layer: int  # of one layer of the language model
    root: int  # embedding, last norm and head, which FSDP keeps in one group
    layers: int
    hidden: int
    heads: int
    key_width: int  # of a token's keys in a layer, over all their heads
    intermediate: int
    vocabulary: int
    tied: bool  # embedding and head are one tensor
    rank: int  # of the adapters; 0: all weights are trained
    adapted: int  # weights that have an adapter beside them
    adapter_width: int  # a token's numbers between the two matrices of all adapters of a layer
    vision_hidden: int
    vision_intermediate: int

    @property
    def language(self):
        return self.total - self.vision


def sizes_of(model_config, rank=0, targets=()):
    """Sizes of a Qwen2_5_VLConfig, from a model of it on the meta device, which takes no memory."""
    text, vision = model_config.text_config, model_config.vision_config
    with torch.device("meta"):
        hf = Qwen2_5_VLForConditionalGeneration._from_config(model_config, attn_implementation="sdpa")
    count = lambda parameters: sum(p.numel() for p in {id(p): p for p in parameters}.values())
    tied = model_config.tie_word_embeddings
    embedding, layer = text.vocab_size * text.hidden_size, hf.model.language_model.layers[0]
    in_vision = count(hf.model.visual.parameters())
    in_layers = count(hf.model.language_model.layers.parameters())
    root = embedding * (1 if tied else 2) + text.hidden_size
    linear = [m for name, m in layer.named_modules()
              if name.rpartition(".")[2] in targets and isinstance(m, torch.nn.Linear)]
    adapters = text.num_hidden_layers * rank * sum(m.in_features + m.out_features for m in linear)
    head_dim = text.hidden_size // text.num_attention_heads
    return Sizes(
        total=in_vision + in_layers + root, vision=in_vision, trained=adapters if rank else in_layers + root,
        largest=rank * text.intermediate_size if rank else embedding,
        layer=count(layer.parameters()), root=root,
        layers=text.num_hidden_layers, hidden=text.hidden_size, heads=text.num_attention_heads,
        key_width=text.num_key_value_heads * head_dim, intermediate=text.intermediate_size,
        vocabulary=text.vocab_size, tied=tied, rank=rank,
        adapted=text.num_hidden_layers * sum(m.weight.numel() for m in linear) if rank else 0,
        adapter_width=rank * len(linear),
        vision_hidden=vision.hidden_size, vision_intermediate=vision.intermediate_size)


# ------------------------------------------------------------------------------------- a pass of the update
def saved_of_layer(s, tokens, item):
    """What a layer keeps for its backward pass, beside its input."""
    hidden, wide = tokens * s.hidden * item, tokens * s.intermediate * item
    # two norms: in float32, cast, times a weight, each kept; what a frozen weight is multiplied with is not
    norms = (8 if item < FLOAT else 5) - (2 if s.rank else 0)
    # rotated queries, attention's result as the kernel and as the projection has it; keys and values
    attention = 3 * hidden + 2 * tokens * s.key_width * item + tokens * s.heads * FLOAT
    # gate, its activation, up, their product
    return norms * hidden + attention + 4 * wide + tokens * s.adapter_width * item


def pass_moments(s, tokens, item, checkpointing, entropy):
    """What a pass needs beside weights and added-up gradients, at the moments where it can be the most.

    Args:
        tokens: of the pass. item: bytes of a number in the compute dtype.
        checkpointing, entropy: as the flags say.
    Returns: {moment: {category: bytes}}."""
    hidden, wide = tokens * s.hidden * item, tokens * s.intermediate * item
    features = hidden  # of the frames in the pack, at worst all of it
    kept = s.layers * (hidden if checkpointing else saved_of_layer(s, tokens, item))
    head, chunk = s.vocabulary * s.hidden, LOGIT_CHUNK * s.vocabulary
    trained_head = item * head if not s.rank else 0
    # the head: its gradient in float32 (of a frozen one, too); in the compute dtype that of a chunk, while
    # the next one comes, or its logits are there: they, their softmax, their gradients, and the entropy's
    logits = (20 if entropy else 12) * chunk
    of_head = 0 if s.rank else FLOAT * head
    of_head += max(trained_head + logits, 2 * trained_head + (6 if entropy else 2) * chunk)
    at_head = {"activations": kept + 6 * hidden + features, "logits": of_head}
    # the last layer's backward pass: what it kept, and gradients of gate, up and product; the last has gone
    in_layer = saved_of_layer(s, tokens, item) if checkpointing else 0
    at_layer = {"activations": kept + in_layer + 2 * hidden + features + 2 * wide,
                "passing gradients": item * (head if s.tied and not s.rank else 0)}
    # the embedding's gradient, at the end
    at_end = {"activations": features + 2 * hidden,
              "passing gradients": 0 if s.rank else item * head * (2 if s.tied else 1)}
    return {"head": at_head, "layer": at_layer, "end": at_end}


def forward_activations(s, tokens, item):
    """A pass without gradients, in the MLP: the stream, before and after its norm, and what comes next; gate,
    up and their product, and with adapters one more."""
    return tokens * (3 * s.hidden + (4 if s.rank else 3) * s.intermediate) * item


# ------------------------------------------------------------------------------------------------- rollouts
def rollout_activations(s, frame_tokens, item):
    """Of frames or prompts on their way, whichever is more."""
    return max(forward_activations(s, PREFILL_TOKENS, item), vision_activations(s, frame_tokens, item))


def auto_cache(s, item, left, row, rows):
    """Bytes for keys and values where `left` are free for them and what a step needs beside: at least those
    of one episode, `row`, at most those of all `rows`."""
    return max(row, min(left / (1 + decode_activations(s, item)), rows * row))


def vision_activations(s, frame_tokens, item):
    """A batch of frames through the vision tower: the stream, queries, keys and values, and the first two
    rotated in float32, with the products on the way; or the MLP; and the pixels."""
    patches = VISION_BATCH * frame_tokens * PATCHES_PER_TOKEN
    attention = s.vision_hidden * (6 * item + 7 * FLOAT)
    mlp = s.vision_hidden * 3 * item + s.vision_intermediate * 3 * item
    return patches * max(attention, mlp) + patches * 1176 * (FLOAT + item)


def cache_token(s, item):
    """Keys and values of one token."""
    return s.layers * 2 * s.key_width * item


def decode_activations(s, item):
    """Of a decode step, for each byte of the cache: a layer's keys in float32, and scores, in two copies."""
    return FLOAT / item / s.layers / 2 + 2 * FLOAT * 2 * s.heads / cache_token(s, item)


def decode_logits(s, rows, item):
    """Of all rows, in both dtypes, and a copy."""
    return rows * s.vocabulary * (item + 2 * FLOAT)


# ----------------------------------------------------------------------------------- episodes, and their time
ZOOMS = 2  # of an episode: the paper reports about so many a question
TURN_TOKENS = 200  # that a turn says: a guess, for times alone
PROMPT_TEXT = 1_500  # tokens of the system prompt, the question, and the frames' tags


@dataclass(frozen=True)
class Episodes:
    """Tokens and frames of a step's share of a process, by what is expected of an episode."""

    groups: int
    size: int  # episodes a group; 1 in SFT
    frame_tokens: int
    frames: int  # of the overview
    zoomed: int  # ... and of an episode's zooms

    @property
    def prompt(self):
        return self.frames * self.frame_tokens + PROMPT_TEXT

    @property
    def sampled(self):
        return (ZOOMS + 1) * TURN_TOKENS

    @property
    def own(self):
        return self.zoomed * self.frame_tokens + self.sampled

    @property
    def all_frames(self):
        """Distinct ones."""
        return self.groups * (self.frames + self.size * self.zoomed)


def episodes_of(config, model_config, env_config, processes):
    """What a process has of a step, RL's or SFT's, at the largest size of frames."""
    unit = model_config.vision_config.patch_size * model_config.vision_config.spatial_merge_size
    limit = getattr(config, "max_zooms", None)
    zooms = min(ZOOMS, env_config.max_zooms if limit is None else limit)
    return Episodes(-(-config.batch_size // processes), getattr(config, "group_size", 1),
                    max(1, env_config.max_pixels // unit ** 2), env_config.overview_max_frames,
                    zooms * env_config.zoom_max_frames)


# (at least so many GB, name, FLOP/s in bfloat16 without sparsity, bytes/s of its memory): data sheets
CARDS = ((130, "H200", 989e12, 4.8e12), (70, "H100", 989e12, 3.35e12), (44, "L40S", 362e12, 0.864e12),
         (36, "A100 40 GB", 312e12, 1.555e12), (20, "RTX 4090", 165e12, 1.008e12), (0, "T4", 65e12, 0.32e12))
OF_PEAK, OF_BANDWIDTH = 0.4, 0.6  # what is reached of them: assumed
BUS = 20e9  # bytes/s between host and GPU, over PCIe 4: assumed
LINK = 200e9, 25e9  # bytes/s a GPU gets of weights from others, in a machine, and across machines: assumed


def card_of(gpu_bytes):
    """(name, FLOP/s, bytes/s)."""
    return next(card[1:] for card in CARDS if gpu_bytes >= card[0] * 1e9)


def pass_tokens(e, max_tokens):
    """(passes, tokens in all of them) of a step: a prompt once in each pass with episodes of its group."""
    episodes = e.groups * e.size
    if e.size == 1:
        tokens = episodes * (e.prompt + e.own)
        return max(1, -(-tokens // max_tokens)), tokens
    at_once = min(e.size, max(1, (max_tokens - e.prompt) // e.own))
    parts = e.groups * -(-e.size // at_once)
    tokens = parts * e.prompt + episodes * e.own
    return max(1, -(-tokens // max_tokens)), tokens


def flops(s, tokens, length):
    """Of a forward pass: a product and a sum for each weight, and attention over half the length."""
    return tokens * (2 * s.language + 4 * s.layers * s.hidden * length / 2)


def update_seconds(s, e, config, card, shards, across, item, with_reference, offload):
    """{part: seconds} of a step's update."""
    _, peak, bandwidth = card
    passes, tokens = pass_tokens(e, config.max_tokens_per_pass)
    forwards = (2 if s.rank else 3) + config.gradient_checkpointing + with_reference
    updates = -(-config.batch_size // getattr(config, "mini_batch_size", config.batch_size))
    adam = 28 * s.trained / shards
    on_host = getattr(config, "on_host", ())
    weights = item * s.language
    forward = flops(s, tokens, e.prompt + e.own) / (peak * OF_PEAK)
    computing, gathering = forwards * forward, passes * 3 * weights / LINK[across] if shards > 1 else 0.0
    features = e.all_frames * e.frame_tokens * s.hidden * item
    return {"passes": computing,  # weights come beside them: what takes longer counts
            "gathering": max(0.0, gathering - computing),
            "optimizer": updates * (24 * s.trained / BUS if offload else adam / (bandwidth * OF_BANDWIDTH)),
            "reference": max(0.0, passes * weights / BUS - forward) if "reference" in on_host else 0.0,
            "features": 2 * features / BUS if "features" in on_host else 0.0}


def rollout_seconds(s, e, rows, card, item):
    """{part: seconds} of a step's rollouts, `rows` episodes at a time."""
    _, peak, bandwidth = card
    episodes, frames = e.groups * e.size, e.all_frames
    shown = e.groups * e.prompt + episodes * e.zoomed * e.frame_tokens
    vision = 2 * s.vision * frames * e.frame_tokens * PATCHES_PER_TOKEN
    steps = episodes * e.sampled / rows
    read = item * s.language + cache_token(s, item) * (rows * e.own / 2 + -(-rows // e.size) * e.prompt)
    return {"frames and prompts": (flops(s, shown, e.prompt + e.own) + vision) / (peak * OF_PEAK),
            "decoding": steps * read / (bandwidth * OF_BANDWIDTH)}
