"""Random bytes in each file that a command reads: one line that names it, or what can still be read; never another
exception, never a hang. `pytest -m slow --times 10` does the same 500 times."""

import json
import random
import shutil
import signal

import pytest
from tiny import random_policy

from common import RunConfig, UserError
from demo import synthetic
from model import replay
from sources.read import read_questions, read_trajectories
from training.checkpoints import load_policy, save_policy
from training.environment import run_environment, with_chosen_frames
from video import VideoError, open_video


def make_place(place):
    """A folder with one of each file that commands read."""
    synthetic.synthetic(place / "data", 3, 2, seed=1)
    save_policy(random_policy(), place / "model")
    (place / "overview.json").write_text(json.dumps(
        [{"video_name": json.loads(line)["video"], "question": json.loads(line)["question"], "frame_idx": [0, 5.0]}
         for line in open(place / "data" / "test.jsonl")]))
    (place / "prompt.txt").write_text("Look closely. é 你")
    return place


def files_read(place):
    return sorted(f for f in place.rglob("*") if f.is_file() and f.name not in ("data.json", "train.jsonl"))


def spoil(content, rng):
    """Bytes of a file with some that are random: all of it, some in the middle, some more, a cut end."""
    noise = rng.randbytes(rng.choice([1, 2, 8, 100, 5000]))
    at = rng.randrange(len(content) + 1) if rng.random() < 0.5 else rng.randrange(min(len(content), 500) + 1)
    return rng.choice([noise, content[:at] + noise + content[at + len(noise):], content[:at] + noise + content[at:],
                       content[:at]])


def read(place, file):
    """What a command does with it."""
    if file.name == "test.jsonl":
        for question in read_questions(file, 0.9)[0]:
            json.dumps(question).encode()
    elif file.name == "sft.jsonl":
        policy = random_policy()
        for row in read_trajectories(file, 0.9)[0]:
            try:
                replay(policy, row, file.parent)
            except (VideoError, ValueError):  # named and skipped, as sft.py does
                pass
    elif file.name == "overview.json":
        questions = read_questions(place / "data" / "test.jsonl", 0)[0]
        with_chosen_frames(questions, RunConfig(overview=str(file), max_bad=1.0))
    elif file.name == "prompt.txt":
        run_environment(place / "model", RunConfig(system_prompt=file)).system_prompt.encode()
    elif file.suffix == ".mp4":
        video = open_video(str(file))
        video.frames_at([0.0, video.duration_s / 2])
    else:
        load_policy(place / "model")


def one_case(place, scratch, seed):
    """Spoils one file of a copy and reads it. Returns what came of it: read, or the error's line."""
    rng, files = random.Random(seed), files_read(place)
    shutil.copytree(place, scratch)
    file = scratch / files[seed % len(files)].relative_to(place)
    file.write_bytes(spoil(file.read_bytes(), rng))
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{file.name}: no end after 60 s"))
    signal.alarm(60)
    try:
        read(scratch, file)
        return f"{file.name}: read"
    except UserError as error:
        assert "\n" not in str(error) and str(error).strip()
        return f"{file.name}: {error}"
    finally:
        signal.alarm(0)
        shutil.rmtree(scratch)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


def check_cases(place, scratch, seeds):
    """Spoils files one after the other; the test fails with all that went wrong."""
    failed = []
    for seed in seeds:
        try:
            one_case(place, scratch, seed)
        except Exception as error:
            failed.append(f"{seed}: {error!r}")
    assert not failed, "\n".join(failed)


def test_random_bytes_in_each_file(place, tmp_path):
    files = files_read(place)
    kinds = {file.suffix if file.suffix == ".mp4" else file.name: number for number, file in enumerate(files)}
    check_cases(place, tmp_path / "copy", kinds.values())


@pytest.mark.slow
def test_random_bytes_in_any_file(place, tmp_path, times):
    check_cases(place, tmp_path / "copy", range(50 * times))
