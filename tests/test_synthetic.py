"""Synthetic data: videos show what the questions say, the teacher's trajectories verify, the bound holds."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from sources.rows import question_error
from common import UserError
from demo import synthetic
from demo.tiny_base import TINY_BASE
from model import replay
from training.checkpoints import load_policy
from video import Video
from zoom_env import ZoomEnv


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    synthetic.synthetic(folder, 40, 10, seed=7)
    read = lambda name: [json.loads(line) for line in open(folder / name)]
    return folder, read("train.jsonl"), read("test.jsonl"), read("sft.jsonl")


def test_same_seed_same_data(made, tmp_path):
    folder, *_ = made
    synthetic.synthetic(tmp_path, 40, 10, seed=7)
    for name in ("train.jsonl", "test.jsonl", "sft.jsonl", "videos/train_0003.mp4"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_questions_are_well_formed_and_of_all_kinds(made):
    folder, train, test, _ = made
    assert len(train) == 40 and len(test) == 10 and not any(map(question_error, train + test))
    assert Counter(q["meta"]["kind"] for q in train) == {"detail": 16, "count": 8, "order": 8, "holistic": 8}
    assert not {q["video"] for q in train} & {q["video"] for q in test}


def nearest(pixel):
    colours = synthetic.PALETTE | {"grey": synthetic.GREY, "black": (0, 0, 0)}
    return min(colours, key=lambda c: sum((int(a) - b) ** 2 for a, b in zip(pixel, colours[c])))


def test_videos_show_the_evidence(made):
    """The decoded file, looked at in the middle of each piece of evidence, shows a flash on the scene asked
    about, in the colour of the right option; and the overview shows no flash at all."""
    folder, train, _, _ = made
    seen = 0
    for q in train:
        video = Video(folder / q["video"])
        assert video.duration_s == pytest.approx(q["meta"]["duration_s"], abs=0.01)
        assert 119.9 <= video.duration_s <= 150.1
        right = q["options"]["ABCD".index(q["answer"])]
        for start, end in q["evidence"] or []:
            (_, image), = video.frames_at([(start + end) / 2])
            # the card can cover some of the corners
            corners = {nearest(image[y, x]) for y in (0, 27) for x in (0, 27)}
            scene = next(c for c in corners if c in q["question"])
            centre = nearest(image[14, 14])
            assert centre not in ("grey", "black", scene)
            if "colour" in q["question"]:
                assert centre in right
                seen += 1
        env = ZoomEnv(q, synthetic.TINY_ENV, folder)
        env.reset()
        for frame in env.watched[0]:
            assert nearest(frame.image[:, 14, 14]) == nearest(frame.image[:, 1, 1])
        video.close()
    assert seen > 10


def test_counts_and_order_of_scenes_are_what_the_video_shows(made):
    """What no piece of evidence tells alone: how many there are, and which scene the overview shows where."""
    folder, train, test, _ = made
    seen = Counter()
    for q in train + test:
        right, kind = q["options"]["ABCD".index(q["answer"])], q["meta"]["kind"]
        if kind == "count":
            assert right == str(len(q["evidence"]))
        elif kind == "holistic":
            env = ZoomEnv(q, synthetic.TINY_ENV, folder)
            env.reset()
            scenes = [nearest(frame.image[:, 1, 1]) for frame in env.watched[0]]
            assert sorted(scenes[:-1]) == sorted(synthetic.COLOURS) and scenes[-1] == "grey"
            named = [c for c in synthetic.COLOURS if f" {c} scene" in q["question"]]
            asked = q["question"]
            at = 0 if "first" in asked else 7 if "last" in asked else scenes.index(named[0]) + 1
            assert right == scenes[at]
        seen[kind] += 1
    assert seen["count"] == seen["holistic"] == 10


def test_trajectories_verify_and_reflections_start_wrong(made):
    folder, _, _, rows = made
    policy = load_policy(TINY_BASE)
    kinds = Counter()
    for row in rows:
        dialogue, env = replay(policy, row, folder)
        assert env.rewards["accuracy"] == 1 and env.rewards["format"] == 1
        kinds[row["kind"], row["question"]["meta"]["kind"], env.num_calls() > 0] += 1
        if row["kind"] == "reflection":
            hits = [any(call.hit for call in turn.calls) for turn in env.turns]
            assert not hits[0] and any(hits[1:])
    zooms = lambda kind: sum(n for (k, q, z), n in kinds.items() if q == kind and z)
    assert zooms("detail") and zooms("count") and zooms("order") and not zooms("holistic")
    assert any(k == "reflection" for k, _, _ in kinds)


def test_uniform_accuracy_equals_a_simulation(made):
    """The bound counts what uniform frames show: against drawing phases at random and looking."""
    _, train, _, _ = made
    rng = np.random.default_rng(0)
    for q in train[:20]:
        if not q["evidence"]:
            assert synthetic.uniform_accuracy(q, 8) == 1
            continue
        scores = []
        step = q["meta"]["duration_s"] / 30
        for _ in range(3000):
            times = (np.arange(30) + rng.random()) * step
            shown = [((start <= times) & (times < end)).any() for start, end in q["evidence"]]
            open_options = {"detail": 4, "count": 5 - max(1, sum(shown)), "order": 2 if any(shown) else 4}
            scores.append(1.0 if all(shown) else 1 / open_options[q["meta"]["kind"]])
        assert synthetic.uniform_accuracy(q, 30) == pytest.approx(np.mean(scores), abs=0.03)
        assert synthetic.uniform_accuracy(q, 100_000) == 1


def test_careless_teacher_leaves_something_to_learn(made):
    """It chooses between 0.5 and 1 frame a second, and only the denser one always shows a flash."""
    folder, train, _, rows = made
    fps = Counter(t.split('"fps": ')[1][:4] for row in rows for t in row["turns"] if "fps" in t)
    assert set(fps) == {"0.50", "1.00"} and fps["0.50"] > fps["1.00"]
    rng = random.Random(0)
    duration_s, scenes = synthetic.make_scenes(rng)
    assert all(f.end_s - f.start_s > 1 for s in scenes for f in s.flashes)


def test_data_of_another_seed_is_refused(tmp_path):
    """Else a second seed would train and test on the first one's data, without a word."""
    synthetic.synthetic(tmp_path, 2, 1, seed=1)
    before = (tmp_path / "train.jsonl").read_text()
    synthetic.ensure_demo(tmp_path, 1)
    with pytest.raises(UserError, match="seed 1, not 2"):
        synthetic.ensure_demo(tmp_path, 2)
    (tmp_path / synthetic.MADE).unlink()  # made before it was remembered
    with pytest.raises(UserError, match="seed unknown, not 1"):
        synthetic.ensure_demo(tmp_path, 1)
    assert (tmp_path / "train.jsonl").read_text() == before
