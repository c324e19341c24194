"""What every script starts with: settings from the command line, sums over processes, rows of files."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from cases import all_hold
from launcher import ROOT, launch
from tiny import make_place
from tqdm import tqdm

import eval as evaluation
import rl
import sft
from common import (RunConfig, UserError, choose_device, choose_dtype, field_comments, float_or_auto, gather,
                    parse_flags, read_rows, run_main, start_processes, sum_over_processes, warn, write_jsonl)
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


# ------------------------------------------------------------------------------ what the terminal cannot show
ODD = "\u53d1\u751f\u4e86\u4ec0\u4e48 \u00fc \udcff"  # Chinese, a letter of latin-1, a byte that is no UTF-8


SCRIPT = f"""
import sys
from pathlib import Path
from tqdm import tqdm
from common import UserError, run_main, warn

def main():
    odd, lines = {ODD!a}, int(sys.argv[1])
    for _ in tqdm(range(lines), desc=odd):
        print(odd, flush=True)
    tqdm.write(odd)
    warn(odd)
    Path("went_on").write_text("")
    if lines == 3:
        raise UserError(odd)

run_main(main)
"""


def run_odd(folder, shell, lines, **environment):
    """What bash makes of `shell`, in which $SCRIPT prints so many lines: (status, output, errors)."""
    went_on = folder / "went_on"
    went_on.unlink(missing_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    variables = {"SCRIPT": f"{sys.executable} script.py {lines}", "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(["bash", "-c", shell], cwd=folder, capture_output=True, timeout=100,
                          env=os.environ | variables)
    assert went_on.exists(), done.stderr[-300:]
    for words in (b"Traceback", b"Exception ignored"):
        assert words not in done.stderr, done.stderr[-300:]
    return done.returncode, done.stdout, done.stderr


def escaped(encoding):
    return ODD.encode(encoding, "backslashreplace")


def test_output_that_nobody_reads_or_that_the_terminal_lacks_ends_nothing(tmp_path):
    status, said, errors = run_odd(tmp_path, "$SCRIPT | head -n 1; exit ${PIPESTATUS[0]}", 5000,
                               PYTHONIOENCODING="ascii")
    assert status == 0 and said == escaped("ascii") + b"\n"
    assert errors.endswith(b"warning: " + escaped("ascii") + b"\n")


@pytest.mark.slow
def test_what_cannot_be_encoded_is_escaped_and_streams_may_be_closed_or_full(tmp_path):
    def holds(encoding, **environment):
        status, said, errors = run_odd(tmp_path, "$SCRIPT", 3, **environment)
        shown = escaped(encoding)
        assert status == 2 and said.splitlines() == [shown] * 4
        assert errors.endswith(b"error: " + shown + b"\n") and errors.count(shown) > 3

    utf8 = {"PYTHONUTF8": "1", "PYTHONIOENCODING": ""}
    ascii = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    cases = [("ascii", ascii), ("utf-8", utf8), ("gbk", {"PYTHONIOENCODING": "gbk"})]
    all_hold(lambda encoding, environment: holds(encoding, **environment), cases)

    def ends(status, shell, lost=False, lines=5000):
        got, _, errors = run_odd(tmp_path, shell, lines, **utf8)
        assert got == status and (b"No space left" in errors) == lost

    all_hold(ends, [
        (0, "$SCRIPT >&-"), (0, "$SCRIPT >&- 2>&- <&-"), (0, "$SCRIPT >/dev/full", True),
        (0, "$SCRIPT 2>&1 | head -n 1; exit ${PIPESTATUS[0]}"),
        (2, "$SCRIPT 2>&1 | head -n 1; exit ${PIPESTATUS[0]}", False, 3)])


@pytest.mark.slow
def test_scripts_go_on_where_nobody_reads_what_they_say(tmp_path):
    """sft.py trains to the end under torchrun, eval.py shows a video whose name is no UTF-8, and commands
    that only print say when what they printed is lost."""
    place, root = make_place(tmp_path, layers=1), shlex.quote(str(ROOT))
    bash = lambda shell: subprocess.run(["bash", "-c", shell], cwd=place, capture_output=True, text=True,
                                        timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    python = shlex.quote(sys.executable)
    torchrun = f"{python} -m torch.distributed.run --standalone --nproc_per_node=2"
    done = bash(f"{torchrun} {root}/sft.py --model model --data sft.jsonl --out out --device cpu "
                f"--batch_size 2 --max_length 20000 | head -n 1; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 0, done.stderr
    assert json.loads((place / "out" / "run.json").read_text())["finished"] and "Traceback" not in done.stderr
    video = next((place / "videos").iterdir())
    video.rename(video.with_name("\udcff.mp4"))
    done = bash(f"{python} {root}/eval.py --model model --video videos/$'\\xff.mp4' --question Why? "
                f"--device cpu --max_turn_tokens 4")
    assert done.returncode == 0 and "videos/\\udcff.mp4: Why?" in done.stdout, done.stderr
    done = bash(f"{python} {root}/data_prep.py stats sft.jsonl > /dev/full")
    assert done.returncode == 2 and "cannot write to standard output: No space left" in done.stderr


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
