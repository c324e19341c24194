"""Flags whose value is a word, a file or a folder, given a wrong word, a missing file, a folder for a file, a
file for a folder: one line that names what is wrong, exit status 2, and nothing done before. (What the parser
says to values of another type is in test_common.)"""

import json
import sys
from pathlib import Path

import pytest
from cases import all_hold
from tiny import random_policy

import common
import data_prep
import eval as evaluation
import rl
import sft
from demo import synthetic
from training.checkpoints import save_policy

SCRIPTS = {"sft": sft, "rl": rl, "eval": evaluation, "data_prep": data_prep}
WRONG_WORDS = {
    "device": ["gpu", "cuda:x", "meta"], "dtype": ["float16", "x"], "mode": ["x"], "resume": ["x", "always"],
    "clips": ["x"], "zoom": ["x", "Never"],
    "loss_mean": ["x"], "old_log_probs": ["x", "Sampled"], "offload": ["x", "Reference"], "preset": ["x"],
    "plan": ["x", "8", "x80"], "shard": ["x", "All"], "kinds": ["x"],
    "protocol": ["x", "missing.json", "folder.json", "bytes.json"],
    "overview": ["sometimes", "missing.json", "folder.json", "bytes.json"],
    "system_prompt": ["missing", "folder", "bytes"], "val": ["missing", "folder", "bytes", "empty"],
    "data": ["missing", "folder", "bytes", "empty"], "model": ["missing", "folder", "rows", "bytes"],
    "out": ["rows", "rows/below"], "save_frames": ["rows", "rows/below"],
    "video": ["missing", "folder", "rows", "bytes"]}
TRAINING = ["--offload optimizer --lora_rank 4", "--offload optimizer --shard all",
            "--lora_rank 4 --shard node"]
MORE = {
    "sft": [*TRAINING, "--epochs 0", "--max_zooms -1"],
    "rl": [*TRAINING, "--offload reference", "--max_mismatch 0.1", "--temperature 0", "--group_size 1",
           "--max_mismatch 0.1 --old_log_probs sampled", "--steps 0"],
    "eval": ["--options one --question What?", "--question What?", "--options a a --question What?",
             "--num_frames 0", "--max_rows 0", "--votes 0", "--zoom gate",
             "--votes 3 --question What? --video data/test.jsonl", "--zoom gate --votes 2",
             "--clips grey --mode uniform", "--zoom never --mode uniform", "--clips grey --temperature 1",
             "--clips grey --zoom always", "--clips none --votes 3", "--clips grey --max_zooms 0",
             "--clips other --max_zooms 0", "--zoom always --protocol direct",
             "--zoom gate --votes 3 --max_zooms 0"],
    "data_prep": ["", "x", "synthetic --train 0", "synthetic --test x", "synthetic --seed x",
                  "synthetic --out rows", "tiny_base --steps x", "tiny_base --steps 0",
                  "tiny_base --init missing", "tiny_base --out rows"]}


def wrong_flags(name):
    """What is given to a script."""
    config = getattr(SCRIPTS[name], "Config", None)
    for flag, words in WRONG_WORDS.items():
        if hasattr(config, flag):
            for word in words:
                yield [f"--{flag}", word] + ["--question", "What?"] * (flag in ("video", "save_frames"))
    for flags in MORE[name]:
        yield flags.split()
    if name == "eval":
        yield ["--question", " "]
    yield ["--no_such_flag", "1"]
    yield ["stray"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint, data, and what is none."""
    place = tmp_path_factory.mktemp("flags")
    synthetic.synthetic(place / "data", 2, 2, seed=1)
    save_policy(random_policy(layers=1), place / "model")
    (place / "folder").mkdir()
    (place / "folder.json").mkdir()
    for name in ("bytes", "bytes.json"):
        (place / name).write_bytes(bytes(range(256)) * 20)
    (place / "rows").write_text("a text\n")
    (place / "empty").write_text("")
    return place


@pytest.mark.parametrize("name", SCRIPTS)
def test_wrong_input_is_one_line(name, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    video = json.loads(Path("data/test.jsonl").read_text().splitlines()[0])["video"]
    base = {"--model": "model", "--data": f"data/{'sft' if name == 'sft' else 'test'}.jsonl", "--out": "new"}

    def is_one_line(*flags):
        given = [*flags]
        if name != "data_prep":
            for flag, value in base.items():
                if flag not in flags:
                    given += [flag, value]
        if "--save_frames" in flags:
            given += ["--video", f"data/{video}"]
        with monkeypatch.context() as patched:
            if "--out" in flags and name != "data_prep":  # which is tried before a model is loaded
                patched.setattr(SCRIPTS[name], "load_policy" if name == "eval" else "load_weights", None)
            patched.setattr(sys, "argv", [f"{name}.py", *given])
            with pytest.raises(SystemExit) as exit:
                common.run_main(SCRIPTS[name].main)
        said = capsys.readouterr().err.strip()
        assert exit.value.code == 2 and said.startswith(f"{name}.py: error: ") and "\n" not in said, said
        assert not Path("new/metrics.jsonl").exists() and not Path("new/results.json").exists()

    all_hold(is_one_line, wrong_flags(name))
