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
from test_video import decode_all
from tiny import chatty, random_policy, restless

from common import RunConfig, UserError
from model import encode, frame_features, replay, token_log_probs
from rollout import Engine, RolloutConfig, play
from scale.checkpoints import load_env_config, save_policy
from sources.protocols import PROTOCOLS, read_protocol, use_protocol
from sources.protocols.official import read_official
from sources.protocols.released import Released
from video import open_video
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
    failed = run("--official", str(tmp_path / "none"), "--out", "q.json")
    assert failed.returncode == 2 and "no such folder" in failed.stderr and not (tmp_path / "q.json").exists()
    assert len(failed.stderr.strip().splitlines()) == 1


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
