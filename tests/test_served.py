"""What a server plays: the same episodes, whatever the server does otherwise; no answer lost or asked again."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from urllib.request import urlopen

import pytest
import torch
from api_server import KEY, Raw, api_server, completion, images_of, refusal, text_of, use_key
from tiny import make_place

import eval as evaluation
from common import UserError
from demo.tiny_base import TINY_BASE
from rollout import RolloutConfig
from sources import served
from sources.served import Said, ServedConfig, ServedEngine, Server, said_in
from training.environment import load_env_config
from zoom_env import Message, ZoomEnv

pytest.importorskip("openai")
ZOOM = '<think>Closer.</think><video_zoom>{"segment": [10, 14], "fps": 1}</video_zoom>'
STOP, TAGS = ("</video_zoom>",), ("video_zoom",)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("served"), layers=1, test=6)


@pytest.fixture
def key(monkeypatch):
    use_key(monkeypatch)


def turns_so_far(body):
    return sum(message["role"] == "assistant" for message in body["messages"])


def zoom_then_answer(body):
    """A policy: it zooms, then says A."""
    return ZOOM if turns_so_far(body) == 0 else "<think>Seen.</think><answer>A</answer>"


def questions_of(place, name="test"):
    return [json.loads(line) for line in open(place / f"{name}.jsonl")]


def engine_of(place, server, tmp_path, group_size=1, **how):
    settings = {name: how.pop(name) for name in list(how) if name in ServedConfig.__annotations__}
    env_config = load_env_config(place / "model")
    served = Server(ServedConfig(base_url=server.url, **settings), tmp_path / "answers.jsonl", env_config)
    config = RolloutConfig(temperature=how.pop("temperature", 0.0), max_turn_tokens=50, **how)
    return ServedEngine(served, group_size, config)


# ------------------------------------------------------------------------------------------------- the episode
def test_what_is_asked_is_what_the_environment_shows(place, tmp_path, key):
    """Texts, frames to the last bit, sampling, and the dialogue that grows; no turn of another question."""
    questions = questions_of(place)
    with api_server(zoom_then_answer) as server:
        groups, skipped = engine_of(place, server, tmp_path, concurrency=3).play(questions, place)
    assert not skipped and len(server.requests) == 2 * len(questions)
    for question, (e,) in zip(questions, groups):
        env = ZoomEnv(question, load_env_config(place / "model"), place)
        shown = env.reset()
        asked = [body for body in server.requests if body["messages"][:2] == e.messages[:2]]
        for body in sorted(asked, key=turns_so_far):
            frames = [item for message in shown for item in message.content if not isinstance(item, str)]
            assert all(map(torch.equal, images_of(body), [frame.image for frame in frames]))
            assert len(images_of(body)) == len(frames)
            assert text_of(body).replace("\n", "") == "".join(
                item for message in shown for item in message.content if isinstance(item, str)).replace("\n", "")
            assert [m["role"] for m in body["messages"]] == [m.role for m in shown]
            text = zoom_then_answer(body)
            shown += [Message("assistant", [text]), *env.step(text)]
            assert (body["temperature"], body["top_k"], body["repetition_penalty"]) == (0.0, -1, 1)
            assert "top_p" not in body
            assert body["stop"] == [*STOP] and body["max_tokens"] == 50 and body["model"] == "teacher"
            assert body["key"] == f"Bearer {KEY}"
        assert e.env.rewards == env.rewards and e.env.turns == env.turns
        assert e.token_counts() == {"tokens": 110, "generated": 20, "prompt_tokens": 100,
                                    "refused_parameters": []}
    assert KEY not in (tmp_path / "answers.jsonl").read_text()


def test_frames_as_jpeg(place, tmp_path, key):
    """Of the same sizes, and nearly the same."""
    question = questions_of(place)[0]
    with api_server(zoom_then_answer) as server:
        engine_of(place, server, tmp_path, image_format="jpeg").play([question], place)
    frames = [item for message in ZoomEnv(question, load_env_config(place / "model"), place).reset()
              for item in message.content if not isinstance(item, str)]
    body = server.requests[0]
    urls = [part["image_url"]["url"] for part in body["messages"][1]["content"] if part["type"] == "image_url"]
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls) and len(urls) == len(frames)
    for shown, frame in zip(images_of(body), frames):
        assert shown.shape == frame.image.shape
        assert (shown.float() - frame.image.float()).abs().mean() < 12


def test_samples_of_a_question_have_seeds_of_their_own(place, tmp_path, key):
    """And its video is read once for all of them, and not kept."""
    opened = []

    def begin(env):
        opened.append(env.question["id"])
        return env.reset()

    questions = questions_of(place)
    with api_server(zoom_then_answer) as server:
        engine = engine_of(place, server, tmp_path, group_size=3, temperature=1.0, concurrency=4)
        engine.begin = begin
        groups, _ = engine.play(questions, place, on_end=lambda e: e.forget_frames())
    assert sorted(opened) == sorted(question["id"] for question in questions)
    assert [[e.number for e in group] for group in groups] == [[0, 1, 2]] * len(questions)
    assert len({body["seed"] for body in server.requests}) == len(server.requests) == 6 * len(questions)
    assert all(e.messages == [] and e.env.watched[0][0].image is None for group in groups for e in group)


@pytest.mark.parametrize("text, choice, becomes", [
    # the stop string is left out, and the server says so, or does not; it is kept; it was never known
    (ZOOM.removesuffix(*STOP), {"stop_reason": STOP[0]}, ZOOM),
    (ZOOM.removesuffix(*STOP), {"matched_stop": STOP[0]}, ZOOM),
    (ZOOM.removesuffix(*STOP), {}, ZOOM),
    (ZOOM.removesuffix(*STOP), {"finish_reason": "length"}, ZOOM.removesuffix(*STOP)),
    (ZOOM, {}, ZOOM), (ZOOM + " and" + ZOOM, {}, ZOOM),
    # a call in a thought that comes in a field of its own is none
    ("<answer>A</answer>", {"message": {"content": "<answer>A</answer>", "reasoning": ZOOM}},
     f"<think>{ZOOM}</think><answer>A</answer>"),
    # a text that ends by itself and only names the tool
    ("<think>I may <video_zoom> here {x}</think>no", {}, "<think>I may <video_zoom> here {x}</think>no"),
    ("I may <video_zoom> here", {}, "I may <video_zoom> here"),
    (ZOOM.removesuffix(*STOP), {"stop_reason": None}, ZOOM.removesuffix(*STOP)),
    (ZOOM.removesuffix(*STOP), {"matched_stop": 151645}, ZOOM.removesuffix(*STOP)),
    # it stopped within a thought that comes in a field of its own
    ("", {"message": {"content": None, "reasoning": "so <video_zoom>{}"}, "stop_reason": STOP[0]},
     "<think>so <video_zoom>{}</video_zoom>"),
])
def test_the_end_of_a_call(text, choice, becomes):
    body = completion(text)
    body["choices"][0] |= choice
    assert said_in(json.dumps(body), TAGS).text == becomes


def test_what_an_answer_may_look_like():
    said = lambda *a, **how: said_in(json.dumps(completion(*a, **how)))
    assert said("A") == Said("A", False, 100, 10)
    assert said("A", "length").cut_off
    assert said("<answer>A</answer>", reasoning="so").text == "<think>so</think><answer>A</answer>"
    assert said(None, reasoning_content="so").text == "<think>so"
    assert said("", reasoning_content="so<|im_end|>").text == "<think>so"
    assert said("<think>x</think>A", reasoning="so").text == "<think>x</think>A"
    # without `stop` it goes on behind the call
    assert said("<a></a> or</think>", reasoning="so").text == "<think>so</think><a></a> or</think>"
    assert said([{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]).text == "AB"
    assert said("").text == ""
    assert said(None, "length") == Said("", True, 100, 10)
    assert said_in(json.dumps(completion("A") | {"usage": None})) == Said("A", False, None, None)
    for bad in ({"choices": []}, {"error": "x"}, {}, [], completion(None)):
        with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
            said_in(json.dumps(bad))
    for refused in (completion("", "content_filter"), completion(None, refusal="I cannot")):
        with pytest.raises(served.NoAnswer, match="refuses"):
            said_in(json.dumps(refused))


def test_a_turn_or_an_episode_that_is_too_long_ends_it(place, tmp_path, key):
    """Cut off by max_tokens; beyond the context: the reply that nobody saw is dropped; beyond
    --max_response_tokens, too."""
    question = questions_of(place)[0]

    def played(say, **how):
        with api_server(say) as server:
            engine = engine_of(place, server, tmp_path / str(time.monotonic()), **how)
            engine.server.answers.path.parent.mkdir()
            return engine.play([question], place)

    ((e,),), _ = played(lambda body: completion("<answer>A</answer>", "length"))
    assert e.truncated and e.env.done and e.env.turns[0].answer == "A"
    # a call that is whole was not cut off, but what a server without `stop` said behind it
    for behind in ("", " and so on"):
        ((e,),), _ = played(lambda body: completion(
            ZOOM + behind, "length") if not turns_so_far(body) else zoom_then_answer(body))
        assert not e.truncated
        assert [turn.text for turn in e.env.turns] == [ZOOM, "<think>Seen.</think><answer>A</answer>"]
    too_long = refusal(400, "This model's maximum context length is 2048 tokens, but max_tokens 50 and more")
    ((e,),), _ = played(lambda body: ZOOM if not turns_so_far(body) else too_long)
    assert e.truncated and e.env.turns[0].kind == "dropped" and e.env.frames_shown == len(e.env.watched[0])
    (group,), [(_, reason)] = played(lambda body: too_long)
    assert group == [] and "maximum context length" in reason

    def grows(body):
        said = completion(zoom_then_answer(body))
        said["usage"]["prompt_tokens"] += 40 * turns_so_far(body)
        return said

    ((e,),), _ = played(grows, max_response_tokens=39)
    assert e.truncated and e.env.turns[0].kind == "dropped" and len(e.env.turns) == 1
    ((e,),), _ = played(grows, max_response_tokens=40)
    assert not e.truncated and len(e.env.turns) == 2


# ------------------------------------------------------------------------------------------ servers that differ
def test_parameters_that_are_refused_are_left_out(place, tmp_path, key, capsys):
    """One after the other, by `param` or by name; each is refused once, others are warned of."""
    def say(body):
        for name in ("top_k", "repetition_penalty"):
            if name in body:
                return refusal(400, f"Unrecognized request argument supplied: {name}")
        if "seed" in body:
            return refusal(422, "Unexpected fields in the request: {'seed'}")
        if "max_tokens" in body:
            return refusal(400, "Unsupported parameter: use 'max_completion_tokens' instead.", param="max_tokens")
        assert body["max_completion_tokens"] == 50
        return zoom_then_answer(body)

    questions = questions_of(place)
    with api_server(say) as server:
        groups, skipped = engine_of(place, server, tmp_path, concurrency=1).play(questions, place)
    assert not skipped and len(server.requests) == 4 + 2 * len(questions)
    assert all(e.env.num_calls() == 1 for e, in groups)
    assert capsys.readouterr().err.count("the server refuses repetition_penalty, seed, top_k") == 1


def test_a_server_that_fails_at_stop(place, tmp_path, key, capsys):
    """As transformers serve does with a model that sees; what it says behind a call is cut off here."""
    def say(body):
        if "top_k" in body:
            return Raw(422, {"detail": "Unexpected fields in the request: {'top_k', 'repetition_penalty'}"})
        return Raw(500, b"Internal Server Error") if "stop" in body else zoom_then_answer(body) + " more"

    questions = questions_of(place)
    with api_server(say) as server:
        groups, skipped = engine_of(place, server, tmp_path, concurrency=1).play(questions, place)
    assert not skipped and all(e.env.turns[0].text == ZOOM for e, in groups)
    assert len(server.requests) == 1 + 6 + 2 * len(questions)
    assert "refuses repetition_penalty, stop, top_k" in capsys.readouterr().err


def test_an_error_that_only_mentions_a_parameter_drops_none(place, tmp_path, key):
    with api_server(lambda body: refusal(400, "temperature 0 with this seed failed") if len(
            server.requests) == 1 else zoom_then_answer(body)) as server:
        engine = engine_of(place, server, tmp_path, concurrency=1)
        _, skipped = engine.play(questions_of(place), place)
    assert len(skipped) == 1 and "temperature 0 with this seed failed" in skipped[0][1]
    assert not engine.server.left_out


def test_an_error_that_stays_without_the_parameter_drops_none(place, tmp_path, key):
    bad = questions_of(place)[0]["question"]
    say = lambda body: refusal(400, "unexpected end of the image in top_k bytes") if bad in text_of(
        body) else zoom_then_answer(body)
    with api_server(say) as server:
        engine = engine_of(place, server, tmp_path, concurrency=1)
        _, skipped = engine.play(questions_of(place), place)
    assert skipped and not engine.server.left_out


@pytest.mark.parametrize("words, name", [
    ("`top_p` must be > 0.0 and < 1.0", "top_p"), ("top_k: Input should be greater than or equal to 0", "top_k"),
    ("`temperature` and `top_p` cannot both be specified", "top_p")])
def test_a_value_that_is_refused(place, tmp_path, key, words, name):
    """Of the sampling's parameters that say nothing: temperature stays."""
    with api_server(lambda body: refusal(400, words) if name in body else zoom_then_answer(body)) as server:
        engine = engine_of(place, server, tmp_path, temperature=1.0)
        _, skipped = engine.play(questions_of(place), place)
    assert not skipped and engine.server.left_out == {name}
    lines = [json.loads(line) for line in open(tmp_path / "answers.jsonl")]
    assert all(line["without"] == [name] for line in lines)


@pytest.mark.parametrize("body", [
    {"detail": "the context window is 5"}, [{"error": {"message": "Input is too long for it"}}],
    {"message": {"detail": [{"msg": "exceed context limit"}]}}, {"error": "maximum prompt length is 5"},
    "input length (8 tokens) exceeds the maximum allowed length", {"error": {"message": "input token count (8) "
                                                                           "exceeds the maximum number of tokens"}}])
def test_errors_of_all_shapes_are_read(place, tmp_path, key, body):
    """Too long in the second turn: that ends the episode."""
    raw = Raw(400, body.encode() if isinstance(body, str) else body)
    with api_server(lambda asked: raw if turns_so_far(asked) else ZOOM) as server:
        ((e,),), skipped = engine_of(place, server, tmp_path).play(questions_of(place)[:1], place)
    assert not skipped and e.truncated and e.env.turns[0].kind == "dropped" and len(server.requests) == 2


def test_a_refused_parameter_is_found_wherever_the_error_names_it(place, tmp_path, key):
    body = {"message": "1 validation error\nrepetition_penalty\n  Extra inputs are not permitted"}
    say = lambda asked: Raw(400, body) if "repetition_penalty" in asked else zoom_then_answer(asked)
    with api_server(say) as server:
        engine = engine_of(place, server, tmp_path)
        _, skipped = engine.play(questions_of(place), place)
    assert not skipped and engine.server.left_out == {"repetition_penalty"}


@pytest.mark.parametrize("error, end", [(refusal(402, "Insufficient Balance"), True),
                                        (refusal(403, "the key may not"), True),
                                        (refusal(403, "Input was flagged"), False)])
def test_what_is_about_the_key_ends_the_run_and_what_is_about_a_question_does_not(place, tmp_path, key, error, end):
    bad = questions_of(place)[-1]["question"]
    say = lambda body: error if end or bad in text_of(body) else zoom_then_answer(body)
    with api_server(say) as server:
        engine = engine_of(place, server, tmp_path, concurrency=1)
        if end:
            with pytest.raises(UserError, match="status 40[23]"):
                engine.play(questions_of(place), place)
        else:
            assert engine.play(questions_of(place), place)[1]


def test_samples_come_at_one_time_whatever_is_opened(place, tmp_path, key):
    """Few questions with many samples: about as many at one time as --concurrency allows."""
    now, most, lock = [0], [0], threading.Lock()

    def say(body):
        with lock:
            now[0] += 1
            most[0] = max(now[0], most[0])
        time.sleep(0.1)
        with lock:
            now[0] -= 1
        return "<answer>A</answer>"

    def begin(env):
        time.sleep(0.2)
        return env.reset()

    with api_server(say) as server:
        engine = engine_of(place, server, tmp_path, group_size=12, concurrency=8, temperature=1.0)
        engine.begin = begin
        groups, _ = engine.play(questions_of(place)[:2], place)
    assert most[0] > 5 and [len(group) for group in groups] == [12, 12]


def test_a_server_that_does_not_count_is_named(place, tmp_path, key, capsys):
    with api_server(lambda body: completion("<answer>A</answer>") | {"usage": None}) as server:
        engine_of(place, server, tmp_path, max_tokens_total=1).play(questions_of(place), place)
    assert capsys.readouterr().err.count("--max_tokens_total does nothing") == 1


def test_addresses_and_keys_that_are_none(place, tmp_path, key, monkeypatch):
    for address in ("http://[::1/v1", "localhost"):
        with pytest.raises(UserError, match="is no address"):
            Server(ServedConfig(base_url=address), tmp_path / "a")
    with api_server(zoom_then_answer) as server:
        with pytest.raises(UserError, match="most addresses end with /v1"):
            Server(ServedConfig(base_url=server.url + "/x"), tmp_path / "a")
        monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
        engine_of(place, server, tmp_path).play(questions_of(place)[:1], place)
    assert server.requests[0]["key"] == f"Bearer {KEY}"


def test_a_rate_limit_is_no_long_dialogue_and_an_outage_no_refusal(place, tmp_path, key):
    """The server is busy, for longer than the package tries, after some answers: it is asked until it answers,
    with all parameters."""
    busy = [refusal(429, "Too many tokens, please wait before trying again.")] * 14 + [Raw(503, b"")] * 14
    busy += [Raw(500, b"")] * 14

    def say(body):
        return busy.pop() if turns_so_far(body) and busy else zoom_then_answer(body)

    with api_server(say) as server:
        groups, skipped = engine_of(place, server, tmp_path, concurrency=2).play(questions_of(place), place)
    assert not skipped and not busy and all("stop" in body for body in server.requests)
    assert all(len(e.env.turns) == 2 for e, in groups)


def test_questions_that_are_bad_by_themselves_end_nothing(place, tmp_path, key):
    """However many in a row, and however many samples of one."""
    questions = questions_of(place, "train") + questions_of(place)
    good = questions[-1]["id"]
    say = lambda body: zoom_then_answer(body) if questions[-1]["question"] in text_of(body) else refusal(
        400, "At most 2 image(s) may be provided")
    with api_server(say) as server:
        groups, skipped = engine_of(place, server, tmp_path, group_size=9, concurrency=2).play(questions, place)
    assert len(skipped) > 8 and good not in [name for name, _ in skipped] and len(groups[-1]) == 9


def test_a_slow_video_does_not_hold_the_others(place, tmp_path, key):
    """Nor where each question has several samples."""
    slow, came = questions_of(place)[0]["id"], {}

    def begin(env):
        if env.question["id"] == slow:
            time.sleep(2)
        return env.reset()

    questions, began = questions_of(place), time.monotonic()
    with api_server(zoom_then_answer) as server:
        engine = engine_of(place, server, tmp_path, group_size=4, concurrency=3)
        engine.begin = begin
        engine.play(questions, place, on_end=lambda e: came.setdefault(
            e.env.question["id"], time.monotonic() - began))
    assert came[slow] > 2 and all(came[question["id"]] < 2 for question in questions[1:])


BAD = {
    "500": refusal(500, "oops"),
    "429": refusal(429, "slow down"),
    "429 with its time": refusal(429, "slow down", {"Retry-After": "0.05"}),
    "503, no JSON": Raw(503, b"<html>"),
    "cut": Raw(200, completion("A"), cut=True),
    "no JSON": Raw(200, b'{"choices": [{"mess'),
    "no choice": completion("A") | {"choices": []},
    "no text": completion(None),
    "100 MB": Raw(200, b'{"choices": "' + b"x" * 100_000_000),
    "an error with status 200": {"error": {"message": "busy"}},
    "an error with status 500": Raw(500, {"detail": "busy"}),
    "an error that breaks off": Raw(500, b"x", cut=True),
    "a refusal that breaks off": Raw(400, b"x", cut=True),
}


@pytest.mark.parametrize("what", BAD)
def test_what_goes_wrong_once_is_asked_again(place, tmp_path, key, what):
    with api_server(lambda body: BAD[what] if len(server.requests) == 1 else "<answer>A</answer>") as server:
        ((e,),), skipped = engine_of(place, server, tmp_path).play(questions_of(place)[:1], place)
    assert e.env.answer() == "A" and not skipped and len(server.requests) == 2
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1


NEVER = BAD | {
    "the key in an error": refusal(400, f"your key {KEY} is odd"),
    "the address in an error": lambda url: refusal(400, f"{url} has no such thing"),
    "images": refusal(400, "At most 8 image(s) may be provided in one prompt."),
    "slow": Raw(200, completion("A"), every_s=0.2),
    "a long wait": refusal(429, "come back", {"Retry-After": "900"}),
}


@pytest.mark.parametrize("what", NEVER)
def test_what_never_comes_is_skipped_by_name(place, tmp_path, key, capsys, what):
    """No crash, no hang beyond the time-out, no key; the others are played, and the same command asks again."""
    questions = questions_of(place)[:3]
    bad = questions[1]["question"]
    never = lambda: NEVER[what](server.url) if callable(NEVER[what]) else NEVER[what]
    say = lambda body: never() if bad in text_of(body) else zoom_then_answer(body)
    began = time.monotonic()
    with api_server(say) as server:
        engine = engine_of(place, server, tmp_path, timeout_s=3, concurrency=3)
        groups, skipped = engine.play(questions, place)
    assert time.monotonic() - began < 9
    failed = [question["id"] for question in questions if question["question"] == bad]
    assert [name for name, _ in skipped] == failed
    assert all(bool(group) == (q["id"] not in failed) for q, group in zip(questions, groups))
    assert KEY not in (said := str(skipped) + capsys.readouterr().err) and server.url[7:] not in said
    # now it answers
    with api_server(zoom_then_answer) as again:
        groups, skipped = engine_of(place, again, tmp_path).play(questions, place)
    assert not skipped and all(groups) and len(again.requests) == 2 * len(failed)


@pytest.mark.parametrize("error, words", [
    (refusal(401, f"Incorrect API key provided: {KEY}"), "status 401: Incorrect API key provided: ***"),
    (refusal(404, "The model does not exist"), "status 404: The model does not exist"),
    (Raw(307, headers={"Location": "http://127.0.0.1:9/v1"}), "status 307: it points to another address"),
])
def test_what_no_question_would_survive_ends_the_run(place, tmp_path, key, error, words):
    with api_server(lambda body: error) as server:
        with pytest.raises(UserError, match=re.escape(words)) as raised:
            engine_of(place, server, tmp_path, concurrency=2).play(questions_of(place), place)
    assert KEY not in str(raised.getrepr())
    assert len(server.requests) <= 2


def test_a_server_that_is_gone_ends_the_run(place, tmp_path, key, capsys):
    """Not each question after its own time-out."""
    questions = questions_of(place, "train") * 3
    with api_server(lambda body: refusal(500, "out of memory")) as server:
        with pytest.raises(UserError, match="failed at 8 questions in a row .*out of memory"):
            engine_of(place, server, tmp_path, concurrency=4, timeout_s=2).play(questions, place)
    assert len({body["seed"] for body in server.requests}) <= 8 + 4
    with pytest.raises(UserError, match="cannot reach the server"):
        engine_of(place, server, tmp_path)
    with api_server(zoom_then_answer, models=("a", "b")) as server:
        engine_of(place, server, tmp_path, served_model="c")
        assert "lists no model c, but a, b" in capsys.readouterr().err
        with pytest.raises(UserError, match="give --served_model: one of a, b"):
            engine_of(place, server, tmp_path)


def test_a_limit_of_tokens_stops_cleanly(place, tmp_path, key):
    """What was on its way is kept; with more of them it goes on, and asks nothing again."""
    questions = questions_of(place)
    with api_server(zoom_then_answer) as server:
        with pytest.raises(UserError, match="stopped after (330|440) tokens, --max_tokens_total 330"):
            engine_of(place, server, tmp_path, max_tokens_total=330, concurrency=2).play(questions, place)
        came = len(server.requests)
        assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == came <= 4
        groups, _ = engine_of(place, server, tmp_path, max_tokens_total=10_000).play(questions, place)
    assert all(groups) and len(server.requests) == 2 * len(questions)


def test_a_cut_line_is_asked_again_and_a_whole_one_never(place, tmp_path, key):
    questions, path = questions_of(place), tmp_path / "answers.jsonl"
    with api_server(zoom_then_answer) as server:
        engine_of(place, server, tmp_path).play(questions, place)
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:-1]) + lines[-1][:30])
        before = len(server.requests)
        groups, _ = engine_of(place, server, tmp_path).play(questions, place)
        assert all(groups) and len(server.requests) == before + 1
        assert path.read_bytes() == b"".join(lines)


def test_equal_requests_on_their_way_are_asked_once(place, tmp_path, key):
    def slowly(body):
        time.sleep(0.2)
        return zoom_then_answer(body)

    with api_server(slowly) as server:
        groups, _ = engine_of(place, server, tmp_path, concurrency=4).play(questions_of(place)[:1] * 4, place)
    assert all(groups) and len(server.requests) == 2


# ------------------------------------------------------------------------------------------------ evaluation
def evaluated(place, out, *flags):
    sys.argv = ["eval.py", "--data", str(place / "test.jsonl"), "--out", str(out), *map(str, flags)]
    evaluation.main()
    return json.loads((out / "results.json").read_text())


def test_evaluation_of_a_served_policy(place, tmp_path, key, capsys):
    """The tables of local play; the settings say what played; a finished run asks nothing; no key and no
    address anywhere."""
    with api_server(zoom_then_answer) as server:
        flags = "--base_url", server.url, "--model", place / "model", "--mode", "zoom"
        row, bound = evaluated(place, tmp_path / "out", *flags)
        came = len(server.requests)
        assert evaluated(place, tmp_path / "out", *flags) == [row, bound] and len(server.requests) == came
    truths = [question["answer"] for question in questions_of(place)]
    assert row["accuracy"] == truths.count("A") / len(truths) and row["zooms_per_question"] == 1
    assert row["settings"]["served_model"] == "teacher" and row["settings"]["dtype"] is None
    assert "teacher on a server" in capsys.readouterr().out
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert KEY not in written and "127.0.0.1" not in written
    with pytest.raises(UserError, match="--temperature"):
        evaluated(place, tmp_path / "out", *flags, "--temperature", "0.5")


def test_another_model_does_not_go_on(place, tmp_path, key):
    flags = "--model", place / "model", "--mode", "zoom"
    busy = questions_of(place)[-1]["question"]
    say = lambda body: refusal(400, "no") if busy in text_of(body) else zoom_then_answer(body)
    with api_server(say, models=("a",)) as server:
        evaluated(place, tmp_path / "out", "--base_url", server.url, *flags)
    with api_server(zoom_then_answer, models=("b",)) as server:
        with pytest.raises(UserError, match="was begun with the served model a, not b"):
            evaluated(place, tmp_path / "out", "--base_url", server.url, *flags)


def test_what_was_refused_stands_beside_the_numbers(place, tmp_path, key):
    say = lambda body: refusal(400, "unsupported: seed") if "seed" in body else zoom_then_answer(body)
    with api_server(say) as server:
        row, _ = evaluated(place, tmp_path / "out", "--base_url", server.url, "--model", place / "model", "--mode",
                           "zoom")
    assert row["settings"]["refused"] == ["seed"]


def test_served_votes_and_a_gate_without_token_counts(place, tmp_path, key):
    """Servers that do not count tokens leave these columns empty."""
    say = lambda body: completion(zoom_then_answer(body)) | {"usage": None}
    with api_server(say) as server:
        rows = evaluated(place, tmp_path / "out", "--base_url", server.url, "--model", place / "model", "--zoom",
                         "policy", "never", "gate", "--votes", 3)
    assert [row["mode"] for row in rows if row["mode"] != "bound"] == ["zoom x3", "zoom off x3", "zoom", "gate x3"]
    assert all(row["tokens_per_question"] is None for row in rows)


def test_without_a_checkpoint_it_is_the_papers_environment(place, tmp_path, key):
    with api_server(lambda body: "<think>t</think><answer>A</answer>") as server:
        row, _ = evaluated(place, tmp_path / "out", "--base_url", server.url, "--num_frames", 4)
    assert row["policy"] == "served" and row["settings"]["max_pixels"] == 100_352
    assert all(image.shape[1] * image.shape[2] >= 25_088 for body in server.requests for image in images_of(body))


def test_a_question_about_one_video(place, key, capsys):
    video = place / questions_of(place)[0]["video"]
    with api_server(zoom_then_answer) as server:
        sys.argv = ["eval.py", "--base_url", server.url, "--model", str(place / "model"), "--video", str(video),
                    "--question", "What is it?"]
        evaluation.main()
    assert "looked at 4 frames" in (said := capsys.readouterr().out) and "answer: A" in said


def test_flags_that_do_not_go_together(place, tmp_path, key):
    with pytest.raises(UserError, match="--image_format must be png or jpeg"):
        Server(replace(ServedConfig(base_url="http://127.0.0.1:9"), image_format="bmp"), tmp_path / "a")
    with pytest.raises(UserError, match="plays one model"):
        evaluated(place, tmp_path / "out", "--base_url", "http://127.0.0.1:9", "--model", "a", "b")


@pytest.mark.slow
def test_transformers_serve_plays_as_it_is_played_here(place, tmp_path, key):
    """The shipped base, temperature 0: the same texts, answers and frames, turn by turn."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", TINY_BASE,
               "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    flags = "--mode", "uniform", "--protocol", "direct", "--num_frames", 9, "--model", TINY_BASE
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        evaluated(place, tmp_path / "served", *flags, "--base_url", f"{url}/v1", "--served_model", TINY_BASE)
    finally:
        server.kill()
        server.wait()
    evaluated(place, tmp_path / "here", *flags)
    served_lines, lines = ([json.loads(line) for line in open(tmp_path / name / "episodes.jsonl")]
                           for name in ("served", "here"))
    same = "question", "turns", "answer", "frames", "right"
    assert [[line[name] for name in same] for line in served_lines] == [
        [line[name] for name in same] for line in lines]
    assert len({line["answer"] for line in lines}) > 1
