"""Many episodes at once on one KV cache."""

import copy
import os
import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from common import UserError
from model import Dialogue, Sampled, causal_attention, encode, fill_features, run_layers
from video import VideoError
from zoom_env import Message, ZoomEnv

BLOCK = 128  # tokens of the vocabulary that are one block in sampling
DECODE_STEPS = {"cpu": 1, "cuda": 8}  # tokens that are decoded before the CPU reads them and checks for ends of turns
PREFILL_TOKENS = 16_384  # tokens of prompts and replies in one pass


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
