"""Rollouts: the engine says what the plain loop says, scores what it samples, stays within its rows and its
memory, compiled and replayed as well."""

import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny import DEVICE, ScriptedEnv, chatty, full_copy, plain_log_probs, random_policy, restless, seeded

import generation
from common import capture_graph, has_graphs
from generation import ROW_UNIT, Decoder, KVCache, Row, decode_hidden, prefill, sample
from model import Dialogue, Policy, token_log_probs
from protocols import PROTOCOLS
from rollout import Engine, RolloutConfig, play, rollout
from training.decoder_check import check_decoder
from video import Video

pytestmark = pytest.mark.device

SHORT = RolloutConfig(max_turn_tokens=24, compile=False)  # where there are graphs the default is to compile
# what a compiled decode step goes through; the last one is what an Engine takes
PATHS = ["compiled", "compiled, in a CUDA graph"] if has_graphs(DEVICE) else ["compiled"]


@pytest.fixture(scope="module")
def policy():
    return random_policy(layers=2)


def said(groups):
    return [e.dialogue.ids for group in groups for e in group]


def check_sampled_log_probs(policy, episodes, temperature=1.0, scored=token_log_probs):
    """Sampled equals scored: a pass on the features that sampling left, or transformers' own, which computes
    its own."""
    for e in episodes:
        with torch.no_grad():
            if scored is token_log_probs:
                expected, _ = token_log_probs(policy, [[e.dialogue]], temperature)
            else:
                expected = plain_log_probs(policy, e.dialogue, temperature)
        sampled = torch.tensor(e.dialogue.sampled_log_probs)
        torch.testing.assert_close(sampled, expected.cpu(), atol=1e-4, rtol=0)
        assert sum(e.dialogue.trained) == len(e.dialogue.sampled_log_probs) > 0


@pytest.mark.parametrize("limits", [dict(), dict(max_response_tokens=150)])
def test_the_engine_says_what_the_plain_loop_says(policy, data, monkeypatch, limits):
    """At temperature 0, token for token: with tool replies, rows that enter as others end, episodes that are
    cut off."""
    folder, questions, _ = data
    policy = restless(policy)
    monkeypatch.setitem(PROTOCOLS, "videozoomer", ScriptedEnv)
    config = RolloutConfig(temperature=0.0, max_turn_tokens=16, compile=False, **limits)
    plain = [play(policy, question, config, folder) for question in questions[:8]]
    assert len({len(e.env.turns) for e in plain}) > 1 and any(e.env.num_calls() for e in plain)
    longest = max(len(e.dialogue.ids) - e.dialogue.prompt_length for e in plain)
    assert (longest <= 150) == bool(limits)
    for steps, max_rows in ((None, 64), (5, 64), (None, 2)):
        limited = replace(config, max_rows=max_rows)
        groups, _ = rollout(policy, questions[:8], 1, limited, root=folder, steps=steps)
        assert said(groups) == [e.dialogue.ids for e in plain], (steps, max_rows)
        assert [group[0].env.rewards for group in groups] == [e.env.rewards for e in plain]
        assert [group[0].truncated for group in groups] == [e.truncated for e in plain]


def test_the_plain_loop_scores_what_it_samples(policy, data):
    folder, questions, _ = data
    policy = chatty(policy)
    episodes = [play(policy, questions[0], SHORT, folder, seeded(seed)) for seed in range(2)]
    check_sampled_log_probs(policy, episodes, scored=plain_log_probs)


@pytest.mark.parametrize("temperature, steps", [(1.0, None), (1.3, 5)])
def test_rollout_scores_what_it_samples(policy, data, temperature, steps):
    """Log-probabilities noted while sampling, on a shared prefill and a cache that rows leave and tool
    replies are appended to, equal those of a plain pass over the finished dialogue."""
    folder, questions, _ = data
    policy = chatty(policy)
    config = replace(SHORT, temperature=temperature)
    groups, skipped = rollout(policy, questions[:3], 6, config, root=folder, generator=seeded(), steps=steps)
    episodes = [e for group in groups for e in group]
    assert not skipped and len(episodes) == 18
    assert len({len(e.env.turns) for e in episodes}) > 1  # they do not all end together
    assert max(len(e.env.turns) for e in episodes) > 2
    check_sampled_log_probs(policy, episodes, temperature)
    check_sampled_log_probs(policy, episodes[::3], temperature, scored=plain_log_probs)


def recorded(monkeypatch, policy, data, **how):
    """Rollouts: (episodes, bytes of the cache each time it was made larger, how many rows left and how many
    were there each time that room was made)."""
    folder, questions, _ = data
    taken, left, rows = [], [], []
    reserve, make_room = KVCache.reserve, Engine.make_room

    def recording_reserve(cache, *args):
        reserve(cache, *args)
        taken.append(sum(t.nbytes for t in cache.tensors()))

    def recording_make_room(engine):
        before = len(engine.live)
        make_room(engine)
        left.append(before - len(engine.live))
        rows.append(len(engine.live))

    with monkeypatch.context() as patched:
        patched.setattr(KVCache, "reserve", recording_reserve)
        patched.setattr(Engine, "make_room", recording_make_room)
        config = replace(SHORT, **how)
        groups, _ = rollout(policy, questions[:5], 4, config, root=folder, generator=seeded())
    return [e for group in groups for e in group], taken, left, rows


def test_rollout_stays_within_its_rows_and_its_cache(policy, data, monkeypatch):
    """However few rows or little memory, the episodes are played, one at a time if need be. `share`: of the
    memory that an unlimited cache takes."""
    policy = chatty(policy)
    _, taken, *_ = recorded(monkeypatch, policy, data)
    unlimited = max(taken)
    for max_rows, share in ((5, 1.0), (1, 1.0), (64, 0.3), (6, 0.3), (64, 0.0)):
        cache_gb = share * unlimited / 1e9
        how = dict(max_rows=max_rows, cache_gb=cache_gb)
        episodes, taken, left, rows = recorded(monkeypatch, policy, data, **how)
        assert len(episodes) == 20 and all(e.env.done for e in episodes)
        assert max(len(e.env.turns) for e in episodes) > 2
        check_sampled_log_probs(policy, episodes)
        assert max(rows) <= max_rows
        if share == 0.3:
            assert max(taken) <= share * unlimited
        if (max_rows, share) == (64, 0.3):
            assert sum(left) > 0 and max(rows) > 1  # some had to leave and came back
        if share == 0:
            assert max(rows) == 1


def test_a_step_knows_of_the_places_that_the_cache_has(policy):
    """Above the budget the cache gives back the places of the last prompts, whose episodes have ended."""
    engine = Engine(policy, 2, SHORT)
    cache = engine.cache
    for length in (5, 7, 6):
        cache.add_prompt(length, users=2)
    cache.reserve(2, 4)
    assert engine.decoder.state([], 0)["prompt_lengths"].tolist() == [5, 7, 6]
    cache.users[1:] = [0, 0]
    cache.max_tokens = 0
    cache.reserve(2, 4)
    assert engine.decoder.state([], 0)["prompt_lengths"].tolist() == [5]


def test_released_memory_comes_back(policy, data):
    """Between rollouts and update the cache has none; after that the rollouts are those of an engine that
    kept it."""
    folder, questions, _ = data
    policy, texts = chatty(policy), []
    for release in (True, False):
        engine = Engine(policy, 4, SHORT, seeded())
        for draw in (questions[:2], questions[2:4]):
            texts.append(said(engine.play(draw, folder)[0]))
            assert sum(t.nbytes for t in engine.cache.tensors()) > 1e5
            if release:
                engine.release()
                assert sum(t.nbytes for t in engine.cache.tensors()) == 0 and not engine.cache.hidden
    assert texts[:2] == texts[2:] and texts[0] != texts[1]


def test_a_prompt_runs_through_the_model_once(policy, data, monkeypatch):
    """What the network computes in a rollout: each prompt once a group, and every other token once a row."""
    folder, questions, _ = data
    tokens, plain = [], Policy.hidden_states

    def counted(policy, ids, *args):
        tokens.append(ids.numel())
        return plain(policy, ids, *args)

    monkeypatch.setattr(Policy, "hidden_states", counted)
    config = replace(SHORT, max_rows=12)
    groups, _ = rollout(chatty(policy), questions[:3], 6, config, root=folder, generator=seeded())
    expected = 0
    for group in groups:
        expected += group[0].dialogue.prompt_length
        for e in group:  # from the last sampled token on nothing is run
            last = max(t for t, trained in enumerate(e.dialogue.trained) if trained)
            expected += last - e.dialogue.prompt_length
    assert sum(tokens) == expected


@pytest.mark.parametrize("vocabulary, temperature", [(100, 1.0), (512, 0.5), (1300, 0.5)])
def test_samples_come_from_the_softmax(vocabulary, temperature):
    """Fewer tokens than a block, one block, several and a shorter one."""
    head = torch.nn.Linear(8, vocabulary, bias=False, device=DEVICE)
    torch.nn.init.normal_(head.weight, std=0.5, generator=seeded(0))
    one = SimpleNamespace(head=head)
    one.logits = partial(Policy.logits, one)
    hidden = torch.randn(1, 8, generator=seeded(), device=DEVICE)
    with torch.no_grad():
        expected = (head(hidden)[0].double() / temperature).softmax(0)
        tokens, log_probs = sample(one, hidden.expand(20_000, 8), temperature, seeded(2))
        top, top_log_prob = sample(one, hidden, 0)
        plain = head(hidden).log_softmax(1)[0]
        assert top == plain.argmax() and top_log_prob.item() == pytest.approx(plain.max().item())
    torch.testing.assert_close(log_probs, expected.log()[tokens].float(), atol=1e-5, rtol=0)
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    expected_counts = expected * len(tokens)
    likely = expected_counts > 5  # chi-squared, as its standard score
    chi = ((counts - expected_counts) ** 2 / expected_counts)[likely].sum()
    assert abs(chi - likely.sum()) < 5 * (2 * likely.sum()) ** 0.5


def test_the_rollouts_of_a_question_decode_its_overview_once(policy, data, monkeypatch):
    folder, questions, _ = data
    decoded, plain = [], Video.frames_at

    def counted(video, times_s, *more):
        decoded.append(video.path)
        return plain(video, times_s, *more)

    monkeypatch.setattr(Video, "frames_at", counted)
    copies = [q | {"video": shutil.copy(folder / q["video"], folder / f"once{i}.mp4")}
              for i, q in enumerate(questions[:3])]
    config = RolloutConfig(max_turn_tokens=8, compile=False)
    groups, _ = rollout(policy, copies, 4, config, root=folder, generator=seeded(0))
    assert [len(g) for g in groups] == [4, 4, 4] and all(e.env.frames_shown for g in groups for e in g)
    assert len(decoded) == len(set(decoded)) == 3


def test_a_prompts_place_is_free_when_its_episodes_are_over(policy, data):
    folder, questions, _ = data
    config = RolloutConfig(max_turn_tokens=8, max_rows=2, compile=False)
    engine = Engine(chatty(policy), 2, config, seeded())
    groups, _ = engine.play(questions[:4], folder)
    assert [len(group) for group in groups] == [2] * 4
    assert not any(engine.cache.users) and len(engine.cache.users) < 4


def test_unreadable_video_is_named_and_the_rest_goes_on(policy, data):
    folder, questions, _ = data
    bad = dict(questions[0], id="bad", video="missing.mp4")
    config = RolloutConfig(max_turn_tokens=4, compile=False)
    groups, skipped = rollout(policy, [questions[0], bad], 1, config, root=folder)
    assert [len(g) for g in groups] == [1, 0] and skipped[0][0] == "bad" and "missing.mp4" in skipped[0][1]
    groups, skipped = rollout(policy, [bad, bad], 3, root=folder)
    assert groups == [[], []] and len(skipped) == 2


# ----------------------------------------------------------------------------------- compiled, and as a graph
@pytest.fixture(scope="module")
def small():
    """A restless policy of two layers: compiling takes its time."""
    torch._dynamo.reset()
    return restless(random_policy(layers=2))


def move(policy):
    """Another set of weights in the same place, as an update makes them."""
    with torch.no_grad():
        for p in policy.language_model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=seeded(3), device=DEVICE) * p.abs().mean())


def compiled_engine(policy, group_size, config, path=PATHS[-1], generator=None):
    """An Engine with a decode step that goes this way and has passed its check."""
    engine = Engine(policy, group_size, replace(config, compile=True), generator)
    take_path(engine.decoder, path)
    check_decoder(engine.decoder)
    assert engine.decoder.path == path
    assert max(engine.decoder.errors) < (1e-4 if policy.dtype == torch.float32 else 0.1)
    return engine


def take_path(decoder, path):
    """A compiled decoder goes this way: that of its device, or not captured."""
    assert decoder.path == PATHS[-1]
    if path == "compiled":
        decoder.capture, decoder.path = False, path


@pytest.mark.slow
def test_compiled_rollouts_say_the_same(small, data, monkeypatch, capsys):
    """Whole rollouts at temperature 0: rows that enter and leave, one row, as many rows as prompts, two sets
    of weights. Nothing is compiled again when shapes or weights change, but for a group of one and for as
    many rows as the cache has."""
    folder, questions, _ = data
    monkeypatch.setitem(PROTOCOLS, "videozoomer", ScriptedEnv)
    plainly = RolloutConfig(temperature=0.0, max_turn_tokens=16, compile=False)
    counted = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    start = counted()
    for moved in range(2):
        for rows, number, group_size in ((64, 5, 3), (1, 2, 1), (4, 4, 1), (6, 5, 2)):
            config = replace(plainly, max_rows=rows)
            plain, _ = rollout(small, questions[:number], group_size, config, root=folder)
            for path in PATHS:
                engine = compiled_engine(small, group_size, config, path)
                before = counted()
                groups, _ = engine.play(questions[:number], folder)
                assert said(groups) == said(plain) == said(engine.play(questions[:number], folder)[0]), path
                if moved:
                    assert counted() == before
        move(small)
    assert before - start <= 4
    assert "warning: " not in capsys.readouterr().err


def make_decoder(policy, path, temperature=0, generator=None):
    """(a decoder, eight rows of two prompts with the first token of their turn): what `go_on` takes."""
    cache = KVCache(policy, 4, 1e18, ROW_UNIT)
    decoder = Decoder(policy, cache, temperature, generator, path != "plain")
    if path != "plain":
        take_path(decoder, path)
    rows = []
    for length in (40, 24):
        prompt = Dialogue(prompt_length=length)
        prompt.add([(7 * i + length) % 300 for i in range(length)])
        place = cache.add_prompt(length, 4)
        rows += [Row(prompt, [20 + 10 * number], [0.0], place, number, length) for number in range(4)]
    cache.reserve(8, 64)
    prefill(policy, cache, [(row.place, row.dialogue) for row in rows[::4]], [], 0)
    return decoder, rows


@torch.no_grad()
def go_on(decoder, rows, steps):
    """The rows say so many more tokens, and note their log-probabilities."""
    for row, ids, log_probs in zip(rows, *decoder.decode(rows, steps), strict=True):
        row.turn_ids += ids
        row.turn_log_probs += log_probs


def all_go_on(decoders, number):
    """The first rows of each decoder say three more tokens. Returns what all rows have said; those of the
    first decoder must have said the same as those of the others."""
    for decoder, rows in decoders:
        go_on(decoder, rows[:number], 3)
    texts = [[row.turn_ids for row in rows] for _, rows in decoders]
    scores = [torch.tensor([p for row in rows for p in row.turn_log_probs]) for _, rows in decoders]
    for (decoder, _), text, score in zip(decoders, texts, scores):
        assert text == texts[0], decoder.path
        torch.testing.assert_close(score, scores[0], atol=1e-4, rtol=0)
    return texts[0]


@pytest.mark.slow
def test_steps_of_two_sizes_work_by_turns(small):
    """Each on what the other has left in the cache, with and without surplus rows. As graphs both are in one
    memory pool, and are captured once."""
    decoders = [make_decoder(small, path) for path in ("plain", *PATHS)]
    for number in (8, 4, 8, 3, 5, 1, 8):
        all_go_on(decoders, number)
    for decoder, _ in decoders:
        graphs = decoder.graphs if decoder.capture else {}
        assert set(graphs) == ({4, 8} if decoder.path == "compiled, in a CUDA graph" else set())
        assert {replay.__self__.pool() for replay, _, _ in graphs.values()} == {decoder.pool} - {None}


@pytest.mark.slow
def test_steps_follow_the_weights(small, monkeypatch):
    """Those that change where they lie, as by an optimizer, are the next step's, and nothing is captured
    again; those that come to lie elsewhere, as gathered ones do, are captured anew."""
    captured = []

    def counted(*args):
        captured.append(args)
        return capture_graph(*args)

    monkeypatch.setattr(generation, "capture_graph", counted)
    decoders = [make_decoder(small, path) for path in ("plain", *PATHS)]
    unmoved, rows = make_decoder(full_copy(small), "plain")
    all_go_on(decoders, 8)
    assert len(captured) == has_graphs(DEVICE)
    move(small)
    now = all_go_on(decoders, 8)
    go_on(unmoved, rows, 6)
    assert now != [row.turn_ids for row in rows]
    assert len(captured) == has_graphs(DEVICE)
    for p in small.parameters():
        p.data = p.detach().clone()
    move(small)
    small.weights_version += 1
    all_go_on(decoders, 8)
    assert len(captured) == 2 * has_graphs(DEVICE)


@pytest.mark.slow
def test_each_step_draws_anew(small):
    """From nearly uniform probabilities, so that what would be drawn twice were the same token twice."""
    for path in ("plain", *PATHS):
        texts = []
        for _ in range(2):
            decoder, rows = make_decoder(small, path, temperature=1e6, generator=seeded())
            for _ in range(2):
                go_on(decoder, rows, 8)
            texts.append([row.turn_ids for row in rows])
        assert texts[0] == texts[1], path  # a seed gives one result
        assert min(len(set(text)) for text in texts[0]) > 8, path


@pytest.mark.slow
def test_compiled_steps_score_what_they_sample(small, data, monkeypatch):
    """A seed gives one result, released memory comes back, and what is played next is something else."""
    folder, questions, _ = data
    monkeypatch.setitem(PROTOCOLS, "videozoomer", ScriptedEnv)
    texts = []
    for release in (True, False):
        engine = compiled_engine(small, 3, SHORT, generator=seeded())
        for _ in range(2):
            groups, _ = engine.play(questions[:3], folder)
            episodes = [e for group in groups for e in group]
            assert len({len(e.env.turns) for e in episodes}) > 1
            check_sampled_log_probs(small, episodes)
            texts.append(said(groups))
            if release:
                engine.release()
                assert not engine.decoder.graphs
    assert texts[:2] == texts[2:] and texts[0] != texts[1]


def test_steps_are_compiled_by_default_where_there_are_graphs(policy):
    engine = Engine(policy, 2, RolloutConfig())
    assert engine.decoder.path == (PATHS[-1] if has_graphs(DEVICE) else "plain")


def test_replayed_steps_survive_new_weights(policy, data, monkeypatch):
    """What a captured decode step works on: tensors that stay where they are, with surplus rows, replayed for
    several tokens; captured again only when the cache has moved, not when the weights have changed. A pool
    without graphs is not used again. Here "capturing" keeps the step and replaying computes it."""
    folder, questions, _ = data
    policy, captured, sizes = chatty(policy), [], []

    def capture(step, generator, pool):
        assert (pool is None) == (not engine.decoder.graphs)
        tensors = [t.data_ptr() for t in engine.cache.tensors()]
        captured.append(tensors)
        result = [torch.zeros_like(x) for x in step()]

        def replay():
            sizes.append(len(result[0]))
            assert tensors == [t.data_ptr() for t in engine.cache.tensors()]
            for place, value in zip(result, step()):
                place.copy_(value)

        return replay, result, "a pool"

    engine = Engine(policy, 5, SHORT, seeded(), steps=3)
    engine.cache.row_unit = generation.ROW_UNIT
    engine.decoder.capture, engine.decoder.layers = True, lambda *args: decode_hidden(*args)
    monkeypatch.setattr(generation, "capture_graph", capture)
    for _ in range(2):
        number = len(captured)
        groups, _ = engine.play(questions[:3], folder)
        episodes = [e for group in groups for e in group]
        assert all(e.env.done for e in episodes) and max(len(e.env.turns) for e in episodes) > 1
        check_sampled_log_probs(policy, episodes)
        move(policy)
    assert 3 * (len(captured) - number) < len(sizes) / 3  # another number of rows, or a longer one
    assert len(set(sizes)) > 1 and all(n % generation.ROW_UNIT == 0 for n in sizes)


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_what_does_not_compile_runs_plain_with_one_warning(policy, data, monkeypatch, capsys, fault):
    folder, questions, _ = data

    def compiled(*args):
        if fault == "raises":
            raise RuntimeError("no compiler here")
        return decode_hidden(*args) * 1.01

    monkeypatch.setattr(torch, "compile", lambda *args, **how: compiled)
    config = RolloutConfig(temperature=0.0, max_turn_tokens=12, compile=True)
    engine = Engine(policy, 2, config)
    check_decoder(engine.decoder)
    warnings = capsys.readouterr().err.strip().splitlines()
    assert len(warnings) == 1 and ("no compiler here" if fault == "raises" else "off by") in warnings[0]
    assert engine.decoder.path == "plain"
    expected, _ = rollout(policy, questions[:2], 2, replace(config, compile=False), root=folder)
    assert said(engine.play(questions[:2], folder)[0]) == said(expected)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_meaning_of_bfloat16(data, compiled):
    """In bfloat16, sampling, packed scoring and single scoring round differently, but by no more than its
    precision: stated bounds for the mean and the largest mismatch of a log-probability."""
    folder, questions, _ = data
    policy = chatty(random_policy(layers=2 if compiled else None)).to(torch.bfloat16)
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    engine = Engine(policy, 6, SHORT, seeded())
    if compiled:
        torch._dynamo.reset()
        engine = compiled_engine(policy, 6, SHORT, generator=seeded())
    groups, _ = engine.play(questions[:3], folder)
    dialogues = [[e.dialogue for e in group] for group in groups]
    sampled = torch.tensor([p for group in dialogues for d in group for p in d.sampled_log_probs])
    with torch.no_grad():
        packed, _ = token_log_probs(policy, dialogues)
        single, _ = token_log_probs(policy, [[d] for group in dialogues for d in group])
    assert sampled.dtype == packed.dtype == torch.float32
    for other in (packed, single):
        mismatch = (other.cpu() - sampled).abs()
        assert mismatch.mean() < 0.03 and mismatch.max() < 0.3, (mismatch.mean(), mismatch.max())
