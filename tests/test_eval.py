"""Evaluation: intervals, the table's figures against a count by hand, asking about one video, wrong input."""

import json
import subprocess
import sys
import wave
from pathlib import Path

import pytest
import torch
from tiny import random_policy as make_policy

import eval as evaluation
from demo import synthetic
from model import encode
from rollout import Episode
from scale.checkpoints import save_policy
from zoom_env import Message, ZoomEnv

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    synthetic.synthetic(folder, 5, 10, seed=4)
    save_policy(make_policy(), folder / "policy")
    return folder


def run(*flags):
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), *map(str, flags)], capture_output=True, text=True,
                          timeout=300)


def test_wilson_interval():
    """Against published values: 81 of 263 (Newcombe 1998, table I)."""
    low, high = evaluation.interval(81, 263)
    assert low == pytest.approx(0.2553, abs=1e-4) and high == pytest.approx(0.3662, abs=1e-4)
    assert evaluation.interval(0, 20)[0] == 0 and evaluation.interval(20, 20)[1] == pytest.approx(1)


def test_figures_equal_a_count_by_hand(folder, monkeypatch):
    """Episodes that are known: one zooms into the evidence and is right, one zooms elsewhere with one bad call and is
    wrong."""
    policy = make_policy()
    question = next(q for line in open(folder / "test.jsonl") if (q := json.loads(line))["meta"]["kind"] == "detail")
    start, end = question["evidence"][0]
    far = 0 if start > 20 else 100
    zoom = '<think>t</think><video_zoom>{{"segment": [{}, {}], "fps": 2}}</video_zoom>'
    answer = "<think>t</think><answer>{}</answer>"
    wrong = "ABCD"["ABCD".index(question["answer"]) - 1]
    groups = []
    for turns in ([zoom.format(start, end), answer.format(question["answer"])],
                  [zoom.format(far, far + 5), "what?", answer.format(wrong)]):
        env = ZoomEnv(question, policy.env_config, folder)
        dialogue = encode(policy, env.reset())
        for text in turns:
            encode(policy, [Message("assistant", [text])], dialogue)
            encode(policy, env.step(text), dialogue)
        groups.append([Episode(dialogue, env=env)])
    num_frames = sum(len(g[0].dialogue.frames) for g in groups)
    monkeypatch.setattr(evaluation, "rollout", lambda *args, **kwargs: (groups, []))  # both in one batch
    rows, episodes, skipped = evaluation.evaluate(policy, "p", "zoom", [question] * 2, folder, evaluation.Config())
    row = rows[0]
    assert row["kind"] == "all" and rows[1]["kind"] == "detail" and row["num_questions"] == 2
    assert row["accuracy"] == 0.5 and row["zooms_per_question"] == 1 and row["hit_rate"] == 0.5
    assert row["invalid_call_rate"] == 1 / 3
    assert row["frames_per_question"] == num_frames / 2
    bound = evaluation.uniform_bound(row, episodes)
    assert bound["accuracy"] == pytest.approx(synthetic.uniform_accuracy(question, round(row["frames_per_question"])))


def test_results_file(folder, tmp_path):
    done = run("--model", folder / "policy", "--data", folder / "test.jsonl", "--out", tmp_path, "--max_turn_tokens", 8,
               "--mode", "uniform", "--num_frames", 24, "--device", "cpu", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())
    for key in ("policy", "mode", "num_questions", "accuracy", "accuracy_low", "accuracy_high", "frames_per_question",
                "zooms_per_question", "invalid_call_rate", "hit_rate", "tokens_per_question", "seconds_per_question"):
        assert key in rows[0]
    assert rows[0]["num_questions"] == 10 and rows[0]["mode"] == "uniform"
    assert rows[0]["frames_per_question"] == 24 and rows[0]["zooms_per_question"] == 0


def test_ask_about_a_video(folder, tmp_path):
    video = folder / "videos" / "test_0000.mp4"
    done = run("--model", folder / "policy", "--video", video, "--question", "What happens?", "--options", "this", "that",
               "--save_frames", tmp_path / "seen", "--max_turn_tokens", 8)
    assert done.returncode == 0, done.stderr
    assert "overview: 9 frames" in done.stdout and "answer:" in done.stdout and "A. this" in done.stdout
    assert len(list((tmp_path / "seen").glob("0_overview_*.png"))) == 1


def test_a_strip_holds_frames_of_any_sizes():
    sizes = [(28, 56), (84, 28), (56, 56)]
    images = [torch.full((3, *size), n + 1, dtype=torch.uint8) for n, size in enumerate(sizes)]
    strip, left = evaluation.strip(images), 0
    assert strip.shape == (3, 84, 140) and strip.dtype == torch.uint8
    for image, (height, width) in zip(images, sizes):
        assert torch.equal(strip[:, :height, left:left + width], image)
        assert not strip[:, height:, left:left + width].any()
        left += width


def test_wrong_input_gives_one_line_and_status_2(folder, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("this is no video\n" * 100)
    audio = tmp_path / "audio.wav"
    with wave.open(str(audio), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000), file.writeframes(b"\0\0" * 8000)
    video, policy = folder / "videos" / "test_0000.mp4", folder / "policy"
    for flags, words in [
        (["--model", policy, "--video", tmp_path / "none.mp4", "--question", "q"], "none.mp4"),
        (["--model", policy, "--video", text, "--question", "q"], "text.mp4"),
        (["--model", policy, "--video", audio, "--question", "q"], "audio.wav"),
        (["--model", policy, "--video", video, "--question", "  "], "--question"),
        (["--model", policy, "--video", video], "--question"),
        (["--model", tmp_path, "--video", video, "--question", "q"], "config.json"),
        (["--model", policy, "--data", folder / "test.jsonl", "--mode", "sideways"], "sideways"),
        (["--model", policy, "--data", folder / "test.jsonl", "--num_frames", "0"], "overview_max_frames"),
        (["--model", policy, "--data", folder / "test.jsonl", "--temperature", "-1"], "--temperature"),
        (["--model", policy, "--data", folder / "test.jsonl", "--max_bad", "nan"], "--max_bad"),
        (["--model", policy, "--data", folder / "test.jsonl", "--dtype", "float16"], "--dtype"),
    ]:
        done = run(*flags)
        assert done.returncode == 2, (flags, done.stderr)
        assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
