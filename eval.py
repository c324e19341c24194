"""Evaluation: accuracy against frames, with and without zooming; or one question about one video.

    python eval.py                                     the demo: runs/sft and runs/rl on runs/data/test.jsonl
    python eval.py --model DIR [DIR ...] --data questions.jsonl --mode uniform --num_frames 128
    torchrun --standalone --nproc_per_node=8 eval.py --model DIR --data questions.jsonl
    python eval.py --model DIR --video FILE --question TEXT [--options A B C D] [--save_frames DIR]

Modes: `zoom` plays full episodes; `uniform` shows --num_frames uniform frames and takes the answer, no tool.
The demo adds each policy's accuracy with zooming off, and for synthetic data the best that any uniform
sampler could reach with as many frames as the policy looked at (see demo/synthetic.py).

What are the zooms good for (controls/; several words of a flag are several rows of one table)?
    --clips grey other none           each clip is grey, another video's, or away, beside the same turns with
                                      the clip shown: clips.jsonl, clips_by_kind.jsonl
    --zoom policy always never gate   as the policy likes; no answer before a zoom; no tool; a zoom only where
                                      --votes direct answers disagree: gate.jsonl
    --votes K                         the majority of K samples at temperature 1

Each finished question is a line of --out/episodes.jsonl at once, and the tables are made from these lines
(training/tables.py): results.json (a row for each policy and mode, with the settings), by_kind.jsonl and
by_duration.jsonl (the same by kind of question and length of video), zooms.jsonl and zooms_by_number.jsonl
(where each zoom went against where the evidence is). So a run that was stopped goes on, see
--resume. A video that is missing or cannot be read ends nothing: it is counted, and named in skipped.jsonl;
once it can be played the same command plays it and makes the tables anew.

Temperature 0, as in the paper: nothing depends on what is played together, else on --seed and each process's
share. An invalid call is a turn that could not be carried out, among all calls; where no tool is offered,
calls are counted apart (no tool), and answers without <answer>, too, which are graded all the same
(untagged). Seconds are those of playing, summed over processes.
"""

import itertools
import json
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from common import (RunConfig, UserError, check_shown, choose_dtype, open_folder, parse_flags, run_main,
                    start_processes, warn, write_json, write_jsonl)
from controls import altered, effects, modes, places, votes
from demo import synthetic
from protocols import protocol_of
from rollout import RolloutConfig
from scale.pick import cache_gb
from sources import served
from sources.judge import judge
from sources.read import read_questions
from sources.rows import question_error
from sources.served import ServedConfig, ServedEngine, Server
from training import run_folder, tables
from training.checkpoints import load_policy
from training.environment import run_environment, with_chosen_frames
from training.held_out import make_player, missing_file, unplayable
from training.memory import out_of_memory
from video import open_video


@dataclass(frozen=True)
class Config(RolloutConfig, RunConfig, ServedConfig):
    model: list[str] | None = None  # folders or hub names; else those of runs/sft and runs/rl that are there
    data: str = "runs/data/test.jsonl"  # questions
    out: str = "runs/eval"  # folder for results.json and episodes.jsonl
    resume: str = "auto"  # auto: an unfinished run in --out goes on; never: it is moved aside
    strict: bool = False  # end with status 3, after the table, if any row or video was bad
    mode: str | None = None  # zoom, uniform (see above); else zoom, of the demo's policies zoom off, too
    clips: list[str] | None = None  # shown, grey, other, none: what zooms show; by default shown
    zoom: list[str] | None = None  # policy, always, never, gate: who decides on zooms; by default policy
    votes: int | None = None  # samples of a question, whose majority answers; by default one answer
    temperature: float = 0.0  # 0 takes the most likely token; with --votes 0 is 1
    max_questions: int | None = None  # use only the first questions of the file
    max_turn_tokens: int | None = None  # an assistant turn is cut off here; else as trained
    max_rows: int = 100  # episodes at one time, at most
    video: str | None = None  # ask about this video file instead
    question: str | None = None  # ... this question
    options: list[str] | None = None  # ... with these options
    judge_url: str | None = None  # of a server with a judge of open answers; by default none
    judge_model: str | None = None  # the judge's name there; else the only model that it has
    save_frames: str | None = None  # ... and write what was seen as PNG strips into this folder


MAY_DIFFER = (*served.MAY_DIFFER, "judge_url", "judge_model", "strict", "video", "question", "options",
              "save_frames")  # when a run goes on
TABLES = "by_kind", "by_duration", "skipped", "clips", "clips_by_kind", "gate", "zooms", "zooms_by_number"
FILES = rf"results\.json|(episodes(\.rank\d+)?|answers|judge|{'|'.join(TABLES)})\.jsonl"  # that it writes


def environment(name, config):
    """What a checkpoint plays, by the flags. Raises UserError."""
    if config.mode == "uniform":
        config = replace(config, max_zooms=0)
    return run_environment(None if config.base_url and not config.model else name, config)


def load(name, env_config, config, device, answers=os.devnull):
    """The policy of a checkpoint; with --base_url the server that plays it, whose answers are kept in the
    file `answers`. Raises UserError."""
    if config.base_url:
        return Server(config, answers, env_config)
    return load_policy(name, device, choose_dtype(config.dtype, device), env_config)


def make_engine(policy, mode, config, rank):
    """What plays a policy's episodes, as many a question as a Mode has votes."""
    turn_tokens = policy.env_config.max_turn_tokens
    config = replace(config, max_turn_tokens=turn_tokens, temperature=mode.temperature)
    if config.base_url:
        return ServedEngine(policy, mode.votes, config, config.seed)
    config = replace(config, cache_gb=cache_gb(policy, config))
    generator = torch.Generator(policy.device).manual_seed(config.seed * 1000 + rank)
    return make_player(policy, config, generator, mode.votes)


# ---------------------------------------------------------------------------------------------------- playing
def evaluate(engine, play, mode, questions, root, env_config, write, show=True):
    """Plays each of the {number: question} for a Play, as its Mode says. `write` gets a dict of each as soon
    as it is over, and at the end one of each question whose video could not be read."""
    there, skipped = {}, []
    for number, question in questions.items():
        reason = missing_file(question, root)
        if reason:
            skipped.append((question["id"], reason))
        else:
            there[number] = question
    numbers, last, samples = list(there), time.monotonic(), defaultdict(dict)
    with tqdm(total=len(there), desc=" ".join(play), dynamic_ncols=True, leave=False,
              disable=not show) as bar:
        def on_end(episode):
            nonlocal last
            number = numbers[episode.question_number]
            samples[number][episode.number] = record(episode)
            episode.forget_frames()
            if len(samples[number]) < mode.votes:
                return
            began, last = last, time.monotonic()
            said = [sample for _, sample in sorted(samples.pop(number).items())]
            line = said[0] if mode.votes == 1 else votes.vote(said, there[number])
            write(play._asdict() | {"number": number, "seconds": last - began} | line)
            bar.update()

        make_env = altered.maker(mode)
        _, unread = engine.play([*there.values()], root, env_config, on_end, make_env)
    for question_id, reason in skipped + unread:
        write(play._asdict() | {"question": question_id, "skipped": reason})


def record(e):
    """What the tables need of an episode, and what was said in it."""
    env, question = e.env, e.env.question
    with_tool = env.config.max_zooms > 0
    hits = [call.hit for turn in env.turns for call in turn.calls if call.hit is not None]
    acts = [turn.text.rpartition("</think>")[2] for turn in env.turns]
    calls = sum(any(f"<{tag}>" in act for tag in env.tools) for act in acts)
    refused = altered.num_refused(env)
    right = None if tables.waits_for_judge(question) else env.rewards["accuracy"]
    return {"question": question["id"], "right": right, "answer": env.answer(),
            "kind": tables.kind_of(question),
            "untagged": any(turn.untagged for turn in env.turns), "frames": env.frames_shown,
            "zooms": env.num_calls(), "hits": sum(hits), "hits_known": len(hits),
            "invalid": env.num_invalid() - refused if with_tool else None, "refused": refused,
            "calls_without_tool": None if with_tool else calls,
            **e.token_counts(), "overview_frames": len(env.watched[0]),
            "turns": [turn.text for turn in env.turns], "calls": [*places.calls_of(env)]}


# -------------------------------------------------------------------------------------------------- the table
def no_question(where, bad):
    first = "; ".join(f"{name}: {reason}" for name, reason in bad[:3])
    return UserError(f"{where}: no question could be played ({first})")


def summarise(written, names, ways, questions, bad, config):
    """Writes the tables and skipped.jsonl from the lines of all processes, and from run.json what each policy
    was played with. names: of policies; ways: {name: Mode}. Raises UserError if no question could be
    played."""
    unread = [line for line in written.read() if "skipped" in line]
    episodes, out = written.merge(), written.out
    skipped = list(dict.fromkeys(bad + [(line["question"], line["skipped"]) for line in unread]))
    if not episodes:
        raise no_question(config.data, skipped)
    judged = {"judge": judge(episodes, questions, config, out / "judge.jsonl")} if config.judge_url else {}
    by_play, run = defaultdict(list), run_folder.note(out)
    for e in episodes:
        by_play[e["policy"], e["mode"]].append(e)
    found = {name: [] for name in TABLES}
    found["skipped"] = [{"row": where, "reason": reason} for where, reason in skipped]

    def add_rows(play, played, settings):
        kinds, durations = tables.table_rows(*play, played, questions, len(bad))
        refused = sorted({name for e in played for name in e.get("refused_parameters", ())})
        kinds[0]["settings"] = settings | judged | ({"refused": refused} if refused else {})
        asked = [questions[e["number"]] for e in played]
        synthetic_ones = all("uniform_accuracy" in (q.get("meta") or {}) for q in asked)
        if asked and play.mode in ("zoom", "uniform") and synthetic_ones:
            kinds.append(synthetic.uniform_bound(kinds[0], asked))
        found["by_kind"] += kinds
        found["by_duration"] += durations

    for name in names:
        for mode in ways.values():
            play = Play(name, mode.name)
            settings = tables.run_settings(config, run.get(environment_key(play)) or {})
            add_rows(play, by_play[play], settings | modes.settings(mode))
            zooms = [row for e in by_play[play] for row in places.zoom_rows(e, questions[e["number"]])]
            found["zooms"] += zooms
            found["zooms_by_number"] += places.by_number(zooms)
            if mode.clips != "shown":
                rows = effects.effects(by_play[name, "zoom"], by_play[play])
                found["clips"] += rows
                found["clips_by_kind"] += effects.effect_rows(rows)
        if gate := modes.gate_modes(config):
            play, direct, zoom = (Play(name, mode) for mode in gate)
            lines, words = votes.gate(by_play[direct], by_play[zoom], play.mode, config.votes, questions)
            found["gate"] += lines
            settings = tables.run_settings(config, run.get(environment_key(zoom)) or {})
            add_rows(play, lines, settings | modes.settings(ways[direct.mode]) | {"gate": words})
    write_json(out / "results.json", [row for row in found["by_kind"] if row["kind"] == "all"])
    for name, rows in found.items():
        if rows or name in ("by_kind", "by_duration", "skipped"):
            write_jsonl(out / f"{name}.jsonl", rows)


def report(out, strict):
    """Prints what a finished run has written. Ends with status 3 if `strict` and any row or video was bad."""
    found = {name: [] for name in TABLES}
    for name in TABLES:
        if (out / f"{name}.jsonl").exists():  # runs of earlier versions have fewer
            found[name] = [json.loads(line) for line in open(out / f"{name}.jsonl", encoding="utf-8")]
    skipped = found["skipped"]
    print(tables.report(found["by_kind"], found["by_duration"], skipped) + "\n")
    if any(row["num_with_evidence"] for row in found["zooms_by_number"]):
        print(places.report(found["zooms_by_number"]) + "\n")
    if found["clips_by_kind"]:
        print(effects.report(found["clips_by_kind"]) + "\n")
    print(f"wrote {out / 'results.json'}", flush=True)
    if strict and skipped:
        sys.exit(3)


# ------------------------------------------------------------------------- one question about one video
def ask(config, world, device):
    """Plays one question about one video and prints the dialogue.

    config: with video, question, options, save_frames. world: number of processes. Raises UserError."""
    if world > 1 or config.video is None or not (config.question or "").strip():
        raise UserError("to ask about a video give both --video FILE and --question TEXT, to one process")
    given = [flag for flag in ("clips", "zoom", "votes") if getattr(config, flag)]
    if given:
        raise UserError(f"--{given[0]} is for a file of questions, not for one about a video")
    question = {"id": "question", "video": config.video, "question": config.question,
                "options": config.options, "answer": "A" if config.options else "unknown",
                "answer_type": "multiple_choice" if config.options else "open_ended"}
    reason = question_error(question | {"video": "any"})  # its name may be no UTF-8
    if reason:
        raise UserError(reason)
    open_video(config.video)  # before the model loads
    if config.save_frames:
        open_folder(config.save_frames)
    chosen, _ = with_chosen_frames([question], config)
    names = checkpoints(config)
    name = names[0] if config.model else names[-1]
    mode = modes.Mode("zoom", temperature=config.temperature)
    engine = make_engine(load(name, environment(name, config), config, device), mode, config, 0)
    groups, skipped = engine.play([*chosen.values()])
    if skipped:
        raise UserError(skipped[0][1])
    env = groups[0][0].env
    print(env.describe())
    answer = env.answer()
    print(f"answer: {'none (the policy gave no answer)' if answer is None else answer}")
    check_shown()
    if not config.save_frames:
        return
    for number, frames in enumerate(env.watched):
        if frames:
            times = f"{frames[0].time_s:.2f}s-{frames[-1].time_s:.2f}s"
            name = Path(config.save_frames, f"{number}_{'zoom' if number else 'overview'}_{times}.png")
            picture = strip([frame.image for frame in frames])
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(name)
            print(f"wrote {name}")


def strip(images):
    """(3, H, W) images side by side, upper edges in line; where a film's size changes, some are higher."""
    height = max(image.shape[1] for image in images)
    return torch.cat([torch.nn.functional.pad(i, (0, 0, 0, height - i.shape[1])) for i in images], dim=2)


# ------------------------------------------------------------------------------------------- the script
class Play(NamedTuple):
    """What is evaluated: a checkpoint's name, and that of a Mode: zoom, uniform, zoom off, .."""

    policy: str
    mode: str


def checkpoints(config):
    """The names of the checkpoints that are evaluated. Raises UserError where there is none."""
    if config.base_url:
        names = config.model or [config.served_model or "served"]
        if len(names) > 1:
            raise UserError("--base_url plays one model: --model is the one folder that says what is played")
        return names
    names = config.model or [name for name in ("runs/sft", "runs/rl") if os.path.exists(name)]
    if not names:
        raise UserError("no runs/sft or runs/rl yet: run sft.py and rl.py, or name checkpoints with --model")
    return list(dict.fromkeys(names))


def environment_key(play):
    """Where run.json keeps what a Play was played with."""
    return f"environment of {play.policy}, {play.mode}"


def play_share(name, env_config, ways, questions, done, written, config, rank, world, device):
    """Plays what is left of this process's share of the questions with one policy, in each of its ways.
    done: {(Play, number)} that other processes or an earlier start have played."""
    left = {}
    for mode in ways:
        play = Play(name, mode)
        numbers = [number for number in questions if (play, number) not in done]
        left[play] = {number: questions[number] for number in numbers[rank::world]}
    if not any(left.values()):
        return
    policy = load(name, env_config, config, device, Path(config.out) / "answers.jsonl")
    engine = sampling = None
    for play, share in left.items():
        mode, env_config = ways[play.mode], policy.env_config
        if (mode.votes, mode.temperature) != sampling:
            if engine:
                engine.release()
            engine, first = make_engine(policy, mode, config, rank), engine is None
            sampling = mode.votes, mode.temperature
            if rank == 0 and first:
                by = f"{policy.model} on a server, {config.concurrency} at one time" if config.base_url else (
                    f"{world} process(es) on {device}, {policy.dtype}, decode step {engine.decoder.path}")
                print(f"{name}: {len(questions)} questions, {by}", flush=True)
        if mode.zoom == "never":
            env_config = replace(env_config, max_zooms=0)
        settings = tables.environment_settings(env_config)
        if config.base_url:
            served.same_model(config.out, "served model", policy.model)
            settings["served_model"] = policy.model
        if rank == 0:
            run_folder.note(config.out, **{environment_key(play): settings})
        root = Path(config.data).parent
        evaluate(engine, play, mode, share, root, env_config, written.write, show=rank == 0)


def main():
    least_one = "max_questions", "max_turn_tokens", "max_rows", "votes", "concurrency", "max_tokens_total"
    config = parse_flags(Config, __doc__, least_one)
    rank, world, device = start_processes(config.device)
    if config.base_url and world > 1:
        raise UserError("--base_url: one process asks, --concurrency episodes at one time")
    if len(config.num_frames or []) > 1:
        raise UserError("--num_frames takes one number here: evaluate each in a run of its own")
    for flag, known in (("mode", (None, "zoom", "uniform")), ("resume", ("auto", "never"))):
        if getattr(config, flag) not in known:
            names = " or ".join(name for name in known if name)
            raise UserError(f"--{flag} must be {names}, not {getattr(config, flag)}")
    modes.check_flags(config)
    dtype = None if config.base_url else str(choose_dtype(config.dtype, device)).removeprefix("torch.")
    if config.video is not None or config.question is not None:
        return ask(config, world, device)

    # all that can be wrong, before a model loads
    names = checkpoints(config)
    rows, bad = read_questions(config.data, config.max_bad)
    questions, without = with_chosen_frames(rows[:config.max_questions], config)  # by their place in the file
    environments = {name: environment(name, config) for name in names}
    for name, env_config in environments.items():
        modes.check_tool(config, name, env_config, protocol_of(env_config).tools)
    if "other" in (config.clips or ()):
        questions = altered.with_other_videos(questions, rows, Path(config.data).parent, config.seed)

    # each process plays its share, and writes a line an episode
    is_demo = all(env_config.preset == "demo" for env_config in environments.values())
    ways = modes.modes_of(config, is_demo)
    plays = [Play(name, mode) for name in names for mode in ways]

    def key(line):
        if "skipped" in line:
            return None
        return plays.index((line["policy"], line["mode"])), line["number"]

    root = Path(config.data).parent
    missing = {number: reason for number, q in questions.items() if (reason := missing_file(q, root))}

    def check_new():
        if len(missing) == len(questions):
            raise no_question(config.data, without + [(questions[n]["id"], missing[n]) for n in missing])

    def is_whole(done):
        """Whether the tables are there, and none of the questions that are not in `done`, keys, can be
        played; says why."""
        if not all(Path(config.out, name).exists() for name in ("by_kind.jsonl", "skipped.jsonl")):
            return False
        reason = None
        for place, number in itertools.product(range(len(plays)), questions):
            if done and (place, number) not in done:  # else episodes.jsonl was taken away: the tables stay
                reason = unplayable(questions[number], environments[plays[place].policy], root)
                if not reason:
                    return False
        if reason:
            warn(f"what was skipped cannot be played yet ({reason})")
        return True

    written = run_folder.Rows(config.out, "episodes", key, rank)
    inputs = {"question file": config.data} | run_folder.files_of(config)
    inputs |= {f"checkpoint {name}": name for name in names}
    state, keys = written.begin(replace(config, dtype=dtype), MAY_DIFFER, inputs, FILES, check_new, is_whole)
    done = {(plays[place], number) for place, number in keys}
    if state != "finished":
        lacking = [number for number in missing if any((play, number) not in done for play in plays)]
        if lacking:
            warn(f"{len(lacking)} of {len(questions)} questions are without their video or images "
                 f"({missing[lacking[0]]}); the same command plays them once these are there")
        for name in names:
            play_share(name, environments[name], ways, questions, done, written, config, rank, world, device)
    written.wait()
    if rank == 0:
        if state != "finished" or config.judge_url:
            summarise(written, names, ways, questions, bad + without, replace(config, dtype=dtype))
            run_folder.finish_run(config.out)
        report(Path(config.out), config.strict)


if __name__ == "__main__":
    run_main(main, out_of_memory)
