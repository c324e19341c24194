"""What a model's configuration alone says: the sizes of its parts, and the memory of passes and rollouts.

The counts follow transformers' Qwen2.5-VL layers and the passes of model.py and generation.py;
bench/bench_plan.py holds those of an update against PyTorch's memory trackers. All are bytes of one GPU, but
for Sizes, which are numbers of elements. `s` is a Sizes, `item` the bytes of a number in the compute dtype.
"""

from dataclasses import dataclass

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from generation import PREFILL_TOKENS
from model import LOGIT_CHUNK, VISION_BATCH

FLOAT = 4  # bytes of a float32
PATCHES_PER_TOKEN = 4  # the vision tower's, merged into one token of the language model
PATCH = 1176  # numbers of a patch's pixels
RESERVE = 3e9  # of each GPU: CUDA's context, workspaces of libraries, gaps between tensors


# ------------------------------------------------------------------------------------------ sizes of a model
@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters and of elements of a model, not bytes."""

    total: int  # all parameters
    vision: int  # of the vision tower with its projector: frozen, in each process
    trained: int  # of the language model and the head, or of its adapters
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
        """Parameters of the language model and the head."""
        return self.total - self.vision

    @property
    def head(self):
        """Parameters of the head, or of the embedding: the largest tensor."""
        return self.vocabulary * self.hidden


def sizes_of(model_config, rank=0):
    """Sizes of a Qwen2_5_VLConfig, from a model of it on the meta device, which takes no memory. Adapters, of
    a rank above 0, stand beside all linear layers of the language model's decoder (scale/lora.py)."""
    def count(module):
        return sum(p.numel() for p in module.parameters())

    text, vision = model_config.text_config, model_config.vision_config
    with torch.device("meta"):
        hf = Qwen2_5_VLForConditionalGeneration._from_config(model_config, attn_implementation="sdpa")
    in_vision, in_layers = count(hf.model.visual), count(hf.model.language_model.layers)
    layer = hf.model.language_model.layers[0]
    tied = model_config.tie_word_embeddings
    root = text.vocab_size * text.hidden_size * (1 if tied else 2) + text.hidden_size
    trained, adapted, adapter_width = in_layers + root, 0, 0
    if rank:
        linear = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        trained = text.num_hidden_layers * rank * sum(m.in_features + m.out_features for m in linear)
        adapted = text.num_hidden_layers * sum(m.weight.numel() for m in linear)
        adapter_width = rank * len(linear)
    return Sizes(
        total=in_vision + in_layers + root, vision=in_vision, trained=trained, layer=count(layer), root=root,
        layers=text.num_hidden_layers, hidden=text.hidden_size, heads=text.num_attention_heads,
        key_width=text.num_key_value_heads * text.hidden_size // text.num_attention_heads,
        intermediate=text.intermediate_size, vocabulary=text.vocab_size, tied=tied, rank=rank,
        adapted=adapted, adapter_width=adapter_width, vision_hidden=vision.hidden_size,
        vision_intermediate=vision.intermediate_size)


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
    """What a pass of `tokens` needs beside weights and added-up gradients, at the two moments of most.

    checkpointing, entropy: whether layers are computed twice, whether the loss has the entropy.
    Returns two dicts {category: bytes}: of the head, and of the last layer's backward pass."""
    hidden, wide = tokens * s.hidden * item, tokens * s.intermediate * item
    features = hidden  # of the frames in the pass, at worst all of it
    kept = s.layers * (hidden if checkpointing else saved_of_layer(s, tokens, item))
    # logits of a chunk of positions, their softmax and their gradients, and what the entropy needs
    chunk = LOGIT_CHUNK * s.vocabulary
    logits = (20 if entropy else 12) * chunk
    if not s.rank:  # the head's gradient is added up in float32; that of a chunk is there beside the logits,
        later = item * s.head + (6 if entropy else 2) * chunk  # or beside the one of the chunk before
        logits = (FLOAT + item) * s.head + max(logits, later)
    at_head = {"activations": kept + 6 * hidden + features, "logits": logits}
    # what the last layer kept, and the gradients of gate, up and product; what the layer kept last has gone
    in_layer = saved_of_layer(s, tokens, item) if checkpointing else 0
    at_layer = {"activations": kept + in_layer + 2 * hidden + features + 2 * wide,
                "passing gradients": item * s.head if s.tied and not s.rank else 0}
    return at_head, at_layer


def forward_activations(s, tokens, item):
    """A pass without gradients, in the MLP: the stream, before and after its norm, and what comes next; gate,
    up and their product, and with adapters one more."""
    return tokens * (3 * s.hidden + (4 if s.rank else 3) * s.intermediate) * item


# ------------------------------------------------------------------------------------------------- rollouts
def rollout_activations(s, frame_tokens, item):
    """Of frames or prompts on their way, whichever is more."""
    return max(forward_activations(s, PREFILL_TOKENS, item), vision_activations(s, frame_tokens, item))


def vision_activations(s, frame_tokens, item):
    """A batch of frames through the vision tower: the stream, queries, keys and values, and the first two
    rotated in float32, with the products on the way; or the MLP; and the pixels."""
    patches = VISION_BATCH * frame_tokens * PATCHES_PER_TOKEN
    attention = s.vision_hidden * (6 * item + 7 * FLOAT)
    mlp = s.vision_hidden * 3 * item + s.vision_intermediate * 3 * item
    return patches * max(attention, mlp) + patches * PATCH * (FLOAT + item)


def cache_token(s, item):
    """Keys and values of one token."""
    return s.layers * 2 * s.key_width * item


def auto_cache(s, item, left, tokens, rows):
    """The cache that takes what is `left` for it and for the decode step: at least that of one episode of so
    many `tokens`, at most that of all `rows`."""
    row = tokens * cache_token(s, item)
    return max(row, min(left / (1 + decode_activations(s, item)), rows * row))


def decode_activations(s, item):
    """Of a decode step, for each byte of the cache: a layer's keys in float32, and scores, in two copies."""
    return FLOAT / item / s.layers / 2 + 2 * FLOAT * 2 * s.heads / cache_token(s, item)


def decode_logits(s, rows, item):
    """Of all rows, in both dtypes, and a copy."""
    return rows * s.vocabulary * (item + 2 * FLOAT)


# ------------------------------------------------------------------------------------------------- episodes
ZOOMS = 2  # of an episode: the paper reports about so many a question
PROMPT_TEXT = 1_500  # tokens of the system prompt, the question, and the frames' tags


def frame_tokens_of(model_config, env_config):
    """Tokens of the largest frame."""
    vision = model_config.vision_config
    return max(1, env_config.max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2)


def longest_episode(env_config, frame_tokens, config):
    """Tokens of the longest episode that a RolloutConfig lets be."""
    return env_config.overview_max_frames * frame_tokens + PROMPT_TEXT + config.max_response_tokens


@dataclass(frozen=True)
class Episodes:
    """What a process plays or trains on in a step, by what is expected of an episode."""

    groups: int
    size: int  # episodes a group; 1 in SFT
    frames: int  # of the overview, which a group shares
    zoomed: int  # frames of an episode's zooms

    @property
    def all_frames(self):
        """Distinct ones of a step."""
        return self.groups * (self.frames + self.size * self.zoomed)

    def frames_of(self, rows):
        """Distinct ones of `rows` episodes that are played at one time."""
        return -(-rows // self.size) * self.frames + rows * self.zoomed


def episodes_of(config, env_config, processes):
    """Episodes of a process in a step of RL or SFT."""
    zooms = min(ZOOMS, env_config.max_zooms)
    return Episodes(-(-config.batch_size // processes), getattr(config, "group_size", 1),
                    env_config.overview_max_frames, zooms * env_config.zoom_max_frames)
