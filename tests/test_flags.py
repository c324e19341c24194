"""Every flag of every script given a wrong type, a missing file, a folder for a file, a file for a folder: one line that
names what is wrong, exit status 2, and nothing done before."""

import json
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest
from tiny import random_policy

import common
import data_prep
import eval as evaluation
import rl
import sft
from demo import synthetic
from training.checkpoints import save_policy

SCRIPTS = {"sft": sft, "rl": rl, "eval": evaluation}
WRONG_WORDS = {"device": ["gpu", "cuda:x", "meta"], "dtype": ["float16", "x"], "mode": ["x"], "resume": ["x", "always"],
               "old_log_probs": ["x", "Sampled"], "offload": ["x", "Reference"], "preset": ["x"], "plan": ["x", "8", "x80"], "shard": ["x", "All"],
               "val": ["missing", "folder", "bytes", "empty"],
               "overview": ["sometimes", "missing.json", "folder.json", "bytes.json"],
               "system_prompt": ["missing", "folder", "bytes"], "data": ["missing", "folder", "bytes", "empty"],
               "model": ["missing", "folder", "rows", "bytes"], "out": ["rows", "rows/below"],
               "save_frames": ["rows", "rows/below"], "video": ["missing", "folder", "rows", "bytes"]}


def wrong_values():
    """(script, flags) for each flag of each script."""
    for name, script in SCRIPTS.items():
        for f in fields(script.Config):
            kind = f.type.__args__[0] if isinstance(f.type, types.UnionType) else f.type
            if kind is bool:
                values = [f"--{f.name}=maybe"]
            elif kind in (int, float):
                values = ["x", "-1", ""] + (["nan"] if kind is float else ["1.5"])
            else:
                values = WRONG_WORDS.get(f.name, [])
            for value in values:
                flags = [value] if kind is bool else [f"--{f.name}", value]
                yield name, flags + (["--question", "What?"] if f.name in ("video", "save_frames") else [])
    for name in SCRIPTS:
        yield name, ["--no_such_flag", "1"]
        yield name, ["stray"]
    for name in ("rl", "sft"):
        yield name, ["--offload", "optimizer", "--lora_rank", "4"]
        yield name, ["--offload", "optimizer", "--shard", "all"]
        yield name, ["--lora_rank", "4", "--shard", "node"]
    yield "rl", ["--offload", "reference"]
    yield "rl", ["--max_mismatch", "0.1"]
    yield "rl", ["--max_mismatch", "0.1", "--old_log_probs", "sampled"]
    for flags in (["--options", "one", "--question", "What?"], ["--question", " "], ["--question", "What?"],
                  ["--options", "a", "a", "--question", "What?"]):
        yield "eval", flags
    for flags in ([], ["x"], ["synthetic", "--train", "0"], ["synthetic", "--test", "x"], ["synthetic", "--seed", "x"],
                  ["synthetic", "--out", "rows"], ["tiny_base", "--steps", "x"], ["tiny_base", "--steps", "0"],
                  ["tiny_base", "--init", "missing"], ["tiny_base", "--out", "rows"]):
        yield "data_prep", flags


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint, data, and what is none."""
    place = tmp_path_factory.mktemp("flags")
    synthetic.synthetic(place / "data", 2, 2, seed=1)
    save_policy(random_policy(), place / "model")
    (place / "folder").mkdir()
    (place / "folder.json").mkdir()
    for name in ("bytes", "bytes.json"):
        (place / name).write_bytes(bytes(range(256)) * 20)
    (place / "rows").write_text("a text\n")
    (place / "empty").write_text("")
    return place


@pytest.mark.parametrize("name, flags", [pytest.param(*case, id=" ".join((case[0], *case[1]))) for case in wrong_values()])
def test_wrong_input_is_one_line(name, flags, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    given = {f for f in flags if f.startswith("--")}
    if name in SCRIPTS:
        base = {"--model": "model", "--data": f"data/{'sft' if name == 'sft' else 'test'}.jsonl", "--out": "new"}
        flags = flags + [x for flag, value in base.items() if flag not in given for x in (flag, value)]
        if "--save_frames" in given:
            flags += ["--video", json.loads(Path("data/test.jsonl").read_text().splitlines()[0])["video"].join(["data/", ""])]
    if "--out" in given and name in SCRIPTS:
        monkeypatch.setattr(SCRIPTS[name], "load_policy" if name == "eval" else "load_weights", None)  # tried before that
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    with pytest.raises(SystemExit) as exit:
        common.run_main((SCRIPTS.get(name) or data_prep).main)
    said = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and said.startswith(f"{name}.py: error: ") and "\n" not in said, said
    assert not Path("new/metrics.jsonl").exists() and not Path("new/results.json").exists()
