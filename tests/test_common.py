"""What every script starts with: settings from the command line, sums over processes, rows of files."""

import json
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from cases import all_hold
from launcher import launch

import eval as evaluation
import rl
import sft
from common import (RunConfig, UserError, choose_device, choose_dtype, field_comments, float_or_auto, gather,
                    parse_flags, read_rows, run_main, start_processes, sum_over_processes, write_jsonl)
from training.weights import sync_gradients


# ------------------------------------------------------------------------------------------------------ flags
@dataclass(frozen=True)
class Base:
    seed: int = 0  # of the order
    shared: float = 0.5  # as the base has it


@dataclass(frozen=True)
class Settings(Base):
    model: str | None = None  # a folder
    steps: int = 3  # how many, at most 100% of them
    most: int | None = None  # a bound, without one by default
    weights: list[float] = (1.0, 2.0)  # one each
    names: list[str] | None = None  # which # of them
    check: bool = False  # whether to
    shuffle: bool = True  # or not
    shared: float = 0.25  # as the heir has it
    size: float_or_auto = 16.0  # a number, or auto


def parse(*flags, preset=None, at_least_one=()):
    return parse_flags(Settings, "What it does.", at_least_one, preset, list(flags))


def message_of(capsys, *flags, **given):
    """The one line with which wrong flags end."""
    with pytest.raises(SystemExit) as raised:
        parse(*flags, **given)
    lines = capsys.readouterr().err.splitlines()
    assert raised.value.code == 2 and len(lines) == 1 and ": error: " in lines[0]
    return lines[0]


def test_without_flags_the_defaults_hold():
    assert parse() == Settings()


def test_values_have_the_fields_types():
    config = parse("--steps", "7", "--most", "9", "--shared", "1e-3", "--model", "x", "--names", "a", "b",
                   "--weights", "1", "2.5", "0")
    assert config == Settings(steps=7, most=9, shared=1e-3, model="x", names=["a", "b"],
                              weights=[1.0, 2.5, 0.0])
    assert type(config.most) is int and all(type(w) is float for w in config.weights)
    assert parse("--size", "auto").size == "auto" and parse("--size", "2").size == 2.0


def test_a_bool_is_a_switch():
    config = parse("--check", "--no-shuffle")
    assert config.check is True and config.shuffle is False
    config = parse("--no-check", "--shuffle")
    assert config.check is False and config.shuffle is True


def test_values_of_another_type_are_refused(capsys):
    def is_refused(*flags):
        assert "see --help" in message_of(capsys, *flags)

    all_hold(is_refused, [
        ["--check", "true"], ["--check=maybe"], ["--shuffle=False"], ["--steps", "1.5"], ["--steps"],
        ["--steps", ""], ["--steps", "x"], ["--most", "many"], ["--shared", "x"], ["--shared", ""],
        ["--weights"], ["--weights", "1", "x"], ["--size", "x"], ["--unknown", "3"], ["stray"]])


def test_negative_numbers_and_nan_are_refused(capsys):
    def is_refused(flags, named):
        assert re.search(named, message_of(capsys, *flags))

    all_hold(is_refused, [
        (["--steps", "-1"], "--steps must be at least 0, not -1"), (["--most", "-3"], "--most .* not -3"),
        (["--shared", "nan"], "--shared .* not nan"), (["--shared=-0.5"], "--shared .* not -0.5"),
        (["--shared=-inf"], "--shared"), (["--seed", "-1"], "--seed"),  # one that is inherited
        (["--size", "-1"], "--size"), (["--size", "nan"], "--size")])


def test_some_must_be_at_least_one(capsys):
    assert parse("--steps", "0").steps == 0 and parse("--steps", "1", at_least_one=("steps",)).steps == 1
    assert "--steps must be at least 1, not 0" in message_of(capsys, "--steps", "0", at_least_one=("steps",))
    assert parse(at_least_one=("most",)).most is None  # no number: no bound


def test_a_preset_replaces_defaults_and_flags_overrule_it():
    seen = []

    def preset(given):
        seen.append(given)
        return {"steps": 50, "shared": 0.75}

    assert parse(preset=preset) == Settings(steps=50, shared=0.75)
    assert parse("--steps", "2", preset=preset) == Settings(steps=2, shared=0.75)
    assert seen == [{}, {"steps": 2}]


def test_help_is_the_comments_own_fields_first(capsys):
    comments = field_comments(Settings)
    assert comments == {
        "seed": "of the order", "shared": "as the heir has it", "model": "a folder",
        "steps": "how many, at most 100% of them", "most": "a bound, without one by default",
        "weights": "one each", "names": "which # of them", "check": "whether to", "shuffle": "or not",
        "size": "a number, or auto"}
    with pytest.raises(SystemExit) as raised:
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert raised.value.code == 0 and "What it does." in shown
    assert all(comment in shown for comment in comments.values())
    assert "(default 3)" in shown
    order = [shown.index(comments[name]) for name in ("model", "steps", "shuffle", "seed")]
    assert order == sorted(order)


@pytest.mark.parametrize("script", [sft, rl, evaluation])
def test_help_names_each_setting_its_meaning_and_default(script, monkeypatch, capsys):
    settings, comments = fields(script.Config), field_comments(script.Config)
    assert {f.name for f in fields(RunConfig)} < {f.name for f in settings} == set(comments)
    assert all(len(comment) > 3 for comment in comments.values())
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    with pytest.raises(SystemExit) as end:
        script.main()
    text, flags = capsys.readouterr().out, {}
    for flag in re.split(r"\n  --", text[text.index("\noptions:"):])[1:]:
        flags[re.split(r"[ ,]", flag)[0]] = " ".join(flag.split())
    assert end.value.code == 0
    for f in settings:
        assert f"{' '.join(comments[f.name].split())} (default {f.default})" in flags[f.name]


# ----------------------------------------------------------------------------------------- errors and devices
def ends(raised):
    def main():
        raise raised
    with pytest.raises(SystemExit) as end:
        run_main(main)
    return end.value.code


def test_wrong_input_ends_with_one_line_and_status_2(capsys):
    assert ends(UserError("no such file")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].endswith(": error: no such file")
    assert ends(KeyboardInterrupt()) == 130 and not capsys.readouterr().err


def test_an_error_that_can_be_explained_is_one_line(capsys):
    def main():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes")

    explain = lambda error: "too large" if "allocate" in str(error) else None
    with pytest.raises(SystemExit) as end:
        run_main(main, explain)
    assert end.value.code == 2 and capsys.readouterr().err.endswith(": error: too large\n")


def test_other_errors_are_not_hidden():
    def main():
        raise RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        run_main(main)


def test_devices_and_dtypes_that_are_not_there_are_refused():
    assert choose_device("cpu") == (torch.device("cpu"), "gloo")
    for name in ("tpu9", "mps", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(UserError, match=f"--device {name}"):
            choose_device(name)
    assert choose_dtype(None, torch.device("cpu")) is torch.float32
    assert choose_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    for name in ("float16", "half", ""):
        with pytest.raises(UserError, match="--dtype must be float32 or bfloat16"):
            choose_dtype(name, torch.device("cpu"))


# -------------------------------------------------------------------------------------------------- processes
SHARES = [[1.0, 5.0, 2.0], []]  # the tokens of each process; the second has none


def add_up(folder):
    """Of one process of two."""
    rank, world, device = start_processes("cpu")
    w, b = (torch.nn.Parameter(torch.tensor(x)) for x in ([[1.0, 2.0], [3.0, 4.0]], [0.5]))
    only_second, unused = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    mine = SHARES[rank]
    total = sum_over_processes({"tokens": len(mine), "loss": 0.1 * (rank + 1)}, device)
    loss = sum(((w * x) ** 2).sum() + b.sum() * x for x in mine) / total["tokens"]
    if rank == 1:
        loss = loss + (only_second * torch.tensor([1.0, -2.0])).sum()
    loss.backward()
    sync_gradients([w, unused, b, only_second])
    gathered = gather([f"{rank}{i}" for i in range(2 * rank + 1)])
    gradients = [p.grad.tolist() for p in (w, b, only_second, unused)]
    seen = {"world": world, "total": total, "gathered": gathered, "gradients": gradients}
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two gloo processes wrote."""
    folder = tmp_path_factory.mktemp("two")
    launch(2, "test_common:add_up", [folder]).wait()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_all_processes_have_the_sums_and_the_joined_lists(two_processes):
    for seen in two_processes:
        assert seen["world"] == 2
        assert seen["total"] == {"tokens": 3.0, "loss": pytest.approx(0.3)}
        assert seen["gathered"] == ["00", "10", "11", "12"]


def test_gradients_add_up_to_those_of_one_process(two_processes):
    """Also for a process without tokens, and for a weight that only one process used, or none."""
    w, b = (torch.tensor(x, requires_grad=True) for x in ([[1.0, 2.0], [3.0, 4.0]], [0.5]))
    tokens = SHARES[0] + SHARES[1]
    (sum(((w * x) ** 2).sum() + b.sum() * x for x in tokens) / len(tokens)).backward()
    whole = w.grad, b.grad, [1.0, -2.0], [0.0, 0.0]
    for seen in two_processes:
        for gradient, expected in zip(seen["gradients"], whole, strict=True):
            torch.testing.assert_close(torch.tensor(gradient), torch.as_tensor(expected))
    assert w.grad.abs().min() > 0 and b.grad > 0


def test_one_process_alone_needs_no_group():
    assert sum_over_processes({"a": 2, "b": 0.5}, torch.device("cpu")) == {"a": 2.0, "b": 0.5}
    assert gather([1, "x"]) == [1, "x"]
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    used.sum().backward()
    sync_gradients([used, unused])
    assert used.grad.tolist() == [1.0, 1.0] and unused.grad is None


# ------------------------------------------------------------------------------------------------------- rows
def check(row):
    return None if row["n"] > 0 else "n is not positive"


def test_rows_that_are_left_out_are_named_with_the_reason(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n\n{"n": 0}\n{"n": 2\n{"m": 1}\n[1]\n{"n": 3}\n   \n')
    rows, bad = read_rows(path, 4 / 6, check)  # blank lines are no rows
    assert rows == [{"n": 1}, {"n": 3}]
    assert [where for where, _ in bad] == ["line 3", "line 4", "line 5", "line 6"]
    reasons = dict(bad)
    assert reasons["line 3"] == "n is not positive" and "JSON" in reasons["line 4"]
    assert reasons["line 5"] == "KeyError: 'n'" and reasons["line 6"].startswith("TypeError")


def test_more_bad_rows_than_allowed_end_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n{"n": 0}\n{"n": -1}\n{"n": -2}\n{"n": -3}\n')
    with pytest.raises(UserError) as raised:
        read_rows(path, 0.79, check)
    message = str(raised.value)
    assert message.startswith(f"{path}: 4 of 5 rows") and "line 2: n is not positive" in message
    assert "line 4" in message and "line 5" not in message and "--max_bad" in message  # the first three
    assert len(read_rows(path, 0.8, check)[1]) == 4


def test_a_file_without_a_good_row_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    for text in (None, "", "\n \n", '{"n": 0}\n'):
        if text is not None:
            path.write_text(text)
        with pytest.raises(UserError, match="rows.jsonl"):
            read_rows(path, 1, check)


def test_what_is_written_is_read_again(tmp_path):
    rows = [{"n": 1, "text": "é\u2028\n\"x\""}, {"n": 0.1 + 0.2, "none": None}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl", 0, lambda row: None) == (rows, [])
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]  # the temporary file is gone


def test_the_old_file_stays_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"n": 1}])
    before = path.read_bytes()
    # a row that is no JSON
    with pytest.raises(TypeError):
        write_jsonl(path, [{"n": 2}, {"n": object()}])
    assert path.read_bytes() == before

    # a disk that is full in the middle
    def write_half(self, text, *args, **kwargs):
        with open(self, "w") as file:
            file.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space left"):
        write_jsonl(path, [{"n": 2}])
    assert path.read_bytes() == before
