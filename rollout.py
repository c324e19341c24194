"""Rollouts: episodes in which the policy looks, zooms and answers. First the plain way, then many at once.

`play` is the whole agentic episode, one token after the other, each from a pass over everything before it.
`Engine` plays the same episodes, many at once on one KV cache (generation.py); at temperature 0 both say the
same tokens.

    outside                          live: episode i has row i of the cache
    ┌───────────────────┐   enter    ┌──────────────────┬─────────────────────┐
    │ their prompt is   │ ─────────▶ │ decoding         │ wait for the reply  │ ─▶ ended
    │ in the cache,     │ ◀───────── │ within a turn    │ of the environment  │
    │ they have no row  │ make_room  │ rows 0 .. d - 1  │ rows d ..           │
    └───────────────────┘            └──────────────────┴─────────────────────┘

A question's group is admitted when there is room for it, and its prompt gets a place in the cache. An
episode whose turn is over changes places with the last one that is decoding. When enough of them wait, their
replies are taken and run as one packed sequence, and free rows go to episodes outside. What runs when depends
on no clock, so a seed gives one result.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from common import float_or_auto, has_graphs
from generation import ROW_UNIT, Decoder, KVCache, Row, prefill, sample
from model import Piece, Sampled, attend_pieces, encode, fill_features, pack, turn_is_over, turn_text
from protocols import make_env
from video import VideoError
from zoom_env import Message, ZoomEnv


@dataclass(frozen=True)
class RolloutConfig:
    """Settings of rollouts."""

    temperature: float = 1.0  # of sampling, and of the log-probabilities in the loss; 0: the likeliest token
    max_turn_tokens: int = 1024  # an assistant turn is cut off here, which ends the episode
    max_response_tokens: int = 32_768  # after the prompt; an episode ends before a reply that goes beyond
    max_rows: int = 64  # episodes that a process plays at one time, at most
    cache_gb: float_or_auto = 16.0  # KV cache, 1e9 bytes, or auto: what is free; a small one means few rows
    compile: bool | None = None  # compile the decode step; by default on cuda, as a CUDA graph there


# ------------------------------------------------------------------------------------------------ the episode
@dataclass
class Episode(Row):
    """One rollout: its environment, which records turns and rewards, and its dialogue."""

    env: ZoomEnv | None = None
    question_number: int = 0  # of its question, among those that are played
    truncated: bool = False  # a turn or the episode was cut off at a limit
    reply: Future | None = None  # the environment's next message, while its frames are decoded

    def forget_images(self):
        """Its frames' features are computed; their images are not needed any more."""
        self.dialogue.frames, self.env.watched = [], self.env.when_watched()

    def forget_frames(self):
        """Neither are the features: nothing is trained on it."""
        self.dialogue.features, self.dialogue.frames, self.env.watched = [], [], self.env.when_watched()

    def token_counts(self):
        """Of all that was shown and said, of what was said, and of the prompt."""
        d = self.dialogue
        return {"tokens": len(d.ids), "generated": sum(d.trained), "prompt_tokens": d.prompt_length}

    def turn_is_over(self, policy):
        """Whether the turn ends with the token that was sampled last."""
        return turn_is_over(policy, self.turn_ids, self.env)

    def end_turn(self, policy):
        """The turn becomes part of the dialogue, ids as sampled. Returns its text, without an end token."""
        self.truncated = not self.turn_is_over(policy)
        sampled = Sampled(self.turn_ids, self.turn_log_probs)
        for place, token in enumerate(sampled.ids):
            if token > self.env.largest_id:  # the protocol drops it, and what follows moves up
                self.cached = min(self.cached, len(self.dialogue.ids) + place)
        encode(policy, [Message("assistant", [sampled])], self.dialogue, rules=self.env)
        self.turn_ids, self.turn_log_probs = [], []
        return turn_text(policy, sampled.ids, self.env)

    def take_reply(self, policy, reply, max_response_tokens):
        """The environment's message is appended, unless the episode is over, or would be too long with it."""
        if not self.env.done and not self.truncated:
            longer = encode(policy, reply, self.dialogue.fork())
            self.truncated = len(longer.ids) - longer.prompt_length > max_response_tokens
            if not self.truncated:
                self.dialogue = longer
        if self.truncated:
            self.env.end()


@torch.no_grad()
def play(policy, question, config, root=".", generator=None):
    """One episode the plain way: no cache, no batch. What `Engine` must equal. Returns an Episode."""
    # the question and the first look at the video
    env = make_env(question, policy.env_config, root)
    e = Episode(encode(policy, env.reset()), env=env)
    while not env.done:
        # the policy's turn, each token from a pass over the whole dialogue
        fill_features(policy, [e.dialogue])
        turn_ends = False
        while not turn_ends:
            sequence = pack(policy, [Piece(e.so_far(), 0, e.total)])
            attend = lambda layer, q, k, v: attend_pieces(q, k, v, sequence.spans, lambda piece: None)
            hidden = policy.hidden_states(sequence.ids, sequence.positions, attend, sequence.is_image,
                                          sequence.features)
            token, log_prob = sample(policy, hidden[:, -1], config.temperature, generator)
            e.turn_ids.append(token.item())
            e.turn_log_probs.append(log_prob.item())
            turn_ends = e.turn_is_over(policy) or len(e.turn_ids) >= config.max_turn_tokens
        # what it said goes to the environment: a zoom, whose frames come back, or an answer, the end
        reply = env.step(e.end_turn(policy))
        e.take_reply(policy, reply, config.max_response_tokens)
    return e


def rollout(policy, questions, group_size=1, config=RolloutConfig(), generator=None, steps=None, **how):
    """Plays `group_size` episodes of each question, see `Engine.play`."""
    return Engine(policy, group_size, config, generator, steps).play(questions, **how)


# ----------------------------------------------------------------------------------------------- many at once
class Engine:
    """Plays episodes of a policy, many at once. It may play again after the policy's weights have changed:
    cache and captured steps stay.

    live: the Episodes that have rows, `live[i]` row i of the cache. decoding: how many of them, the first
    ones, are within a turn. outside: those that are admitted and have no row.

    Args:
        group_size: episodes a question.
        config: RolloutConfig.
        generator: torch.Generator on the policy's device.
        steps: tokens between looks for ends of turns; by default 8 where steps are compiled, else 1."""

    def __init__(self, policy, group_size, config, generator=None, steps=None):
        self.policy, self.group_size, self.config = policy, group_size, config
        compiled = has_graphs(policy.device) if config.compile is None else config.compile
        self.cache = KVCache(policy, group_size, config.cache_gb * 1e9, ROW_UNIT if compiled else 1)
        self.decoder = Decoder(policy, self.cache, config.temperature, generator, compiled)
        self.steps = steps or (8 if compiled else 1)

    @torch.no_grad()
    def play(self, questions, root=".", env_config=None, on_end=None, make_env=make_env):
        """Plays `group_size` episodes of each question.

        Args:
            questions: question rows, their videos relative to `root`.
            env_config: other settings of the environment than the policy's.
            on_end: called with each episode that ended.
            make_env: what makes the environment of a question, where it is not the protocol's own.
        Returns: (groups, skipped): a list of Episode for each question, empty for one whose video cannot be
            read, and the (question id, reason) of those."""
        self.live, self.decoding, self.outside, self.on_end = [], 0, deque(), on_end
        self.cache.clear()
        groups, skipped = [[] for _ in questions], []
        with ThreadPoolExecutor(4) as self.video_threads:
            try:
                env_config = env_config or self.policy.env_config
                make = lambda question: make_env(question, env_config, root)
                coming = self.groups_to_come(questions, make, groups, skipped)
                new = next(coming, None)
                while new or self.live or self.outside:
                    # what the environment said, where a turn is over
                    self.take_replies()
                    # new groups, as long as there is room
                    admitted = []
                    while new and self.admit(new):
                        admitted.append(new)
                        new = next(coming, None)
                    # everything that is new runs as packed sequences, then all rows token by token
                    self.enter(admitted)
                    while self.decoding and not self.should_pause():
                        self.decode()
            except BaseException:
                # else leaving the pool would wait for the videos that are decoded ahead
                self.video_threads.shutdown(wait=False, cancel_futures=True)
                raise
        return groups, skipped

    def groups_to_come(self, questions, make, groups, skipped):
        """Yields the group of each question in turn, in the environment that `make` makes of it, once its
        video is decoded; those of the next questions are decoded meanwhile. Puts it into `groups`, or the
        reason why the video cannot be read into `skipped`."""
        def begin(question):
            env = make(question)
            try:
                return env, env.reset(), None
            except VideoError as error:
                return env, None, str(error)

        at_once = max(4, self.config.max_rows // self.group_size)
        upcoming, pending = deque(questions), deque()
        for number in range(len(questions)):
            while upcoming and len(pending) < at_once:
                pending.append(self.video_threads.submit(begin, upcoming.popleft()))
            env, messages, error = pending.popleft().result()
            if error is not None:
                skipped.append((env.question["id"], error))
                continue
            groups[number] = self.make_group(env, encode(self.policy, messages), number)
            yield groups[number]

    def release(self):
        """Gives the cache's memory back, and that of captured steps, until it plays again."""
        self.cache.release()
        self.decoder.forget_graphs()

    def make_group(self, env, dialogue, question_number):
        """The episodes of a question, which go apart after the prompt."""
        return [Episode(dialogue.fork(), number=number, cached=dialogue.prompt_length, env=env.fork(),
                        question_number=question_number) for number in range(self.group_size)]

    def should_pause(self):
        """Whether so many episodes wait for a reply, a quarter and at least 4, that they are to run first."""
        return len(self.live) - self.decoding >= max(4, len(self.live) // 4)

    def take_replies(self):
        """Waits for the replies of the rows that need one; episodes that are over give their rows up."""
        for i in reversed(range(self.decoding, len(self.live))):
            if self.take_reply(self.live[i]):
                self.swap(i, len(self.live) - 1)
                self.live.pop()

    def take_reply(self, e):
        """Waits for an episode's reply. Returns whether the episode is over."""
        if e.reply:
            e.take_reply(self.policy, e.reply.result(), self.config.max_response_tokens)
            e.reply = None
        if e.env.done:
            self.cache.users[e.place] -= 1
            if self.on_end:
                self.on_end(e)
        return e.env.done

    def admit(self, group):
        """Takes in a new group if there is room for it, or nothing else runs. Returns whether it did."""
        # room for all that runs and the group, each row as long as the longest, or a turn
        rows = len(self.live) + len(self.outside) + len(group)
        prompt_length = group[0].prompt_length
        length = max(self.longest(*self.outside), self.config.max_turn_tokens)
        fits = rows <= self.config.max_rows and rows <= self.cache.most_rows(length, prompt_length)
        if (self.live or self.outside) and not fits:
            return False
        # a place for the prompt, which `enter` computes; the episodes get rows there, too
        place = self.cache.add_prompt(prompt_length, len(group))
        for e in group:
            e.place = place
        self.outside.extend(group)
        return True

    def enter(self, new_groups):
        """Gives episodes outside a row as long as there is room, runs all that the cache lacks of the prompts
        of new groups and of the episodes that are not decoding, and samples the first token of the latter's
        next turn."""
        # rows for episodes outside
        while self.outside and len(self.live) < max(1, self.config.max_rows):
            e = self.outside[0]
            if self.take_reply(e):
                self.outside.popleft()
                continue
            length = max(self.longest(), e.own_length + self.config.max_turn_tokens)
            if self.live and len(self.live) + 1 > self.cache.most_rows(length):
                break  # it would have to leave again soon
            self.live.append(self.outside.popleft())
        # one pass over prompts and replies
        self.make_room()
        first, entering = self.decoding, self.live[self.decoding:]
        prompts = [(group[0].place, group[0].dialogue) for group in new_groups]
        hidden = prefill(self.policy, self.cache, prompts, entering, first)
        # the first token of each turn; all rows decode now
        if entering:
            tokens, log_probs = sample(self.policy, hidden, self.config.temperature, self.decoder.generator)
            self.decoding = len(self.live)
            self.settle(first, tokens[:, None].tolist(), log_probs[:, None].tolist())

    def longest(self, *more):
        """Own tokens of the longest row, with the next `steps` ones."""
        return max((e.own_length for e in (*self.live, *more)), default=0) + self.steps

    def make_room(self):
        """Room for the longest row in each row; where the budget is too small for that, rows leave from the
        back, those that wait first; all after their prompt is computed again later."""
        while len(self.live) > 1 and len(self.live) > self.cache.most_rows(self.longest()):
            e = self.live.pop()
            e.cached = e.prompt_length
            self.outside.appendleft(e)
        self.decoding = min(self.decoding, len(self.live))
        self.cache.reserve(len(self.live), self.longest())

    def decode(self):
        """The next tokens of all that are within a turn."""
        self.make_room()
        rows = self.live[:self.decoding]
        sampled = self.decoder.decode(rows, self.steps)
        for e in rows:
            e.cached += self.steps
        self.settle(0, *sampled)

    def settle(self, first, tokens, log_probs):
        """Appends what was sampled for the rows from `first` to the last one that is decoding: lists, one a
        row. Where a turn is over, the environment gets it and answers in a thread."""
        # from the back: such a row changes places with the last one that is decoding, settled already
        for i in reversed(range(first, self.decoding)):
            e, new_ids = self.live[i], tokens[i - first]
            for number, token in enumerate(new_ids, 1):
                e.turn_ids.append(token)
                e.turn_log_probs.append(log_probs[i - first][number - 1])
                if e.turn_is_over(self.policy) or len(e.turn_ids) >= self.config.max_turn_tokens:
                    e.cached -= len(new_ids) - number  # what came after the end is not part of it
                    e.reply = self.video_threads.submit(e.env.step, e.end_turn(self.policy))
                    self.decoding -= 1
                    self.swap(i, self.decoding)
                    break

    def swap(self, a, b):
        """Two rows change places, with what the cache holds of them."""
        live = self.live
        longest = max(e.cached - e.prompt_length for e in (live[a], live[b]))
        self.cache.swap(a, b, longest)
        live[a], live[b] = live[b], live[a]
