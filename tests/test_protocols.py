"""Protocols: the released one against plain rules, its sentences read out of a tree of the same shape, the others in play."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import released_rules as plain
import torch
from launcher import launch
from PIL import Image
from test_video import decode_all
from tiny import random_policy, restless

from common import RunConfig, UserError
from model import encode, replay
from rollout import Engine, RolloutConfig, play
from training.checkpoints import load_env_config, save_policy
from protocols import PROTOCOLS, check_protocol, read_protocol, use_protocol
from sources.official import read_official
from protocols.released import Released
from video import VideoError, open_video
from zoom_env import EnvConfig, Message, ZoomEnv

ROOT = Path(__file__).resolve().parent.parent
CASES = int(os.environ.get("PROTOCOL_CASES", 50))

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
    for name, text in {"verl/workers/rollout/vllm_rollout/vllm_async_engine.py": ENGINE,
                       "verl/workers/rollout/vllm_rollout/function_tools.py": TOOLS,
                       "scripts/train_video.sh": SCRIPT % "train", "scripts/eval_video.sh": SCRIPT % "in \\\\boxed{{}}"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


# ------------------------------------------------------------------------------------------------------ the sentences
def test_sentences_of_a_clone(official):
    train, evaluation = (read_official(official, variant) for variant in ("train", "eval"))
    assert train["texts"] == evaluation["texts"] == {
        "frame": "<frame{index}_at{time}>", "before_frames": "<tool_response>\nHere it is {so}:\n",
        "after_frames": "\n</tool_response>\nGo on: \\n", "bad_call": "<tool_response>\nNot read: {error}!\n</tool_response>\n",
        "bad_input": "Wrong: {error}, of {input}", "too_many": "{count} is above {limit}.",
        "not_shown": "<tool_response>\nOh: {error}<tool_response>", "after_error": "Try again.", "last_round": "No more."}
    # only \" is taken for something; a backslash and an n stay two characters
    assert train["system_prompt"] == 'Look. {"segment": [a, b], "fps": n} \\n and train.'
    assert evaluation["system_prompt"] == 'Look. {"segment": [a, b], "fps": n} \\n and in \\\\boxed{{}}.'


@pytest.mark.parametrize("name, old, new, message", [
    ("vllm_async_engine", "process_tool_call", "another", "has no function process_tool_call"),
    ("vllm_async_engine", "{error_info}!", "{other}!", "{other} stands in a text where error_info does"),
    ("vllm_async_engine", '"No more."', '"No more." if 1 else ""', "adds tool_call_prompt_message 1 times, not 2"),
    ("vllm_async_engine", "assistant\\n", "helper\\n", "not a user message of tagged images"),
    ("vllm_async_engine", "class Engine", "class Engine(", "cannot read"),
    ("function_tools", "raise ValueError(f", "raise ValueError(1, f", "raises a text 0 times, not 1"),
])
def test_a_clone_of_another_shape_is_said_to_be_one(official, tmp_path, name, old, new, message):
    shutil.copytree(official, tmp_path / "clone")
    path = tmp_path / f"clone/verl/workers/rollout/vllm_rollout/{name}.py"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=re.escape(message)):
        read_official(tmp_path / "clone", "train")


def test_the_command(official, tmp_path):
    run = lambda *flags: subprocess.run([sys.executable, str(ROOT / "data_prep.py"), "protocol", *flags],
                                        capture_output=True, text=True, cwd=tmp_path)
    done = run("--official", str(official), "--variant", "eval", "--out", "p.json")
    assert done.returncode == 0, done.stderr
    assert read_protocol(tmp_path / "p.json")["system_prompt"].endswith("boxed{{}}.")
    with pytest.raises(UserError, match="no such folder"):
        read_official(tmp_path / "none", "train")


# --------------------------------------------------------------------------------------------------- the released rules
SIZES = {"wide": (640, 360, 6), "standard": (640, 480, 4), "photo": (480, 320, 5), "tiny": (176, 144, 10), "long": (96, 64, 1),
         "varying": (320, 240, 0)}


def write(path, width, height, rate, seconds):
    """A clip whose frames all look different; at rate 0 they come at times that vary."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate or 10, options={"crf": "30", "preset": "ultrafast", "g": "12"})
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
    policy.env_config = use_protocol(policy.env_config, RunConfig(protocol=str(write_protocol(official))), "none")
    policy.env_config = replace(policy.env_config, **{name: getattr(EnvConfig(), name) for name in (
        "overview_fps", "overview_max_frames", "zoom_max_frames", "max_zooms", "min_pixels", "max_pixels")})
    return policy


def write_protocol(official, variant="train"):
    path = official.parent / f"{variant}.json"
    path.write_text(json.dumps(read_official(official, variant)), encoding="utf-8")
    return path


def plain_video(path):
    return plain.Video([image for _, image in decode_all(path)], open_video(str(path)).fps)


PROBLEM = "Look:\n<image>\nWhat is it?\nA. a cat\nB. a dog"
QUESTION = {"id": "q", "video": "", "question": "What is it?", "options": ["a cat", "a dog"], "answer": "B",
            "answer_type": "multiple_choice", "source": "test", "meta": {"problem": PROBLEM}}


def test_dialogues_equal_the_plain_rules(folder, policy):
    """Ids, what is trained, pixels and the format reward, over random turns of all kinds and videos of several shapes."""
    rng, seen = random.Random(int(os.environ.get("PROTOCOL_SEED", 0))), set()
    videos = {name: plain_video(folder / f"{name}.mp4") for name in SIZES}
    config, tokenizer = policy.env_config, policy.tokenizer
    for case in range(CASES):
        name = rng.choice(list(SIZES))
        video = videos[name]
        turns = plain.random_turns(rng, len(video.frames) / video.rate)
        ids, trained, patches, said = plain.dialogue(tokenizer, policy.image_processor, config.texts, config.system_prompt, PROBLEM,
                                                     video, turns, largest_id=max(tokenizer.get_vocab().values()))
        row = {"question": QUESTION | {"video": f"{name}.mp4"}, "turns": turns[:len(said)], "learn": [True] * len(said)}
        env = ZoomEnv.protocols["released"](row["question"], config, folder)
        dialogue = encode(policy, env.reset())
        for text in said:  # whole, as nothing says where sampling stops
            assert not env.done, (case, said)
            encode(policy, [Message("assistant", [text])], dialogue)
            encode(policy, env.step(text), dialogue)
        assert env.done, (case, said)
        assert dialogue.ids == ids and dialogue.trained == trained, (case, name, said)
        mine = policy.image_processor([f.image for f in dialogue.frames], do_resize=False, return_tensors="pt")
        assert torch.equal(mine["image_grid_thw"], patches["image_grid_thw"]), (case, name, said)
        assert torch.equal(mine["pixel_values"], patches["pixel_values"]), (case, name)
        assert env.rewards["format"] == plain.format_reward(said), (case, said)
        seen |= {turn.kind for turn in env.turns} | {f"{len(env.turns)} turns", f"format {env.rewards['format']}"}
    assert seen >= {"call", "error", "answer", "1 turns", "5 turns", "format 0.0", "format 1.0"}


def test_replay_writes_what_the_checkpoint_was_trained_on(folder, policy):
    """A trajectory for SFT: end tokens are trained though the text has none, and no line break follows a turn."""
    zoom = '<think>I look.</think><video_zoom>{"segment": [1, 5], "fps": 1}</video_zoom>'
    row = {"question": QUESTION | {"video": "tiny.mp4"}, "turns": [zoom, "<think>I see.</think><answer>B</answer>"], "learn": [True, True]}
    dialogue, env = replay(policy, row, folder)
    said = policy.tokenizer.decode([i for i, trained in zip(dialogue.ids, dialogue.trained) if trained])
    assert said == f"{zoom}<|im_end|><think>I see.</think><answer>B</answer><|im_end|>"
    assert "</video_zoom><|im_end|><|im_start|>user\n<tool_response>\nHere it is {so}:\n<frame0_at1.00>" in policy.tokenizer.decode(dialogue.ids)
    assert env.rewards == {"reward": 1.5, "accuracy": 1.0, "format": 1.0, "tool": 1.0}


class Scripted(Released):
    """Zooms, makes an error or answers, as the length of what is said has it."""

    def step(self, text):
        number = len(text) + len(self.turns)
        zoom = '<video_zoom>{"segment": [%d, %d], "fps": 1}</video_zoom>' % (number % 9, number % 9 + 2)
        says = [zoom, "<video_zoom>{}</video_zoom>", zoom, "<video_zoom>?</video_zoom>", zoom, "<think>t</think><answer>A</answer>"]
        return super().step(says[number % 6])


@pytest.mark.parametrize("how", [dict(), dict(look_every=5), dict(max_rows=2)])
def test_the_engine_plays_by_it_as_the_plain_loop_does(folder, policy, monkeypatch, how):
    """With ids that are dropped in the middle of a turn, and appended end tokens, which have no log-probability of sampling."""
    policy = restless(policy)
    with torch.no_grad():
        policy.head.weight[policy.im_end] *= 1.1
    monkeypatch.setitem(ZoomEnv.protocols, "released", Scripted)
    monkeypatch.setattr(Released, "largest_id", 250)
    policy.env_config = replace(policy.env_config, overview_max_frames=2)
    questions = [QUESTION | {"id": str(n), "video": "tiny.mp4", "meta": {"problem": f"{n} <image>?"}} for n in range(8)]
    config = RolloutConfig(temperature=0.0, max_turn_tokens=12, **how)
    episodes = [play(policy, question, config, folder) for question in questions]
    groups, _ = Engine(policy, 1, config).play(questions, folder)
    assert [g[0].dialogue.ids for g in groups] == [e.dialogue.ids for e in episodes]
    sampled = [p for e in episodes for p in e.dialogue.sampled_log_probs]
    assert None in sampled and max(i for e in episodes for i, t in zip(e.dialogue.ids, e.dialogue.trained) if t) <= 250
    assert any(e.env.num_calls() for e in episodes) and any(len(e.env.turns) > 2 for e in episodes)
    for e in [g[0] for g in groups]:
        assert e.dialogue.trained.count(True) == len(e.dialogue.sampled_log_probs)


# ------------------------------------------------------------------------------------------------- which one is played
def test_a_checkpoint_keeps_its_protocol(policy, official, tmp_path, capsys):
    save_policy(policy, tmp_path / "trained")
    kept = use_protocol(load_env_config(tmp_path / "trained"), RunConfig(), tmp_path / "trained")
    assert kept == policy.env_config and kept.protocol == "released" and not capsys.readouterr().err
    other = use_protocol(kept, RunConfig(protocol="direct"), tmp_path / "trained")
    assert (other.protocol, other.texts, other.max_zooms) == ("direct", {}, 0) and "helpful" in other.system_prompt
    ours = use_protocol(kept, RunConfig(protocol="videozoomer"), tmp_path / "trained")
    assert ours.system_prompt == EnvConfig().system_prompt and ours.texts == {}
    given = use_protocol(replace(kept, system_prompt="mine"), RunConfig(protocol="direct", system_prompt="file"), tmp_path / "trained")
    assert given.system_prompt == "mine"
    # one that says nothing
    (tmp_path / "trained/zoom_config.json").unlink()
    for tool, name in ((True, "videozoomer"), (False, "direct")):
        plays = use_protocol(load_env_config(tmp_path / "trained"), RunConfig(), tmp_path / "trained", tool)
        assert plays.protocol == name and f"played by the protocol {name}" in capsys.readouterr().err


@pytest.mark.parametrize("file, message", [
    ("[]", "must be an object"), ("{", "cannot read"), ('{"protocol": "released"}', "lacks its texts frame"), ('{"protocol": "mine"}', "must be one of"),
    ('{"protocol": "released", "texts": {"frame": 1}}', "must be an object"), ('{"protocol": "direct", "speed": 1}', "must be an object")])
def test_a_bad_file_is_named(tmp_path, file, message):
    (tmp_path / "p.json").write_text(file)
    with pytest.raises(UserError, match=message) as error:
        use_protocol(EnvConfig(), RunConfig(protocol=str(tmp_path / "p.json")), "none")
    assert len(str(error.value).splitlines()) == 1


def test_released_without_its_texts_is_refused():
    with pytest.raises(UserError, match="data_prep.py protocol"):
        use_protocol(EnvConfig(), RunConfig(protocol="released"), "none")
    with pytest.raises(ValueError, match="protocol must be one of"):
        EnvConfig(protocol="unheard")


# --------------------------------------------------------------------------------------------------------- the others
def episode(name, folder, texts, **question):
    config = use_protocol(replace(EnvConfig(), frame_unit=28), RunConfig(protocol=name), "none")
    env = PROTOCOLS[name](QUESTION | {"video": "tiny.mp4"} | question, config, folder)
    messages = [env.reset()]
    for text in texts:
        assert not env.done
        messages.append(env.step(text))
    return env, [["".join(i if isinstance(i, str) else "[]" for i in m.content) for m in some] for some in messages]


@pytest.mark.parametrize("said, right", [("B", 1), ("B.", 1), ("(B) a dog", 1), ("The answer is B.", 1), ("A", 0), ("a dog", 1), ("", 0),
                                         ("<think>A?</think><answer>B</answer>", 1), ("B\nIt has fur.", 1)])
def test_direct(folder, said, right):
    env, ((system, user),) = episode("direct", folder, [])
    assert user == "[]" * 6 + "What is it?\nA. a cat\nB. a dog\nAnswer with the letter of the right option only."
    assert system == "You are a helpful assistant."
    env, _ = episode("direct", folder, [said])
    assert env.done and env.rewards["accuracy"] == right and env.rewards["tool"] == 0


def test_longvt(folder):
    call = lambda **a: '<think>t</think><tool_call>' + json.dumps({"name": "crop_video", "arguments": a}) + "</tool_call>"
    turns = [call(video_path="x", start_time=2, end_time=6), call(start_time=8.0, end_time=99), call(start_time=6, end_time=2),
             call(start_time=50, end_time=60), "<think>t</think><tool_call>crop</tool_call>", "<think>t</think><answer>B</answer>"]
    env, messages = episode("longvt", folder, turns, evidence=[[9, 10]])
    assert messages[0][1] == "[]" * 12 + "What is it?\nA. a cat\nB. a dog\nThe path of the video is tiny.mp4; it lasts 12.00 seconds."
    assert messages[1] == ["<tool_response>\n[][][][]4 frames, 2.00 s to 6.00 s\n</tool_response>"]
    assert messages[2] == ["<tool_response>\n[][][][]4 frames, 8.00 s to 12.00 s\n</tool_response>"]
    assert ["before end_time" in messages[3][0], "after the end" in messages[4][0], "not JSON" in messages[5][0]] == [True] * 3
    assert [turn.kind for turn in env.turns] == ["call", "call", "error", "error", "error", "answer"]
    assert [turn.calls[0].hit for turn in env.turns[:2]] == [False, True] and env.rewards["accuracy"] == 1
    assert all(f.image.shape[1] * f.image.shape[2] <= 50_176 for frames in env.watched for f in frames)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_nothing_that_is_said_raises(folder, official, name):
    config = RunConfig(protocol=str(write_protocol(official)) if name == "released" else name)
    config = use_protocol(replace(EnvConfig(), frame_unit=28), config, "none")
    calls = ['{"segment": [0, 1e308], "fps": 1e308}', '{"segment": [1e308, 1e308], "fps": 1}', '{"segment": [-1e308, 1], "fps": 1e-308}',
             '{"segment": {"0": 1, "1": 2}, "fps": 1}', '{"segment": [NaN, 1], "fps": 1}', '{"name": "crop_video", "arguments": {"start_time": NaN, "end_time": 1}}',
             "[" * 100_000, '{"a": ' + "[" * 100_000 + "}", "{" * 100_000, '{"segment": [' + "9" * 5000 + ', 1], "fps": 1}', "\0\ud800", "{}{}"]
    for tag in ("video_zoom", "tool_call", "answer"):
        for text in [f"<{tag}>{call}</{tag}>" for call in calls] + [f"<{tag}>" * 80_000, f"<{tag}>{{" * 40_000, f"</{tag}>" * 80_000]:
            env = PROTOCOLS[name](QUESTION | {"video": "tiny.mp4"}, config, folder)
            env.reset()
            reply = env.step(text)
            assert env.done or reply
            env.end()
            assert 0 <= env.rewards["accuracy"] <= 1


# -------------------------------------------------------------------------------------------------------- the scripts
def test_the_scripts_play_by_it(folder, official, tmp_path):
    """SFT on messages keeps the protocol; RL goes on with it, and asks for recomputed log-probabilities; eval.py repeats it."""
    policy = random_policy()
    save_policy(policy, tmp_path / "base")
    (tmp_path / "base/zoom_config.json").unlink()
    os.symlink(folder, tmp_path / "clips")
    protocol, image = write_protocol(official), tmp_path / "0.png"
    Image.fromarray(np.zeros((56, 84, 3), dtype=np.uint8)).save(image)
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "<think>t</think><answer>B</answer>"}]
    (tmp_path / "sft.json").write_text(json.dumps([{"messages": messages, "images": ["0.png"]}] * 4))
    problem = {"videos": ["clips/tiny.mp4"], "problem": PROBLEM, "solution": "B.", "data_source": "x", "extra_info": {"answer_type": "multiple_choice"}}
    (tmp_path / "rl.json").write_text(json.dumps([problem] * 2))
    common = ["--protocol", protocol, "--dtype", "float32"]
    run = launch(1, ROOT / "sft.py", ["--model", tmp_path / "base", "--data", tmp_path / "sft.json", "--out", tmp_path / "sft", "--batch_size", 2, *common])
    run.wait()
    kept = load_env_config(tmp_path / "sft")
    assert kept.protocol == "released" and kept.texts == read_official(official, "train")["texts"]
    assert json.loads((tmp_path / "sft/metrics.jsonl").read_text().splitlines()[-1])["tokens"] > 20
    small = ["--steps", 1, "--batch_size", 1, "--mini_batch_size", 1, "--group_size", 2, "--max_turn_tokens", 4, "--max_draws", 1, "--cache_gb", 0.1]
    flags = ["--model", tmp_path / "sft", "--data", tmp_path / "rl.json", "--out", tmp_path / "rl", "--dtype", "float32", *small]
    refused = launch(1, ROOT / "rl.py", flags)
    assert "--old_log_probs recomputed" in refused.wait([2])
    launch(1, ROOT / "rl.py", [*flags, "--old_log_probs", "recomputed", "--loss_mean", "episode", "--tool_weight", 0]).wait()
    assert load_env_config(tmp_path / "rl").texts == kept.texts
    asked = [QUESTION | {"id": str(n), "video": f"clips/{name}.mp4"} for n, name in enumerate(("tiny", "varying"))]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked))
    for model, mode, name in (("rl", "zoom", "released"), ("base", "uniform", "direct")):
        how = ["--mode", mode, "--num_frames", 2] if mode == "uniform" else []
        run = launch(1, ROOT / "eval.py", ["--model", tmp_path / model, "--data", tmp_path / "q.jsonl", "--out", tmp_path / name, "--dtype", "float32",
                                           "--max_turn_tokens", 4, *how])
        run.wait()
        assert json.loads((tmp_path / name / "results.json").read_text())[0]["settings"]["protocol"] == name
        assert ("has no zoom_config.json" in run.said()) == (name == "direct")


def test_a_name_on_the_hub_has_its_settings_fetched(policy, tmp_path):
    """Here out of the hub's cache, as nothing can be fetched in a test."""
    folder = tmp_path / "models--some--policy"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    save_policy(policy, folder / "snapshots" / ("0" * 40))
    ask = "from training.checkpoints import find_env_config, load_env_config as load; print(load('some/policy').protocol, find_env_config('some/other'))"
    run = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, cwd=ROOT,
                         env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert run.stdout.split() == ["released", "None"], run.stderr


@pytest.mark.parametrize("name", PROTOCOLS)
def test_images_and_subtitles_of_a_question_are_shown(folder, official, name):
    """Each image where its <image> stands, in the sizes of frames, not counted as frames; subtitles with their seconds."""
    image = np.random.default_rng(0).integers(0, 255, (280, 560, 3), dtype=np.uint8)
    Image.fromarray(image).save(folder / "slide.png")
    Image.fromarray(np.zeros((56, 56, 3), dtype=np.uint8)).save(folder / "dot.jpg")
    config = RunConfig(protocol=str(write_protocol(official)) if name == "released" else name)
    config = use_protocol(replace(EnvConfig(), frame_unit=28), config, "none")
    row = QUESTION | {"video": "tiny.mp4", "question": "Is <image> or <image> in it?", "images": ["slide.png", "dot.jpg"], "meta": {},
                      "subtitles": [[0.0, 2.5, "Hello."], [2.5, 4.0, "See this?"]]}
    env = PROTOCOLS[name](row, config, folder)
    user = env.reset()[1].content
    text = "".join(i if isinstance(i, str) else "[]" for i in user)
    assert "[0.0 - 2.5] Hello.\n[2.5 - 4.0] See this?\nIs [] or [] in it?\nA. a cat\nB. a dog" in text and "<image>" not in text
    shown = [i.image for i in user if not isinstance(i, str)]
    slide, = [i for i in shown if tuple(i.shape) == (3, 224, 448)] if name != "longvt" else [next(i for i in shown if i.shape[2] > 1.5 * i.shape[1])]
    assert slide.float().std() > 20 and env.frames_shown == len(env.watched[0]) == len(shown) - 2
    (folder / "slide.png").write_bytes(b"?")
    with pytest.raises(VideoError, match="slide.png: not an image"):
        PROTOCOLS[name](row, config, folder).reset()


@pytest.mark.parametrize("script", ["sft", "rl", "eval"])
def test_a_wrong_protocol_is_said_before_anything_loads(tmp_path, script):
    flags = ["--model", tmp_path, "--data", tmp_path / "none.jsonl", "--protocol", "unheard"]
    (tmp_path / "none.jsonl").write_text(json.dumps(QUESTION | {"video": "x"}) + "\n")
    if script == "sft":
        row = {"question": QUESTION | {"video": "x"}, "turns": ["x"], "learn": [True]}
        (tmp_path / "none.jsonl").write_text(json.dumps(row) + "\n")
    said = launch(1, ROOT / f"{script}.py", flags + (["--out", tmp_path / "out"])).wait([2])
    assert said.strip().splitlines()[-1].endswith("--protocol must be one of videozoomer, released, direct, longvt or a .json file, not unheard")


def test_another_protocol_comes_with_its_own_numbers(policy, tmp_path):
    """From one to the next and back: nothing of the one before stays; the same one keeps what the checkpoint had."""
    take = lambda config, name: use_protocol(config, RunConfig(protocol=name), "none")
    for name in ("longvt", "direct"):
        assert take(take(EnvConfig(), name), "videozoomer") == EnvConfig()
    assert take(take(EnvConfig(), "direct"), "longvt") == take(EnvConfig(), "longvt")
    trained = replace(EnvConfig(), overview_max_frames=9)
    assert take(trained, "videozoomer") == trained and take(policy.env_config, "released") == policy.env_config


@pytest.mark.parametrize("numbers", [[-5, 10], [0, 500], [float("nan")], [float("inf"), 3]])
def test_chosen_frames_that_are_not_there_are_the_videos_fault(folder, policy, numbers):
    for name in ("tiny.mp4", "varying.mp4"):
        for env in (Released, ZoomEnv):
            config = policy.env_config if env is Released else EnvConfig(frame_unit=28)
            with pytest.raises(VideoError, match="no frame"):
                env(QUESTION | {"video": name, "overview_frames": numbers}, config, folder).reset()


def test_the_answer_of_the_released_protocol_is_the_last_one_said(folder, policy):
    zoom = '<video_zoom>{"segment": [1, 5], "fps": 1}</video_zoom>'
    config = replace(policy.env_config, max_zooms=1)
    for turns, answer in ((["<answer>A</answer>" + zoom, "<answer>B</answer>" + zoom], "B"), ([zoom, "B it is"], zoom + " B it is"),
                          ([zoom, zoom], zoom + " " + zoom), (["<answer>B</answer>" + zoom, "hm"], "B")):
        env = Released(QUESTION | {"video": "tiny.mp4"}, config, folder)
        env.reset()
        for text in turns:
            env.step(text)
        assert env.done and env.answer() == answer


def test_settings_that_cannot_be_read_are_one_line(policy, tmp_path):
    save_policy(policy, tmp_path / "model")
    check_protocol(RunConfig(protocol="released"), tmp_path / "model")  # its texts are the checkpoint's own
    (tmp_path / "model/zoom_config.json").write_text("{")
    with pytest.raises(UserError) as error:
        check_protocol(RunConfig(), tmp_path / "model")
    assert "model" in str(error.value) and len(str(error.value).splitlines()) == 1
