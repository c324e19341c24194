"""Synthetic data: videos show what the questions say, the teacher's trajectories verify, the bound holds."""

import json
import random
import re
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from launcher import launch

from common import UserError
from demo import synthetic
from demo.search import SEARCH
from demo.tiny_base import TINY_BASE
from model import replay
from sources.rows import question_error
from training.checkpoints import load_policy
from training.run_folder import LOCK
from video import Video
from zoom_env import ZoomEnv, slice_centres


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    synthetic.synthetic(folder, 40, 10, seed=7)
    read = lambda name: [json.loads(line) for line in open(folder / name)]
    return folder, read("train.jsonl"), read("test.jsonl"), read("sft.jsonl")


def test_same_seed_same_data(tmp_path):
    contents = []
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        folder = tmp_path / name
        synthetic.synthetic(folder, 4, 2, seed)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
        contents.append({str(path.relative_to(folder)): path.read_bytes() for path in files})
    first, again, other = contents
    assert sorted(first) == ["data.json", "sft.jsonl", "test.jsonl", "train.jsonl", "videos/test_0000.mp4",
                             "videos/train_0000.mp4"]
    assert first == again and not any(first[name] == other[name] for name in first)
    assert [first[name].count(b"\n") for name in ("train.jsonl", "test.jsonl")] == [4, 2]  # a part of a video's questions


def test_questions_are_well_formed_and_of_all_kinds(made):
    folder, train, test, _ = made
    assert len(train) == 40 and len(test) == 10 and not any(map(question_error, train + test))
    assert Counter(q["meta"]["kind"] for q in train) == {"detail": 16, "count": 8, "order": 8, "holistic": 8}
    assert not {q["video"] for q in train} & {q["video"] for q in test}
    assert len({q["id"] for q in train + test}) == 50 and all(len(set(q["options"])) == 4 for q in train + test)


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


def test_flashes_lie_apart_and_between_the_overviews_frames():
    """Each is longer than a second, in the scene's own span; two in a row differ in colour, so each can be counted."""
    for seed in range(50):
        duration_s, scenes = synthetic.make_scenes(random.Random(seed))
        slot_s = duration_s / 9
        assert [scene.colour for scene in scenes][-1] == "grey" and not scenes[-1].flashes
        assert sorted(len(scene.flashes) for scene in scenes[:-1]) == [1, 1, 1, 1, 1, 2, 3, 4]
        for i, scene in enumerate(scenes[:-1]):
            times = [(i + 0.5) * slot_s, *(t for f in scene.flashes for t in (f.start_s, f.end_s)), scenes[i + 1].start_s]
            assert scene.start_s <= times[0] and min(np.diff(times)) > 0.1
            colours = [scene.colour] + [f.picture.figure.colour for f in scene.flashes]
            assert all(a != b for a, b in zip(colours, colours[1:])) and scene.colour not in colours[1:]
            assert all(f.end_s - f.start_s > 1 and f.picture.background == scene.colour for f in scene.flashes)


def test_shapes_are_told_apart():
    """At any offset: a figure is where it is said to be, on its card, and no two look alike."""
    sizes = {}
    for shape in synthetic.SHAPES:
        for offset in ((0, 0), (2, -2)):
            image = synthetic.paint(synthetic.Picture("blue", synthetic.Figure("red", shape), offset))
            rows, columns = np.nonzero((image == synthetic.PALETTE["red"]).all(-1))
            card = (image == 0).all(-1).sum() + len(rows)
            assert card == 22 * 22 and (image[0, 0] == synthetic.PALETTE["blue"]).all()
            assert abs(columns.mean() - 13.5 - offset[0]) <= 1 and abs((rows.min() + rows.max()) / 2 - 13.5 - offset[1]) <= 1
            sizes.setdefault(shape, set()).add(len(rows))
    assert all(len(size) == 1 for size in sizes.values()) and len(set(map(tuple, sizes.values()))) == 4


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


def test_options_do_not_tell_the_order():
    """They are all pairs of two colours, and a pair of one colour is right as often as another. No flash has its
    scene's colour, so none of them is one of the two scenes': that would tell where it cannot be."""
    rng, alike = random.Random(0), []
    for _ in range(300):
        duration_s, scenes = synthetic.draw_scenes(rng, synthetic.DEMO)
        *_, order, _ = synthetic.make_questions(rng, "v.mp4", 0, duration_s, scenes)
        pairs = [option.split(" then ") for option in order["options"]]
        colours = {colour for pair in pairs for colour in pair}
        assert len(colours) == 2 and {*map(tuple, pairs)} == {*product(colours, repeat=2)}
        assert not colours & {*synthetic.named_scenes(order)}
        first, second = pairs["ABCD".index(order["answer"])]
        alike.append(first == second)
    assert 0.4 < sum(alike) / 300 < 0.6


def test_rows_without_zooms_answer_what_their_overview_shows(made):
    """Of each kind of question; a count is of all flashes, each in a frame of its own."""
    folder, _, _, rows = made
    kinds = Counter()
    for row in rows:
        if "max_zooms" in row["provenance"] and not row["provenance"]["guessed"]:
            question = row["question"]
            kinds[question["meta"]["kind"]] += 1
            times_s = slice_centres(0, question["meta"]["duration_s"], question.get("num_frames", 9))
            for start_s, end_s in question["evidence"] or []:
                assert any(start_s - 0.2 < time_s < end_s + 0.2 for time_s in times_s)
    assert {"detail", "holistic"} <= set(kinds)


def test_trajectories_verify_and_reflections_start_wrong(made):
    folder, _, _, rows = made
    policy = load_policy(TINY_BASE)
    kinds, wrong_first, looked_again = Counter(), 0, 0
    for row in rows:
        dialogue, env = replay(policy, row, folder)
        assert env.rewards["accuracy"] == 1 and env.rewards["format"] == 1
        kinds[row["kind"], row["question"]["meta"]["kind"], env.num_calls() > 0] += 1
        if row["kind"] == "reflection":
            hits = [any(call.hit for call in turn.calls) for turn in env.turns]
            wrong_first += not hits[0]
            looked_again += hits[0]
            assert any("not found" in turn and "<video_zoom>" in turn for turn in row["turns"][1:])
        else:
            assert not any("not found" in turn for turn in row["turns"])
        assert ("max_zooms" in row["provenance"]) <= (env.num_calls() == 0)
        assert len(row["turns"]) == len(env.turns)
    zooms = lambda kind: sum(n for (k, q, z), n in kinds.items() if q == kind and z)
    assert zooms("detail") and zooms("count") and zooms("order") and not zooms("holistic")
    assert any(k == "reflection" for k, _, _ in kinds)
    assert wrong_first and looked_again  # at a right scene that showed nothing
    assert any("max_zooms" in row["provenance"] for row in rows)


def test_uniform_accuracy_equals_a_simulation(made):
    """The bound counts what uniform frames show: against drawing phases at random and looking."""
    _, train, _, _ = made
    rng = np.random.default_rng(0)
    for q in train[:20]:
        if not q["evidence"]:
            assert synthetic.uniform_accuracy(q, 8) == 1
            continue
        step = q["meta"]["duration_s"] / 30
        phases = rng.random(3000)
        shown = np.zeros((3000, len(q["evidence"])), bool)
        for number, (start, end) in enumerate(q["evidence"]):
            first = np.ceil(start / step - phases)  # the first of the frames (n + phase) * step at or after the start
            shown[:, number] = (first + phases) * step < end
        seen = shown.sum(1)
        still_open = {"detail": 4, "count": 5 - np.maximum(1, seen), "order": np.where(seen > 0, 2, 4)}[q["meta"]["kind"]]
        expected = np.where(shown.all(1), 1.0, 1 / still_open).mean()
        assert synthetic.uniform_accuracy(q, 30) == pytest.approx(expected, abs=0.03)
        assert q["meta"]["uniform_accuracy"]["32"] == round(synthetic.uniform_accuracy(q, 32), 4)
        assert synthetic.uniform_accuracy(q, 100_000) == 1


def test_careless_teacher_leaves_something_to_learn(made):
    """It takes as many frames as it may or fewer, mostly fewer; only the denser look always shows a flash."""
    _, _, _, rows = made
    shares = Counter()
    for row in rows:
        for turn in row["turns"]:
            if "fps" in turn:
                start, end, fps = map(float, re.search(r"\[([\d.]+), ([\d.]+)\], .fps.: ([\d.]+)", turn).groups())
                most = max(f for f in (0.25, 0.5, 0.75, 1.0, 2.0) if f * (end - start) <= 16.02)  # of rounded times
                shares[round(fps / most, 2)] += 1
    assert set(shares) <= {0.5, 0.67, 1.0} and shares[0.5] > shares[1.0] > 0


def test_guesses_are_known_and_without_a_tool_there_is_none(made):
    """Rows without a zoom: the overview shows all of the evidence, whatever its size, or the answer is a guess and is
    said to be one; those by the protocol without a tool have any number of frames, and no guess."""
    folder, _, _, rows = made
    policy = load_policy(TINY_BASE)
    kinds, sizes, guesses = Counter(), {"direct": set(), "other": set()}, 0
    for row in rows:
        _, env = replay(policy, row, folder)
        question = row["question"]
        assert len(env.watched[0]) == question.get("num_frames", 9)
        direct = row["kind"] == "direct"
        sizes["direct" if direct else "other"].add(len(env.watched[0]))
        assert direct == (env.protocol == "direct")
        if not env.num_calls():
            times = [frame.time_s for frame in env.watched[0]]
            shown = all(any(start <= t < end for t in times) for start, end in question["evidence"] or [])
            assert shown != row["provenance"]["guessed"] and (shown or not direct)
            guesses += not shown
            kinds[direct, question["meta"]["kind"]] += 1
    assert min(kinds[True, "holistic"], kinds[False, "holistic"], kinds[True, "detail"], kinds[False, "detail"]) > 0
    assert sizes["other"] >= {5, 9, 17, 33} and len(sizes["direct"]) > 3 and guesses


# ------------------------------------------------------------------------------------------------ the suite search
@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    synthetic.synthetic(folder, 60, 5, seed=3, suite=SEARCH)
    read = lambda name: [json.loads(line) for line in open(folder / name)]
    return folder, read("train.jsonl"), read("sft.jsonl")


def card_and_figure(image):
    """Whether a frame shows a card, and whether a shape on it."""
    inside = {nearest(image[:, y, x]) for y in range(6, 22, 3) for x in range(6, 22, 3)}
    return "black" in inside, "black" in inside and len(inside) > 1


def test_one_look_finds_the_card_and_a_second_one_the_flash(searched):
    """As the policy sees it: the overview shows scenes alone; 12 frames of a scene have two with the card, around the
    flash, and none with a shape on it; 3 frames a second between these two show each flash."""
    folder, train, _ = searched
    seen = Counter()
    for q in train:
        env = ZoomEnv(q, synthetic.TINY_ENV, folder)
        env.reset()
        assert 540 <= env.duration_s < 600 and len(env.watched[0]) == 9
        assert not any(card_and_figure(frame.image)[0] for frame in env.watched[0])
        overview = {nearest(f.image[:, 1, 1]): f.time_s for f in env.watched[0]}
        times = [*overview.values(), env.duration_s]
        for scene in synthetic.named_scenes(q) if q["evidence"] else ():
            start = overview[scene]
            end = times[times.index(start) + 1]
            env.step(f'<video_zoom>{{"segment": [{start:.2f}, {end:.2f}], "fps": 0.2}}</video_zoom>')
            looks = [card_and_figure(frame.image) for frame in env.watched[-1]]
            assert len(looks) == 12 and sum(card for card, _ in looks) == 2 and not any(figure for _, figure in looks)
            first, second = [f.time_s for f, (card, _) in zip(env.watched[-1], looks) if card]
            inside = [span for span in q["evidence"] if first < span[0] and span[1] < second]
            assert inside
            env.step(f'<video_zoom>{{"segment": [{first:.2f}, {second:.2f}], "fps": 3}}</video_zoom>')
            shown = [frame.time_s for frame in env.watched[-1]]
            assert all(any(a - 1e-3 <= t < b + 1e-3 for t in shown) for a, b in inside), (inside, shown)
            assert any(figure for _, figure in (card_and_figure(frame.image) for frame in env.watched[-1]))
            seen[q["meta"]["kind"]] += 1
        assert env.num_invalid() == 0 and env.num_calls() <= 4
        if q["evidence"]:
            assert synthetic.uniform_accuracy(q, 128) < 0.6
    assert min(seen["detail"], seen["count"], seen["order"]) > 3


def test_looking_twice_is_rare_in_what_is_learned_first(searched):
    folder, _, rows = searched
    policy = load_policy(TINY_BASE)
    twice = asked = 0
    for row in rows:
        dialogue, env = replay(policy, row, folder)
        assert env.rewards["accuracy"] == env.rewards["format"] == 1
        assert max(len(policy.tokenize(turn)) for turn in row["turns"]) < 160
        asked += bool(row["question"]["evidence"])
        twice += any("card" in turn.partition(";")[2].partition("<video_zoom>")[0] for turn in row["turns"])
    assert 0 < twice <= asked / 3


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


@pytest.mark.slow
def test_data_that_is_made_twice_at_once_in_one_folder_is_whole(tmp_path):
    """The second start waits for the first."""
    flags = ["synthetic", "--out", tmp_path, "--train", 20, "--test", 5]
    runs = [launch(1, "data_prep.py", [*flags, "--seed", seed]) for seed in (1, 2)]
    said = [run.wait() for run in runs]
    assert sum("belongs to a run that is alive" in text for text in said) == 1
    last = 1 if "is alive" in said[0] else 2
    assert json.loads(Path(tmp_path, synthetic.MADE).read_text())["seed"] == last
    synthetic.synthetic(tmp_path / "alone", 20, 5, last)
    for name in ("train.jsonl", "test.jsonl", "sft.jsonl", "videos/train_0001.mp4"):
        assert Path(tmp_path, name).read_bytes() == Path(tmp_path, "alone", name).read_bytes()
