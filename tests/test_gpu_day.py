"""bench/gpu_day.py: what it runs, in which order, and how it goes on. What only CUDA runs in bench/ is run
with stand-ins here, which shows that it runs, and no number."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import gpu_day  # noqa: E402
import on_device  # noqa: E402

SHORT = ["--shape", "tiny", "--device", "cpu", "--slower", "5", "--minutes", "60", "--all_minutes", "60"]


def make_day(folder, *flags):
    """(settings, parts, results) of a call with these flags."""
    args = gpu_day.parse(["--out", str(folder / "out"), "--work", str(folder / "work"), *flags])
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    return args, gpu_day.parts_of(args), gpu_day.Results(args.out / "results.jsonl")


def shell(folder, code):
    """Parts are commands of the shell here."""
    return gpu_day.Part("a part", 20, ["bash", "-c", code], cwd=folder)


def test_the_limits_of_the_true_parts_fit_into_a_call(tmp_path):
    args, parts, _ = make_day(tmp_path)
    assert all(part.limit_s <= args.minutes * 60 for part in parts)
    assert next(part for part in parts if part.name == "tests").limit_s == 120
    made = {part.makes for part in parts}
    assert all(part.needs in made for part in parts if part.needs)
    assert len({part.name for part in parts}) == len(parts)


def test_parts_that_are_chosen_come_with_what_they_need(tmp_path):
    _, parts, _ = make_day(tmp_path, "--parts", "demo: eval", "7B: rl")
    names = ["7B: random weights", "7B: rl offload_reference", "demo: sft", "demo: rl", "demo: eval"]
    assert [part.name for part in parts] == names


def test_the_order_of_parts(tmp_path):
    _, parts, results = make_day(tmp_path)
    a, b, c = (gpu_day.Part(name, limit, []) for name, limit in (("a", 1), ("b", 100), ("c", 1)))
    choose = lambda fits=lambda part: True: gpu_day.next_part([a, b, c], results, fits, set())
    assert choose() is a
    results.write(a, 1, began=0.0)
    assert choose() is a  # it was killed
    results.write(a, 1, ended="failed", seconds=1.0, reason="x")
    assert choose() is b  # what failed comes after what was not tried
    assert choose(lambda part: part.limit_s < 10) is c
    for part in (b, c):
        results.write(part, 1, began=0.0)
        results.write(part, 1, ended="done", seconds=1.0, reason="")
    assert choose() is a
    results.write(a, 2, began=0.0)
    results.write(a, 2, ended="failed", seconds=1.0, reason="x")
    assert choose() is None
    assert gpu_day.Results(results.file).lines == results.lines
    assert results.seconds() == 4.0


def test_what_is_needed_and_was_lost_is_made_again(tmp_path):
    _, _, results = make_day(tmp_path)
    maker = gpu_day.Part("maker", 1, [], makes=tmp_path / "model")
    user = gpu_day.Part("user", 1, [], needs=tmp_path / "model")
    choose = lambda fits=lambda part: True, refused=(): gpu_day.next_part(
        [maker, user], results, fits, refused
    )
    results.write(maker, 1, began=0.0)
    results.write(maker, 1, ended="done", seconds=1.0, reason="")
    assert choose() is maker
    assert choose(refused={"maker"}) is None
    assert choose(lambda part: part is user) is None
    maker.makes.touch()
    assert choose() is user


def test_a_part_that_succeeds_fails_or_takes_too_long(tmp_path):
    args, _, results = make_day(tmp_path)
    rows = [
        {"name": "decode, x", "ours": 1.5, "peer": 3.0, "ratio": 2.0, "goal": 0.5, "met": True},
        {"name": "other", "failed": "ValueError: no"},
    ]
    write = f"echo '{json.dumps(rows)}' > {args.out}/rows.json; "
    good = shell(tmp_path, write + "exit 1")  # one measurement of two failed
    bad, slow = shell(tmp_path, "echo one; echo two; exit 3"), shell(tmp_path, write + "sleep 60")
    bad.name, bad.rows = "bad", None
    slow.name, slow.limit_s = "slow", 1
    for part in (good, bad, slow):
        gpu_day.run_part(part, args, results)
    assert results.end(good)["ended"] == "done"
    assert results.end(bad)["ended"] == results.end(slow)["ended"] == "failed"
    assert results.end(bad)["reason"] == "ended with status 3\none\ntwo"
    assert results.end(slow)["reason"].startswith("took longer than 1 s")
    assert [row["name"] for row in results.rows(slow)] == ["decode, x", "other"]  # what it had measured
    text = gpu_day.table(args, [good, bad, slow], results, "A card")
    assert text.startswith("**A card**, shape true: 1 of 3 parts")
    assert "| a part | decode, x | 1.5 s | 3 s | 2 | 0.5 | yes |" in text
    assert "- a part: other: ValueError: no" in text
    assert "- bad (1 tries): ended with status 3" in text


def test_no_part_begins_that_could_end_after_the_time(tmp_path):
    args, _, results = make_day(tmp_path, "--minutes", "1", "--all_minutes", "2")
    parts = [shell(tmp_path, "true") for _ in range(3)]
    for number, (part, limit_s) in enumerate(zip(parts, (50, 70, 5))):
        part.name, part.limit_s, part.rows = f"part {number}", limit_s, None
    gpu_day.run_parts(args, parts, results, "A card", time.monotonic())
    assert [results.done(part) for part in parts] == [True, False, True]
    # of all calls together
    used = gpu_day.Part("before", 1, [])
    results.write(used, 1, ended="done", seconds=100.0, reason="")
    parts[1].limit_s = 30
    gpu_day.run_parts(args, parts, results, "A card", time.monotonic())
    assert not results.done(parts[1])


def test_what_pytest_says_is_read():
    said = """tests/test_a.py::test_one PASSED                          [ 50%]
tests/test_a.py::test_two[x y] FAILED                    [100%]
[gw1] [ 66%] PASSED tests/test_b.py::test_three
[gw0] [ 66%] SKIPPED tests/test_b.py::test_four
[gw0] [ 70%] PASSED tests/test_b.py::test_five
[gw0] [ 71%] ERROR tests/test_b.py::test_five
FAILED tests/test_a.py::test_two[x y] - AssertionError: PASSED
"""
    first, *bad = gpu_day.tests_of(said)
    assert first["name"] == "tests that passed, of 5 (skipped: 1)"
    assert (first["ours"], first["met"]) == (2, False)
    assert [row["name"] for row in bad] == ["tests/test_a.py::test_two[x y]", "tests/test_b.py::test_five"]


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch, capsys):
    args, _, _ = make_day(tmp_path)
    monkeypatch.setattr(gpu_day, "NEEDED", ["torch", "no_such_package"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    with pytest.raises(SystemExit) as ended:
        gpu_day.prepare_packages(args)
    assert ended.value.code == 2
    assert "no_such_package missing" in capsys.readouterr().err
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(args.work / "site"), "before"]


# ------------------------------------------------------------------------------------ what only CUDA executes
def test_what_is_asked_of_cuda(monkeypatch):
    asked = []

    def record(name, answer=None):
        monkeypatch.setattr(torch.cuda, name, lambda *args: asked.append(name) or answer)

    for name, answer in {
        "current_device": 0,
        "get_device_name": "A card",
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 5,
        "empty_cache": None,
    }.items():
        record(name, answer)
    device = on_device.device_of("cuda")
    assert device == torch.device("cuda", 0)
    assert on_device.card(device) == "A card"
    on_device.synchronize(device)
    on_device.reset_peak(device)
    assert on_device.peak_bytes(device) == 5
    on_device.free_unused(device)
    assert asked == [
        "current_device",
        "get_device_name",
        "synchronize",
        "reset_peak_memory_stats",
        "max_memory_allocated",
        "empty_cache",
    ]
    # kernels: their time on the device counts
    events = [
        SimpleNamespace(key=name, self_device_time_total=us, count=2) for name, us in (("a", 10), ("b", 30))
    ]

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        __enter__ = lambda self: self
        __exit__ = lambda self, *error: None
        key_averages = lambda self: events

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    largest, total = on_device.largest_kernels(lambda: asked.append("task"), device, 1)
    assert largest == [("b", 30e-6, 2)] and total == pytest.approx(40e-6)
    assert asked[-3:] == ["synchronize", "task", "synchronize"]


def test_the_peak_on_a_cpu():
    device = torch.device("cpu")
    on_device.reset_peak(device)
    before = on_device.peak_bytes(device)
    torch.ones(2**24)
    assert on_device.peak_bytes(device) - before > 0.8 * 2**26


@pytest.mark.slow
def test_forms_of_attention_that_only_cuda_runs(monkeypatch):
    """With stand-ins for the products and the kernel that a CPU does not have."""
    import bench_attention
    from torch.nn.attention import varlen

    def varlen_attn(query, key, value, begins_q, begins_k, most_q, most_k, return_aux):
        assert return_aux.lse
        outs, sums = [], []
        for i in range(len(begins_q) - 1):
            q = query[begins_q[i] : begins_q[i + 1]].transpose(0, 1)  # (heads, T, D)
            k, v = (x[begins_k[i] : begins_k[i + 1]].transpose(0, 1) for x in (key, value))
            assert q.shape[1] <= most_q and k.shape[1] <= most_k
            scores = q @ k.transpose(1, 2) * q.shape[2] ** -0.5
            outs.append((scores.softmax(-1) @ v).transpose(0, 1))
            sums.append(scores.logsumexp(-1))
        return torch.cat(outs), torch.cat(sums, dim=1)

    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b, out_dtype: product(a, b).to(out_dtype))
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    torch.manual_seed(0)
    layer = bench_attention.Layer("tiny", torch.device("cpu"), torch.float32)
    exact = layer.exact()
    for name in ("two parts, plain", "bmm, plain", "varlen_attn"):
        difference = (bench_attention.FORMS[name](layer)().double() - exact).abs().max()
        assert difference < 1e-5, name
    # a form captured as a graph: the stand-in replays by calling it
    captured = []

    def capture(form, generator, pool):
        captured.append(form)
        return form, form(), None

    monkeypatch.setattr(bench_attention, "has_graphs", lambda device: True)
    monkeypatch.setattr(bench_attention, "capture_graph", capture)
    rows, how = [], SimpleNamespace(shape="tiny", repeat=1, trials=1)
    bench_attention.measure("two parts, plain", layer, exact, 1.0, how, rows)
    assert len(captured) == len(rows) == 1


# ----------------------------------------------------------------------------------------------- whole calls
def call(folder, *flags):
    command = [
        "bash",
        str(ROOT / "bench/gpu_day.sh"),
        *SHORT,
        "--out",
        str(folder / "out"),
        "--work",
        str(folder / "work"),
        *flags,
    ]
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(folder / "copies")}
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def processes_of(folder):
    """Ids of processes whose command names the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in command:
            found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_a_day_that_is_killed_goes_on(tmp_path):
    parts = "--parts", "3B: random weights", "3B: sft full", "demo: data"
    lines = lambda: [json.loads(line) for line in open(tmp_path / "out/results.jsonl")]
    first = call(tmp_path, *parts)
    results = tmp_path / "out/results.jsonl"
    deadline = time.monotonic() + 300
    while not (
        results.exists() and any("began" in line and line["part"] == "3B: sft full" for line in lines())
    ):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(1)  # the part is at work
    second = call(tmp_path, *parts)  # refused while the first one lives
    assert "another call works in" in second.communicate()[0] and second.returncode == 2
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    for _ in range(150):  # its part ends with it
        if not processes_of(tmp_path):
            break
        time.sleep(0.1)
    assert not processes_of(tmp_path)
    # the same line goes on
    said = call(tmp_path, *parts)
    text, _ = said.communicate(timeout=300)
    assert said.returncode == 0, text
    ended = [(line["part"], line["ended"], line["try"]) for line in lines() if "ended" in line]
    assert ended == [
        ("3B: random weights", "done", 1),
        ("3B: sft full", "done", 2),
        ("demo: data", "done", 1),
    ]
    assert "3 of 3 parts" in text and "sft full, all layers: GB at update, against the plan" in text
    assert sorted(file.name for file in (tmp_path / "copies").iterdir()) == [
        "log.txt",
        "results.jsonl",
        "table.md",
    ]
    # nothing is left to do
    before = lines()
    again = call(tmp_path, *parts)
    text, _ = again.communicate(timeout=100)
    assert again.returncode == 0 and "all parts have run" in text and lines() == before
