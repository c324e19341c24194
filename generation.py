"""Tokens for many rows at once: the KV cache, prefill of prompts and replies, the decode step, sampling.

A row is one episode's dialogue; the rows of a group share a question, and so their prompt. What a row's next
token depends on lies in two caches: `prompts` holds each prompt once, `own` what followed it in each row. New
prompts and the environment's replies run as one packed sequence (`prefill`); after that every row that is
within a turn gets one token a step (`decode_hidden`, `sample`).

A step is plain PyTorch over transformers' layers. With `compile` it goes through torch.compile, on any
device, and where launching costs more than computing (CUDA) a whole step is captured as one graph. What is
compiled is the function that runs without, so tests on a CPU see what a GPU runs; and before the first
rollout training/decoder_check.py compares it with the pass of training.
"""

from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from common import capture_graph, has_graphs, warn
from model import Dialogue, Piece, attend_pieces, fill_features, pack

PREFILL_TOKENS = 16_384  # tokens of prompts and replies in one pass
ROW_UNIT = 4  # a compiled step has a multiple of so many rows; surplus ones compute what nobody reads
BLOCK = 512  # tokens of the vocabulary that are one block in sampling


@dataclass
class Row:
    """A dialogue that is being continued, with what is sampled of its next turn."""

    dialogue: Dialogue
    turn_ids: list = field(default_factory=list)
    turn_log_probs: list = field(default_factory=list)
    place: int = 0  # of its prompt in the cache
    number: int = 0  # among the rows of its group, which share the prompt
    cached: int = 0  # tokens, from the start, whose keys and values are in the cache; at least the prompt

    @property
    def prompt_length(self):
        return self.dialogue.prompt_length

    @property
    def total(self):
        """Tokens, with those of the turn."""
        return len(self.dialogue.ids) + len(self.turn_ids)

    @property
    def own_length(self):
        """Tokens after the prompt, with those of the turn."""
        return self.total - self.prompt_length

    def so_far(self):
        """The dialogue with the turn, as far as it is sampled."""
        dialogue = self.dialogue.fork()
        dialogue.add(self.turn_ids)
        return dialogue


# ------------------------------------------------------------------------------------------------------ cache
class Extent(NamedTuple):
    """How large a part of the cache is: `number` places or rows of `capacity` tokens."""

    number: int
    capacity: int

    @property
    def tokens(self):
        return self.number * self.capacity

    def with_room_for(self, other):
        """The smallest Extent that holds both."""
        return Extent(max(self.number, other.number), max(self.capacity, other.capacity))


def extent_of(tensors):
    """The Extent of a part of the cache, (keys and values) for each layer."""
    keys, _ = tensors[0]
    return Extent(keys.shape[0], keys.shape[2])


class KVCache:
    """Keys and values, for each layer those of prompts and those of rows in tensors of their own, so that
    growing never needs room for two caches:

        prompts[layer]    keys and values, each (places, kv heads, capacity, D)
        own[layer]        keys and values, each (rows, kv heads, capacity, D)

    Rows are the caller's: row i belongs to its i-th live row. Nobody looks at the last position of a place or
    a row, so surplus rows of a step may write there. All arithmetic of the memory budget is here, in tokens:
    places * capacity of the prompts + rows * capacity of their own stay within it, whatever was there before.
    A compiled step has rows by the `row_unit`, and two places at least: torch.compile makes 1 a constant."""

    def __init__(self, policy, group_size, max_bytes, row_unit=1):
        config = policy.language_model.config
        layers, heads, D = len(policy.language_model.layers), config.num_key_value_heads, policy.head_dim
        empty = torch.zeros(0, heads, 0, D, dtype=policy.dtype, device=policy.device)
        self.prompts, self.own = ([[empty, empty] for _ in range(layers)] for _ in range(2))
        self.max_tokens = int(max_bytes // (layers * 2 * heads * D * empty.itemsize))
        self.group_size, self.row_unit = group_size, row_unit
        self.version = 0  # changes when a tensor does
        self.clear()

    def clear(self):
        """Forgets all prompts. The tensors stay, and what was captured on them."""
        self.users = []  # of each place: how many unfinished rows share its prompt, 0 for a free one
        self.lengths = []  # ... and the prompt's length
        self.hidden = {}  # ... and its last hidden state: the first token of all its rows is sampled from it

    def add_prompt(self, length, users):
        """A place for a prompt."""
        if 0 in self.users:
            place = self.users.index(0)
            self.users[place], self.lengths[place] = users, length
            return place
        self.users.append(users)
        self.lengths.append(length)
        return len(self.users) - 1

    def prompts_extent(self, new_length=0):
        """The Extent that the prompts in use need; with another one of `new_length`, if above 0."""
        lengths = [length if users else 0 for users, length in zip(self.users, self.lengths)]
        if new_length:
            place = lengths.index(0) if 0 in lengths else len(lengths)
            lengths[place:place + 1] = [new_length]
        while lengths and not lengths[-1]:
            lengths.pop()
        places = max(len(lengths), 2) if self.row_unit > 1 else len(lengths)
        return Extent(places, max(lengths, default=0) + 1)

    def most_rows(self, length, new_prompt_length=0):
        """How many rows of `length` own tokens the budget allows, beside the prompts in use and a new one."""
        left = max(0, self.max_tokens - self.prompts_extent(new_prompt_length).tokens)
        return left // (length + 1) // self.row_unit * self.row_unit

    def reserve(self, rows, length):
        """Room for the prompts in use and for `length` own tokens in each of `rows` rows. The tensors only
        grow, by a little more than needed; if that is above the budget, they become what is needed."""
        rows = -(-rows // self.row_unit) * self.row_unit
        needed_prompts, needed_own = self.prompts_extent(), Extent(rows, length + 1 if rows else 0)
        # at least what there is; rows that grow get a quarter more
        prompts = needed_prompts.with_room_for(extent_of(self.prompts))
        own = needed_own.with_room_for(extent_of(self.own))
        if needed_own.capacity > extent_of(self.own).capacity:
            own = Extent(own.number, needed_own.capacity + needed_own.capacity // 4)
        # above the budget: no more than needed
        if prompts.tokens + own.tokens > self.max_tokens:
            prompts, most = needed_prompts, own.capacity
            own = needed_own
            if rows:
                fitting = (self.max_tokens - prompts.tokens) // rows
                own = Extent(rows, max(needed_own.capacity, min(most, fitting)))
        self._resize(self.prompts, prompts)
        self._resize(self.own, own)

    def _resize(self, tensors, extent):
        if extent_of(tensors) == extent:
            return
        self.version += 1
        for pair in tensors:
            for i, old in enumerate(pair):
                number, _, capacity, _ = old.shape
                pair[i] = old.new_zeros(extent.number, old.shape[1], extent.capacity, old.shape[3])
                pair[i][:number, :, :capacity] = old[:extent.number, :, :extent.capacity]

    def release(self):
        """Gives the memory back."""
        self.clear()
        self._resize(self.prompts, Extent(0, 0))
        self._resize(self.own, Extent(0, 0))

    def tensors(self):
        return [tensor for pair in (*self.prompts, *self.own) for tensor in pair]

    def swap(self, a, b, length):
        """The first `length` tokens of rows a and b change places."""
        if a != b:
            for own in (tensor for pair in self.own for tensor in pair):
                own[[a, b], :, :length] = own[[b, a], :, :length]


# ---------------------------------------------------------------------------------------------------- prefill
class Due(NamedTuple):
    """A piece that is to run, and where the cache keeps it."""

    piece: Piece
    place: int  # of its prompt
    row: int | None  # among the entering rows; None: the piece is a prompt

    @property
    def length(self):
        return self.piece.stop - self.piece.start


def prefill(policy, cache, prompts, rows, first_row):
    """Runs new prompts and what the cache lacks of rows, in packs of at most PREFILL_TOKENS (or one piece).

    Args:
        prompts: (place, dialogue) of each.
        rows: list of Row, the i-th in row first_row + i of the cache.
    Returns: the hidden states from which each row's next token is sampled, (B, hidden); None without rows."""
    # new frames are encoded
    fill_features(policy, [d for _, d in prompts] + [row.dialogue for row in rows])
    waiting = deque(Due(Piece(d, 0, d.prompt_length), place, None) for place, d in prompts)
    waiting.extend(Due(Piece(row.so_far(), row.cached, row.total), row.place, i)
                   for i, row in enumerate(rows) if row.cached < row.total)
    last = {}  # hidden state of the last token of each row that ran
    while waiting:
        # one pack: as many pieces as fit
        due = [waiting.popleft()]
        length = due[0].length
        while waiting and length + waiting[0].length <= PREFILL_TOKENS:
            length += waiting[0].length
            due.append(waiting.popleft())
        # run it, and keep the hidden state at each piece's end
        packed = pack(policy, [d.piece for d in due])
        attend = partial(attend_prefill, cache, packed.spans, due, first_row)
        hidden = policy.hidden_states(packed.ids, packed.positions, attend, packed.is_image, packed.features)
        for span, d in zip(packed.spans, due):
            if d.row is None:
                cache.hidden[d.place] = hidden[0, span.stop - 1].clone()  # a view would keep the whole pass
            else:
                last[d.row] = hidden[0, span.stop - 1]
                rows[d.row].cached = rows[d.row].total
    if not rows:
        return None
    return torch.stack([last.get(i, cache.hidden[row.place]) for i, row in enumerate(rows)])


def attend_prefill(cache, spans, due, first_row, layer, query, key, value):
    """Stores keys and values of a pack's pieces and attends: a prompt sees itself; what stands in a row sees
    its prompt, the row's earlier tokens and itself. query (1, heads, T, D); returns (1, T, heads, D)."""
    # new: (kv heads, T, D), once the keys and once the values
    for prompts, own, new in zip(cache.prompts[layer], cache.own[layer], (key[0], value[0])):
        for span, d in zip(spans, due):
            if d.row is None:
                prompts[d.place, :, :d.piece.stop] = new[:, span]
            else:
                P = d.piece.dialogue.prompt_length
                own[first_row + d.row, :, d.piece.start - P:d.piece.stop - P] = new[:, span]

    def before(number):
        d = due[number]
        if d.row is None:
            return None
        P = d.piece.dialogue.prompt_length
        L = d.piece.start - P
        return [torch.cat([prompts[d.place, :, :P], own[first_row + d.row, :, :L]], dim=1)[None]
                for prompts, own in zip(cache.prompts[layer], cache.own[layer])]

    return attend_pieces(query, key, value, spans, before)


# ----------------------------------------------------------------------------------------------------- decode
def decode_hidden(policy, prompts, own, state, P, L, group_size):
    """Stores keys and values of the rows' last tokens and returns their hidden states, (B, hidden).

    Cascade attention over a shared prefix: a prompt's keys are read once for all rows that share it, as if
    these were several queries of one. So the softmax over all that a row sees is put together from two parts, its
    prompt and its own tokens, by a log-sum-exp merge. With the scores s of a part and its values v,

        m = max s      Z = sum exp(s - m)      S = sum exp(s - m) v      of each part
        out = (exp(m1 - m) S1 + exp(m2 - m) S2) / (exp(m1 - m) Z1 + exp(m2 - m) Z2)      m = max(m1, m2)

    Args:
        prompts, own: the cache's tensors.
        state: dict of (B,) tensors: `tokens`, their `positions`, `own_lengths`: how many own tokens are
            cached, `group_rows`: place of the prompt * group_size + number in the group, for a surplus row
            one beyond the last; and `prompt_lengths`, (places,).
        P, L: how many positions of the prompts, and of the rows' own tokens, are looked at."""
    group_rows, own_lengths = state["group_rows"], state["own_lengths"]
    B, places, device = len(group_rows), len(prompts[0][0]), own_lengths.device
    rows = torch.arange(B, device=device)
    beyond_prompt = (torch.arange(P, device=device) >= state["prompt_lengths"][:, None])[:, None, None]
    beyond_own = (torch.arange(L, device=device) > own_lengths[:, None])[:, None, None]

    def attend(layer, query, key, value):
        heads, D = key.shape[1], key.shape[3]
        own[layer][0][rows, :, own_lengths] = key[:, :, 0]
        own[layer][1][rows, :, own_lengths] = value[:, :, 0]
        query = query.reshape(B, heads, -1, D)  # the heads that share a key are several queries of it
        n = query.shape[2]

        def part(query, keys, values, unseen):  # (.., D + 2): S, Z and m of a part
            scores = query.float() @ keys.float().transpose(2, 3) * D ** -0.5
            scores = scores.masked_fill(unseen, float("-inf"))
            m = scores.amax(3, keepdim=True)
            p = (scores - m).exp().to(values.dtype)  # not divided by its sum yet
            return torch.cat([(p @ values).float(), p.float().sum(3, keepdim=True), m], dim=3)

        # the prompt's part: (B, heads, n, D) to (places, heads, group_size * n, D) and back; a surplus row is
        # left out
        q = query.new_zeros(places * group_size + 1, heads, n, D).index_copy(0, group_rows, query)[:-1]
        q = q.view(places, group_size, heads, n, D).transpose(1, 2).reshape(places, heads, group_size * n, D)
        of_prompt = part(q, *(x[:, :, :P] for x in prompts[layer]), beyond_prompt)
        of_prompt = of_prompt.view(places, heads, group_size, n, D + 2).transpose(1, 2).flatten(0, 1)
        of_prompt = of_prompt[group_rows.clamp(max=places * group_size - 1)]
        # the own tokens' part
        of_own = part(query, *(x[:B, :, :L] for x in own[layer]), beyond_own)
        # the merge: both relative to one m, then divided by Z
        m = torch.maximum(of_prompt[..., -1:], of_own[..., -1:])
        merged = sum(x[..., :-1] * (x[..., -1:] - m).exp() for x in (of_prompt, of_own))  # (.., D + 1): S, Z
        return (merged[..., :-1] / merged[..., -1:]).to(value.dtype).view(B, 1, -1, D)

    positions = state["positions"].expand(3, B)[..., None]
    return policy.hidden_states(state["tokens"][:, None], positions, attend)[:, 0]


def sample(policy, hidden, temperature, generator=None):
    """Samples from softmax(logits / temperature); 0 takes the most likely token. hidden (B, hidden). Returns
    token ids and their log-probabilities (of temperature 1 at 0), (B,) each."""
    # (vocabulary, B); in place from here: a copy is 40 MB
    p = policy.logits(hidden, temperature or 1.0, transposed=True)
    V, B, whole = *p.shape, len(p) // BLOCK * BLOCK
    # the vocabulary in blocks, (blocks, tokens, B), the last one shorter
    blocks = [p[:whole].view(-1, BLOCK, B)] * (whole > 0) + [p[None, whole:]] * (whole < V)
    most = torch.cat([x.amax(1) for x in blocks]).T  # (B, blocks): logits so far
    p.sub_(most.amax(1)).exp_()
    mass, p = torch.cat([x.sum(1) for x in blocks]).T, p.T

    def draw(p):  # (B, choices): the first at which the sum of those before and it exceeds a random share
        total = p.cumsum(1, dtype=torch.float64)
        share = torch.rand(len(p), 1, dtype=torch.float64, device=p.device, generator=generator)
        return torch.searchsorted(total, share * total[:, -1:], right=True)

    # first a block, then a token of it: two short sums in place of one long one
    block = draw(mass) if temperature > 0 else most.argmax(1, keepdim=True)
    ids = block * BLOCK + torch.arange(BLOCK, device=p.device)
    inside = p.gather(1, ids.clamp(max=V - 1)).masked_fill_(ids >= V, 0)
    token = ids.gather(1, draw(inside) if temperature > 0 else inside.argmax(1, keepdim=True))
    log_prob = (p.gather(1, token) / mass.sum(1, keepdim=True)).log()
    return token[:, 0], log_prob[:, 0]


class Decoder:
    """Samples the next tokens of rows of a cache. Its layers run plain, or compiled; with CUDA graphs, a
    compiled step is captured once for each number of rows and replayed while the cache's tensors stay."""

    def __init__(self, policy, cache, temperature, generator=None, compiled=False):
        self.policy, self.cache, self.temperature, self.generator = policy, cache, temperature, generator
        self.layers, self.capture, self.path = decode_hidden, False, "plain"
        self.graphs, self.version, self.pool, self.errors = {}, None, None, None
        if compiled:
            import torch._dynamo
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it falls back in silence
            self.layers = torch.compile(decode_hidden, dynamic=True)
            self.capture = has_graphs(policy.device)
            self.path = "compiled, in a CUDA graph" if self.capture else "compiled"

    def decode(self, rows, steps):
        """The next `steps` tokens of each row; row i of the cache is that of rows[i], and holds all but its
        last token. Returns token ids and log-probabilities, lists (B, steps)."""
        cache, size = self.cache, len(rows)
        if self.layers is not decode_hidden:
            size = -(-size // cache.row_unit) * cache.row_unit
        state = self.state(rows, size)
        if self.capture:
            # a graph reads fixed memory: new tensors in the cache need new ones, a step's input is copied in
            version = cache.version, self.policy.weights_version
            if self.version != version:
                self.forget_graphs()
                self.version = version
            if size not in self.graphs:
                self.graphs[size] = self.captured(state)
            replay, graph_state, result = self.graphs[size]
            for name, value in state.items():
                graph_state[name].copy_(value)
            sampled = []
            for _ in range(steps):
                replay()
                sampled.append([x.clone() for x in result])
        else:
            P = max(row.prompt_length for row in rows)
            L = max(2, max(row.own_length for row in rows) - 1 + steps)
            sampled = [self.step(state, P, L) for _ in range(steps)]
        return [torch.stack(x, dim=1)[:len(rows)].tolist() for x in zip(*sampled)]

    def state(self, rows, size):
        """What a step reads and advances, for `size` rows: those beyond `rows` are surplus."""
        cache, surplus = self.cache, size - len(rows)
        places = extent_of(cache.prompts).number
        last = extent_of(cache.own).capacity - 1  # where surplus rows write
        state = {
            "tokens": [row.turn_ids[-1] for row in rows] + [0] * surplus,
            "positions": [row.dialogue.next_position + len(row.turn_ids) - 1 for row in rows] + [0] * surplus,
            "own_lengths": [row.own_length - 1 for row in rows] + [last] * surplus,
            "group_rows": [row.place * cache.group_size + row.number for row in rows]
            + [places * cache.group_size] * surplus,
            # the cache may have fewer places than there were prompts, or more
            "prompt_lengths": (cache.lengths + [1] * places)[:places]}
        return {name: torch.tensor(values, device=self.policy.device) for name, values in state.items()}

    def step(self, state, P, L):
        """One token for each row, without synchronising with the CPU: advances `state` in place. Returns
        token ids and log-probabilities, (B,) each."""
        tokens, log_probs = sample(self.policy, self.hidden(state, P, L), self.temperature, self.generator)
        state["tokens"].copy_(tokens)
        state["positions"] += 1
        state["own_lengths"].add_(1).clamp_(max=extent_of(self.cache.own).capacity - 1)
        return tokens, log_probs

    def hidden(self, state, P, L):
        """`decode_hidden`, compiled where it is; an error in compiling ends that for good."""
        arguments = self.policy, self.cache.prompts, self.cache.own, state, P, L, self.cache.group_size
        if self.layers is not decode_hidden:
            try:
                return self.layers(*arguments)
            except Exception as error:  # whatever it is: what is wrong without compiling shows below
                self.give_up(f"compiling the decode step failed ({str(error).strip().splitlines()[0][:200]})")
        return decode_hidden(*arguments)

    def give_up(self, reason):
        warn(f"{reason}; rollouts go on uncompiled")
        self.layers, self.capture, self.path = decode_hidden, False, "plain"

    def forget_graphs(self):
        """Gives their memory back: a pool without graphs is not used again."""
        self.graphs, self.pool = {}, None

    def captured(self, state):
        """A step as a graph: what runs it, and the tensors that it reads (a state) and writes (a result)."""
        state = {name: value.clone() for name, value in state.items()}
        P = extent_of(self.cache.prompts).capacity - 1  # all they hold
        L = extent_of(self.cache.own).capacity - 1
        replay, result, self.pool = capture_graph(lambda: self.step(state, P, L), self.generator, self.pool)
        return replay, state, result
