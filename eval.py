"""Evaluation: accuracy against frames, with and without zooming; or one question about one video.

    python eval.py                                     the demo: runs/sft and runs/rl on runs/data/test.jsonl
    python eval.py --model DIR [DIR ...] --data questions.jsonl --mode uniform --num_frames 128
    python eval.py --model DIR --video FILE --question TEXT [--options A B C D] [--save_frames DIR]

Modes: `zoom` plays full episodes; `uniform` shows --num_frames uniform frames and takes the answer, no tool. The demo
adds, for each policy, its accuracy with zooming off, and for synthetic data the best accuracy that any uniform sampler
could reach with as many frames as the policy looked at (demo/synthetic.py says how that is counted).

Writes to --out: results.json (a row for each policy and mode), by_kind.jsonl (the same by kind of question) and
episodes.jsonl (what each policy said). Temperature 0, as in the paper. Intervals are Wilson's, 95%. An invalid call is a
turn that could not be carried out; its rate is counted among all calls.
"""

import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torchvision.io import write_png
from tqdm import tqdm

from common import (RunConfig, UserError, check_bad, choose_dtype, parse_flags, run_main, start_processes,
                    write_jsonl)
from data_prep import question_error, read_questions, use_overview
from demo import synthetic
from model import load_policy
from rollout import RolloutConfig, rollout
from video import open_video


@dataclass(frozen=True)
class Config(RolloutConfig, RunConfig):
    model: list[str] | None = None  # checkpoint folders or hub names; without it, runs/sft and runs/rl, zooming on and off
    data: str = "runs/data/test.jsonl"  # questions
    out: str = "runs/eval"  # folder for results.json and episodes.jsonl
    mode: str = "zoom"  # zoom: full episodes; uniform: --num_frames uniform frames and no tool
    num_frames: int | None = None  # frames of the overview; without it, as the checkpoint was trained
    max_zooms: int | None = None  # zooms in an episode; without it, as the checkpoint was trained
    temperature: float = 0.0  # 0 takes the most likely token
    max_questions: int | None = None  # use only the first questions of the file
    max_rows: int = 16  # episodes at one time, at most
    video: str | None = None  # ask about this video file instead
    question: str | None = None  # ... this question
    options: list[str] | None = None  # ... with these options
    save_frames: str | None = None  # ... and write what was seen as PNG strips into this folder


DEMO = dict(max_rows=100, max_turn_tokens=160)


def interval(right, total):
    """Wilson's 95% interval of a share."""
    if not total:
        return 0.0, 1.0
    z, p = 1.96, right / total
    centre, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, (centre - half) / (1 + z * z / total)), min(1.0, (centre + half) / (1 + z * z / total))


def load(name, config, device):
    policy = load_policy(name, device, choose_dtype(config.dtype, device), config.system_prompt)
    changes = {}
    if config.num_frames is not None:
        changes = {"overview_max_frames": config.num_frames, "overview_fps": 1e6}  # always that many
    if config.max_zooms is not None:
        changes["max_zooms"] = config.max_zooms
    if config.mode == "uniform":
        changes["max_zooms"] = 0
    try:
        policy.env_config = replace(policy.env_config, **changes)
    except ValueError as error:
        raise UserError(str(error)) from None
    return policy


def evaluate(policy, name, mode, questions, root, config, env_config=None):
    """Plays one episode of each question. Returns (rows for the table by kind, episodes, [(id, reason)])."""
    env_config = env_config or policy.env_config
    generator = torch.Generator(policy.device).manual_seed(config.seed)
    began = time.time()
    with tqdm(total=len(questions), desc=f"{name} {mode}", unit="question", dynamic_ncols=True, leave=False) as bar:
        def ended(e):
            e.dialogue.features, e.dialogue.frames, e.env.watched = [], [], []  # memory stays that of those being played
            bar.update()

        groups, skipped = rollout(policy, questions, 1, config, env_config=env_config, root=root, generator=generator,
                                  on_end=ended)
    episodes = [e for group in groups for e in group]
    seconds = time.time() - began
    if not episodes:
        raise UserError("no question could be played")
    by_kind = defaultdict(list)
    for e in episodes:
        by_kind["all"].append(e)
        by_kind[(e.env.question.get("meta") or {}).get("kind") or e.env.question.get("source") or "other"].append(e)
    rows = []
    for kind, some in by_kind.items():
        right = sum(e.env.rewards["accuracy"] >= 0.5 for e in some)
        low, high = interval(right, len(some))
        zooms = [t for e in some for t in e.env.turns if t.kind == "call"]
        known = [t for t in zooms if t.hit is not None]
        invalid = sum(e.env.num_invalid() for e in some)
        mean = lambda f: sum(f(e) for e in some) / len(some)
        rows.append({
            "policy": name, "mode": mode, "kind": kind, "num_questions": len(some), "accuracy": right / len(some),
            "accuracy_low": low, "accuracy_high": high, "frames_per_question": mean(lambda e: e.env.frames_shown),
            "zooms_per_question": mean(lambda e: e.env.num_calls()),
            "invalid_call_rate": invalid / max(1, invalid + len(zooms)),
            "hit_rate": sum(t.hit for t in known) / len(known) if known else None,
            "tokens_per_question": mean(lambda e: len(e.dialogue.ids)),
            "seconds_per_question": seconds / len(episodes)})
    return rows, episodes, skipped


def uniform_bound(row, episodes):
    """A table row: the best accuracy of any uniform sampler with as many frames a question as `row` has."""
    frames = max(1, round(row["frames_per_question"]))
    scores = [synthetic.uniform_accuracy(e.env.question, frames) for e in episodes]
    return dict.fromkeys(row) | {
        "policy": f"best uniform sampler for {row['policy']}", "mode": "bound", "kind": "all",
        "num_questions": len(scores), "accuracy": sum(scores) / len(scores), "frames_per_question": frames,
        "zooms_per_question": 0.0}


def table(rows):
    """The rows as an aligned text table."""
    percent = lambda x: "" if x is None else f"{100 * x:.1f}"
    number = lambda x, digits: "" if x is None else f"{x:.{digits}f}"
    lines = [("policy", "mode", "kind", "n", "right %", "95% interval", "frames", "zooms", "invalid %", "hit %", "tokens",
              "s")]
    for r in rows:
        ends = "" if r["accuracy_low"] is None else f"{percent(r['accuracy_low'])} - {percent(r['accuracy_high'])}"
        lines.append((r["policy"], r["mode"], r["kind"], str(r["num_questions"]), percent(r["accuracy"]), ends,
                      number(r["frames_per_question"], 1), number(r["zooms_per_question"], 2),
                      percent(r["invalid_call_rate"]), percent(r["hit_rate"]), number(r["tokens_per_question"], 0),
                      number(r["seconds_per_question"], 3)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths)))
                     for line in lines)


def ask(policy, config):
    """Plays one question about one video and prints the dialogue."""
    question = {"id": "question", "video": config.video, "question": config.question, "options": config.options,
                "answer": "A" if config.options else "unknown", "meta": {}, "evidence": None,
                "answer_type": "multiple_choice" if config.options else "open_ended"}
    if reason := question_error(question):
        raise UserError(reason)
    policy.env_config, _, _ = use_overview(policy.env_config, [question], config.overview, config.max_bad)
    open_video(config.video)
    generator = torch.Generator(policy.device).manual_seed(config.seed)
    groups, skipped = rollout(policy, [question], 1, config, generator=generator)
    if skipped:
        raise UserError(skipped[0][1])
    env = groups[0][0].env
    print(env.describe())
    print(f"answer: {env.answer() if env.answer() is not None else 'none (the policy gave no answer)'}")
    if config.save_frames:
        folder = Path(config.save_frames)
        folder.mkdir(parents=True, exist_ok=True)
        for number, frames in enumerate(env.watched):
            name = folder / f"{number}_{'zoom' if number else 'overview'}_{frames[0].time_s:.2f}s-{frames[-1].time_s:.2f}s.png"
            write_png(strip([f.image for f in frames]), str(name))
            print(f"wrote {name}")


def strip(images):
    """(3, H, W) images side by side, upper edges in line; a film's size may change, so some reach further down."""
    height = max(image.shape[1] for image in images)
    return torch.cat([torch.nn.functional.pad(i, (0, 0, 0, height - i.shape[1])) for i in images], dim=2)


def main():
    config = parse_flags(Config, __doc__, DEMO, ("max_questions", "max_turn_tokens", "max_rows"))
    _, world, device = start_processes(config.device)
    if world > 1:
        raise UserError("eval.py runs as one process")
    if config.mode not in ("zoom", "uniform"):
        raise UserError(f"--mode must be zoom or uniform, not {config.mode}")
    if config.video is not None or config.question is not None:
        if config.video is None or not (config.question or "").strip():
            raise UserError("to ask about a video give both --video FILE and --question TEXT")
        open_video(config.video)  # before the model loads
        names = config.model or [n for n in ("runs/rl", "runs/sft") if Path(n).exists()][:1]
        if not names:
            raise UserError("no runs/rl or runs/sft yet: run sft.py and rl.py first, or name a checkpoint with --model")
        return ask(load(names[0], config, device), config)

    names = config.model or [n for n in ("runs/sft", "runs/rl") if Path(n).exists()]
    if not names:
        raise UserError("no runs/sft or runs/rl yet: run sft.py and rl.py first, or name checkpoints with --model")
    questions, bad = read_questions(config.data, config.max_bad)
    questions = questions[:config.max_questions]
    root, out, rows, said = Path(config.data).parent, Path(config.out), [], []
    for name in names:
        policy = load(name, config, device)
        policy.env_config, questions, without = use_overview(policy.env_config, questions, config.overview, config.max_bad)
        bad += without
        plays = [(config.mode, None)]
        if config.model is None and config.mode == "zoom":
            plays.append(("zoom off", replace(policy.env_config, max_zooms=0)))
        bound = None
        for mode, env_config in plays:
            new, episodes, skipped = evaluate(policy, name, mode, questions, root, config, env_config)
            check_bad(skipped, len(questions), config.max_bad, config.data)
            bad += [skip for skip in skipped if skip not in bad]
            if bound is None and all("uniform_accuracy" in (e.env.question.get("meta") or {}) for e in episodes):
                bound = uniform_bound(new[0], episodes)
            rows += new
            said += [{"policy": name, "mode": mode, "question": e.env.question["id"], "right": e.env.rewards["accuracy"],
                      "turns": [t.text for t in e.env.turns]} for e in episodes]
            print(f"{name}, {mode}:\n{table(new)}\n")
        rows += [bound] if bound else []
    out.mkdir(parents=True, exist_ok=True)
    total = [r for r in rows if r["kind"] == "all"]
    (out / "results.tmp").write_text(json.dumps(total, indent=1))
    (out / "results.tmp").replace(out / "results.json")
    write_jsonl(out / "by_kind.jsonl", rows)
    write_jsonl(out / "episodes.jsonl", said)
    for where, reason in bad:
        print(f"skipped {where}: {reason}")
    print(f"{table(total)}\nwrote {out / 'results.json'}")


if __name__ == "__main__":
    run_main(main)
