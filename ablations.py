"""The paper's findings, the controls that it lacks, what of GRPO matters: a table of command lines.

    python ablations.py [paper|controls|grpo|NAME ...] [--seeds 0 1 2] [--suite demo|search] [--quick]
    python ablations.py --report      runs nothing; one HTML file of what is there (report.py)

A row of ROWS says in which flags of sft.py, rl.py and eval.py it differs from the row `full`, which is always
run. To try an idea, add a row. A row is a chain of stages (findings/stage.py); those of the same flags and
inputs are made once: one cold start serves many rows. A finished stage is not run again while its inputs are
the same, a stopped one goes on by the same command. Code is not among the inputs: after a change of the method
remove the folder of the first stage that it concerns, what hangs on it follows. Writes each row's
<runs>/<suite>/<seed>/rows/<row>/result.json, with its folders as `stages`, and tables (findings/compare.py) of
these rows and of those that were made before (docs/ablations.jsonl, findings/kept.py).
"""

import argparse
import hashlib
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import eval as evaluation
import report
import rl
import sft
from common import UserError, fail, open_folder, run_main, write_json
from controls.modes import CLIPS
from demo.tiny_base import TINY_BASE
from findings import compare, kept, plots
from findings.stage import Stage, show_plan
from stopping import ENDING
from training.run_folder import fingerprint, own_folder


class Row(NamedTuple):
    name: str
    group: str
    shows: str  # what it is for
    sft: str | None = ""  # flags; None: the stage is left out
    rl: str | None = ""
    rft: str | None = None  # rejection fine-tuning: sft.py on the policy's own successes
    eval: str = ""
    mode: str = "zoom"  # the line of eval.py's results that is reported
    of: str | None = None  # the row whose policy is evaluated, in place of one of its own


DIRECT = "--kinds direct --protocol direct --epochs {epochs}"  # the cold start without the tool
# {frames}: frames a question of the row `full`, rounded; {twice}: twice as many; {fps}: of the suite;
# {epochs}: so many that fewer trajectories give as many updates
ROWS = [
    Row("full", "paper", "the whole method (table 3)"),
    Row("no-rl", "paper", "the cold start alone (table 3)", rl=None),
    Row("no-bonus", "paper", "RL without the tool bonus (table 3, figure 6)", rl="--tool_weight 0"),
    Row("no-cold-start", "paper", "from a base that never saw a call (table 3)", sft=None, rl="--steps 8"),
    Row("no-reflection", "paper", "no rows that look again, so fewer updates in SFT (table 3, figure 6)",
        sft="--kinds exemplar direct"),
    *[Row(f"zooms-{n}", "paper", "table 11", of="full", eval=f"--max_zooms {n}") for n in range(4)],
    *[Row(f"{name}overview-{n}", "paper", "figure 5", of=of, eval=f"--num_frames {n}")
      for name, of in (("", "full"), ("no-rl-", "no-rl")) for n in (5, 17, 33)],
    *[Row(f"uniform-{n}", "paper", "the base, without the tool (figure 5)", sft=None, rl=None,
          eval=f"--mode uniform --protocol direct --num_frames {n}", mode="uniform") for n in (9, 17, 33)],

    *[Row(name, "controls", f"SFT and RL without the tool, {shows} frames as full looks at", sft=DIRECT,
          rl=f"--num_frames {number}", eval=f"--num_frames {number}") for name, shows, number in (
        ("no-tool", "as many uniform", "{frames}"), ("no-tool-twice", "twice as many", "{twice}"))],
    Row("fixed-fps", "controls", "one frame rate in all zooms (search needs two)", rl="--zoom_fps {fps}"),
    Row("no-rl-fps", "controls", "... without RL", of="no-rl", eval="--zoom_fps {fps}"),
    Row("mixed", "controls", "overview drawn for each question in RL", rl="--num_frames 5 9 17"),
    *[Row(f"mixed-{n}", "controls", "... at another one", of="mixed", eval=f"--num_frames {n}") for n in (5, 17)],
    Row("reward-halves", "controls", "reward 0.5 / 0.5 / 0.5", rl="--accuracy_weight 0.5 --format_weight 0.5"),
    Row("reward-right", "controls", "1 / 0 / 0", rl="--accuracy_weight 1 --format_weight 0 --tool_weight 0"),
    Row("reward-hit", "controls", "a reward for zooms that hit", rl="--hit_weight 0.5"),
    Row("rft", "controls", "fine-tuning on successes in place of RL", rl=None, rft=""),
    Row("rl-rft", "controls", "... after RL", rft=""),
    *[Row(f"clips-{how}", "controls", "what the clip is for", of="full", eval=f"--clips {how}",
          mode=CLIPS[how]) for how in ("grey", "other", "none")],
    *[Row(name, "controls", shows, of="full", eval=flags, mode=mode) for name, shows, flags, mode in (
        ("zoom-always", "no answer without a zoom", "--zoom always", "always zoom"),
        ("zoom-gate", "zooms where 5 direct answers disagree too much", "--zoom gate --votes 5", "gate x5"),
        ("votes-8", "majority of 8 samples", "--votes 8", "zoom x8"))],

    Row("dr-grpo", "grpo", "advantage r - mean", rl="--advantage dr_grpo"),
    Row("rloo", "grpo", "r - mean of the others, one update a step",
        rl="--advantage rloo --mini_batch_size 16"),
    Row("gspo", "grpo", "a sequence's ratio, clipped as published", rl="--ratio sequence --loss_mean episode "
        "--clip_low 0.0003 --clip_high 0.0004"),
    Row("no-clip-higher", "grpo", "clip 0.2 / 0.2", rl="--clip_high 0.2"),
    Row("no-dynamic-sampling", "grpo", "groups without spread stay", rl="--no-dynamic_sampling"),
    Row("no-kl", "grpo", "the reward alone", rl="--kl_weight 0"),
    Row("on-policy", "grpo", "one update a step, so half as many", rl="--mini_batch_size 16")]
BY_NAME, FULL = {row.name: row for row in ROWS}, ROWS[0]

# flags that all rows of a suite have, by stage, and its {fps}; --quick adds those of QUICK
SEARCH = {"fps": 0.2, "data": "--suite search", "rl": "--max_response_tokens 2500 --steps 36"}
SUITES = {"demo": {"fps": 1}, "search": SEARCH}
QUICK = {"data": "--train 200 --test 40", "eval": "--max_turn_tokens 80",
         "rl": "--steps 2 --batch_size 4 --mini_batch_size 2 --group_size 4 --max_draws 1"}


# ------------------------------------------------------------------------------------------------- the stages
class Place(NamedTuple):
    """Where the rows of one suite and seed are made."""

    suite: str  # with -quick behind it
    seed: int
    folder: Path

    def flags(self, kind, own=""):
        """The words of a stage's flags, its row's own last: these win."""
        quick = QUICK.get(kind, "") if self.suite.endswith("-quick") else ""
        return f"{SUITES[self.suite.removesuffix('-quick')].get(kind, '')} {quick} {own}".split()


def chain(row, place):
    """The Stages that lead to a row's numbers, the first one first. The data has to be there."""
    stages, policy = [], row if row.of is None else BY_NAME[row.of]

    def add(kind, script, flags, inputs, out=""):
        """Adds a stage. inputs: {flag: (path, its key)}. Returns (path, key) of what it writes."""
        words = place.flags(kind, fill(flags, place)) + ["--seed", str(place.seed)]
        files = [fingerprint(word) for word in words if Path(word).is_file()]
        text = json.dumps([kind, place.seed, words, files, [key for _, key in inputs.values()]])
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        folder = place.folder / "stages" / f"{kind}-{key}"
        named = [word for flag, (path, _) in inputs.items() for word in (flag, str(path))]
        command = [*script.split(), *named, "--out", str(folder / out), *words]
        stages.append(Stage(kind, command, key, folder, tuple(named[1::2])))
        return folder / out, key

    trajectories, questions, test = [(path, fingerprint(path)) for path in (
        place.folder / "data" / f"{name}.jsonl" for name in ("sft", "train", "test"))]
    model = TINY_BASE, fingerprint(TINY_BASE)
    if policy.sft is not None:
        model = add("sft", "sft.py", policy.sft, {"--model": model, "--data": trajectories})
    if policy.rl is not None:
        model = add("rl", "rl.py", policy.rl, {"--model": model, "--data": questions})
    if policy.rft is not None:
        inputs = {"--model": model, "--questions": questions}
        right = add("successes", "data_prep.py successes", "", inputs, "sft.jsonl")
        model = add("rft", "sft.py", policy.rft, {"--model": model, "--data": right})
    mode = "" if "--mode" in row.eval else "--mode zoom "
    add("eval", "eval.py", mode + row.eval, {"--model": model, "--data": test})
    return stages


def fill(flags, place):
    """Flags with their numbers, those of frames once the full run is evaluated."""
    numbers = {"fps": SUITES[place.suite.removesuffix("-quick")]["fps"]}
    if "{epochs}" in flags:
        kinds = [row["kind"] for row in compare.read_lines(place.folder / "data" / "sft.jsonl")]
        numbers["epochs"] = round(sft.PRESETS["demo"]["epochs"] * len(kinds) / max(1, kinds.count("direct")))
    if ("{frames}" in flags or "{twice}" in flags) and (full := chain(FULL, place)[-1]).result():
        frames = compare.figures_of(full.folder, FULL.mode)["frames_per_question"]
        numbers |= {"frames": round(frames), "twice": round(2 * frames)}
    return re.sub(r"{(\w+)}", lambda m: str(numbers.get(m[1], m[0])), flags)


def make_row(row, place):
    """Runs what is missing of a row, then writes its result.json."""
    if "{" in " ".join(word for stage in chain(row, place) for word in stage.command):
        raise UserError("its frames are those of the row full, which is not there")
    for stage in (stages := chain(row, place)):
        stage.run()
    made = [stage.result() for stage in stages]
    rl_folder, test = next((s.folder for s in stages if s.kind == "rl"), None), stages[-1].inputs[-1]
    write_json(open_folder(place.folder / "rows" / row.name) / "result.json", {
        "row": row.name, "suite": place.suite, "seed": place.seed, "mode": row.mode,
        "begun": [result["begun"] for result in made], "commands": [result["command"] for result in made],
        "commits": sorted({commit for result in made for commit in result["commits"]}),
        "made_with": made[-1]["made_with"],
        "made_of": made_of(row, place.suite), "inputs": [fingerprint(TINY_BASE), fingerprint(test)],
        "seconds": sum(result["seconds"] for result in made), "data": test,
        "stages": [str(stage.folder) for stage in stages],
        **compare.summary(stages[-1].folder, row.mode, test, rl_folder)})


def made_of(row, suite):
    """The flags that a row's result depends on."""
    policy = BY_NAME[row.of] if row.of else row
    return [policy.sft, policy.rl, policy.rft, row.eval, row.mode, SUITES[suite.removesuffix("-quick")]]


def read_results(runs):
    """(results, stale ones) of the rows that there are in the folder, see `kept.of_runs`."""
    return kept.of_runs(runs, ROWS, lambda row, *place: chain(row, Place(*place)))


# ------------------------------------------------------------------------------------------------- the script
def choose(names):
    """The rows of these names and groups, and the full run. Raises UserError, also for a flag that a row's
    script does not have."""
    for name in {*names} - {*BY_NAME} - {row.group for row in ROWS}:
        raise UserError(f"there is no row or group {name}; rows are {', '.join(BY_NAME)}")
    rows = [row for row in ROWS if not names or row is FULL or row.name in names or row.group in names]
    for row in rows:
        if row.of and (row.of not in BY_NAME or BY_NAME[row.of].of
                       or (row.sft, row.rl, row.rft) != ("", "", None)):
            raise UserError(f"row {row.name}: {row.of} has to be a row with a policy of its own")
        for script, flags in zip((sft, rl, sft, evaluation), (row.sft, row.rl, row.rft, row.eval)):
            known = {field.name for field in fields(script.Config)}
            for flag in {*re.findall(r"--(?:no-)?(\w+)", flags or "")} - known:
                raise UserError(f"row {row.name}: {script.__name__}.py has no flag --{flag}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (see --help)")
    parser.add_argument("names", nargs="*", help="groups and rows; else all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--suite", choices=SUITES, default="demo")
    parser.add_argument("--quick", action="store_true", help="few questions and steps")
    parser.add_argument("--report", action="store_true", help="only write report.html of what is there")
    parser.add_argument("--picture", help="only draw a dialogue before and after RL there (first seed)")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="folder of the results")
    parser.add_argument("--out", type=Path, help="tables; else docs/ablations.md, of --quick RUNS/quick.md")
    args = parser.parse_args()
    if args.report:
        return report.write_report(args.runs, read_results(args.runs)[0])
    suite = args.suite + "-quick" * args.quick
    places = [Place(suite, seed, args.runs / suite / str(seed)) for seed in args.seeds]
    if args.picture:
        return plots.picture(read_results(args.runs)[0].get(suite, {}), args.seeds[0], args.picture)
    rows = choose(args.names)
    ENDING.save = ENDING.lost = lambda: "stopped; the same command goes on where it was"
    own_folder(args.runs)  # a second start waits, then gives up
    for place in places:
        data = place.folder / "data"  # stages are known by its content
        words = ["--out", str(data), "--seed", str(place.seed), *place.flags("data")]
        Stage("data", ["data_prep.py", "synthetic", *words], " ".join(words[2:]), data).run()
    show_plan([(place, row, chain(row, place)) for place in places for row in rows], args.runs)
    failed = []
    for place in places:
        for row in rows:
            try:
                make_row(row, place)
            except UserError as error:  # the others are made all the same
                print(f"\n{row.name}: {error}", flush=True)
                failed.append(f"{row.name} of seed {place.seed}")
    out = args.out or (args.runs / "quick.md" if args.quick else Path("docs/ablations.md"))
    found, stale = read_results(args.runs)
    found = {suite: rows for suite, rows in found.items() if suite.endswith("-quick") == args.quick}
    compare.write_tables(kept.with_kept(found, stale, out.with_suffix(".jsonl"), ROWS, made_of), ROWS, out)
    if failed:
        raise UserError(f"not there: {', '.join(failed)}; the same command tries again")


if __name__ == "__main__":
    run_main(main)
