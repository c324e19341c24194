"""Protocols: the released one against plain rules, its sentences read out of a tree of the same shape, the
others in play, and which one a run takes."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import released_rules as plain
import torch
from PIL import Image
from test_video import decode_all
from tiny import DEVICE, random_policy, restless

import data_prep
import eval as evaluation
import protocols
import rl
import sft
from common import RunConfig, UserError
from model import encode, replay
from protocols import PROTOCOLS, check_protocol, make_env
from protocols.released import Released, resized
from rollout import Engine, RolloutConfig, play
from sources.official import read_official
from training.checkpoints import save_policy
from training.environment import load_env_config, read_protocol, run_environment
from video import VideoError, open_video
from zoom_env import EnvConfig, Message, Turn, overview_times

ROOT = Path(__file__).resolve().parent.parent

# A tree of the public repository's shape, with other sentences.
ENGINE = '''
class Engine:
    def process_tool_call(self, given, contents, decoded, mask, current_iteration, max_iterations, path):
        error_info = None
        try:
            found = read(contents)
        except Exception as e:
            error_info = str(e)
        if error_info is not None:
            tool_outputs = f"<tool_response>\\nNot read: {error_info}!\\n</tool_response>\\n"
        else:
            tool_outputs = extract_video_clip(path, **found)
        if not isinstance(tool_outputs, str):
            frame_time = tool_outputs['frame_time']
            vision_pad = ''.join([f'<frame{i}_at{frame_time[i]:.2f}><|vision_start|><|image_pad|><|vision_end|>' for i in range(len(frame_time))])
            tool_call_prompt_message = "<|im_start|>user\\n" + "<tool_response>\\nHere it is {so}:\\n"+ vision_pad + "\\n</tool_response>\\n" + "Go on: \\\\n"
            if current_iteration == max_iterations - 2:
                tool_call_prompt_message += "No more."
            tool_call_prompt_message +=  "<|im_end|>\\n<|im_start|>assistant\\n"
            ids = self.tokenizer.encode(tool_call_prompt_message)
        else:
            tool_call_prompt_message = "<|im_start|>user\\n" + tool_outputs + "Try again."
            if current_iteration == max_iterations - 2:
                tool_call_prompt_message += "No more."
            tool_call_prompt_message +=  "<|im_end|>\\n<|im_start|>assistant\\n"
        return 0
'''
TOOLS = '''
def prepare_tool_call_inputs_video(json_objects):
    assert len(json_objects) == 1
    try:
        fps = float(json_objects[0]['fps'])
    except Exception as e:
        raise ValueError(f"Wrong: {e}, of {json_objects[0]}")
    return {"fps": fps}


def extract_video_clip(video_path, start_time, end_time, fps=4.0, max_frames=16):
    try:
        if extract_frame_num > max_frames:
            error_msg = f"{extract_frame_num} is above {max_frames}."
            raise ValueError(error_msg)
        return {'frame_time': frame_time, 'frames': pil_images}
    except Exception as e:
        error_msg = f"Failed: {e}"
        return f"<tool_response>\\nOh: {e}<tool_response>"
'''
SCRIPT = """set -e
python3 -m main data.a=1 \\
    'data.system_prompt="Look. {\\"segment\\": [a, b], \\"fps\\": n} \\n and %s."' \\
    'b={'image': 128}' "c=${D}/e"
"""


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official") / "clone"
    files = {"verl/workers/rollout/vllm_rollout/vllm_async_engine.py": ENGINE,
             "verl/workers/rollout/vllm_rollout/function_tools.py": TOOLS,
             "scripts/train_video.sh": SCRIPT % "train",
             "scripts/eval_video.sh": SCRIPT % "in \\\\boxed{{}}"}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def write_protocol(official, variant="train"):
    path = official.parent / f"{variant}.json"
    path.write_text(json.dumps(read_official(official, variant)), encoding="utf-8")
    return path


def run_script(monkeypatch, main, *flags):
    """A script's main in this process."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
    main()


# ---------------------------------------------------------------------------------------------- the sentences
def test_sentences_of_a_clone(official):
    train, evaluation = (read_official(official, variant) for variant in ("train", "eval"))
    assert train["texts"] == evaluation["texts"] == {
        "frame": "<frame{index}_at{time}>", "before_frames": "<tool_response>\nHere it is {so}:\n",
        "after_frames": "\n</tool_response>\nGo on: \\n",
        "bad_call": "<tool_response>\nNot read: {error}!\n</tool_response>\n",
        "bad_input": "Wrong: {error}, of {input}", "too_many": "{count} is above {limit}.",
        "not_shown": "<tool_response>\nOh: {error}<tool_response>", "after_error": "Try again.",
        "last_round": "No more."}
    # only \" is taken for something; a backslash and an n stay two characters
    assert train["system_prompt"] == 'Look. {"segment": [a, b], "fps": n} \\n and train.'
    assert evaluation["system_prompt"] == 'Look. {"segment": [a, b], "fps": n} \\n and in \\\\boxed{{}}.'
    with pytest.raises(UserError, match="no such folder"):
        read_official(official / "none", "train")


def test_a_clone_of_another_shape_is_said_to_be_one(official, tmp_path):
    for name, old, new, message in (
            ("vllm_async_engine", "process_tool_call", "another", "has no function process_tool_call"),
            ("vllm_async_engine", "{error_info}!", "{other}!",
             "{other} stands in a text where error_info does"),
            ("vllm_async_engine", '"No more."', '"No more." if 1 else ""',
             "adds tool_call_prompt_message 1 times, not 2"),
            ("vllm_async_engine", "assistant\\n", "helper\\n", "not a user message of tagged images"),
            ("vllm_async_engine", "vision_pad + ", "vision_pad + vision_pad + ",
             "vision_pad is not in a reply once"),
            ("vllm_async_engine", "class Engine", "class Engine(", "cannot read"),
            ("function_tools", "raise ValueError(f", "raise ValueError(1, f",
             "raises a text 0 times, not 1")):
        clone = tmp_path / message[:8]
        shutil.copytree(official, clone, dirs_exist_ok=True)
        path = clone / f"verl/workers/rollout/vllm_rollout/{name}.py"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(UserError, match=re.escape(message)):
            read_official(clone, "train")
    shutil.copytree(official, tmp_path / "prompt")
    (tmp_path / "prompt/scripts/train_video.sh").write_text("data.a=1")
    with pytest.raises(UserError, match="has no 'data.system_prompt"):
        read_official(tmp_path / "prompt", "train")


def test_the_command(official, tmp_path, monkeypatch):
    out = tmp_path / "new/p.json"
    flags = ["--official", official, "--variant", "eval", "--out", out]
    run_script(monkeypatch, data_prep.main, "protocol", *flags)
    assert read_protocol(out)["system_prompt"].endswith("boxed{{}}.")


# ----------------------------------------------------------------------------------------- the released rules
SIZES = {"wide": (640, 360, 6), "standard": (640, 480, 4), "photo": (480, 320, 5), "tiny": (176, 144, 10),
         "long": (96, 64, 1), "varying": (320, 240, 0)}  # width, height, frames a second


def write(path, width, height, rate, seconds):
    """A clip whose frames all look different; at rate 0 they come at times that vary."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        options = {"crf": "30", "preset": "ultrafast", "g": "12"}
        stream = container.add_stream("libx264", rate=rate or 10, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        time_ms = 0
        while time_ms < seconds * 1000:
            image = np.roll(noise, (time_ms // 50) % width, axis=1)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
            frame.pts, frame.time_base = time_ms, stream.codec_context.time_base
            container.mux(stream.encode(frame))
            time_ms += 1000 // rate if rate else int(rng.integers(40, 500))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name, (width, height, rate) in SIZES.items():
        write(folder / f"{name}.mp4", width, height, rate, 150 if name == "long" else 12)
    return folder


@pytest.fixture(scope="module")
def policy(official):
    policy = random_policy()
    config = with_flags(EnvConfig(frame_unit=policy.env_config.frame_unit), protocol=write_protocol(official))
    policy.env_config = config
    return policy


def with_flags(env_config, class_=RunConfig, **flags):
    """What a run with these flags plays, on a checkpoint that was trained with `env_config`."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "zoom_config.json").write_text(json.dumps(asdict(env_config)))
        flags = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
        return run_environment(folder, class_(**flags))


def named(name, official):
    """What --protocol takes for a protocol of this name."""
    return write_protocol(official) if name == "released" else name


def plain_video(path):
    return plain.Video([image for _, image in decode_all(path)], open_video(str(path)).fps)


PROBLEM = "Look:\n<image>\nWhat is it?\nA. a cat\nB. a dog"
QUESTION = {"id": "q", "video": "", "question": "What is it?", "options": ["a cat", "a dog"], "answer": "B",
            "answer_type": "multiple_choice", "source": "test", "meta": {"problem": PROBLEM}}


@pytest.mark.parametrize("seed, cases", [(0, 12), pytest.param(1, 60, marks=pytest.mark.slow)])
def test_dialogues_equal_the_plain_rules(folder, policy, seed, cases):
    """Ids, what is trained, pixels and the format reward, over random turns of all kinds and videos of
    several shapes."""
    rng, seen = random.Random(seed), set()
    videos = {name: plain_video(folder / f"{name}.mp4") for name in SIZES}
    config, tokenizer, processor = policy.env_config, policy.tokenizer, policy.image_processor
    for case in range(cases):
        name = rng.choice(list(SIZES))
        video = videos[name]
        turns = plain.random_turns(rng, len(video.frames) / video.rate)
        ids, trained, patches, said = plain.dialogue(
            tokenizer, processor, config.texts, config.system_prompt, PROBLEM, video, turns,
            largest_id=max(tokenizer.get_vocab().values()))
        env = make_env(QUESTION | {"video": f"{name}.mp4"}, config, folder)
        dialogue = encode(policy, env.reset())
        for text in said:  # whole, as nothing says where sampling stops
            assert not env.done, (case, said)
            encode(policy, [Message("assistant", [text])], dialogue)
            encode(policy, env.step(text), dialogue)
        assert env.done, (case, said)
        assert dialogue.ids == ids and dialogue.trained == trained, (case, name, said)
        mine = processor([f.image for f in dialogue.frames], do_resize=False, return_tensors="pt")
        assert torch.equal(mine["image_grid_thw"], patches["image_grid_thw"]), (case, name, said)
        assert torch.equal(mine["pixel_values"], patches["pixel_values"]), (case, name)
        assert env.rewards["format"] == plain.format_reward(said), (case, said)
        seen |= {turn.kind for turn in env.turns}
        seen |= {f"{len(env.turns)} turns", f"format {env.rewards['format']}"}
    assert seen >= {"call", "error", "answer", "1 turns", "5 turns", "format 0.0", "format 1.0"}


def test_frames_have_the_size_that_the_processor_gives_them(policy):
    """Of all shapes, a few pixels high among them; in the two steps."""
    limits = {"shortest_edge": 3_136, "longest_edge": 12_845_056}
    for height, width in ((360, 640), (9, 300), (300, 5), (20, 3000), (30, 30), (2000, 1500)):
        image = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
        mine = resized(Image.fromarray(image), 25_088, 100_352, 28)
        mine = policy.image_processor([mine], do_resize=False, return_tensors="pt")
        theirs = policy.image_processor([plain.shrink(image)], size=limits, return_tensors="pt")
        assert torch.equal(mine["image_grid_thw"], theirs["image_grid_thw"]), (height, width)
        assert torch.equal(mine["pixel_values"], theirs["pixel_values"]), (height, width)
    for size in ((3000, 10), (300_000, 2)):  # of the second the first step would leave no height
        with pytest.raises(VideoError, match="too narrow"):
            resized(Image.new("RGB", size), 25_088, 100_352, 28)


def test_the_format_reward_equals_the_plain_rules(policy):
    """Over random texts of its pieces, nearly right ones above all; long ones take no time."""
    rng, well_formed = random.Random(0), 0
    calls = [f'{{"segment": [1, {end}], "fps": 1}}' for end in (5, 50)]
    pieces = [f"<{end}{tag}>" for tag in ("think", "answer", "video_zoom") for end in ("", "/")]
    pieces += ["x", "\n", *calls]
    call = f"<think>x</think>\n<video_zoom>{calls[0]}</video_zoom>"
    env = Released(QUESTION, policy.env_config)
    for _ in range(3000):
        said = rng.choice([[], [call]]) + [rng.choice([call, "<think>x</think> so <answer>B</answer>\n"])]
        at, place = rng.randrange(len(said)), rng.randrange(60)
        said[at] = said[at][:place] + rng.choice(pieces) + said[at][place + rng.choice([0, 0, 3]):]
        env.turns = [Turn(text, "answer", True) for text in said]
        assert env.is_well_formed() == plain.format_reward(said), said
        well_formed += env.is_well_formed()
    assert 100 < well_formed < 1000
    start = time.process_time()
    for text in ("<think>" + "</think>" * 100_000, "<think></think>" + "<answer>" * 100_000 + "</answer>",
                 "<think>" * 100_000 + "</think><answer></answer>x",
                 "<video_zoom>" + "{" * 100_000 + "</video_zoom>"):
        env.turns = [Turn(text, "answer", True), Turn(text, "answer", True)]
        assert not env.is_well_formed()
        env.parse(text)
    assert time.process_time() - start < 1


def test_replay_writes_what_the_checkpoint_was_trained_on(folder, policy):
    """A trajectory for SFT: end tokens are trained though the text has none, and no line break follows a
    turn."""
    zoom = '<think>I look.</think><video_zoom>{"segment": [1, 5], "fps": 1}</video_zoom>'
    answer = "<think>I see.</think><answer>B</answer>"
    row = {"question": QUESTION | {"video": "tiny.mp4"}, "turns": [zoom, answer], "learn": [True, True]}
    dialogue, env = replay(policy, row, folder)
    said = policy.tokenizer.decode([i for i, trained in zip(dialogue.ids, dialogue.trained) if trained])
    assert said == f"{zoom}<|im_end|>{answer}<|im_end|>"
    between = "</video_zoom><|im_end|><|im_start|>user\n<tool_response>\nHere it is {so}:\n<frame0_at1.00>"
    assert between in policy.tokenizer.decode(dialogue.ids)
    assert env.rewards == {"reward": 1.5, "accuracy": 1.0, "format": 1.0, "tool": 1.0, "hit": 0.0}


class Scripted(Released):
    """Zooms, makes an error or answers, as the length of what is said has it."""

    def step(self, text):
        number = len(text) + len(self.turns)
        zoom = '<video_zoom>{"segment": [%d, %d], "fps": 1}</video_zoom>' % (number % 9, number % 9 + 2)
        answer = "<think>t</think><answer>A</answer>"
        says = [zoom, "<video_zoom>{}</video_zoom>", zoom, "<video_zoom>?</video_zoom>", zoom, answer]
        return super().step(says[number % 6])


@pytest.mark.device
def test_the_engine_plays_by_it_as_the_plain_loop_does(folder, policy, monkeypatch):
    """With ids that are dropped in the middle of a turn, and appended end tokens, which have no
    log-probability of sampling; all rows at once, and two at a time."""
    policy = restless(policy)
    with torch.no_grad():
        policy.head.weight[policy.im_end] *= 1.1
    monkeypatch.setitem(protocols.PROTOCOLS, "released", Scripted)
    monkeypatch.setattr(Released, "largest_id", 250)
    policy.env_config = replace(policy.env_config, overview_max_frames=2)
    questions = [QUESTION | {"id": str(n), "video": "tiny.mp4", "meta": {"problem": f"{n} <image>?"}}
                 for n in range(6)]
    config = RolloutConfig(temperature=0.0, max_turn_tokens=12, compile=False)
    episodes = [play(policy, question, config, folder) for question in questions]
    for max_rows in (config.max_rows, 2):
        groups, _ = Engine(policy, 1, replace(config, max_rows=max_rows)).play(questions, folder)
        assert [g[0].dialogue.ids for g in groups] == [e.dialogue.ids for e in episodes]
        for e in [g[0] for g in groups]:
            assert e.dialogue.trained.count(True) == len(e.dialogue.sampled_log_probs)
    assert None in [p for e in episodes for p in e.dialogue.sampled_log_probs]
    assert max(i for e in episodes for i, t in zip(e.dialogue.ids, e.dialogue.trained) if t) <= 250
    assert any(e.env.num_calls() for e in episodes) and any(len(e.env.turns) > 2 for e in episodes)


def test_an_episode_of_the_released_protocol_has_at_most_128_images(folder, policy):
    """The call after them ends it, though a round is left."""
    zoom = '<video_zoom>{"segment": [0, 64], "fps": 0.25}</video_zoom>'
    env = Released(QUESTION | {"video": "long.mp4"}, replace(policy.env_config, max_zooms=9), folder)
    env.reset()
    for frames_shown in (80, 96, 112, 128):
        env.step(zoom)
        assert env.frames_shown == frames_shown and not env.done
    assert env.step(zoom) == [] and env.done and env.num_calls() == 4


def test_chosen_frames_that_are_not_there_are_the_videos_fault(folder, policy):
    for numbers in ([-5, 10], [0, 500], [float("nan")], [float("inf"), 3]):
        for name in ("tiny.mp4", "varying.mp4"):
            for config in (policy.env_config, EnvConfig(frame_unit=28)):
                question = QUESTION | {"video": name, "overview_frames": numbers}
                with pytest.raises(VideoError, match="no frame"):
                    make_env(question, config, folder).reset()


def test_the_answer_of_the_released_protocol_is_the_last_one_said(folder, policy):
    zoom = '<video_zoom>{"segment": [1, 5], "fps": 1}</video_zoom>'
    config = replace(policy.env_config, max_zooms=1)
    for turns, answer in ((["<answer>A</answer>" + zoom, "<answer>B</answer>" + zoom], "B"),
                          ([zoom, "B it is"], zoom + " B it is"), ([zoom, zoom], zoom + " " + zoom),
                          (["<answer>B</answer>" + zoom, "hm"], "B")):
        env = Released(QUESTION | {"video": "tiny.mp4"}, config, folder)
        assert env.answer() is None
        env.reset()
        for text in turns:
            env.step(text)
        assert env.done and env.answer() == answer


# ---------------------------------------------------------------------------------------- which one is played
def test_a_checkpoint_keeps_its_protocol(policy, official, tmp_path, capsys):
    save_policy(policy, tmp_path)
    kept = run_environment(tmp_path, RunConfig())
    assert kept == policy.env_config and kept.protocol == "released" and not capsys.readouterr().err
    # its texts are the checkpoint's own
    assert run_environment(tmp_path, RunConfig(protocol="released")) == kept
    direct = run_environment(tmp_path, RunConfig(protocol="direct"))
    assert (direct.protocol, direct.texts, direct.max_zooms) == ("direct", {}, 0)
    assert "helpful" in direct.system_prompt
    ours = run_environment(tmp_path, RunConfig(protocol="videozoomer"))
    assert ours.system_prompt == EnvConfig().system_prompt and ours.texts == {}
    (tmp_path / "prompt").write_text("mine\n")
    for protocol in (None, "direct"):
        flags = RunConfig(protocol=protocol, system_prompt=str(tmp_path / "prompt"))
        assert run_environment(tmp_path, flags).system_prompt == "mine"
    # one that says nothing
    (tmp_path / "zoom_config.json").unlink()
    for max_zooms, name in ((None, "videozoomer"), (0, "direct")):
        plays = run_environment(tmp_path, RunConfig(max_zooms=max_zooms))
        assert plays.protocol == name and f"played by the protocol {name}" in capsys.readouterr().err


def test_another_protocol_comes_with_its_own_numbers(policy):
    """From one to the next and back: nothing of the one before stays; the same one keeps what the checkpoint
    had."""
    take = lambda config, name: with_flags(config, protocol=name)
    for name in ("longvt", "direct"):
        assert take(take(EnvConfig(), name), "videozoomer") == EnvConfig()
    assert take(take(EnvConfig(), "direct"), "longvt") == take(EnvConfig(), "longvt")
    trained = replace(EnvConfig(), overview_max_frames=9)
    assert take(trained, "videozoomer") == trained
    assert take(policy.env_config, "released") == policy.env_config


@pytest.mark.parametrize("script", [sft, rl, evaluation], ids=["sft", "rl", "eval"])
def test_frames_and_pixels_stay_where_a_protocol_names_none(script):
    """In each script; its flags come after the protocol."""
    demo = EnvConfig(overview_max_frames=9, overview_fps=2.0, min_pixels=784, max_pixels=12_544, max_zooms=2,
                     max_turn_tokens=96, preset="demo")
    direct = with_flags(demo, script.Config, protocol="direct")
    words = {"protocol": "direct", "max_zooms": 0, "system_prompt": "You are a helpful assistant."}
    assert direct == replace(demo, **words)
    given = with_flags(demo, script.Config, protocol="direct", num_frames=[23], max_zooms=1, overview="uniform")
    assert (given.overview_max_frames, given.max_zooms, given.overview) == (23, 1, "uniform")
    assert given.max_pixels == 12_544 and len(overview_times(0.5, given)) == 23
    longvt = with_flags(demo, script.Config, protocol="longvt")
    assert (longvt.overview_max_frames, longvt.max_pixels, longvt.preset) == (512, 50_176, "demo")


def test_a_bad_file_of_a_protocol_is_named(tmp_path):
    for file, message in (
            ("[]", "must be an object"), ("{", "cannot read"), ('{"protocol": "mine"}', "must be one of"),
            ('{"protocol": "released"}', "lacks its texts frame"),
            ('{"protocol": "direct", "speed": 1}', "must be an object"),
            ('{"protocol": "released", "texts": {"frame": 1}}', "must be an object")):
        (tmp_path / "p.json").write_text(file)
        with pytest.raises(UserError, match=message) as error:
            with_flags(EnvConfig(), protocol=tmp_path / "p.json")
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match="data_prep.py protocol"):
        with_flags(EnvConfig(), protocol="released")


def test_settings_that_cannot_be_read_are_one_line(policy, tmp_path):
    """An EnvConfig of a protocol that is not there can be made, but not be played nor loaded."""
    unheard = EnvConfig(protocol="unheard")
    with pytest.raises(ValueError, match="must be one of videozoomer, released, direct, longvt, not unheard"):
        check_protocol(unheard)
    with pytest.raises(ValueError, match="lacks its texts frame, before_frames, .."):
        check_protocol(EnvConfig(protocol="released"))
    check_protocol(policy.env_config)
    for text in ("{", "[]", json.dumps(asdict(unheard)), '{"protocol": 3}', '{"protocol": "released"}',
                 '{"max_zooms": -1}', '{"speed": 1}', '{"overview_fps": NaN}', "[" * 100_000):
        (tmp_path / "zoom_config.json").write_text(text)
        with pytest.raises(UserError, match="zoom_config.json: .*correct it or remove it") as error:
            load_env_config(tmp_path)
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("script", [sft, rl, evaluation], ids=["sft", "rl", "eval"])
def test_a_wrong_protocol_is_said_before_anything_loads(data, tmp_path, monkeypatch, script):
    rows = data[0] / ("sft.jsonl" if script.__name__ == "sft" else "test.jsonl")
    flags = ["--model", ROOT / "demo/tiny_base", "--data", rows, "--out", tmp_path / "out"]
    known = "must be one of videozoomer, released, direct, longvt or a .json file, not unheard"
    with pytest.raises(UserError, match=f"^--protocol {known}$"):
        run_script(monkeypatch, script.main, *flags, "--protocol", "unheard")


@pytest.mark.slow
def test_a_fresh_interpreter(policy, tmp_path):
    """A protocol's name is a setting like others, whatever was imported before. A name on the hub has its
    settings fetched: here out of the hub's cache, as nothing can be fetched in a test."""
    folder = tmp_path / "models--some--policy"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    save_policy(policy, folder / "snapshots" / ("0" * 40))
    ask = ("from zoom_env import EnvConfig; print(EnvConfig(protocol='direct').protocol); "
           "from training.environment import find_env_config, load_env_config; "
           "print(load_env_config('some/policy').protocol, find_env_config('some/other'))")
    run = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, cwd=ROOT,
                         env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert run.stdout.split() == ["direct", "released", "None"], run.stderr


# ------------------------------------------------------------------------------------------------- the others
def episode(name, folder, texts, **question):
    config = with_flags(EnvConfig(frame_unit=28), protocol=name)
    env = make_env(QUESTION | {"video": "tiny.mp4"} | question, config, folder)
    messages = [env.reset()]
    for text in texts:
        assert not env.done
        messages.append(env.step(text))
    return env, [[words(message.content) for message in some] for some in messages]


def words(content):
    """A message with [] for each image."""
    return "".join(item if isinstance(item, str) else "[]" for item in content)


def test_direct(folder):
    _, ((system, user),) = episode("direct", folder, [])
    asked = "What is it?\nA. a cat\nB. a dog\nAnswer with the letter of the right option only."
    assert user == "[]" * 6 + asked
    assert system == "You are a helpful assistant."
    for said, right in (("B", 1), ("B.", 1), ("(B) a dog", 1), ("The answer is B.", 1), ("A", 0), ("", 0),
                        ("a dog", 1), ("<think>A?</think><answer>B</answer>", 1), ("B\nIt has fur.", 1),
                        ("<think>Is it <answer>A</answer>?</think>B", 1)):
        env, _ = episode("direct", folder, [said])
        assert env.done and env.rewards["accuracy"] == right and env.rewards["tool"] == 0, said


def test_longvt(folder):
    def call(**arguments):
        asked = json.dumps({"name": "crop_video", "arguments": arguments})
        return f"<think>t</think><tool_call>{asked}</tool_call>"

    turns = [call(video_path="x", start_time=2, end_time=6), call(start_time=8.0, end_time=99),
             call(start_time=6, end_time=2), call(start_time=50, end_time=60),
             "<think>t</think><tool_call>crop</tool_call>", "<think>t</think><answer>B</answer>"]
    env, messages = episode("longvt", folder, turns, evidence=[[9, 10]])
    path = "The path of the video is tiny.mp4; it lasts 12.00 seconds."
    assert messages[0][1] == "[]" * 12 + f"What is it?\nA. a cat\nB. a dog\n{path}"
    assert messages[1] == ["<tool_response>\n[][][][]4 frames, 2.00 s to 6.00 s\n</tool_response>"]
    assert messages[2] == ["<tool_response>\n[][][][]4 frames, 8.00 s to 12.00 s\n</tool_response>"]
    said = [message for message, in messages[3:6]]
    assert "before end_time" in said[0] and "after the end" in said[1] and "not JSON" in said[2]
    assert [turn.kind for turn in env.turns] == ["call", "call", "error", "error", "error", "answer"]
    assert [call.hit for turn in env.turns for call in turn.calls] == [False, True]
    assert env.rewards["accuracy"] == 1
    assert all(f.image.shape[1] * f.image.shape[2] <= 50_176 for frames in env.watched for f in frames)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_nothing_that_is_said_raises(folder, official, name):
    config = with_flags(EnvConfig(frame_unit=28, overview_max_frames=2), protocol=named(name, official))
    calls = ['{"segment": [0, 1e308], "fps": 1e308}', '{"segment": [1e308, 1e308], "fps": 1}',
             '{"segment": [-1e308, 1], "fps": 1e-308}', '{"segment": {"0": 1, "1": 2}, "fps": 1}',
             '{"segment": [NaN, 1], "fps": 1}',
             '{"name": "crop_video", "arguments": {"start_time": NaN, "end_time": 1}}',
             '{"name": "crop_video", "arguments": [1]}', '["crop_video"]',
             "[" * 100_000, '{"a": ' + "[" * 100_000 + "}", "{" * 100_000,
             '{"segment": [' + "9" * 5000 + ', 1], "fps": 1}', "\0\ud800", "{}{}"]
    for tag in ("video_zoom", "tool_call", "answer"):
        texts = [f"<{tag}>{call}</{tag}>" for call in calls]
        for text in [*texts, f"<{tag}>" * 80_000, f"<{tag}>{{" * 40_000, f"</{tag}>" * 80_000]:
            env = make_env(QUESTION | {"video": "tiny.mp4"}, config, folder)
            env.reset()
            reply = env.step(text)
            assert env.done or reply
            env.end()
            assert 0 <= env.rewards["accuracy"] <= 1


@pytest.mark.parametrize("name", PROTOCOLS)
def test_images_and_subtitles_of_a_question_are_shown(folder, official, name):
    """Each image where its <image> stands, in the sizes of frames, not counted as frames; subtitles with
    their seconds."""
    image = np.random.default_rng(0).integers(0, 255, (280, 560, 3), dtype=np.uint8)
    Image.fromarray(image).save(folder / "slide.png")
    Image.fromarray(np.zeros((56, 56, 3), dtype=np.uint8)).save(folder / "dot.jpg")
    config = with_flags(EnvConfig(frame_unit=28), protocol=named(name, official))
    row = QUESTION | {"video": "tiny.mp4", "question": "Is <image> or <image> in it?", "meta": {},
                      "images": ["slide.png", "dot.jpg"],
                      "subtitles": [[0.0, 2.5, "Hello."], [2.5, 4.0, "See this?"]]}
    env = make_env(row, config, folder)
    user = env.reset()[1].content
    text = words(user)
    asked = "Is [] or [] in it?\nA. a cat\nB. a dog"
    assert f"[0.0 - 2.5] Hello.\n[2.5 - 4.0] See this?\n{asked}" in text and "<image>" not in text
    shown = [i.image for i in user if not isinstance(i, str)]
    slide = next(i for i in shown if i.shape[2] > 1.5 * i.shape[1])
    assert name == "longvt" or slide.shape == (3, 224, 448)
    assert slide.float().std() > 20 and env.frames_shown == len(env.watched[0]) == len(shown) - 2
    (folder / "slide.png").write_bytes(b"?")
    with pytest.raises(VideoError, match="slide.png: not an image"):
        make_env(row, config, folder).reset()


# ------------------------------------------------------------------------------------------------ the scripts
def write_questions(path, *names):
    rows = [QUESTION | {"id": name, "video": f"clips/{name}.mp4"} for name in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.device
def test_a_run_of_eval_takes_another_protocol(folder, policy, tmp_path, monkeypatch):
    """`--protocol direct` on a checkpoint with 9 frames shows 9 frames."""
    os.symlink(folder, tmp_path / "clips")
    trained = EnvConfig(frame_unit=policy.frame_unit, overview_max_frames=9, overview_fps=2.0)
    monkeypatch.setattr(policy, "env_config", trained)
    save_policy(policy, tmp_path / "model")
    data = write_questions(tmp_path / "q.jsonl", "tiny", "varying")
    run_script(monkeypatch, evaluation.main, "--model", tmp_path / "model", "--data", data, "--out",
               tmp_path / "out", "--protocol", "direct", "--max_turn_tokens", 4, "--no-compile", "--device",
               DEVICE.type)
    settings = json.loads((tmp_path / "out/results.json").read_text())[0]["settings"]
    assert settings["protocol"] == "direct" and settings["overview_max_frames"] == 9
    episodes = [json.loads(line) for line in open(tmp_path / "out/episodes.jsonl")]
    assert [e["frames"] for e in episodes] == [9, 9] and [e["zooms"] for e in episodes] == [0, 0]


@pytest.mark.device
@pytest.mark.slow
def test_the_scripts_play_by_it(folder, official, tmp_path, monkeypatch, capsys):
    """SFT on messages keeps the protocol; RL goes on with it, and asks for recomputed log-probabilities;
    eval.py repeats it."""
    save_policy(random_policy(), tmp_path / "base")
    (tmp_path / "base/zoom_config.json").unlink()
    os.symlink(folder, tmp_path / "clips")
    Image.fromarray(np.zeros((56, 84, 3), dtype=np.uint8)).save(tmp_path / "0.png")
    messages = [{"role": "user", "content": "<image>What?"},
                {"role": "assistant", "content": "<think>t</think><answer>B</answer>"}]
    (tmp_path / "sft.json").write_text(json.dumps([{"messages": messages, "images": ["0.png"]}] * 4))
    problem = {"videos": ["clips/tiny.mp4"], "problem": PROBLEM, "solution": "B.", "data_source": "x",
               "extra_info": {"answer_type": "multiple_choice"}}
    (tmp_path / "rl.json").write_text(json.dumps([problem] * 2))
    common = ["--dtype", "float32", "--device", DEVICE.type]
    run_script(monkeypatch, sft.main, "--model", tmp_path / "base", "--data", tmp_path / "sft.json",
               "--out", tmp_path / "sft", "--batch_size", 2, "--protocol", write_protocol(official), *common)
    kept = load_env_config(tmp_path / "sft")
    assert kept.protocol == "released" and kept.texts == read_official(official, "train")["texts"]
    assert json.loads((tmp_path / "sft/metrics.jsonl").read_text().splitlines()[-1])["tokens"] > 20
    flags = ["--model", tmp_path / "sft", "--data", tmp_path / "rl.json", "--out", tmp_path / "rl", *common,
             "--steps", 1, "--batch_size", 1, "--mini_batch_size", 1, "--group_size", 2,
             "--max_turn_tokens", 4, "--max_draws", 1, "--cache_gb", 0.1, "--no-compile"]
    with pytest.raises(UserError, match="--old_log_probs recomputed"):
        run_script(monkeypatch, rl.main, *flags)
    run_script(monkeypatch, rl.main, *flags, "--old_log_probs", "recomputed", "--loss_mean", "episode",
               "--tool_weight", 0)
    assert load_env_config(tmp_path / "rl").texts == kept.texts
    data = write_questions(tmp_path / "q.jsonl", "tiny", "varying")
    capsys.readouterr()
    uniform = ["--mode", "uniform", "--num_frames", 2]
    for model, name, mode in (("rl", "released", []), ("base", "direct", uniform)):
        run_script(monkeypatch, evaluation.main, "--model", tmp_path / model, "--data", data, *common, *mode,
                   "--out", tmp_path / name, "--max_turn_tokens", 4, "--no-compile")
        settings = json.loads((tmp_path / name / "results.json").read_text())[0]["settings"]
        assert settings["protocol"] == name
        assert ("has no zoom_config.json" in capsys.readouterr().err) == (name == "direct")
