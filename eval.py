"""Evaluation: accuracy against frames, with and without zooming; or one question about one video.

    python eval.py                                     the demo: runs/sft and runs/rl on runs/data/test.jsonl
    python eval.py --model DIR [DIR ...] --data questions.jsonl --mode uniform --num_frames 128
    torchrun --standalone --nproc_per_node=8 eval.py --model DIR --data questions.jsonl
    python eval.py --model DIR --video FILE --question TEXT [--options A B C D] [--save_frames DIR]

Modes: `zoom` plays full episodes; `uniform` shows --num_frames uniform frames and takes the answer, no tool.
The demo adds each policy's accuracy with zooming off, and for synthetic data the best that any uniform
sampler could reach with as many frames as the policy looked at (see demo/synthetic.py).

Each finished question is a line of --out/episodes.jsonl at once, and the tables are made from these lines
(training/tables.py): results.json (a row for each policy and mode, with the settings), by_kind.jsonl and
by_duration.jsonl (the same by kind of question and length of video). So a run that was stopped goes on, see
--resume. A video that is missing or cannot be read ends nothing: it is counted, and named in skipped.jsonl.

Temperature 0, as in the paper: nothing depends on what is played together, else on --seed and each process's
share. An invalid call is a turn that could not be carried out, among all calls; where no tool is offered,
calls are counted apart (no tool), and answers without <answer>, too, which are graded all the same
(untagged). Seconds are those of playing, summed over processes.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torchvision.io import write_png
from tqdm import tqdm

from common import (
    RunConfig,
    UserError,
    choose_dtype,
    open_folder,
    parse_flags,
    run_main,
    start_processes,
    write_json,
    write_jsonl,
)
from demo import synthetic
from rollout import Engine, RolloutConfig
from scale.pick import cache_gb
from sources.read import read_questions
from sources.rows import question_error
from training import run_folder as runs, tables
from training.checkpoints import load_policy
from training.decoder_check import check_decoder
from training.environment import run_environment, with_chosen_frames
from training.memory import out_of_memory
from video import open_video


@dataclass(frozen=True)
class Config(RolloutConfig, RunConfig):
    model: list[str] | None = None  # folders or hub names; without it runs/sft and runs/rl, zoom on and off
    data: str = "runs/data/test.jsonl"  # questions
    out: str = "runs/eval"  # folder for results.json and episodes.jsonl
    resume: str = "auto"  # auto: an unfinished run in --out goes on; never: it is moved aside
    strict: bool = False  # end with status 3, after the table, if any row or video was bad
    mode: str = "zoom"  # zoom: full episodes; uniform: --num_frames uniform frames and no tool
    temperature: float = 0.0  # 0 takes the most likely token
    max_questions: int | None = None  # use only the first questions of the file
    max_turn_tokens: int | None = None  # an assistant turn is cut off here; else as trained
    max_rows: int = 100  # episodes at one time, at most
    video: str | None = None  # ask about this video file instead
    question: str | None = None  # ... this question
    options: list[str] | None = None  # ... with these options
    save_frames: str | None = None  # ... and write what was seen as PNG strips into this folder


MAY_DIFFER = ("strict", "video", "question", "options", "save_frames")  # when a run goes on
FILES = r"results\.json|(episodes(\.rank\d+)?|by_kind|by_duration|skipped)\.jsonl"  # that it writes


def load(name, config, device):
    """The policy of a checkpoint, with the environment that the flags say. Raises UserError."""
    dtype = choose_dtype(config.dtype, device)
    return load_policy(name, device, dtype, run_environment(name, config))


def make_engine(policy, config, rank):
    """What plays a policy's episodes, one a question."""
    config = replace(config, cache_gb=cache_gb(policy, config), max_turn_tokens=policy.env_config.max_turn_tokens)
    engine = Engine(policy, 1, config, torch.Generator(policy.device).manual_seed(config.seed * 1000 + rank))
    check_decoder(engine.decoder)
    return engine


# ---------------------------------------------------------------------------------------------------- playing
def missing_video(question, root):
    """Why a question's video is not there, or None; what else is wrong with it shows when it is opened."""
    path = Path(root, question["video"])
    hint = '; "\\" is part of a name here, write "/"' if "\\" in question["video"] and os.sep == "/" else ""
    return None if os.path.isfile(path) else f"{path}: no such file{hint}"


def evaluate(engine, name, mode, questions, root, env_config, write, show=True):
    """Plays one episode of each of the {number: question}. `write` gets a dict of each as soon as it is over,
    and at the end one of each question whose video could not be read."""
    reasons = [(number, q, missing_video(q, root)) for number, q in questions.items()]
    skipped = [(q["id"], reason) for _, q, reason in reasons if reason]
    there = {id(q): number for number, q, reason in reasons if not reason}
    last = time.monotonic()
    label, play = f"{name} {mode}", {"policy": name, "mode": mode}
    with tqdm(total=len(there), desc=label, dynamic_ncols=True, leave=False, disable=not show) as bar:
        def ended(e):
            nonlocal last
            began, last = last, time.monotonic()
            write(play | {"number": there[id(e.env.question)], "seconds": last - began} | record(e))
            e.forget_frames()
            bar.update()

        _, unread = engine.play([q for q in questions.values() if id(q) in there], root, env_config, ended)
    for where, reason in skipped + unread:
        write(play | {"question": where, "skipped": reason})


def record(e):
    """What the tables need of an episode, and what was said in it."""
    env, question, tool = e.env, e.env.question, e.env.config.max_zooms > 0
    hits = [turn.hit for turn in env.turns if turn.hit is not None]
    calls = sum(any(f"<{t}>" in turn.text.rpartition("</think>")[2] for t in env.tools) for turn in env.turns)
    right = None if tables.waits_for_judge(question) else env.rewards["accuracy"]
    return {"question": question["id"], "right": right, "answer": env.answer(),
            "kind": tables.kind_of(question),
            "untagged": any(turn.untagged for turn in env.turns), "frames": env.frames_shown,
            "zooms": env.num_calls(), "hits": sum(hits), "hits_known": len(hits),
            "invalid": env.num_invalid() if tool else None, "calls_without_tool": None if tool else calls,
            "tokens": len(e.dialogue.ids), "turns": [turn.text for turn in env.turns]}


# -------------------------------------------------------------------------------------------------- the table
def no_question(where, bad):
    first = "; ".join(f"{name}: {reason}" for name, reason in bad[:3])
    return UserError(f"{where}: no question could be played ({first})")


def summarise(written, plays, questions, bad, config):
    """Writes the tables and skipped.jsonl from the Rows of all processes, and from run.json what each policy
    was played with. Raises UserError if no question could be played."""
    unread, episodes = [row for row in written.read() if "skipped" in row], written.merge()
    by_kind, by_duration, out, run = [], [], written.out, runs.note(written.out)
    skipped = list(dict.fromkeys(bad + [(row["question"], row["skipped"]) for row in unread]))
    if not episodes:
        raise no_question(config.data, skipped)
    for name, mode in plays:
        some = [e for e in episodes if (e["policy"], e["mode"]) == (name, mode)]
        kinds, durations = tables.figures(name, mode, some, questions, len(bad))
        kinds[0]["settings"] = tables.settings(config, run.get(f"environment of {name}, {mode}") or {})
        asked = [questions[e["number"]] for e in some]
        if asked and mode != "zoom off" and all("uniform_accuracy" in (q.get("meta") or {}) for q in asked):
            kinds.append(synthetic.uniform_bound(kinds[0], asked))
        by_kind, by_duration = by_kind + kinds, by_duration + durations
    write_json(out / "results.json", [row for row in by_kind if row["kind"] == "all"])
    write_jsonl(out / "by_kind.jsonl", by_kind)
    write_jsonl(out / "by_duration.jsonl", by_duration)
    write_jsonl(out / "skipped.jsonl", [{"row": where, "reason": reason} for where, reason in skipped])


def report(out, strict):
    """Prints what a finished run has written. Ends with status 3 if `strict` and any row or video was bad."""
    read = lambda name: [json.loads(line) for line in open(out / name, encoding="utf-8")]
    by_duration = read("by_duration.jsonl") if (out / "by_duration.jsonl").exists() else []
    skipped = read("skipped.jsonl")
    print(tables.report(read("by_kind.jsonl"), by_duration, skipped))
    print(f"wrote {out / 'results.json'}", flush=True)
    if strict and skipped:
        sys.exit(3)


def checkpoints(config):
    names = list(dict.fromkeys(config.model or filter(os.path.exists, ("runs/sft", "runs/rl"))))
    if not names:
        raise UserError("no runs/sft or runs/rl yet: run sft.py and rl.py, or name checkpoints with --model")
    return names


# ------------------------------------------------------------------------- one question about one video
def ask(config, world, device):
    """Plays one question about one video and prints the dialogue.

    config: with video, question, options, save_frames. world: number of processes. Raises UserError."""
    if world > 1 or config.video is None or not (config.question or "").strip():
        raise UserError("to ask about a video give both --video FILE and --question TEXT, to one process")
    question = {"id": "question", "video": config.video, "question": config.question,
                "options": config.options, "answer": "A" if config.options else "unknown",
                "answer_type": "multiple_choice" if config.options else "open_ended"}
    if reason := question_error(question):
        raise UserError(reason)
    open_video(config.video)  # before the model loads
    if config.save_frames:
        open_folder(config.save_frames)
    chosen, _ = with_chosen_frames([question], config)
    policy = load(checkpoints(config)[0 if config.model else -1], config, device)
    engine = make_engine(policy, config, 0)
    groups, skipped = engine.play([*chosen.values()])
    if skipped:
        raise UserError(skipped[0][1])
    env = groups[0][0].env
    print(env.describe())
    print(f"answer: {env.answer() if env.answer() is not None else 'none (the policy gave no answer)'}")
    seen = [(number, frames) for number, frames in enumerate(env.watched) if frames]
    for number, frames in seen if config.save_frames else []:
        times = f"{frames[0].time_s:.2f}s-{frames[-1].time_s:.2f}s"
        name = Path(config.save_frames, f"{number}_{'zoom' if number else 'overview'}_{times}.png")
        write_png(strip([f.image for f in frames]), str(name))
        print(f"wrote {name}")


def strip(images):
    """(3, H, W) images side by side, upper edges in line; where a film's size changes, some are higher."""
    height = max(image.shape[1] for image in images)
    return torch.cat([torch.nn.functional.pad(i, (0, 0, 0, height - i.shape[1])) for i in images], dim=2)


# ------------------------------------------------------------------------------------------- the script
def main():
    config = parse_flags(Config, __doc__, ("max_questions", "max_turn_tokens", "max_rows"))
    rank, world, device = start_processes(config.device)
    for flag, known in (("mode", ("zoom", "uniform")), ("resume", ("auto", "never"))):
        if getattr(config, flag) not in known:
            raise UserError(f"--{flag} must be {' or '.join(known)}, not {getattr(config, flag)}")
    dtype = choose_dtype(config.dtype, device)
    if config.mode == "uniform":
        config = replace(config, max_zooms=0)
    if config.video is not None or config.question is not None:
        return ask(config, world, device)

    # all that can be wrong, before a model loads
    names = checkpoints(config)
    for name in names:
        run_environment(name, config)
    rows, bad = read_questions(config.data, config.max_bad)
    questions, without = with_chosen_frames(rows[:config.max_questions], config)  # by their place in the file
    root = Path(config.data).parent
    missing = [(q["id"], reason) for q in questions.values() if (reason := missing_video(q, root))]
    if len(missing) == len(questions):
        raise no_question(config.data, without + missing)
    modes = [config.mode, "zoom off"] if config.model is None and config.mode == "zoom" else [config.mode]
    plays = [(name, mode) for name in names for mode in modes]
    key = lambda e: None if "skipped" in e else (plays.index((e["policy"], e["mode"])), e["number"])
    written = runs.Rows(config.out, "episodes", key, rank)
    inputs = {"question file": config.data, "system prompt": config.system_prompt,
              "overview": config.overview if (config.overview or "").endswith(".json") else None,
              "protocol": config.protocol if (config.protocol or "").endswith(".json") else None}
    inputs |= {f"checkpoint {name}": name for name in names}
    resolved = replace(config, dtype=str(dtype).removeprefix("torch."))
    state, done = written.begin(resolved, MAY_DIFFER, inputs, FILES)

    # each process plays its share, and writes a line an episode
    for name in names if state != "finished" else []:
        left = {mode: [n for n in questions if (plays.index((name, mode)), n) not in done] for mode in modes}
        shares = {mode: {n: questions[n] for n in numbers[rank::world]} for mode, numbers in left.items()}
        if not any(shares.values()):
            continue
        policy = load(name, config, device)
        engine = make_engine(policy, config, rank)
        if rank == 0:
            print(f"{name}: {len(questions)} questions, {len(missing)} without a video, {world} process(es) "
                  f"on {device}, {policy.dtype}, decode step {engine.decoder.path}", flush=True)
        for mode, share in shares.items():
            env_config = replace(policy.env_config, max_zooms=0) if mode == "zoom off" else policy.env_config
            if rank == 0:
                runs.note(config.out, **{f"environment of {name}, {mode}": tables.environment(env_config)})
            evaluate(engine, name, mode, share, root, env_config, written.write, show=rank == 0)
        del policy, engine  # before the next one loads
    written.wait()
    if rank == 0:
        if state != "finished":
            summarise(written, plays, questions, bad + without, resolved)
            runs.finish_run(config.out)
        report(Path(config.out), config.strict)


if __name__ == "__main__":
    run_main(main, out_of_memory)
