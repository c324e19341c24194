"""The episode: overview, zooms, what a turn means, rounds, tools, rewards, bad files."""

import json
import random
import re
import struct
import time
from dataclasses import replace

import numpy as np
import pytest
from cases import all_hold
from test_video import BAD_FILES, FILES, decode_all, on_screen, write_video
from tiny import random_policy

import zoom_env
from model import replay, stop_strings
from sources.rows import question_error
from video import Frame, Video, VideoError, open_video, scale
from zoom_env import (LAST_TURN, REWARD_PARTS, Call, EnvConfig, RewardWeights, Tool, ZoomEnv, grade,
                      overview_times, parse_turn, read_call)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos of 20 s at 25 frames a second, of 100 s and 150 s at one frame a second, and two of FILES."""
    folder = tmp_path_factory.mktemp("videos")
    for name in ("constant.mp4", "variable.mp4"):
        write_video(folder / name, **FILES[name])
    write_video(folder / "20s.mp4", range(0, 20_000, 40), b_frames=2)
    write_video(folder / "150s.mp4", range(0, 150_000, 1000))
    write_video(folder / "100s.mp4", range(0, 100_000, 1000))
    return folder


# ------------------------------------------------------------------------------------------ overview and zoom
QUESTION = {"id": "1", "video": "20s.mp4", "question": "What colour is the car?", "answer": "B",
            "options": ["blue", "red", "green"], "answer_type": "multiple_choice", "source": "test"}
ANSWER = "<think>I see it.</think>\n<answer>B</answer>"
WRONG = "<think>I see it.</think>\n<answer>C</answer>"


def zoom(start_s, end_s, fps):
    call = json.dumps({"segment": [start_s, end_s], "fps": fps})
    return f"<think>I look closer.</think>\n<video_zoom>{call}</video_zoom>"


def play(folder, turns, config=EnvConfig(), **question):
    """An episode with scripted turns: the environment and the messages of every step."""
    env = ZoomEnv({**QUESTION, **question}, config, root=folder)
    messages = [env.reset()]
    for turn in turns:
        assert not env.done
        messages.append(env.step(turn))
    return env, messages


def shown(messages):
    """The Frames of some messages; checks that each stands after its tag: its index and its time, to two
    decimals."""
    items = [item for message in messages for item in message.content]
    frames = [item for item in items if isinstance(item, Frame)]
    for index, frame in enumerate(frames):
        tag = items[next(i for i, item in enumerate(items) if item is frame) - 1]
        assert re.fullmatch(rf"\n?<frame{index}_time{frame.time_s:.2f}s>", tag), tag
    assert len(re.findall("<frame", "".join(i for i in items if isinstance(i, str)))) == len(frames)
    return frames


def words(messages):
    return "".join(item for message in messages for item in message.content if isinstance(item, str))


def check_frames(path, frames, asked_s):
    """`frames` are what a plain decode of the file shows at `asked_s`, with their true times."""
    check_frames_of(decode_all(path), frames, asked_s)


def check_frames_of(decoded, frames, asked_s):
    assert len(frames) == len(asked_s)
    for frame, time_s in zip(frames, asked_s):
        want_s, want = on_screen(decoded, time_s)
        assert frame.time_s == pytest.approx(want_s, abs=1e-6)
        assert np.array_equal(frame.image.permute(1, 2, 0).numpy(), want)


def test_overview_is_uniform_at_half_a_frame_a_second(folder):
    _, (first,) = play(folder, [])
    assert [message.role for message in first] == ["system", "user"]
    check_frames(folder / "20s.mp4", shown(first[1:]), [1, 3, 5, 7, 9, 11, 13, 15, 17, 19])
    text = words(first[1:])
    for line in (QUESTION["question"], "A. blue", "B. red", "C. green"):
        assert line in text.splitlines()
    assert "20.00 seconds" in text and "16" in words(first[:1])


def test_overview_shows_at_most_64_frames(folder):
    _, (first,) = play(folder, [], video="150s.mp4")
    frames = shown(first)
    duration_s = Video(folder / "150s.mp4").duration_s
    check_frames(folder / "150s.mp4", frames, [(i + 0.5) * duration_s / 64 for i in range(64)])
    for duration_s in (0.04, 3.0, 127.0, 128.0, 129.0, 36_000.0):
        times_s = overview_times(duration_s, EnvConfig())
        assert len(times_s) == min(64, max(1, int(np.ceil(duration_s / 2))))
        assert 0 < times_s[0] and times_s[-1] < duration_s
        np.testing.assert_allclose(np.diff(times_s), duration_s / len(times_s), atol=1e-5)


def test_a_question_may_say_how_many_frames_its_overview_has(folder):
    for number in (1, 3, 100):
        _, (first,) = play(folder, [], num_frames=number)
        check_frames(folder / "20s.mp4", shown(first), [(i + 0.5) * 20 / number for i in range(number)])


def test_overview_by_key_frames(folder, monkeypatch):
    """20 s with a key frame every second: within half a step of 2 s of every time lies one."""
    def by_key_frames(overview, by_key):
        _, (first,) = play(folder, [], EnvConfig(overview=overview))
        times_s = [frame.time_s for frame in shown(first)]
        # both: a key frame is on screen just then
        assert times_s == pytest.approx([1, 3, 5, 7, 9, 11, 13, 15, 17, 19])
        _, (first,) = play(folder, [], EnvConfig(overview=overview, overview_max_frames=9))
        times_s = [frame.time_s for frame in shown(first)]
        assert all(t == pytest.approx(round(t)) for t in times_s) == by_key and len(times_s) == 9

    all_hold(by_key_frames, [("uniform", False), ("nearest_keyframe", True), ("auto", False)])
    monkeypatch.setattr(zoom_env, "LONG_S", 19)  # then it is a long video
    all_hold(by_key_frames, [("uniform", False), ("auto", True)])


def test_overview_of_frames_that_someone_else_chose(folder):
    _, (first,) = play(folder, [], overview_frames=[250, 0.0, 10.0, 499.0])
    check_frames(folder / "20s.mp4", shown(first), [0.0, 0.4, 10.0, 19.96])
    for bad in ([5000], [-1]):
        with pytest.raises(VideoError, match="20s.mp4: no frame"):
            play(folder, [], overview_frames=bad)
    for bad in ([len(decode_all(folder / "variable.mp4"))], [-1]):
        with pytest.raises(VideoError, match="variable.mp4: no frame"):
            play(folder, [], video="variable.mp4", overview_frames=bad)
    assert question_error({**QUESTION, "overview_frames": "all"})
    assert not question_error({**QUESTION, "overview_frames": [1]})
    variable = decode_all(folder / "variable.mp4")
    chosen = [0, 3, 50, len(variable) - 1]
    _, (first,) = play(folder, [], video="variable.mp4", overview_frames=chosen)
    assert [f.time_s for f in shown(first)] == pytest.approx([variable[n][0] for n in chosen])


def test_every_option_has_one_letter(folder):
    def has_one_letter(options, lines):
        env, (first,) = play(folder, [], options=options)
        shown = words(first[1:]).splitlines()
        assert shown[1:1 + len(lines)] == lines and shown[1 + len(lines)].startswith("The video lasts")
        assert all(f"  {line}" in env.describe().splitlines() for line in lines)
        env.step(f"<think>It is so.</think><answer>{options[1]}</answer>")
        assert env.rewards["accuracy"] == (options[1] != "A")

    all_hold(has_one_letter, [
        (["A. blue", "(B) red", "C) green"], ["A. blue", "B. red", "C. green"]),
        (["A.blue", "B.red", "C.green"], ["A. blue", "B. red", "C. green"]),
        (["A、蓝", "B、红"], ["A. 蓝", "B. 红"]),
        (["a) blue", "b) red"], ["A. blue", "B. red"]),
        (["A: blue", "B．red"], ["A. blue", "B. red"]),
        (["A. M. radio", "FM radio"], ["A. A. M. radio", "B. FM radio"]),  # its letter only by chance
        (["a cat", "I.V. line"], ["A. a cat", "B. I.V. line"]),
        (["B", "A"], ["A. B", "B. A"]),
    ])


def test_zoom_shows_the_segment(folder):
    decoded = decode_all(folder / "20s.mp4")

    def shows_the_segment(start_s, end_s, fps, count):
        env, (_, reply) = play(folder, [zoom(start_s, end_s, fps)])
        frames = shown(reply)
        assert env.turns[0].calls[0].num_frames == count
        step = (end_s - start_s) / count
        check_frames_of(decoded, frames, [start_s + (i + 0.5) * step for i in range(count)])
        # on screen since at most one frame's time
        assert all(start_s - 0.04 <= frame.time_s < end_s for frame in frames)
        assert [message.role for message in reply] == ["user"]
        assert words(reply).startswith("<tool_response>") and "\n</tool_response>" in words(reply)

    all_hold(shows_the_segment, [
        (4, 8, 2, 8), (0, 16, 1, 16), (3.2, 4.0, 20, 16), (10, 10.5, 1, 1), (7, 8, 0.5, 1), (0.3, 2.9, 3, 7),
        (2, 18, 0.25, 4)])


def test_zoom_past_the_end_is_cut_there(folder):
    env, (_, reply) = play(folder, [zoom(18, 30, 1)])
    assert env.turns[0].calls[0].arguments == {"segment": (18.0, 20.0), "fps": 1.0}
    check_frames(folder / "20s.mp4", shown(reply), [18.5, 19.5])


def test_zoom_faster_than_the_video_repeats_no_frame(folder):
    _, (_, reply) = play(folder, [zoom(4, 6, 8)], video="150s.mp4")
    assert [frame.time_s for frame in shown(reply)] == [4.0, 5.0]


def test_zoom_knows_whether_it_saw_the_evidence(folder):
    env, _ = play(folder, [zoom(4, 8, 1), zoom(9, 10, 1)], evidence=[[1, 2], [7.5, 9]])
    assert [call.hit for turn in env.turns for call in turn.calls] == [True, False]


def test_a_zoom_that_holds_a_moment_of_evidence_hits(folder):
    zooms = [zoom(4, 8, 1), zoom(5, 9, 1), zoom(8, 10, 1), zoom(0, 6, 1), zoom(6, 7, 1)]
    env, _ = play(folder, zooms, EnvConfig(max_zooms=5), evidence=[[8, 8], [2, 4]])
    assert [call.hit for turn in env.turns for call in turn.calls] == [True, True, True, True, False]


# ------------------------------------------------------------------------------------------ what a turn means
def call(text):
    return f"<think>I look.</think>\n<video_zoom>{text}</video_zoom>"


GOOD_CALL = '<video_zoom>{"segment": [10, 18], "fps": 2}</video_zoom>'
TURNS = [  # text, kind, well formed; the video lasts 100 s
    (zoom(10, 18, 2), "call", True),
    (ANSWER, "answer", True),
    (zoom(10.25, 18.25, 2), "call", True),
    (zoom(0, 16, 1), "call", True),
    (zoom(0, 0.1, 160), "call", True),
    (call('{"fps": 2e0, "segment": [1e1, 18]}'), "call", True),
    (call(' \n{"segment":[10,18],\n"fps":2}\n '), "call", True),
    # of two equal keys the last counts, as JSON is usually read
    (call('{"segment": [10, 18], "fps": 9, "fps": 2}'), "call", True),
    (call('{"segment": [10, 18], "fps": 2, "fps": 9}'), "error", False),
    (f"  {ANSWER}\n", "answer", True),
    (f"<think></think>{GOOD_CALL}", "call", True),
    ("<think>a < b > c </i> {}</think><answer>a <b>red</b> car</answer>", "answer", True),
    # calls that cannot be carried out
    (zoom(0, 16.1, 1), "error", False),
    (zoom(0, 100, 1), "error", False),
    (zoom(0, 1, 10**9), "error", False),
    (zoom(0, 1, 1e308), "error", False),
    (zoom(100, 110, 1), "error", False),
    (zoom(18, 10, 2), "error", False),
    (zoom(10, 10, 2), "error", False),
    (zoom(-1, 3, 2), "error", False),
    (zoom(10, 18, 0), "error", False),
    (zoom(10, 18, -2), "error", False),
    (call('{"segment": [10, 18], "fps": 1e-400}'), "error", False),
    (call('{"segment": [NaN, 18], "fps": 2}'), "error", False),
    (call('{"segment": [10, NaN], "fps": 2}'), "error", False),
    (call('{"segment": [10, 18], "fps": NaN}'), "error", False),
    (call('{"segment": [10, Infinity], "fps": 2}'), "error", False),
    (call('{"segment": [-Infinity, 18], "fps": 2}'), "error", False),
    (call('{"segment": [10, 18], "fps": Infinity}'), "error", False),
    (call('{"segment": [10, 1e400], "fps": 0.0001}'), "error", False),
    (call('{"segment": [10, %s], "fps": 0.0001}' % ("9" * 6000)), "error", False),
    (call('{"segment": [false, true], "fps": 2}'), "error", False),
    (call('{"segment": [10, 18], "fps": true}'), "error", False),
    (call('{"segment": ["10", "18"], "fps": 2}'), "error", False),
    (call('{"segment": [10, 18], "fps": "2"}'), "error", False),
    (call('{"segment": "10-18", "fps": 2}'), "error", False),
    (call('{"segment": [[10], [18]], "fps": 2}'), "error", False),
    (call('{"segment": [10, 18], "fps": [2]}'), "error", False),
    (call('{"segment": {"start": 10, "end": 18}, "fps": 2}'), "error", False),
    (call('{"segment": [10, null], "fps": 2}'), "error", False),
    (call('{"segment": null, "fps": 2}'), "error", False),
    (call('{"segment": [10, 14, 18], "fps": 2}'), "error", False),
    (call('{"segment": [10], "fps": 2}'), "error", False),
    (call('{"segment": [10, 18]}'), "error", False),
    (call('{"segment": [10, 18], "fps": 2, "crop": 1}'), "error", False),
    (call('[{"segment": [10, 18], "fps": 2}]'), "error", False),
    (call('{"segment": [10, 18], "fps": 2'), "error", False),
    (call('{"segment": [10, 18], "fps": 2,}'), "error", False),
    (call('{"segment": [10, 18], "fps": 2} {}'), "error", False),
    (call("{'segment': [10, 18], 'fps': 2}"), "error", False),
    (call('```json\n{"segment": [10, 18], "fps": 2}\n```'), "error", False),
    (call("10 to 18"), "error", False),
    (call("null"), "error", False),
    (call(""), "error", False),
    (call("\ud800\x00"), "error", False),
    # not exactly one action
    ("", "error", False),
    ("   \n", "error", False),
    ("<think>hm</think>", "error", False),
    ("<think>hm", "error", False),
    ("B", "error", False),
    (f"<think>hm</think>{GOOD_CALL}{GOOD_CALL}", "error", False),
    ("<think>hm</think><answer>A</answer><answer>B</answer>", "error", False),
    (f"<think>hm</think>{GOOD_CALL}<answer>B</answer>", "error", False),
    (f"<think>hm</think><answer>B</answer>{GOOD_CALL}", "error", False),
    (f"<think>hm</think><answer>{GOOD_CALL}</answer>", "error", False),
    ('<think>hm</think><video_zoom><answer>B</answer></video_zoom>', "error", False),
    # tags that are not closed, nested or out of order
    ('<think>hm</think><video_zoom>{"segment": [10, 18], "fps": 2}', "error", False),
    ("<think>hm</think><answer>B", "error", False),
    ("<think>hm</think><answer>B</answer><video_zoom>", "error", False),
    ("<think>hm</think>B</answer>", "error", False),
    ("<think>hm</think></answer>B<answer>", "error", False),
    ("<think>hm</think><answer><answer>B</answer></answer>", "error", False),
    (f"<think>hm</think><video_zoom>{GOOD_CALL}</video_zoom>", "error", False),
    ("<think>hm</think><ANSWER>B</ANSWER>", "error", False),
    # an action inside the thoughts is none
    (f"<think>{GOOD_CALL}</think>", "error", False),
    ("<think><answer>B</answer></think>", "error", False),
    (f"<think>{GOOD_CALL}</think><answer>B</answer>", "answer", False),
    (f"<think><answer>A</answer></think>{GOOD_CALL}", "call", False),
    # can be carried out, but is not well formed
    (GOOD_CALL, "call", False),
    ("<answer>B</answer>", "answer", False),
    (f"Well. {ANSWER}", "answer", False),
    (f"{ANSWER} Done.", "answer", False),
    (f"<think>hm</think> Then {GOOD_CALL}", "call", False),
    ("<think>hm</think><think>hm</think><answer>B</answer>", "answer", False),
    ("<think><think>hm</think><answer>B</answer>", "answer", False),
    ("hm</think><answer>B</answer>", "answer", False),
    ("<think>hm<answer>B</answer>", "answer", False),
]


def check_turn(text, kind, well_formed):
    turn = parse_turn(text, 100.0, EnvConfig())
    assert (turn.kind, turn.well_formed) == (kind, well_formed)
    assert bool(turn.error) == (kind == "error") and len(turn.error or "") < 300
    if kind == "call" and text.count("10, 18"):
        assert turn.calls == [Call("video_zoom", {"segment": (10.0, 18.0), "fps": 2.0})]
    if "<answer>B</answer>" in text and kind == "answer":
        assert turn.answer == "B"


def test_what_a_turn_means():
    all_hold(check_turn, TURNS)


def ended(env):
    """The rewards of an episode, cut off here if it is not over; it can go on all the same."""
    assert bool(env.rewards) == env.done
    env = env.fork()
    env.end()
    return env.rewards


def test_what_the_environment_answers_and_what_format_reward_it_earns(folder):
    begun, _ = play(folder, [], video="100s.mp4")

    def answers(text, kind, well_formed):
        env = begun.fork()
        reply = env.step(text)
        if kind == "answer":
            assert env.done and reply == []
        else:
            assert not env.done and "3 more time(s)" in words(reply)
            assert bool(shown(reply)) == (kind == "call")
            assert words(reply).startswith("<tool_response>\nError: ") == (kind == "error")
            assert ended(env)["format"] == 0  # not finished
            env.step(ANSWER)
        assert env.rewards["format"] == well_formed

    all_hold(answers, TURNS)


def test_a_megabyte_is_read_at_once():
    def is_read_at_once(text):
        start = time.process_time()
        turn = parse_turn(text, 100.0, EnvConfig())
        assert time.process_time() - start < 0.5
        assert turn.kind in ("call", "answer", "error")

    all_hold(is_read_at_once, [(text,) for text in (
        "<video_zoom>" * 83_000,
        "<video_zoom>" * 83_000 + "</video_zoom>",
        "</video_zoom>" * 76_000,
        "<video_zoom></video_zoom>" * 40_000,
        "<answer></video_zoom><video_zoom></answer>" * 24_000,
        "<think>" * 140_000,
        call("[" * 1_000_000),
        call('{"segment":' * 90_000),
        call('{"segment": [1, ' + "9" * 1_000_000 + '], "fps": 1}'),
        call(" " * 1_000_000),
        " " * 1_000_000,
        f"<think>hm</think><answer>{'B' * 1_000_000}</answer>",
        f"<think>{'x' * 1_000_000}</think>{GOOD_CALL}",
    )])


def mutate(text, rng):
    """A few random cuts, copies and insertions."""
    pieces = ["<think>", "</think>", "<video_zoom>", "</video_zoom>", "<answer>", "</answer>", "{", "}", "[",
              "]", '"', ",", ":", "-", "9", "0", ".", "e9", "NaN", "Infinity", "true", "null", "\n", "\x00",
              "\ud83d", "é", " "]
    for _ in range(rng.randint(1, 5)):
        at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        to = min(to, at + rng.choice([1, 3, 20]))
        text = rng.choice([
            text[:at] + text[to:], text[:at] + rng.choice(pieces) + text[at:], text[:to] + text[at:],
            text[:at] + rng.choice(pieces) + text[to:], text[:at] + text[at:to][::-1] + text[to:],
        ])
    return text


@pytest.mark.parametrize("number_of_texts", [4_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_nothing_that_is_said_raises(folder, number_of_texts):
    rng, kinds = random.Random(0), []
    env, _ = play(folder, [], EnvConfig(max_zooms=10**6))
    for number in range(number_of_texts):
        text = mutate(rng.choice([zoom(10, 18, 2), zoom(0.5, 1.25, 4), ANSWER]), rng)
        turn = parse_turn(text, 20.0, EnvConfig())
        kinds.append(turn.kind)
        if turn.kind == "call":
            asked, = (call.arguments for call in turn.calls)
            (start_s, end_s), fps = asked["segment"], asked["fps"]
            assert 0 <= start_s < end_s <= 20 and 0 < (end_s - start_s) * fps < 16.001
        elif turn.kind == "answer":
            assert 0 <= grade(turn.answer, QUESTION) <= 1
        else:
            assert turn.kind == "error" and turn.error
        shape = re.fullmatch(r"\s*<think>.*</think>\s*<(video_zoom|answer)>.*</\1>\s*", text, re.DOTALL)
        tags = re.findall(r"</?(?:think|video_zoom|answer)>", text)
        assert turn.well_formed == bool(shape and len(tags) == 4 and turn.kind != "error"), text
        if number % (number_of_texts // 100) == 0:
            reply = env.step(text)
            assert env.done == (turn.kind == "answer") and bool(reply) != env.done
            assert ended(env)["reward"] >= 0 and env.describe()
            if env.done:
                env.reset()
    # the mutations reach every kind
    assert min(kinds.count(kind) for kind in ("call", "answer", "error")) > 100


@pytest.mark.slow
def test_any_text_and_any_json_is_read():
    """The same with turns that are made up, not mutated, where hypothesis is installed."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    tag = st.sampled_from(["<think>", "</think>", "<video_zoom>", "</video_zoom>", "<answer>", "</answer>"])
    number = st.floats() | st.integers() | st.sampled_from([0, 1, 10, 18, 0.5])
    value = st.recursive(st.none() | st.booleans() | number | st.text(max_size=5),
                         lambda inner: (st.lists(inner, max_size=3)
                                        | st.dictionaries(st.text(max_size=5), inner, max_size=3)))
    segment = st.lists(number, min_size=2, max_size=2) | value
    objects = st.fixed_dictionaries({"segment": segment, "fps": number | value})
    json_call = objects.map(lambda x: call(json.dumps(x)))

    @hypothesis.settings(max_examples=2000, deadline=None, database=None, derandomize=True)
    @hypothesis.given(st.lists(tag | st.text(max_size=10), max_size=10).map("".join) | json_call | st.text())
    def reads(text):
        turn = parse_turn(text, 20.0, EnvConfig())
        assert turn.kind in ("call", "answer", "error") and bool(turn.error) == (turn.kind == "error")
        if turn.kind == "call":
            asked, = (call.arguments for call in turn.calls)
            (start_s, end_s), fps = asked["segment"], asked["fps"]
            assert 0 <= start_s < end_s <= 20 and fps > 0 and (end_s - start_s) * fps < 16.001
        if turn.kind == "answer":
            assert 0 <= grade(turn.answer, QUESTION) <= 1

    reads()


# ----------------------------------------------------------------------------------------------------- rounds
def test_four_zooms_then_an_answer(folder):
    env, messages = play(folder, [zoom(4 * i, 4 * i + 4, 4) for i in range(4)] + [ANSWER])
    assert env.done and env.num_calls() == 4 and env.num_invalid() == 0 and env.answer() == "B"
    assert messages[-1] == []
    assert [LAST_TURN in words(message) for message in messages[:-1]] == [False, False, False, False, True]
    assert env.frames_shown == 10 + 4 * 16 == sum(len(shown(message)) for message in messages)


def test_a_fifth_zoom_ends_the_episode_without_an_answer(folder):
    env, messages = play(folder, [zoom(0, 4, 1)] * 5)
    assert env.done and messages[-1] == [] and env.answer() is None
    assert env.num_calls() == 4 and env.num_invalid() == 1
    assert env.rewards == dict.fromkeys(["reward", *REWARD_PARTS], 0.0)


def test_an_error_costs_a_round(folder):
    env, messages = play(folder, [zoom(0, 20, 9), "hm", zoom(0, 4, 1), call("?"), "hm"])
    assert env.done and env.num_calls() == 1 and env.num_invalid() == 4
    for reply in (messages[1], messages[2], messages[4]):
        assert not shown(reply) and re.match(r"<tool_response>\nError: .+\n</tool_response>\n", words(reply))
    assert LAST_TURN in words(messages[4]) and LAST_TURN not in words(messages[3])


def test_no_zoom_allowed(folder):
    env, messages = play(folder, [zoom(0, 4, 1)], EnvConfig(max_zooms=0))
    assert LAST_TURN in words(messages[0]) and env.done and env.num_calls() == 0


def test_without_a_tool_the_last_line_is_an_answer_without_its_tag(folder):
    begun, _ = play(folder, [], EnvConfig(max_zooms=0))

    def is_answered(text, answer):
        env = begun.fork()
        env.step(text)
        (turn,) = env.turns
        assert (turn.answer if turn.untagged else None) == answer and turn.untagged == (answer is not None)
        if answer:
            assert turn.kind == "error" and env.rewards["accuracy"] == 1 and env.rewards["format"] == 0
        assert not parse_turn(text, 20, EnvConfig(max_zooms=1)).untagged

    all_hold(is_answered, [
        ("B", "B"), ("It is late.\nThe answer is B.", "The answer is B."), ("<think>C?</think>\nB\n", "B"),
        ("<think>C, as\nB", None), ("<answer>B</answer>", None), (zoom(0, 4, 1), None), ("", None),
        ('<video_zoom>{"segment": [0, 4], "fps": 1}', None), ("<answer>B", "<answer>B")])


def test_a_reply_that_is_dropped_is_no_zoom(folder):
    env, _ = play(folder, [zoom(0, 4, 1), zoom(4, 8, 1)], evidence=[[4, 8]])
    assert env.num_calls() == 2 and env.frames_shown == 10 + 4 + 4
    env.end()
    assert env.num_calls() == 1 and env.num_invalid() == 0
    assert env.frames_shown == 10 + 4 and len(env.watched) == 2
    assert env.turns[-1].kind == "dropped" and env.turns[-1].calls[0].hit is None
    assert env.rewards["format"] == 0
    assert "too long" in env.describe()


def test_reset_and_fork(folder):
    env, _ = play(folder, [zoom(0, 4, 1)])
    other = env.fork()
    other.step(WRONG)
    assert other.done and not env.done and len(env.turns) == 1
    env.step(ANSWER)
    assert env.answer() == "B" and other.answer() == "C"
    env.reset()
    assert not env.done and env.turns == [] and env.answer() is None and env.frames_shown == 10


# ------------------------------------------------------------------------------------------------------ tools
def parse_crop(text, duration_s, config):
    call = read_call(text, '{"time": 12.0, "box": [0.0, 0.5, 0.5, 1.0]}')
    time_s, box = call["time"], call["box"]
    if not isinstance(box, list) or len(box) != 4 or not all(type(x) is float for x in [time_s, *box]):
        raise ValueError('"time" must be a number of seconds and "box" four numbers')
    x0, y0, x1, y1 = box
    if not (0 <= time_s < duration_s and 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ValueError("the time must be in the video, and the box in the frame")
    return {"time": time_s, "box": box}


def run_crop(env, arguments):
    video, (x0, y0, x1, y1) = open_video(env.path), arguments["box"]
    (time_s, image), = video.frames_at([arguments["time"]])  # (H, W, 3), as large as it was filmed
    height, width = image.shape[:2]
    image = image[int(y0 * height):int(np.ceil(y1 * height)), int(x0 * width):int(np.ceil(x1 * width))]
    c = env.config
    return (Frame(time_s, scale(image, video.pixel_shape, c.min_pixels, c.max_pixels, c.frame_unit)),)


@pytest.fixture
def crop(monkeypatch):
    """A second tool, in space: all that it takes is a parser, a function that runs it and a row of the
    table."""
    row = Tool(parse_crop, run_crop, looks_at=lambda arguments: (arguments["time"], arguments["time"]))
    monkeypatch.setitem(zoom_env.TOOLS, "crop", row)


def crop_call(time_s, box):
    return f'<think>I look closer.</think>\n<crop>{json.dumps({"time": time_s, "box": box})}</crop>'


def test_a_trajectory_with_a_second_tool_is_replayed(folder, crop):
    """A turn ends with its first call, whichever tool that calls; its end-of-turn token is the
    environment's."""
    policy = random_policy()
    policy.env_config = replace(policy.env_config, max_zooms=4)
    calls = [crop_call(7.99, [0, 0.5, 0.5, 1]), zoom(4, 8, 1)]
    turns = [calls[0] + " and" + calls[1], calls[1] + calls[0], ANSWER]
    row = {"question": QUESTION, "kind": "exemplar", "turns": turns, "learn": [True] * 3, "provenance": {}}
    dialogue, env = replay(policy, row, folder)
    said = policy.tokenizer.decode([i for i, trained in zip(dialogue.ids, dialogue.trained) if trained])
    assert said == calls[0] + calls[1] + ANSWER + "<|im_end|>"
    assert [call.tool for t in env.turns[:2] for call in t.calls] == ["crop", "video_zoom"]


def test_a_second_tool_plays_beside_the_first(folder, crop):
    config = EnvConfig(min_pixels=784, max_pixels=4 * 100_352)
    turns = [crop_call(7.99, [0, 0.5, 0.5, 1]), zoom(4, 8, 1), crop_call(30, [0, 0, 1, 1]), ANSWER]
    env, (_, first, second, third, _) = play(folder, turns, config, evidence=[[7, 9]])
    assert [(turn.kind, [call.tool for call in turn.calls]) for turn in env.turns] == [
        ("call", ["crop"]), ("call", ["video_zoom"]), ("error", []), ("answer", [])]
    assert env.turns[0].calls[0].arguments == {"time": 7.99, "box": [0.0, 0.5, 0.5, 1.0]}
    calls = [call for turn in env.turns for call in turn.calls]
    assert [call.num_frames for call in calls] == [1, 4] and [call.hit for call in calls] == [True, True]
    frame, = shown(first)
    want_s, want = on_screen(decode_all(folder / "20s.mp4"), 7.99)
    assert frame.time_s == pytest.approx(want_s)
    assert np.array_equal(frame.image.permute(1, 2, 0).numpy(), want[84:, :112])
    assert len(shown(second)) == 4 and "Error: the time must be in the video" in words(third)
    assert env.num_calls() == 2 and env.num_invalid() == 1 and env.frames_shown == 10 + 1 + 4
    assert (env.rewards["accuracy"], env.rewards["format"], env.rewards["tool"]) == (1, 0, 1)
    assert "looked at 1 frames, 7.96 s to 7.96 s" in env.describe()


def test_a_second_tool_changes_nothing_for_the_first(crop):
    all_hold(check_turn, TURNS)


def test_what_a_turn_with_two_tools_means(crop):
    good = crop_call(5, [0, 0, 1, 1])
    assert stop_strings(zoom_env.TOOLS) == ("</video_zoom>", "</crop>")
    read = lambda text: parse_turn(text, 100.0, EnvConfig())
    assert (read(good).kind, read(good).well_formed) == ("call", True)
    assert (read("Well. " + good).kind, read("Well. " + good).well_formed) == ("call", False)
    assert read(good + GOOD_CALL).error == (
        "Error: the turn has more than one <video_zoom> or <crop> call or <answer>. Give exactly one.")
    assert read("hm").error == (
        "Error: the turn has no <video_zoom> or <crop> call and no <answer>. Give exactly one.")
    assert read("<think>hm</think><crop>").kind == "error"
    assert read("<think>hm</think><crop>{}</crop>").error == (
        'Error: the call needs exactly the keys "time" and "box"')
    assert read("<think>hm</think><crop>?</crop>").error.startswith("Error: the call is not JSON like {")


def test_without_it_there_is_one_tool(folder):
    assert stop_strings(zoom_env.TOOLS) == ("</video_zoom>",)
    env, (_, reply) = play(folder, [crop_call(5, [0, 0, 1, 1])])
    assert env.turns[0].kind == "error" and not shown(reply)
    assert words(reply).startswith(
        "<tool_response>\nError: the turn has no <video_zoom> call and no <answer>. Give exactly one.\n"
        "</tool_response>\n")


# ---------------------------------------------------------------------------------------------------- rewards
LOOK, TOO_MUCH = zoom(4, 8, 2), zoom(0, 20, 9)


def test_reward(folder):
    begun, _ = play(folder, [])

    def earns(turns, accuracy, format_ok, tool):
        env = begun.fork()
        for text in turns:
            env.step(text)
        env.end()
        reward = env.rewards
        assert (reward["accuracy"], reward["format"], reward["tool"]) == (accuracy, format_ok, tool)
        assert reward["reward"] == pytest.approx(0.9 * accuracy + 0.1 * format_ok + 0.5 * tool)

    all_hold(earns, [
        ([ANSWER], 1, 1, 0),
        ([WRONG], 0, 1, 0),
        ([LOOK, ANSWER], 1, 1, 1),
        ([LOOK, LOOK, ANSWER], 1, 1, 1),  # once, however often it zoomed
        ([LOOK, WRONG], 0, 1, 0),  # no bonus for a wrong answer
        (["<answer>B</answer>"], 1, 0, 0),
        (["<answer>C</answer>"], 0, 0, 0),
        ([GOOD_CALL, ANSWER], 1, 0, 1),  # every turn has to be well formed
        ([LOOK, "<answer>B</answer>"], 1, 0, 1),
        ([TOO_MUCH, ANSWER], 1, 0, 0),  # a zoom that was refused is none
        ([LOOK, TOO_MUCH, ANSWER], 1, 0, 1),
        (["hm", ANSWER], 1, 0, 0),
        ([LOOK], 0, 0, 0),  # not finished
        ([], 0, 0, 0),
    ])


def test_reward_weights_and_partly_right_segments(folder):
    config = EnvConfig(accuracy_weight=2.0, format_weight=0.25, tool_weight=4.0)
    segment = dict(answer_type="segment", answer=[10, 20], options=None)
    for said, reward in (("[12, 18]", 2 * 0.6 + 0.25 + 4), ("[18, 28]", 2 * 2 / 18 + 0.25)):
        answer = f"<think>I see it.</think><answer>{said}</answer>"
        env, _ = play(folder, [LOOK, answer], config, **segment)
        assert env.rewards["reward"] == pytest.approx(reward)


def test_the_share_of_zooms_that_hit_is_a_part_of_the_reward(folder):
    """Of those that were carried out: not a call that was refused, or whose reply was not shown."""
    hit, miss = zoom(4, 8, 1), zoom(12, 16, 1)
    wrong = ANSWER.replace("B</answer>", "A</answer>")

    def has_share(turns, evidence, share):
        env, _ = play(folder, turns, EnvConfig(hit_weight=2.0), evidence=evidence)
        env.end()
        parts = env.rewards
        others = 0.9 * parts["accuracy"] + 0.1 * parts["format"] + 0.5 * parts["tool"]
        assert parts["hit"] == pytest.approx(share) and parts["reward"] == pytest.approx(others + 2 * share)

    all_hold(has_share, [
        ([hit, ANSWER], [[5, 6]], 1), ([hit, miss, wrong], [[5, 6]], 1 / 2), ([miss, ANSWER], [[5, 6]], 0),
        ([miss, hit, miss, ANSWER], [[5, 6]], 1 / 3), ([TOO_MUCH, hit, ANSWER], [[5, 6]], 1),
        ([miss, hit], [[5, 6]], 0),  # cut off before the second one's reply was seen
        ([ANSWER], [[5, 6]], 0), ([hit, ANSWER], None, 0)])


def test_rewards_are_computed_once_when_the_episode_ends(folder, monkeypatch):
    graded = []
    monkeypatch.setattr(zoom_env, "grade", lambda *args: graded.append(args) or grade(*args))
    env, _ = play(folder, [LOOK])
    assert env.rewards == {} and not graded
    env.step(ANSWER)
    assert env.rewards == {"reward": 1.5, "accuracy": 1.0, "format": 1.0, "tool": 1.0, "hit": 0.0}
    assert list(env.rewards) == ["reward", *REWARD_PARTS] and len(graded) == 1
    before = env.rewards
    env.end()
    assert env.rewards is before and env.done and len(graded) == 1
    env.reset()
    assert env.rewards == {} and not env.done


def test_an_episode_that_is_cut_off(folder):
    def is_cut_off(turns):
        env, _ = play(folder, turns)
        other = env.fork()
        env.end()
        assert env.done and env.rewards == dict.fromkeys(["reward", *REWARD_PARTS], 0.0)
        assert len(env.turns) == len(turns) and env.answer() is None and env.describe()
        assert not other.done and other.rewards == {}
        other.step(ANSWER)
        assert other.rewards["accuracy"] == 1 and env.rewards["reward"] == 0

    all_hold(is_cut_off, [([],), ([LOOK],), ([LOOK, "hm"],)])


def test_settings_of_an_old_checkpoint_are_read():
    old = dict(overview_fps=1.0, overview_max_frames=12, overview="auto", zoom_max_frames=8, max_zooms=2,
               min_pixels=3136, max_pixels=3136, accuracy_weight=0.9, format_weight=0.1, tool_weight=0.25,
               system_prompt="You see a video.")
    config = EnvConfig(**json.loads(json.dumps(old)))
    assert isinstance(config, RewardWeights) and config.tool_weight == 0.25 and config.frame_unit == 28
    assert REWARD_PARTS == ("accuracy", "format", "tool", "hit") and config.hit_weight == 0


def test_frames_have_the_policys_unit(folder):
    _, (first, reply) = play(folder, [LOOK], EnvConfig(frame_unit=32))
    for frame in shown(first) + shown(reply):
        assert not any(side % 32 for side in frame.image.shape[1:])
    with pytest.raises(ValueError, match="frame_unit"):
        EnvConfig(frame_unit=0)


# -------------------------------------------------------------------------------------------------- bad files
def test_a_bad_file_is_named(folder, tmp_path):
    (tmp_path / "copy.mp4").write_bytes((folder / "constant.mp4").read_bytes())

    def is_named(name):
        BAD_FILES[name](tmp_path / name, folder / "constant.mp4")
        with pytest.raises(VideoError) as raised:
            ZoomEnv({**QUESTION, "video": name}, EnvConfig(), root=tmp_path).reset()
        assert str(tmp_path / name) in str(raised.value)

    all_hold(is_named, [(name,) for name in BAD_FILES])


def test_an_absurd_time_base_costs_no_time(folder, tmp_path):
    def costs_no_time(ticks_a_second):
        data = bytearray((folder / "constant.mp4").read_bytes())
        at = data.index(b"mdhd") + 16  # the track's time scale
        data[at:at + 4] = struct.pack(">I", ticks_a_second)
        path = tmp_path / f"{ticks_a_second}.mp4"
        path.write_bytes(data)
        start = time.process_time()
        try:
            env = ZoomEnv({**QUESTION, "video": path.name}, EnvConfig(), root=tmp_path)
            env.reset()
            assert all(0 <= f.time_s <= env.duration_s for f in env.watched[0]) and len(env.watched[0]) <= 64
        except VideoError as error:
            assert path.name in str(error)
        assert time.process_time() - start < 5

    all_hold(costs_no_time, [(0,), (1,), (2**31 - 1,), (2**32 - 1,)])


def test_a_corrupt_tail_costs_only_the_tail(tmp_path):
    """A download that was never finished: the space is there, the last third is zeros. At 50 frames a second
    in one group of pictures, so more packets than MAX_FUTILE_PACKETS are lost."""
    path = write_video(tmp_path / "x.mp4", range(0, 80_000, 20), mux={"movflags": "faststart"}, key_every=500)
    whole, data = decode_all(path), bytearray(path.read_bytes())
    first = len(data) * 2 // 3
    data[first:] = bytes(len(data) - first)
    path.write_bytes(data)
    env = ZoomEnv({**QUESTION, "video": path.name}, EnvConfig(), root=tmp_path)
    began = time.monotonic()
    frames = shown(env.reset())
    assert time.monotonic() - began < 10
    assert env.duration_s == pytest.approx(80, abs=0.05)
    last_s = frames[-1].time_s
    assert 40 < last_s < 65
    asked_s = overview_times(env.duration_s, EnvConfig())
    check_frames_of(whole, frames, [t for t in asked_s if t < last_s + 0.02])
    assert "Error: this part of the video cannot be decoded." in words(env.step(zoom(70, 78, 2)))
    assert len(shown(env.step(zoom(last_s - 8, last_s, 2)))) == 16
    assert len(shown(env.step(zoom(last_s - 5, 80, 0.4)))) < 10
    assert env.num_calls() == 2 and env.num_invalid() == 1
