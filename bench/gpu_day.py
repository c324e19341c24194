"""The first day on a GPU: the tests there, then true sizes against the plan and the card's limits, then the
demo.

    bash bench/gpu_day.sh --wheels DIR --tokenizer DIR   one GPU of 80 GB; the same line again goes on
    bash bench/gpu_day.sh --shape tiny --device cpu      all parts at tiny size: a rehearsal
    bash bench/gpu_day.sh --list                         the parts, and how long each may take

A part is a command of this repository in a process of its own, with a limit of time. Parts run in the order
of what they tell. None is started that could end after --minutes; the same line again goes on with the parts
that are left: what is finished is not repeated, what failed or was killed is tried once more, after what was
not tried. All calls together take at most --all_minutes.

Writes to --out: results.jsonl (a line for each result, once its part has ended), table.md (made anew each
time), logs/ (what the parts said). --copy (by default the folder that the variable OUT names) gets the first
two and log.txt, the ends of all logs, as they come. Checkpoints are in --work: 8 GB of 3B, 17 of 7B, which
may be deleted.

Nothing is installed from a network: packages that are missing come from --wheels, into --work.
"""

import argparse
import ctypes
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRIES = 2  # of a part
CARRIED_MB = 60  # of the repository, the wheels and the tokenizer, at most
NEEDED = ["torch", "torchvision", "transformers", "numpy", "tqdm", "av"]  # by all parts
FOR_TESTS = ["pytest"]
WELCOME = ["xdist"]  # without it tests run one after the other
TO_INSTALL = {"xdist": "pytest-xdist"}
SECONDS = ("decode,", "prefill,", "update,", "rollout,", "attention of")  # how rows of seconds begin


# ------------------------------------------------------------------------------------------------- the parts
@dataclass
class Part:
    """A command. limit_s: seconds after which it is ended. makes, needs: a file that the part makes, or that
    has to be there: the part that makes it runs before, once more where it was lost. rows: "json", "tests" or
    "eval": where its results are found."""

    name: str
    limit_s: int
    command: list
    rows: str | None = "json"
    cwd: Path = ROOT
    makes: Path | None = None
    needs: Path | None = None
    interrupt: bool = False  # ended as by Ctrl-C: pytest shows what failed


def parts_of(args):
    """All parts, in the order of what they tell."""
    tiny, parts = args.shape == "tiny", []

    def add(name, limit_s, script, flags, *more, **how):
        command = [sys.executable, script, "--device", args.device, *flags.split(), *more]
        parts.append(Part(name, limit_s, command, **how))

    # 1. the tests
    parallel = f"-n {2 if tiny else 6}" if importlib.util.find_spec("xdist") else ""
    files = "tests/test_model.py" if tiny else "tests"
    flags = f"-v -p no:cacheprovider {parallel} {files}"
    add("tests", 120, "-mpytest", flags, rows="tests", interrupt=True)

    # 2. to 5. true sizes
    def limits(size, limit_s, what, trials=3):
        flags = f"--shape {'tiny' if tiny else size} --trials {1 if tiny else trials} --profile --only {what}"
        add(f"{size}: {what} against the limits", limit_s, "bench/bench_gpu.py", flags)

    def steps(size, config, *limit_and_what):
        folder = args.work / f"model-{size}"
        config = "demo/tiny_base" if tiny else config
        flags = f"--config {config} --episodes {'few' if tiny else 'true'}"
        paths = ["--tokenizer", args.tokenizer or "demo/tiny_base", "--folder", str(args.work)]
        paths += ["--model", str(folder)]
        script, made = "bench/bench_true_size.py", folder / "model.safetensors.index.json"
        if not any(part.makes == made for part in parts):
            name = f"{size}: random weights"
            add(name, 100, script, f"{flags} --make", *paths, rows=None, makes=made)
        for limit_s, stage, how in limit_and_what:
            more = f"{flags} --no_save --stages {stage} --how {how}"
            add(f"{size}: {stage} {how}", limit_s, script, more, *paths, needs=made)

    config = "tests/configs/qwen2.5-vl-3b"
    limits("3B", 150, "check decode prefill")
    steps("3B", config, (100, "sft", "full"), (150, "rl", "full"))
    steps("3B", config, (120, "rl", "lora"), (120, "rl", "offload"))
    limits("3B", 80, "update")
    flags = f"--shape {'tiny --trials 1' if tiny else '3B'}"
    add("3B: attention in other forms", 100, "bench/bench_attention.py", flags)
    limits("3B", 150, "rollout", trials=1)
    steps("3B", config, (80, "sft", "lora"), (100, "sft", "offload"))
    limits("7B", 150, "check decode prefill")
    limits("7B", 150, "rollout", trials=1)
    steps("7B", "tests/configs/qwen2.5-vl-7b", (200, "rl", "offload_reference"))

    # 6. the demo: a run's last file says that it is finished
    demo = args.work / "demo"
    sft_flags = rl_flags = eval_flags = ""
    data = None
    if tiny:
        data = demo / "runs/small/test.jsonl"
        command = [sys.executable, str(ROOT / "data_prep.py"), "synthetic"]
        command += "--out runs/small --train 10 --test 10".split()
        parts.append(Part("demo: data", 60, command, rows=None, cwd=demo, makes=data))
        sft_flags, eval_flags = "--data runs/small/sft.jsonl", "--data runs/small/test.jsonl"
        rl_flags = "--data runs/small/train.jsonl --steps 1 --batch_size 2 --mini_batch_size 1 --group_size 2"
    script = lambda name: str(ROOT / f"{name}.py")
    sft, rl = demo / "runs/sft/skipped.jsonl", demo / "runs/rl/skipped.jsonl"
    add("demo: sft", 120, script("sft"), sft_flags, rows=None, cwd=demo, makes=sft, needs=data)
    add("demo: rl", 300, script("rl"), rl_flags, rows=None, cwd=demo, makes=rl, needs=sft)
    add("demo: eval", 90, script("eval"), eval_flags, rows="eval", cwd=demo, needs=rl)
    for part in parts:
        part.limit_s = round(part.limit_s * args.slower)
    return chosen(parts, args.parts) if args.parts else parts


def chosen(parts, names):
    """Those whose names begin so, and those that make what they need."""
    taken, needed = set(), set()
    for part in reversed(parts):  # what makes something comes before what needs it
        if any(part.name.startswith(name) for name in names) or part.makes in needed:
            taken.add(part.name)
            needed |= {part.needs} - {None}
    return [part for part in parts if part.name in taken]


def fail(message):
    """One line, status 2."""
    print(f"gpu_day: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------- the packages
def missing(names):
    importlib.invalidate_caches()
    return [name for name in names if importlib.util.find_spec(name) is None]


def prepare_packages(args):
    """Says what is there and what is missing, and installs from --wheels. Ends with status 2 where something
    that is needed is not there then."""
    site = args.work / "site"
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    lacking = missing([*NEEDED, *FOR_TESTS, *WELCOME])
    if lacking and args.wheels:
        for name in lacking:
            package = TO_INSTALL.get(name, name)
            command = [sys.executable, "-m", "pip", "install", "--find-links", str(args.wheels)]
            command += "-q --no-index --no-deps --no-compile --disable-pip-version-check --target".split()
            command += [str(site), package]
            print(f"installing {package} from {args.wheels}", flush=True)
            subprocess.run(command)
        lacking = missing([*NEEDED, *FOR_TESTS, *WELCOME])
    versions = [f"{name} {importlib.metadata.version(name)}" for name in NEEDED if name not in lacking]
    print(f"needed: {' '.join(NEEDED)}, for the tests {' '.join(FOR_TESTS)}; better with pytest-xdist")
    print(f"there: {', '.join(versions)}; missing: {' '.join(lacking) or 'nothing'}")
    if needed := [name for name in lacking if name not in WELCOME]:
        fail(f"{', '.join(needed)} missing; put wheels into a folder and name it with --wheels")


def carried_mb(args):
    """MB of the repository without runs/, of the wheels and of the tokenizer."""

    def size(folder):
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())

    apart = {ROOT / name for name in ("runs", ".git", ".venv", "venv")}
    apart |= {Path(folder).resolve() for folder in (args.wheels, args.tokenizer) if folder}
    here = sum(
        size(path) if path.is_dir() else path.stat().st_size for path in ROOT.iterdir() if path not in apart
    )
    return (here + sum(size(folder) for folder in (args.wheels, args.tokenizer) if folder)) / 1e6


def name_of_card(device):
    """Of the card, asked in a process of its own. Ends with status 2 where there is none."""
    ask = (
        "import sys; sys.path.insert(0, 'bench'); import torch; from on_device import card, device_of; "
        f"print(card(device_of({device!r})) + ', torch ' + torch.__version__)"
    )
    run = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        fail(f"--device {device}: {last_lines(run.stderr, 1)}; a rehearsal is --shape tiny --device cpu")
    return run.stdout.strip().splitlines()[-1]


# ----------------------------------------------------------------------------------------------- the results
@dataclass
class Results:
    """Lines of results.jsonl: {"part", "try", "name", ...} is a result, {"part", "try", "began"} and {"part",
    "try", "ended", "seconds", "reason"} are a part's begin and end."""

    file: Path
    lines: list = field(default_factory=list)

    def __post_init__(self):
        if self.file.exists():
            for line in self.file.read_text().splitlines():
                try:
                    self.lines.append(json.loads(line))
                except ValueError:  # the last one, of a call that was killed
                    continue
            if not self.file.read_text().endswith("\n"):
                with open(self.file, "a") as file:
                    file.write("\n")

    def write(self, part, attempt, **what):
        line = {"part": part.name, "try": attempt, **what}
        self.lines.append(line)
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def of(self, part):
        return [line for line in self.lines if line["part"] == part.name]

    def done(self, part):
        return any(line.get("ended") == "done" for line in self.of(part))

    def tries(self, part):
        return sum("began" in line for line in self.of(part))

    def end(self, part):
        """The last end of a part, or None."""
        return next((line for line in reversed(self.of(part)) if "ended" in line), None)

    def rows(self, part):
        """The results of its last try that has any."""
        rows = [line for line in self.of(part) if "name" in line]
        return [row for row in rows if row["try"] == rows[-1]["try"]]

    def seconds(self):
        return sum(line.get("seconds", 0) for line in self.lines if "ended" in line)


def read_rows(part, args, log):
    """A part's results, as far as they are there."""
    try:
        if part.rows == "json":
            return json.loads((args.out / "rows.json").read_text())
        if part.rows == "tests":
            return tests_of(log.read_text(errors="replace"))
        if part.rows == "eval":
            rows = json.loads((part.cwd / "runs/eval/results.json").read_text())
            return [
                {"name": f"accuracy of {Path(row['policy']).name}, {row['mode']}", "ours": row["accuracy"]}
                for row in rows
                if row.get("accuracy") is not None
            ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        print(f"{part.name}: no results ({type(error).__name__}: {error})")
    return []


def tests_of(said):
    """Rows of what `pytest -v` says: how many passed, and each one that did not."""
    either = r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL)"
    found = {}
    for line in said.splitlines():
        match = re.search(rf"{either} (tests/\S+::.*)$", line)
        if match := match or re.match(rf"(tests/\S+::.*?) {either}", line):
            a, b = match.groups()
            name, outcome = (b, a) if a.isupper() else (a, b)
            name = re.sub(r" - .*| +\[ *\d+%\]$", "", name)
            if found.get(name) not in ("FAILED", "ERROR"):  # of a test and its end the worse one
                found[name] = outcome
    bad = [name for name, outcome in found.items() if outcome in ("FAILED", "ERROR")]
    passed, skipped = (sum(o == outcome for o in found.values()) for outcome in ("PASSED", "SKIPPED"))
    name = f"tests that passed, of {len(found)} (skipped: {skipped})"
    all_of_them = {"name": name, "ours": passed, "goal": "none fails", "met": not bad}
    return [all_of_them] + [{"name": name, "failed": "the test failed, see its log"} for name in bad]


def last_lines(text, number):
    """The last lines that say something."""
    lines = [line.rstrip()[:300] for line in re.split(r"[\r\n]+", text) if line.strip()]
    return "\n".join(lines[-number:])


# ------------------------------------------------------------------------------------------------- the table
def table(args, parts, results, card):
    """Markdown of all results so far."""
    done = sum(results.done(part) for part in parts)
    lines = [
        f"**{card}**, shape {args.shape}: {done} of {len(parts)} parts, {results.seconds() / 60:.1f} minutes",
        "",
        "| part | what | measured | against | ratio | goal | met |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    took, kernels, failed = [], [], []
    for part in parts:
        for row in results.rows(part):
            if "failed" in row:
                failed.append(f"- {part.name}: {row['name']}: {row['failed']}")
            elif "kernel" in row:
                kernels.append(
                    f"| {row['name']} | `{row['kernel'][:90].replace('|', '/')}` | {row['calls']} "
                    f"| {row['seconds'] * 1e3:.3f} | {row['share']:.0%} |"
                )
            else:
                unit = " s" if row["name"].startswith(SECONDS) else ""
                cells = [number(row.get(key)) for key in ("ours", "peer")]
                cells = [cell and cell + unit for cell in cells]
                met = {None: "", True: "yes", False: "NO"}[row.get("met")]
                goal = "" if row.get("goal") is None else row["goal"]
                lines.append(
                    f"| {part.name} | {row['name']} | {cells[0]} | {cells[1]} | {number(row.get('ratio'))} "
                    f"| {goal} | {met} |"
                )
        if end := results.end(part):
            took.append(f"{part.name} {end['seconds']:.0f}")
            if end["ended"] != "done":
                failed.append(
                    f"- {part.name} ({results.tries(part)} tries): {end['reason'].splitlines()[0]}\n"
                )
                failed += [f"      {line}" for line in end["reason"].splitlines()[1:]] + [""]
        elif results.tries(part) >= TRIES:
            failed.append(f"- {part.name}: this script was ended within it, {results.tries(part)} times")
    if took:
        lines += ["", f"Seconds of the parts: {'; '.join(took)}."]
    if kernels:
        lines += [
            "",
            "| the largest kernels of | kernel | calls | ms | share |",
            "| --- | --- | --- | --- | --- |",
            *kernels,
        ]
    if failed:
        lines += ["", "What failed:", "", *failed]
    if left := [part.name for part in parts if not results.done(part) and results.tries(part) < TRIES]:
        lines += ["", f"Not done yet: {'; '.join(left)}."]
    return "\n".join(lines) + "\n"


def number(value):
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def show(args, parts, results, card, say=False):
    """Writes table.md, and what --copy gets."""
    text = table(args, parts, results, card)
    (args.out / "table.md").write_text(text)
    if args.copy:
        args.copy.mkdir(parents=True, exist_ok=True)
        for file in (results.file, args.out / "table.md"):
            if file.exists() and file.parent.resolve() != args.copy.resolve():
                shutil.copy(file, args.copy)
        ends = [
            f"==== {log.stem}\n{last_lines(log.read_text(errors='replace'), 60)}\n"
            for log in sorted((args.out / "logs").glob("*.log"), key=lambda log: log.stat().st_mtime)
        ]
        (args.copy / "log.txt").write_text("\n".join(ends))
    if say:
        print(f"\n{text}")


# --------------------------------------------------------------------------------------------------- running
def end_with_parent():
    """In a child: it is ended when this process is, whatever ends that."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def run_part(part, args, results):
    """Runs a part and writes its results."""
    attempt = results.tries(part) + 1
    log = args.out / "logs" / (re.sub(r"\W+", "_", part.name) + ".log")
    rows_file = args.out / "rows.json"
    rows_file.unlink(missing_ok=True)
    part.cwd.mkdir(parents=True, exist_ok=True)
    command = part.command + (["--json", str(rows_file)] if part.rows == "json" else [])
    bounded = ["timeout", "-s", "INT" if part.interrupt else "TERM", "-k", "10", str(part.limit_s), *command]
    print(f"{time.strftime('%H:%M:%S')} {part.name} (at most {part.limit_s} s)", flush=True)
    results.write(part, attempt, began=time.time())
    began = time.monotonic()
    with open(log, "w") as file:
        child = subprocess.Popen(
            bounded,
            cwd=part.cwd,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent,
        )
        try:
            status = child.wait()
        except BaseException:  # a signal: the part is ended, too, and is tried again
            child.terminate()
            child.wait()
            raise
    seconds = time.monotonic() - began
    for row in read_rows(part, args, log):
        results.write(part, attempt, **row)
    # of tests that fail, and of measurements that fail beside others, the rows say so
    rows = results.rows(part)
    whole = (
        status == 0
        or part.rows == "tests"
        and status == 1
        or part.rows == "json"
        and any("ours" in row and row["try"] == attempt for row in rows)
        and status == 1
    )
    if whole and part.makes and not part.makes.exists():
        whole, status = False, f"0, but {part.makes} is not there"
    reason = ""
    if not whole:
        what = f"ended with status {status}"
        if status in (124, 137):
            what = f"took longer than {part.limit_s} s, or was killed"
        reason = f"{what}\n{last_lines(log.read_text(errors='replace'), 8)}"
    results.write(
        part, attempt, ended="done" if whole else "failed", seconds=round(seconds, 1), reason=reason
    )
    print(f"{'':9}{'done' if whole else 'FAILED: ' + reason.splitlines()[0]}, {seconds:.0f} s", flush=True)


def next_part(parts, results, fits, refused):
    """The part to run now, or None: the first that was not tried, then the first that failed; a part that
    makes what another one needs comes before that, again where it was lost."""
    left = [part for part in parts if not results.done(part) and results.tries(part) < TRIES]
    left.sort(key=lambda part: results.end(part) is not None)  # a stable sort
    for part in left:
        if part.needs and not part.needs.exists():
            maker = next((p for p in parts if p.makes == part.needs), None)
            if maker is None or maker.name in refused or results.tries(maker) >= TRIES + results.done(maker):
                continue
            if fits(maker):
                return maker
            continue
        if fits(part):
            return part
    return None


def run_parts(args, parts, results, card, began):
    deadline = began + args.minutes * 60
    before_s = results.seconds()

    def fits(part):
        now = time.monotonic()
        return (
            now + part.limit_s <= deadline and before_s + now - began + part.limit_s <= args.all_minutes * 60
        )

    refused = set()
    while part := next_part(parts, results, fits, refused):
        run_part(part, args, results)
        if results.end(part)["ended"] != "done" or part.makes and not part.makes.exists():
            refused.add(part.name)
        show(args, parts, results, card)


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["true", "tiny"], default="true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9, help="of this call, at most")
    parser.add_argument("--all_minutes", type=float, default=14, help="of all calls, at most")
    parser.add_argument(
        "--slower", type=float, default=1, help="the parts' limits times this, on a busy machine"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu_day", help="folder of the results")
    parser.add_argument(
        "--copy",
        type=Path,
        default=os.environ.get("OUT") or None,
        help="folder for copies of the results, by default the variable OUT's",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "gpu_day",
        help="folder for checkpoints and packages, on a local disk",
    )
    parser.add_argument("--wheels", type=Path, help="folder with wheels of what is missing")
    parser.add_argument("--tokenizer", type=Path, help="folder with Qwen2.5-VL's tokenizer; else the demo's")
    parser.add_argument("--parts", nargs="+", help="only parts whose names begin so")
    parser.add_argument("--list", action="store_true", help="only list the parts")
    parser.add_argument("--table", action="store_true", help="only print the table of what there is so far")
    args = parser.parse_args(argv)
    for name in ("out", "work", "wheels", "tokenizer", "copy"):
        if getattr(args, name):
            setattr(args, name, Path(getattr(args, name)).resolve())
    for name in ("wheels", "tokenizer"):
        if getattr(args, name) and not getattr(args, name).is_dir():
            parser.error(f"--{name} {getattr(args, name)} is no folder")
    if args.tokenizer:
        args.tokenizer = str(args.tokenizer)
    return args


def main():
    args, began = parse(), time.monotonic()
    if args.list:
        for part in parts_of(args):
            print(f"{part.limit_s:5} s  {part.name}")
        return
    for number_of_signal in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number_of_signal, lambda got, frame: sys.exit(128 + got))
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    lock = open(args.out / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fail(f"another call works in {args.out}")
    results, noted = Results(args.out / "results.jsonl"), args.out / "card"
    if args.table:
        card = noted.read_text() if noted.exists() else "no card yet"
        show(args, parts_of(args), results, card, say=True)
        return
    # where the work is: packages, compiled code, checkpoints
    args.work.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(args.work / "inductor"),
    }
    prepare_packages(args)
    if (mb := carried_mb(args)) > CARRIED_MB:
        print(f"warning: repository, wheels and tokenizer are {mb:.0f} MB, above {CARRIED_MB}")
    else:
        print(f"repository, wheels and tokenizer are {mb:.0f} MB, of at most {CARRIED_MB}")
    card = name_of_card(args.device)
    noted.write_text(card)
    parts = parts_of(args)
    print(f"{card}: {len(parts)} parts, results in {args.out}", flush=True)
    try:
        run_parts(args, parts, results, card, began)
    finally:
        show(args, parts, results, card, say=True)
    left = [part for part in parts if not results.done(part) and results.tries(part) < TRIES]
    print(f"{len(left)} parts are left; the same line goes on" if left else "all parts have run")


if __name__ == "__main__":
    main()
