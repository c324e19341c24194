"""Which settings a run takes: the demo's for a checkpoint that descends from the tiny base, the paper's for any other; what
is typed counts over both, and a default that is typed changes nothing."""

import json
import sys
from dataclasses import fields
from itertools import chain
from pathlib import Path

import pytest

import rl
import sft
from common import UserError
from demo.synthetic import TINY_ENV
from demo.tiny_base import TINY_BASE
from training.checkpoints import load_policy, save_policy
from training.environment import load_env_config, run_environment
from training.run import parse_training_flags

BASE = Path(TINY_BASE).resolve()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with runs/sft, saved as a run that began with the tiny base saves, and runs/other, without a preset."""
    folder = tmp_path_factory.mktemp("presets")
    save_policy(load_policy(BASE), folder / "runs" / "sft")
    settings = json.loads((folder / "runs" / "sft" / "zoom_config.json").read_text())
    del settings["preset"], settings["max_turn_tokens"]
    (folder / "runs" / "other").mkdir()
    (folder / "runs" / "other" / "zoom_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def parse(place, monkeypatch):
    """parse(script, flags): the settings of a run of sft or rl in the folder of `place`."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["script.py"])

    def parse(script, *flags):
        if script is sft and "--model" not in flags:  # its default is told from where the tests were started
            flags = ("--model", BASE, *flags)
        sys.argv[1:] = map(str, flags)
        return parse_training_flags(script.Config, "", script.PRESETS, ())

    return parse


def test_what_descends_from_the_tiny_base_says_so(place, parse):
    assert load_env_config(BASE) == load_env_config(place / "runs" / "sft") == TINY_ENV
    assert (TINY_ENV.preset, TINY_ENV.max_turn_tokens) == ("demo", 160)
    other = load_env_config(place / "runs" / "other")
    assert (other.preset, other.max_turn_tokens) == ("paper", 1024)
    # also with another protocol, prompt or number of zooms
    changed = run_environment("runs/sft", parse(rl, "--protocol", "direct", "--max_zooms", 0, "--max_turn_tokens", 9))
    assert (changed.protocol, changed.max_turn_tokens, changed.preset) == ("direct", 9, "demo")


@pytest.mark.parametrize("script", [sft, rl])
def test_the_checkpoint_chooses_the_preset(parse, script):
    def taken(config, names):
        return {name: getattr(config, name) for name in names}

    demo = script.PRESETS["demo"]
    paper = {f.name: f.default for f in fields(script.Config) if f.name in demo}
    assert set(paper) == set(demo) and paper != demo
    for flags, preset, expected in [
            ((), "demo", demo), (("--model", "runs/sft"), "demo", demo), (("--model", "runs/other"), "paper", paper),
            (("--preset", "paper"), "paper", paper), (("--model", "runs/other", "--preset", "demo"), "demo", demo),
            (("--lr", 0.25), "demo", demo | {"lr": 0.25}),
            (("--model", "runs/other", "--lr", 0.25), "paper", paper | {"lr": 0.25})]:
        config = parse(script, *flags)
        assert (config.preset, taken(config, demo)) == (preset, expected), flags
    with pytest.raises(UserError, match="--preset must be paper or demo, not mine"):
        parse(script, "--preset", "mine")
    with pytest.raises(UserError, match="runs/none"):
        parse(script, "--model", "runs/none")


def typed(config):
    """{setting: the flags that say what it is}, of those that a flag can say."""
    flags = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, bool):
            flags[f.name] = [f"--{f.name}" if value else f"--no-{f.name}"]
        elif value is not None and value != ():
            flags[f.name] = [f"--{f.name}", str(value)]
    return flags


@pytest.mark.parametrize("script", [sft, rl])
def test_typing_a_default_changes_nothing(parse, script):
    config = parse(script)
    flags = typed(config)
    assert {"model", "preset", "lr", "batch_size", "gradient_checkpointing"} <= set(flags)
    assert not [name for name in flags if parse(script, *flags[name]) != config]
    # all of them at once, of another checkpoint, too
    for config in (config, parse(script, "--model", "runs/other")):
        assert parse(script, *chain(*typed(config).values())) == config
