"""What the results of ablations.py say: tables, differences, and whether the paper's findings come out again.

    summary(folder, mode, data, rl_folder)  what a row's result.json holds of an evaluation and of RL
    write_tables(found, rows, out)          the Markdown page, and .json beside it, of the results there are

READING says what the numbers are and how a finding is judged.
"""

import json
import math
from collections import Counter, defaultdict
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np

from common import UserError, open_folder, write_json
from controls import places
from training.tables import interval, known, ratio
from training.tables import mean as mean_of_known
from zoom_env import between

RESAMPLES = 2000
NOTHING = {"right": 0.01, "zooms": 0.1}  # a question; the paper's differences are larger
FPS_LIMITS = (1, 2, 4, 8)  # of the paper's table 10: calls at (0, 1], (1, 2], ... frames a second
CURVES = ("full", "no-bonus", "no-reflection", "no-cold-start", "mixed", "reward-hit")  # over RL's steps
PREFACE = """Made by `python ablations.py`. Data and teacher are built so that zooms and RL are needed: the
rows say that the code shows an effect, not how large it is on real videos. Commands and more numbers are in
the .json beside this page, what was right in each question in the .jsonl."""
READING = f"""## How to read the tables

- *right %*: the 95% interval takes the questions for independent, as eval.py does. *Spread*: the standard
  deviation over seeds, each with its own data and training.
- *Against the full run*, and each finding: the mean over the questions that both rows were asked, of all
  seeds that both have, with the 95% interval of {RESAMPLES:,} bootstrap resamples of the videos. It knows of
  questions, not of other training runs: those are what seeds are for.
- *Verdict*: "agrees" if the interval, each seed's mean and the exact sign test at 5% say that there is
  more, "disagrees" if they say that there is less ("yes" and "no" where the paper claims nothing); "no
  difference" if the interval lies within 1 point (0.1 zooms) of 0; else "cannot be told". Each claim is
  tested by itself.
- *No answer %*: these count as wrong. A policy that meets what it was not trained with (fewer zooms,
  another overview, clips that show nothing) may call until no round is left. *Invalid %*: turns that could
  not be carried out, such as calls where no zoom was left or of too many frames, as a share of these and
  the zooms. *Hit %*: of the zooms of questions that have evidence, those that overlap it. *Second zoom
  inside*: how often it lies in the zoom before it and is shorter. These shares, zooms and frames are means
  over seeds.
- *Best uniform %*: what is expected of one who reads as many uniform frames without a mistake and guesses
  among the options that they leave, every holistic question being right. A run can be luckier.
- *Minutes*: all stages of a row, a mean over seeds. Rows share stages, so the sum is more than was spent.
- *Commit*: "with changes" where files differed; in older rows these may have been earlier tables alone."""
QUICK_NOTE = "Few questions and steps: these numbers say only that it runs."
PAPER_FPS = (0.249, 0.662, 0.082, 0.006, None)


class Finding(NamedTuple):
    """A claim that `row` has more of `field`, in the mean of a question, than the row `other`."""

    claim: str
    paper: str  # its numbers
    row: str
    other: str
    field: str = "right"
    of_paper: bool = True  # whether the paper claims it


FINDINGS = [
    Finding("RL adds to the cold start", "MLVU dev 68.8, without 56.4; LVBench 41.5, 26.0", "full", "no-rl"),
    Finding("the tool bonus helps", "MLVU dev 68.8, without 67.5; VideoMME 65.2, 62.5; VideoMMMU 52.2, 53.8",
            "full", "no-bonus"),
    Finding("the tool bonus keeps zooms up", "calls fall towards 0 without it", "full", "no-bonus", "zooms"),
    Finding("the cold start and RL do more than 8 steps from a base that never saw a call (says nothing of the "
            "paper's base)", "MLVU dev 68.8, without 57.0", "full", "no-cold-start", of_paper=False),
    Finding("reflection data helps", "MLVU dev 68.8, without 67.0; VideoMME 65.2, 58.7; VideoMMLU 67.9, 70.1",
            "full", "no-reflection"),
    Finding("reflection data brings zooms", "about 2 calls a question, about 1 without",
            "full", "no-reflection", "zooms"),
    Finding("a zoom helps", "with 0 and 1: LongVideoReason 64.8, 79.9; MLVU dev 65.0, 66.7",
            "zooms-1", "zooms-0"),
    Finding("more zooms help more", "with 1 and 4: MLVU dev 66.7, 68.8; LVBench 39.6, 41.5",
            "full", "zooms-1"),
    Finding("zooms beat more uniform frames of the base", "MLVU 64.0 at 48 frames, the base 58.1 at 128",
            "full", "uniform-33"),
    Finding("5 frames and zooms beat 17 frames of the base, after RL with 9", "not shown",
            "overview-5", "uniform-17", of_paper=False),
    *[Finding(f"RL with 9 frames of overview helps with {n}", "not shown",
              f"overview-{n}", f"no-rl-overview-{n}", of_paper=False) for n in (5, 17, 33)],
    *[Finding(f"RL with 5, 9 and 17 frames helps with {n}", "not shown",
              f"mixed-{n}", f"no-rl-overview-{n}", of_paper=False) for n in (5, 17)],
    *[Finding(f"RL with 5, 9 and 17 frames is better with {n} than RL with 9", "not shown",
              f"mixed-{n}", f"overview-{n}", of_paper=False) for n in (5, 17)],
    Finding("zooms beat as many uniform frames after SFT and RL without the tool", "not shown",
            "full", "no-tool", of_paper=False),
    Finding("zooms beat twice as many uniform frames after SFT and RL without the tool", "not shown",
            "full", "no-tool-twice", of_paper=False),
    Finding("RL does more than to choose the frame rate", "not shown", "full", "no-rl-fps", of_paper=False),
    Finding("RL beats fine-tuning on the policy's own successes", "not shown", "full", "rft", of_paper=False),
    Finding("it is what the clip shows that helps", "not shown", "full", "clips-grey", of_paper=False),
    Finding("never zooming is better than always",
            "of others, on the released checkpoint: LongVideoReason 77.7 never, 76.9 always",
            "zooms-0", "zoom-always", of_paper=False)]


# ------------------------------------------------------------------------------------------- one row's result
def read_lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def episodes_of(folder, mode):
    """The episodes of one mode of an evaluation, as eval.py wrote them."""
    files = folder / "episodes.jsonl", folder / "gate.jsonl"
    return [e for file in files if file.exists() for e in read_lines(file) if e["mode"] == mode]


def figures_of(folder, mode):
    """A row of an evaluation's results, None where there is none of this mode."""
    results = json.loads((folder / "results.json").read_text())
    return next((row for row in results if row["mode"] == mode), None)


def summary(folder, mode, data, rl_folder=None):
    """What the tables need of an evaluation's folder, of one mode in it, and of that of RL, where there was
    any. data: the file of questions. Raises UserError where the mode was not evaluated."""
    figures = figures_of(folder, mode)
    if figures is None:
        raise UserError(f"{folder} has no results of mode {mode}, which the row names")
    bound = figures_of(folder, "bound") if mode in ("zoom", "uniform") else None
    episodes, questions = episodes_of(folder, mode), read_lines(data)
    steps = read_lines(rl_folder / "metrics.jsonl") if rl_folder else []
    return {
        "figures": figures, "bound": bound and bound["accuracy"],
        "questions": {e["number"]: {"right": e["right"], "zooms": e["zooms"],
                                    "video": questions[e["number"]]["video"]} for e in episodes},
        "kinds": of_kinds(episodes), "unanswered": mean(e["answer"] is None for e in episodes),
        "inside": second_inside(episodes, questions),
        "fps": fps_counts([text for e in episodes for text in e["turns"]]),
        "training": [{name: step.get(name) for name in ("step", "accuracy", "zooms", "reward")}
                     for step in steps]}


def of_kinds(episodes):
    """{kind: [how many are right, of how many]} of those that are graded."""
    kinds = {}
    for e in episodes:
        if e["right"] is not None:
            counts = kinds.setdefault(e["kind"], [0, 0])
            counts[0] += e["right"] >= 0.5
            counts[1] += 1
    return kinds


def second_inside(episodes, questions):
    """The share of right answers with two zooms and more whose second one lies within the first; None where
    there are none."""
    zooms = [zoom for e in episodes for zoom in places.zoom_rows(e, questions[e["number"]])]
    return next((row["inside_where_right"] for row in places.by_number(zooms) if row["nth"] == 2), None)


def fps_counts(texts):
    """How many calls in the turns ask for each number of frames a second; {as text: int}, ascending."""
    counts = Counter()
    for text in texts:
        for call in between(text.rpartition("</think>")[2], "video_zoom")[0]:
            try:
                fps = float(json.loads(call)["fps"])
            except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
                continue
            if fps > 0:
                counts[f"{fps:g}"] += 1
    return {fps: counts[fps] for fps in sorted(counts, key=float)}


def fps_shares(counts):
    """Shares of the calls at (0, 1], (1, 2], .. frames a second and above FPS_LIMITS; None each without a
    call."""
    within = [0] * (len(FPS_LIMITS) + 1)
    for fps, count in counts.items():
        within[sum(float(fps) > limit for limit in FPS_LIMITS)] += count
    return [ratio(count, sum(within)) for count in within]


# ------------------------------------------------------------------------------------------------ the figures
class Difference(NamedTuple):
    mean: float
    low: float
    high: float
    p: float  # of the sign test, two-sided
    seeds: list  # the mean of each seed


def pairs(row, other, field):
    """(seed, video, a field's value in `row`, in `other`) of each question that both were asked."""
    for seed in sorted(row.keys() & other.keys()):
        ours, theirs = row[seed]["questions"], other[seed]["questions"]
        for number in sorted(ours.keys() & theirs.keys(), key=int):
            values = ours[number][field], theirs[number][field]
            if None not in values:
                yield seed, ours[number]["video"], *values


def difference(row, other, field):
    """The Difference of what `row` has more than `other` on the same questions, {seed: result} each; None
    where no seed is common."""
    by_video, by_seed = defaultdict(list), defaultdict(list)
    for seed, video, ours, theirs in pairs(row, other, field):
        by_video[seed, video].append(ours - theirs)
        by_seed[seed].append(ours - theirs)
    if not by_seed:
        return None
    sums, sizes = (np.array([f(values) for values in by_video.values()], dtype=float) for f in (sum, len))
    draws = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    low, high = np.percentile(sums[draws].sum(1) / sizes[draws].sum(1), (2.5, 97.5))
    every = [value for values in by_seed.values() for value in values]
    more, less = sum(value > 0 for value in every), sum(value < 0 for value in every)
    return Difference(mean(every), low.item(), high.item(), sign_test(more, less),
                      [mean(values) for values in by_seed.values()])


def sign_test(more, less):
    """The two-sided p of so many heads and tails of a fair coin."""
    n = more + less
    tail = sum(math.comb(n, k) for k in range(min(more, less) + 1))
    return min(1.0, 2 * tail / 2 ** n)


def row_figures(seeds, full):
    """The numbers of a table's row. seeds, full: {seed: result} of the row and of the full run."""
    results = list(seeds.values())
    right = [q["right"] >= 0.5 for r in results for q in r["questions"].values() if q["right"] is not None]
    low, high = interval(sum(right), len(right)) if right else (None, None)
    of_seeds = known(r["figures"]["accuracy"] for r in results)
    over_seeds = lambda name: mean_of_known(r["figures"].get(name) for r in results)
    return {
        "seeds": sorted(seeds), "questions": len(right), "accuracy": ratio(sum(right), len(right)),
        "low": low, "high": high, "spread": stdev(of_seeds) if len(of_seeds) > 1 else None,
        "against_full": None if seeds is full else difference(seeds, full, "right"),
        "zooms": over_seeds("zooms_per_question"), "frames": over_seeds("frames_per_question"),
        "invalid": over_seeds("invalid_call_rate"), "hits": over_seeds("hit_rate"),
        "kinds": {kind: ratio(*map(sum, zip(*(r["kinds"][kind] for r in results if kind in r["kinds"]))))
                  for kind in dict.fromkeys(kind for r in results for kind in r["kinds"])},
        "unanswered": mean_of_known(r["unanswered"] for r in results),
        "inside": mean_of_known(r["inside"] for r in results),
        "seconds_per_question": over_seeds("seconds_per_question"),
        "tokens": over_seeds("tokens_per_question"), "bound": mean_of_known(r["bound"] for r in results),
        "seconds": mean(r["seconds"] for r in results),
        "commits": sorted({commit[:7] + commit[40:] for r in results for commit in r["commits"]})}


def levels(row, other, field):
    """The means of a field in both rows, over the questions of `difference`, as text."""
    form = percent if field == "right" else number
    _, _, ours, theirs = zip(*pairs(row, other, field))
    return f"{form(mean(ours))} - {form(mean(theirs))}"


def verdict(d, finding):
    yes, no = ("agrees", "disagrees") if finding.of_paper else ("yes", "no")
    nothing = NOTHING[finding.field]
    if d.low > 0 and min(d.seeds) > 0 and d.p < 0.05:
        return yes
    if d.high < 0 and max(d.seeds) < 0 and d.p < 0.05:
        return no
    return "no difference" if -nothing < d.low <= d.high < nothing else "cannot be told"


def thirds(seeds, field):
    """The mean of `field` in the first, middle and last third of RL's steps, over seeds; None without RL."""
    runs = [[step[field] for step in r["training"] if step[field] is not None] for r in seeds.values()]
    parts = [np.array_split(run, 3) for run in runs if len(run) >= 3]
    return [mean(float(part[i].mean()) for part in parts) for i in range(3)] if parts else None


# --------------------------------------------------------------------------------------------------- the page
def percent(value, form="{:.1f}"):
    return "" if value is None else form.format(100 * value)


def number(value, form="{:.2f}"):
    return "" if value is None else form.format(value)


def with_interval(found, scale):
    digits = 1 if scale == 100 else 2
    return "" if found is None else "{:+.{d}f} ({:+.{d}f} to {:+.{d}f})".format(
        *[round(scale * value, digits) + 0.0 for value in found[:3]], d=digits)  # + 0.0: never -0.0


def markdown(head, lines):
    """A table. Pipes and angle brackets in the cells are texts."""
    safe = lambda cell: str(cell).replace("|", "\\|").replace("<", "&lt;")
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(safe, row)) + " |" for row in rows)


def suite_page(suite, rows):
    """(lines of Markdown, their numbers) of a suite, {row: {seed: result}}."""
    full = rows.get("full", {})
    figures = {name: row_figures(seeds, full) for name, seeds in rows.items()}
    tested = []
    for finding in FINDINGS:
        if finding.row in rows and finding.other in rows:
            found = difference(rows[finding.row], rows[finding.other], finding.field)
            if found is not None:
                tested.append(finding._asdict() | {
                    "difference": found._asdict(), "verdict": verdict(found, finding)})
    page = [f"## Suite {suite}"] + [QUICK_NOTE] * suite.endswith("-quick") + [markdown(
        ["row", "seeds", "right %, 95% interval", "spread over seeds (data and training)",
         "against the full run, same questions",
         "right %, by kind", "no answer %", "frames", "zooms", "invalid %", "hit %",
         "second zoom inside the first %, right answers", "tokens", "best uniform %", "minutes", "commit"],
        [[name, " ".join(map(str, f["seeds"])),
          f"{percent(f['accuracy'])} ({percent(f['low'])} - {percent(f['high'])})", percent(f["spread"]),
          with_interval(f["against_full"], 100),
          ", ".join(f"{kind} {percent(share, '{:.0f}')}" for kind, share in f["kinds"].items()),
          percent(f["unanswered"]), number(f["frames"], "{:.1f}"), number(f["zooms"]), percent(f["invalid"]),
          percent(f["hits"]), percent(f["inside"]), number(f["tokens"], "{:.0f}"), percent(f["bound"]),
          number(f["seconds"] / 60, "{:.1f}"), " ".join(f["commits"])]
         for name, f in figures.items()])]
    if tested:
        page += ["### Findings", markdown(
            ["finding", "in the paper", "rows", "here", "difference, 95% interval", "seeds", "verdict"],
            [[t["claim"], t["paper"], f"{t['row']} - {t['other']}, {t['field']}",
              levels(rows[t["row"]], rows[t["other"]], t["field"]),
              with_interval([*t["difference"].values()], 100 if t["field"] == "right" else 1),
              len(t["difference"]["seeds"]), t["verdict"]] for t in tested])]
    asked = {name: sum((Counter(r["fps"]) for r in rows[name].values()), Counter())
             for name in ("no-rl", "rft", "full") if name in rows}
    limits = ["0", *map(str, FPS_LIMITS)]
    names = [f"({a}, {b}]" for a, b in zip(limits, limits[1:])] + [f"above {limits[-1]}"]
    page += ["### Frames a second that the calls ask for, %", markdown(
        ["", *names, "most often"], [["paper", *map(percent, PAPER_FPS), ""]] + [
            [name, *map(percent, fps_shares(counts)), ", ".join(
                f"{fps}: {percent(count / counts.total())}" for fps, count in counts.most_common(3))]
            for name, counts in asked.items()])]
    fields = "zooms", "accuracy"
    trained = {name: [thirds(seeds, field) for field in fields] for name, seeds in rows.items()}
    own = {name: both for name, both in trained.items() if name in CURVES and None not in both}
    if own:
        page += ["### Over the steps of RL: mean of the first, middle and last third", markdown(
            ["row", "zooms", "right %, sampled"],
            [[name, " → ".join(map(number, zooms)), " → ".join(map(percent, right))]
             for name, (zooms, right) in own.items()])]
    every = [r for seeds in rows.values() for r in seeds.values()]
    page.append("Made with " + "; ".join(sorted({r["made_with"] for r in every})))
    numbers = {"rows": figures, "findings": tested, "fps": asked, "training": trained,
               "commands": {name: [r["commands"] for r in seeds.values()] for name, seeds in rows.items()}}
    return page, numbers


def rows_page(rows):
    """The table of what each of the Rows is."""
    table = markdown(["row", "group", "shows", "differs from full by"],
                     [[row.name, row.group, row.shows, changes(row)] for row in rows])
    return f"## Rows\n\n{table}\n\nNumbers in braces are a suite's own, see the commands in the .json."


def changes(row):
    """What a Row does otherwise than the full run, as text."""
    parts = [f"the policy of {row.of}"] if row.of else []
    for script, flags in (("sft.py", row.sft), ("rl.py", row.rl), ("eval.py", row.eval)):
        if flags is None:
            parts.append(f"no {script}")
        elif flags:
            parts.append(f"{script} {flags}")
    if row.rft is not None:
        parts.append("sft.py on its own successes")
    return "; ".join(parts)


def write_tables(found, rows, out):
    """Prints the page and writes it to `out`, and its numbers to .json beside it. rows: the Rows that it may
    have."""
    suites, numbers = [], {}
    for suite, there in found.items():
        lines, numbers[suite] = suite_page(suite, there)
        suites += lines
    print("\n\n".join(suites))
    text = "\n\n".join(["# Ablations", PREFACE, READING, rows_page(rows), *suites]) + "\n"
    open_folder(out.parent)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(out)
    write_json(out.with_suffix(".json"), numbers)
    print(f"\nwrote {out}")
