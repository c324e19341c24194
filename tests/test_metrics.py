"""A run's numbers: the same in metrics.jsonl, TensorBoard and Weights & Biases, each step once in the first two however often
the run is killed. TensorBoard's and Weights & Biases' parts need their packages."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from launcher import launch
from tiny import DEVICE

import common
from common import UserError
from training.metrics import Metrics, UpdateMetrics, check_installed, show_step

OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def numbers(step):
    """Of all kinds: what is no number is not for a curve."""
    return {"step": step, "loss": 1 / step, "tokens": 1000 * step, "skipped": step > 2, "kind": "demo", "mismatch": None}


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def board(out):
    """{tag: {step: value}} as TensorBoard shows it; fails where a step stands twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    shown = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for values in shown.values():
        assert len(dict(values)) == len(values)
    return {tag: dict(values) for tag, values in shown.items()}


def wandb_folders(out):
    """`read_wandb`, once the last folder has steps: its process writes them a moment after `finish`."""
    end = time.time() + 10
    while not (folders := read_wandb(out))[-1][1] and time.time() < end:
        time.sleep(0.1)
    return folders


def read_wandb(out):
    """[(id of the run, [(step, {name: value})])] of the .wandb files, in order. These are logs as LevelDB's: after a header of
    7 bytes, blocks of 32 KiB of pieces of records, each with checksum (4 bytes), length (2) and kind (1: 1 a whole record, 2
    its first, 3 a middle, 4 its last piece)."""
    from wandb.proto.wandb_internal_pb2 import Record
    folders = []
    for path in sorted((out / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        data, at, record, steps = path.read_bytes(), 7, b"", []
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
            record, at = record + data[at + 7:at + 7 + length], at + 7 + length
            if kind in (1, 4):
                history = Record.FromString(record).history
                record = b""
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in history.item}
                if items:
                    steps.append((items["_step"], {k: v for k, v in items.items() if not k.startswith("_")}))
        folders.append((path.stem.removeprefix("run-"), steps))
    return folders


def curves(metrics):
    """What the services must have: {step: numbers}."""
    return {m["step"]: {k: v for k, v in m.items() if k in ("loss", "tokens", "skipped")} for m in metrics}


def check_services(out, tensorboard, wandb, began_at=1):
    """TensorBoard has what metrics.jsonl has, each step once; the last folder of Weights & Biases what the last process wrote."""
    expected = curves(lines(out))
    if tensorboard:
        shown = board(out)
        assert set(shown) == {"loss", "tokens", "skipped"}
        for tag, values in shown.items():
            assert values == pytest.approx({step: float(m[tag]) for step, m in expected.items()}, rel=1e-6)
    if wandb:
        folders = wandb_folders(out)
        assert len({run_id for run_id, _ in folders}) == 1
        assert folders[-1][1] == [(step, m) for step, m in expected.items() if step >= began_at]


def steps_until_killed(out, first, last, done, services):
    """Writes steps and is killed."""
    os.environ |= OFFLINE
    os.environ.pop("WANDB_SERVICE", None)  # the tests' own, which would keep the run
    metrics = Metrics(Path(out), 9, "test", done=int(done), **json.loads(services))
    for step in range(int(first), int(last) + 1):
        metrics.write(numbers(step))
    os.kill(os.getpid(), signal.SIGKILL)


def write_and_die(out, first, last, done, **services):
    """Steps of a process that is killed, then half a line, as a kill may leave it."""
    launch(1, "test_metrics:steps_until_killed", [out, first, last, done, json.dumps(services)]).wait([-signal.SIGKILL])
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')


@pytest.fixture(params=["metrics.jsonl alone", pytest.param("all", marks=pytest.mark.slow)])
def services(request, monkeypatch):
    """Flags of Metrics: none, or both services, where their packages are there."""
    if request.param != "all":
        return {"tensorboard": False, "wandb": None}
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    return {"tensorboard": True, "wandb": "videozoomer"}


def test_all_have_the_same_numbers(tmp_path, services, capsys):
    metrics = Metrics(tmp_path, 5, "test", **services)
    for step in range(1, 6):
        metrics.write(numbers(step))
        assert lines(tmp_path)[-1] == numbers(step)  # at once
    metrics.close()
    assert lines(tmp_path) == [numbers(step) for step in range(1, 6)]
    check_services(tmp_path, **services)


def test_a_run_that_is_killed_twice_has_each_step_once(tmp_path, services):
    """Seven steps, killed, on from step 4 to 6, killed, on from step 5: no step is missing or stands twice. Offline, Weights &
    Biases has a folder of each of the three."""
    write_and_die(tmp_path, 1, 7, 0, **services)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    Metrics.cut(tmp_path, 4)
    assert before.startswith((tmp_path / "metrics.jsonl").read_bytes())
    assert [m["step"] for m in lines(tmp_path)] == [1, 2, 3, 4]
    write_and_die(tmp_path, 5, 6, 4, **services)
    Metrics.cut(tmp_path, 5)
    time.sleep(1)  # TensorBoard's files have the second in their names, and are read in that order
    metrics = Metrics(tmp_path, 9, "test", done=5, **services)
    for step in range(6, 10):
        metrics.write(numbers(step))
    metrics.close()
    assert lines(tmp_path) == [numbers(step) for step in range(1, 10)]
    check_services(tmp_path, **services, began_at=6)
    assert not services["wandb"] or len(wandb_folders(tmp_path)) == 3


def test_services_that_are_asked_for_later(tmp_path, services):
    """They have the steps from then on."""
    for done, flags in ((0, {}), (2, services)):
        metrics = Metrics(tmp_path, 4, "test", done=done, **flags)
        for step in (done + 1, done + 2):
            metrics.write(numbers(step))
        metrics.close()
    check_services(tmp_path, False, services["wandb"], began_at=3)
    assert not services["tensorboard"] or set(board(tmp_path)["loss"]) == {3, 4}


def test_a_new_run_in_the_same_folder_is_another_one(tmp_path, services):
    for number in range(2):
        time.sleep(number * services["tensorboard"])  # as above
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        metrics = Metrics(tmp_path, 3, "test", **services)
        for step in range(1, 4):
            metrics.write(numbers(step))
        metrics.close()
    if services["wandb"]:
        check_services(tmp_path, True, None)
        folders = wandb_folders(tmp_path)
        assert len({run_id for run_id, _ in folders}) == 2 and [len(steps) for _, steps in folders] == [3, 3]


def test_only_the_first_process_writes(tmp_path, services, capsys):
    metrics = Metrics(tmp_path, 3, "test", rank=1, **services)
    metrics.write(numbers(1))
    metrics.print("a line")
    metrics.close()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_a_missing_package_is_one_line(monkeypatch):
    for package in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
        with pytest.raises(UserError, match=f"^--{package} needs the package {package}: pip install {package}$"):
            check_installed(package == "tensorboard", "project" if package == "wandb" else None)
    check_installed(False, None)


def with_wandb(out, mode, project):
    """Begins to write to Weights & Biases, of which it knows nothing here."""
    os.environ |= {"WANDB_MODE": mode, "HOME": out, "NETRC": f"{out}/netrc"}
    for name in ("WANDB_API_KEY", "WANDB_SERVICE"):
        os.environ.pop(name, None)
    common.run_main(lambda: Metrics(Path(out), 3, "test", wandb=project))


@pytest.mark.slow
@pytest.mark.parametrize("mode, project, word", [("offline", "a/b", "a/b"), ("online", "videozoomer", "key")])
def test_what_wandb_refuses_is_one_line(tmp_path, mode, project, word):
    pytest.importorskip("wandb")
    said = launch(1, "test_metrics:with_wandb", [tmp_path, mode, project]).wait([2]).strip().splitlines()
    assert f"error: --wandb {project}: " in said[-1] and word in said[-1] and "Traceback" not in "".join(said), said


def test_cutting_keeps_whole_lines_only(tmp_path):
    whole = b'{"step": 1, "loss": 0.10000000000000001}\n{"step": 2, "loss": NaN}\n'
    for damage in (b"", b'{"step": 3, "loss"', b'{"step": 3}', b"\0" * 30, b'\n[1]\n{"no": 1}\n7\n'):
        (tmp_path / "metrics.jsonl").write_bytes(whole + damage)
        Metrics.cut(tmp_path, 3)
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole, damage
    Metrics.cut(tmp_path, 0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"" and len(list(tmp_path.iterdir())) == 1


def test_nothing_to_cut(tmp_path):
    Metrics.cut(tmp_path, 3)
    assert not list(tmp_path.iterdir())


def test_the_bar_goes_on_where_the_run_was(tmp_path, capsys):
    """It shows the steps of the whole run, the time left, and stays whole when something is printed."""
    metrics = Metrics(tmp_path, 10, "rl", done=4)
    metrics.write(numbers(5))
    metrics.print("two\nlines")
    assert metrics.bar.n == 5 and metrics.bar.total == 10
    metrics.close()
    said = capsys.readouterr()
    assert said.out == "two\nlines\n" and "5/10" in said.err and "loss=0.2000" in said.err


def test_what_is_not_finite_is_null(tmp_path):
    """metrics.jsonl is JSON in the strict sense."""
    log = Metrics(tmp_path, 2, "run")
    log.write({"step": 1, "loss": float("nan"), "mismatch_max": float("inf"), "lr": 1e-6})
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "loss": None, "mismatch_max": None, "lr": 1e-6}


def test_what_is_said_of_a_step():
    """One line, and what was not learned."""
    from rl import Config

    metrics = {"step": 2, "reward": 0.5, "groups": 1, "zooms": 0.0, "updates": 1}

    def said(**more):
        lines = []
        show_step(metrics | more, [], Config(steps=3), lines.append)
        return lines

    assert said()[0].startswith("step 2/3  reward 0.500") and len(said()) == 1
    assert "no group had a spread" in said(groups=0)[1]
    left_out = said(episodes_left_out=9)
    assert "9 episodes" in left_out[1] and "--max_mismatch" in left_out[1] and "nothing learned" not in left_out[1]
    assert "nothing learned" in said(episodes_left_out=9, updates=0)[1]


@pytest.mark.device
def test_what_a_fork_adds_up_is_reported_too():
    """Means over the tokens of all updates; the usual names are there, whether anything was added or not."""
    metrics = UpdateMetrics(DEVICE)
    metrics.add_pass({"loss": 2.0, "anchor": 1.0})
    metrics.add_pass({"loss": 4.0, "anchor": 2.0})
    metrics.end_update(tokens=4, norm=1.5)
    metrics.add_pass({"loss": 1.0})
    metrics.end_update(tokens=2, norm=float("nan"))
    means = metrics.means()
    assert means["loss"] == 7 / 6 and means["anchor"] == 0.5 and means["kl"] == 0
    assert (means["updates"], means["bad_steps"], means["trained_tokens"], means["grad_norm"]) == (2, 1, 6, 1.5)


def test_a_folder_that_was_taken_away_is_one_line(tmp_path):
    metrics = Metrics(tmp_path / "run", 2, "run")
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl: No such file"):
        metrics.write({"step": 1})
    metrics.close()
