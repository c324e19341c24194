"""What was seen in an episode; curves, and a picture of one dialogue, by matplotlib, which is optional."""

import io
import math
import re
from pathlib import Path

from PIL import Image

from common import UserError
from controls.altered import maker
from controls.modes import Mode
from demo.synthetic import uniform_accuracy
from findings import compare
from findings.compare import CURVES
from zoom_env import ANY_FPS, EnvConfig

STRIP_PIXELS = 42  # height of the frames in a strip
WAYS = "full", "zooms-0", "zoom-always", "zoom-gate", "votes-8"  # to use the policy of full
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1)}  # where a legend is
INK = "#010203"  # in curves it stands for the page's colour of text


# --------------------------------------------------------------------------------------------------- episodes
def replay(result, episode, question):
    """The environment after an episode's turns, as eval.py wrote them. Raises VideoError."""
    names, played = EnvConfig.__dataclass_fields__, result["figures"]["settings"]
    settings = {name: value for name, value in played.items() if name in names}
    settings["overview_fps"] = settings["overview_fps"] or ANY_FPS
    mode = Mode("", clips=played.get("clips", "shown"), zoom=played.get("zoom", "policy"))
    env = maker(mode)(question, EnvConfig(**settings), Path(result["data"]).parent)
    env.reset()
    for text in episode["turns"]:
        if not env.done:
            env.step(text)
    env.end()  # where it was cut off
    return env


def strip(frames, height=STRIP_PIXELS):
    """Frames side by side, a PIL image."""
    images = [Image.fromarray(frame.image.permute(1, 2, 0).numpy()) for frame in frames]
    images = [image.resize((max(1, image.width * height // image.height), height)) for image in images]
    whole = Image.new("RGB", (sum(image.width for image in images), height))
    for number, image in enumerate(images):
        whole.paste(image, (sum(other.width for other in images[:number]), 0))
    return whole


# ---------------------------------------------------------------------------------------------------- curves
def pyplot():
    """matplotlib.pyplot, or None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def accuracy_axes(axes, rows, questions=(), titles=None, against="frames", **legend):
    """Accuracy with 95% intervals of {row: figures} against one of these, and the best of uniform frames on
    synthetic questions. titles: {row: its name}; rows of one name have one colour. legend: its place."""
    titles = titles or {name: name for name in rows}
    known = list(dict.fromkeys(titles[name] for name in rows))
    for name, f in rows.items():
        if f["accuracy"] is not None:
            error = [[100 * (f["accuracy"] - f["low"])], [100 * (f["high"] - f["accuracy"])]]
            mark = "s" if name.startswith(("uniform", "no-tool")) else "o"
            colour = pyplot().cm.tab20(known.index(titles[name]) % 20)
            axes.errorbar(f[against], 100 * f["accuracy"], error, fmt=mark, capsize=3, color=colour,
                          label=titles[name])
    if questions:
        numbers = sorted({round(4 * 1.25 ** n) for n in range(16)})
        bound = [100 * sum(uniform_accuracy(q, n) for q in questions) / len(questions) for n in numbers]
        axes.plot(numbers, bound, color="grey", linestyle="--", label="best of any uniform frames")
    axes.set(xscale="log", xlabel=f"{against.split('_')[0]} a question", ylabel="right %", ylim=(0, 103))
    low, high = map(math.log2, axes.get_xlim())
    ticks = [2.0 ** n for n in range(math.floor(low), math.ceil(high) + 1)]
    axes.set_xticks(ticks, [f"{tick:.3g}" if tick < 1 else f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    named = dict(zip(*axes.get_legend_handles_labels()[::-1]))  # one of each name
    axes.legend(named.values(), named, fontsize=7, frameon=False, **legend)


def curves(suite, rows, plt):
    """A suite's curves as inline SVG: accuracy against frames, then zooms and accuracy over RL's steps; and
    what ways to use one policy cost (WAYS)."""
    colours = {name: INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color",
                                      "ytick.color")}
    with plt.rc_context(colours | {"svg.fonttype": "none", "svg.hashsalt": suite}):
        figure, ((frames, right, zooms), costs) = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
        full = rows.get("full", {})
        claimed = {name for finding in compare.FINDINGS for name in (finding.row, finding.other)}
        groups = {name: name.rpartition("-")[0] + "-N" for name in rows  # of figure 5: a group has one colour
                  if name.startswith(("overview-", "no-rl-overview-", "uniform-", "zooms-"))}
        accuracy_axes(frames, {name: compare.row_figures(seeds, full) for name, seeds in rows.items()
                               if name in claimed | groups.keys()},
                      titles={name: groups.get(name, name) for name in rows}, **BESIDE)
        for name in CURVES:
            for seed, result in rows.get(name, {}).items():
                for axes, field in ((right, "accuracy"), (zooms, "zooms")):
                    steps = [step for step in result["training"] if step[field] is not None]
                    axes.plot([step["step"] for step in steps], [step[field] for step in steps],
                              color=f"C{CURVES.index(name)}", label=name if seed == min(rows[name]) else None)
        right.set(xlabel="RL step", ylabel="accuracy, sampled")
        zooms.set(xlabel="RL step", ylabel="zooms a question")
        zooms.legend(fontsize=7, frameon=False)
        ways = {name: rows[name] for name in WAYS if name in rows}
        common = set.intersection(*map(set, ways.values())) if ways else ()  # the same questions
        ways = {name: compare.row_figures({seed: seeds[seed] for seed in common}, full)
                for name, seeds in ways.items() if common}
        for axes, against in zip(costs, ("frames", "tokens", "seconds_per_question")):
            accuracy_axes(axes, ways, against=against, **BESIDE)
        for axes in costs[:-1]:  # one legend for all
            axes.get_legend().remove()
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    svg = file.getvalue()
    return svg[svg.index("<svg"):].replace(INK, "currentColor")


# ------------------------------------------------------------------------------------- a dialogue's picture
def picture(rows, seed, out):
    """Draws one dialogue before and after RL, and accuracy against frames. rows: {row: {seed: result}} of a
    suite. out: a file of any kind that matplotlib writes. Raises UserError."""
    plt = pyplot()
    if plt is None:
        raise UserError("a picture needs matplotlib: pip install matplotlib")
    results = {name: seeds[seed] for name, seeds in rows.items() if seed in seeds}
    if not {"no-rl", "full"} <= set(results):
        raise UserError("there are no rows full and no-rl: python ablations.py no-rl makes them")
    before, after = ({e["number"]: e for e in compare.read_lines(Path(results[row]["stages"][-1],
                     "episodes.jsonl"))} for row in ("no-rl", "full"))
    # the first question of those with the shortest dialogues that was wrong before, is right now, by a zoom
    changed = [n for n in before.keys() & after.keys() if before[n]["right"] < 0.5 <= after[n]["right"]
               and before[n]["zooms"] and after[n]["zooms"]]
    if not changed:
        raise UserError("RL has turned no wrong answer with a zoom into a right one")
    number = min(changed, key=lambda n: (len(before[n]["turns"]) + len(after[n]["turns"]), n))
    questions = compare.read_lines(results["full"]["data"])
    figure = plt.figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    shown = []
    for title, row, episode in (("before RL", "no-rl", before[number]), ("after RL", "full", after[number])):
        env = replay(results[row], episode, questions[number])
        if not shown:
            shown.append(("overview", env.watched[0], "black"))
        for frames, turn in zip(env.watched[1:], [turn for turn in env.turns if turn.kind == "call"]):
            shown.append((f"{title}: " + re.search("<video_zoom>.*", turn.text)[0], frames, "black"))
        verdict = "right" if episode["right"] >= 0.5 else "wrong"
        shown.append((f"{title}: <answer>{(episode['answer'] or '').strip()}</answer>, {verdict}", (),
                      "green" if verdict == "right" else "firebrick"))
    longest = max(len(frames) for _, frames, _ in shown)
    left.suptitle("\n".join([questions[number]["question"], "   ".join(env.options())]), fontsize=10)
    for axes, (title, frames, colour) in zip(left.subplots(len(shown), 1), shown):
        axes.axis("off")
        axes.set(xlim=(0, longest * STRIP_PIXELS), ylim=(1.4 * STRIP_PIXELS, -0.5 * STRIP_PIXELS),
                 aspect="equal", anchor="W")
        axes.text(0, -0.15 * STRIP_PIXELS, title, fontsize=8, color=colour, family="monospace")
        if frames:
            axes.imshow(strip(frames), extent=(0, len(frames) * STRIP_PIXELS, STRIP_PIXELS, 0))
            for at, frame in enumerate(frames):
                axes.text((at + 0.5) * STRIP_PIXELS, 1.25 * STRIP_PIXELS, f"{frame.time_s:.1f}", fontsize=6,
                          ha="center")
    titles = {"full": "SFT + RL", "no-rl": "SFT"}
    titles |= dict.fromkeys(("no-tool", "no-tool-twice"), "SFT + RL without the tool")
    titles |= {name: "the base, uniform frames" for name in results if name.startswith("uniform")}
    rows = {name: compare.row_figures({0: results[name]}, {}) for name in results if name in titles}
    accuracy_axes(right.subplots(), rows, questions, titles)
    figure.savefig(out, dpi=130)
    print(f"wrote {out}")

