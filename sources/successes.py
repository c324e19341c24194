"""Rejection fine-tuning: a policy's own successes as trajectories that sft.py trains on.

    python data_prep.py successes --model runs/rl --questions runs/data/train.jsonl --out runs/data/rft.jsonl
    python sft.py --model runs/sft --data runs/data/rft.jsonl --out runs/rft

Each question is played --samples times at temperature 1. An episode is a success if it is right (a segment:
from an overlap of 0.5 on), well formed in every turn and not cut off; of a question's successes at most
--keep are written, first those of whose zooms the largest share hit the evidence, where that is known. A row
is what was played: an episode whose text would be read as other tokens than were sampled is left out, too.

Right is not the same as understood: of four options one episode in four is right by luck, and of four samples
of a policy that only guesses two questions in three have a success. Zooms that hit tell some of these apart;
a question without evidence, or an answer without a zoom, has nothing that does.

    torchrun --standalone --nproc_per_node=8 data_prep.py successes ...     each process plays its share
"""

from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from common import UserError, choose_dtype, gather, open_folder, start_processes, write_jsonl
from model import end_turn, until_call
from rollout import RolloutConfig
from sources.files import check_out, moved_question, write_skipped
from sources.read import read_questions
from training.checkpoints import load_policy
from training.held_out import make_player
from training.tables import waits_for_judge

TEMPERATURE = 1.0
MAX_BAD = 0.01  # share of unusable rows of a question file


def successes(model, questions, out, samples=4, keep=1, seed=0, device=None):
    """Plays the question file and writes the trajectory file `out`, and beside it the questions that could
    not be played; prints counts. Returns the rows, and {why an episode was not written: how many}. Raises
    UserError, also where there is no success."""
    out = check_out(out, questions)
    rank, world, device = start_processes(device)
    rows, skipped = read_questions(questions, MAX_BAD)
    skipped += [(row["id"], "its answer waits for a judge") for row in rows if waits_for_judge(row)]
    rows = [row for row in rows if not waits_for_judge(row)]
    open_folder(out.parent)
    # play
    policy = load_policy(model, device, choose_dtype(None, device))
    config = RolloutConfig(temperature=TEMPERATURE, max_turn_tokens=policy.env_config.max_turn_tokens)
    generator = torch.Generator(device).manual_seed(seed * 1000 + rank)
    engine, mine = make_player(policy, config, generator, samples), rows[rank::world]
    with tqdm(total=len(mine) * samples, desc="successes", unit="episode", dynamic_ncols=True,
              disable=rank > 0) as bar:
        def on_end(episode):
            episode.forget_frames()
            bar.update()

        groups, unread = engine.play(mine, Path(questions).parent, on_end=on_end)
    # choose
    found, rejects = [], Counter()
    for number, group in enumerate(groups):
        for episode in choose(policy, group, keep, rejects):
            row = trajectory(episode, Path(questions).parent, out)
            row["provenance"] |= {"model": str(model), "seed": seed, "temperature": TEMPERATURE}
            found.append((number * world + rank, row))
    found = [row for _, row in sorted(gather(found), key=lambda pair: pair[0])]
    skipped += gather(unread)
    rejects = sum(gather([rejects]), Counter())
    # write
    if rank == 0:
        reasons = ", ".join(f"{reason} {number}" for reason, number in rejects.most_common()) or "none"
        print(f"successes: {len({row['question']['id'] for row in found})} of {len(rows)} questions, "
              f"{len(found)} trajectories; episodes left out: {reasons}; "
              f"questions not played: {len(skipped)}")
        write_skipped(out, skipped)
    if not found:
        raise UserError(f"{model} has no success on {questions}: more --samples, or easier questions")
    if rank == 0:
        write_jsonl(out, found)
        print(f"wrote {out}")
    return found, rejects


def choose(policy, group, keep, rejects):
    """The episodes of a question that are written; `rejects` counts why the others are not."""
    good, texts = [], []
    for episode in group:
        reason = why_not(policy, episode)
        said = [turn.text for turn in episode.env.turns]
        if not reason and said in texts:
            reason = "said before"
        if reason:
            rejects[reason] += 1
            continue
        good.append(episode)
        texts.append(said)
    good.sort(key=lambda episode: -episode.env.rewards["hit"])  # equal ones stay in order
    rejects["more than --keep"] += len(good[keep:])
    return good[:keep]


def why_not(policy, episode):
    """Why an episode is no success, or None."""
    env, dialogue = episode.env, episode.dialogue
    if episode.truncated:
        return "cut off"
    if env.rewards["accuracy"] < 0.5:
        return "wrong"
    if env.rewards["format"] < 1:
        return "not well formed"
    # what sft.py will train
    texts = [until_call(turn.text, env.tools) for turn in env.turns]
    read = [token for text in texts for token in end_turn(policy, text, env)[0].ids]
    if read != [token for token, trained in zip(dialogue.ids, dialogue.trained) if trained]:
        return "its text is other tokens"
    return None


def trajectory(episode, root, out):
    """A row of the trajectory file `out`, of an episode whose question's files are relative to `root`."""
    env = episode.env
    question, turns = moved_question(env.question, root, out), [turn.text for turn in env.turns]
    return {"question": question, "kind": "success", "turns": turns, "learn": [True] * len(turns),
            "provenance": {"sample": episode.number, "max_zooms": env.config.max_zooms}}
