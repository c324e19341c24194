"""The released data sets as they are: questions of lists and yaml files, messages against the processor's chat template."""

import json
import shutil

import numpy as np
import pytest
import torch
from cases import all_hold
from PIL import Image
from tiny import random_policy
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

import sft
from common import UserError
from demo.synthetic import write_video
from protocols import make_env
from protocols.released import TEXTS
from sources.benchmarks import Given, finish
from sources.overlap import overlap
from sources.read import read_questions, read_trajectories
from sources.released_data import encode_stored, stored_frame
from sources.rows import question_error
from sources.stats import stats
from zoom_env import EnvConfig, ZoomEnv

PROBLEM = "Look:\n<image>\nWhat is it?\nA. a cat\nB. a dog"
ROW = {"videos": ["tiny.mp4"], "problem": PROBLEM, "solution": "B.", "data_source": "LongVideo-Reason/longvideo",
       "extra_info": {"answer_type": "multiple_choice", "problem_type": "spatial"}}


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_questions_of_a_list(tmp_path):
    rows = [ROW, ROW | {"solution": "<answer>A</answer>"}, ROW | {"solution": "a dog", "extra_info": None},
            ROW | {"problem": "<image>What happens?", "solution": "It rains.", "extra_info": {"answer_type": "open_ended"}}]
    questions, bad = read_questions(write(tmp_path / "rl.json", rows), 0)
    assert not bad and [q["answer"] for q in questions] == ["B", "A", "B", "It rains."]
    assert questions[0] == {
        "id": "rl_0", "video": "tiny.mp4", "question": "Look:\n\nWhat is it?", "options": ["a cat", "a dog"], "answer": "B",
        "answer_type": "multiple_choice", "source": "LongVideo-Reason/longvideo", "evidence": None,
        "meta": {"problem_type": "spatial", "problem": PROBLEM, "kind": "spatial"}}
    assert questions[3]["question"] == "What happens?" and questions[3]["options"] is None
    assert len({q["id"] for q in questions}) == 4
    told = PROBLEM + "\nAnswer with the letter.\n\nThink first."
    (question,), _ = read_questions(write(tmp_path / "told.json", [ROW | {"problem": told}]), 0)
    assert question["question"] == "Look:\n\nWhat is it?\nAnswer with the letter.\n\nThink first." and question["options"] == ["a cat", "a dog"]
    assert question["meta"]["problem"] == told


def test_options_with_small_letters_and_what_json_made_of_latex(tmp_path, capsys):
    rows = [ROW | {"problem": "<image>Who?\n(a) Ann\n(b) Bob", "solution": "b"},
            ROW | {"problem": "<image>Which?\nA. \frac{1}{2}\nB. \theta", "solution": "B"}]
    questions, bad = read_questions(write(tmp_path / "rl.json", rows), 0)
    assert not bad and [(q["options"], q["answer"], q["answer_type"]) for q in questions] == [
        (["Ann", "Bob"], "B", "multiple_choice"), ([r"\frac{1}{2}", r"\theta"], "B", "multiple_choice")]
    assert r"1 questions hold control characters (rl_1: '\x0c')" in capsys.readouterr().err


def test_a_bad_question_is_named(tmp_path):
    def holds(row, reason):
        questions, bad = read_questions(write(tmp_path / "rl.json", [ROW, ROW | row]), 0.5)
        assert len(questions) == 1 and len(bad) == 1 and bad[0][0] == "row 1" and reason in bad[0][1]
        with pytest.raises(UserError, match="rl.json: 1 of 2 rows"):
            read_questions(tmp_path / "rl.json", 0.1)

    all_hold(holds, [
        ({"videos": []}, "not one video"), ({"videos": None}, "not one video"), ({"solution": "E"}, "no right option"),
        ({"solution": "a bird"}, "no right option"), ({"problem": "<image>Which?"}, "of 0 options"),
        ({"problem": None}, "AttributeError"), ({"videos": ["x" * 3000], "solution": "E"}, "no right option")])
    with pytest.raises(UserError, match="rl.json: 1 of 1 rows"):
        read_questions(write(tmp_path / "rl.json", 3), 0)


def test_questions_of_a_yaml(tmp_path):
    for name, number in (("a", 10), ("b", 5)):
        write(tmp_path / f"{name}.json", [ROW | {"problem": f"{name}{i} {PROBLEM}"} for i in range(number)])
    def names(strategies):
        text = "datasets:\n" + "".join(f"  - json_path: {name}.json\n    sampling_strategy: \"{s}\"\n" for name, s in strategies)
        return [q["meta"]["problem"].split()[0] for q in read_questions(write(tmp_path / "rl.yaml", text), 0)[0]]
    assert names([("a", "first:3"), ("b", "all")]) == ["a0", "a1", "a2", "b0", "b1", "b2", "b3", "b4"]
    assert names([("a", "end:2"), ("b", "first:21%")]) == ["a8", "a9", "b0", "b1"]  # a share is rounded up
    drawn = names([("a", "random:4"), ("b", "end:1")])
    assert len(set(drawn[:4])) == 4 and drawn[4] == "b4" and drawn == names([("a", "random:4"), ("b", "end:1")]) != names([("a", "first:4"), ("b", "end:1")])
    for text in ("datasets: 3", "x", "datasets:\n  - json_path: none.json", "datasets:\n  - json_path: a.json\n    sampling_strategy: some:3",
                 "datasets:\n  - json_path: a.json\n    sampling_strategy: first:²", "- {"):
        with pytest.raises(UserError):
            read_questions(write(tmp_path / "rl.yaml", text), 0)


def test_its_own_text_is_what_the_released_protocol_shows(tmp_path):
    """Options inside, frames where <image> stands; ours has question and options apart, and frames behind them."""
    write_video(tmp_path / "tiny.mp4", (np.full((144, 176, 3), n, np.uint8) for n in range(120)), 10)
    (question,), _ = read_questions(write(tmp_path / "rl.json", [ROW]), 0)
    words = lambda env: "".join(i if isinstance(i, str) else "[]" for i in env.reset()[1].content)
    texts = dict.fromkeys(TEXTS, "") | {"frame": "<frame{index}_at{time}>"}
    text = words(make_env(question, EnvConfig(protocol="released", texts=texts, frame_unit=28), tmp_path))
    assert text == "Look:\n" + "".join(f"<frame{i}_at{2 * i}.00>[]" for i in range(6)) + "\nWhat is it?\nA. a cat\nB. a dog"
    assert words(ZoomEnv(question, EnvConfig(frame_unit=28), tmp_path)).startswith("Look:\n\nWhat is it?\nA. a cat\nB. a dog\nThe video")


def test_a_mark_of_the_video_is_its_place(tmp_path):
    """<video>, as EasyR1's and LLaMA-Factory's rows have it, is as <image>; in no protocol it stays as a word."""
    write_video(tmp_path / "tiny.mp4", (np.full((144, 176, 3), n, np.uint8) for n in range(40)), 10)
    rows = [ROW | {"problem": problem} for problem in ("<image>\n" + PROBLEM[14:], "<video>\n" + PROBLEM[14:])]
    (one, two), _ = read_questions(write(tmp_path / "rl.json", rows), 0)
    assert one | {"id": ""} == two | {"id": ""}
    texts = dict.fromkeys(TEXTS, "") | {"frame": "<frame{index}>"}
    for protocol, settings in (("released", {"texts": texts}), ("videozoomer", {}), ("direct", {})):
        config = EnvConfig(protocol=protocol, frame_unit=28, **settings)
        shown = [make_env(question, config, tmp_path).reset()[1].content for question in (one, two)]
        words = ["".join("[]" if not isinstance(item, str) else item for item in content) for content in shown]
        assert words[0] == words[1] and "<video>" not in words[1] and "[]" in words[1]


def test_what_a_question_would_not_show_is_named(tmp_path):
    def holds(row, reason):
        questions, bad = read_questions(write(tmp_path / "rl.json", [ROW, row if row == 7 else ROW | row]), 0.5)
        assert len(questions) == 1 and len(bad) == 1 and reason in bad[0][1], bad

    all_hold(holds, [
        ({"problem": "<video>" + PROBLEM}, "2 places of a video, 1 video"), ({"problem": "<image>" + PROBLEM}, "2 places"),
        ({"problem": "<audio>" + PROBLEM}, "<audio> in its problem"), ({"problem": "<|video_pad|>" + PROBLEM}, "<|video_pad|> in"),
        ({"images": ["a.png"]}, '"images" would not be shown'), ({"audios": ["a.wav"]}, '"audios" would not be shown'),
        ({"videos": [["a.png", "b.png"]]}, "its video is not a path"), (7, "not a JSON object")])
    for key in ("videos", "problem", "solution"):
        without = {k: v for k, v in ROW.items() if k != key}
        _, bad = read_questions(write(tmp_path / "rl.json", [ROW, without]), 0.5)
        assert bad == [("row 1", f'no "{key}"')]


def test_a_mark_in_a_question_of_our_own_is_named():
    row = {"id": "1", "video": "a.mp4", "options": None, "answer": "x", "answer_type": "open_ended"}
    def holds(text):
        assert "<video> or <audio>" in question_error(row | {"question": text})

    all_hold(holds, [["<video>What?"], ["<video>\nWhat?"], ["What?\n <audio>\nWho?"], ["What?\n<video>"]])
    assert question_error(row | {"question": "What does the tag <video> do?"}) is None
    made, _ = finish(Given(video="a", question="<video>\nWhat?", options=["x", "y"], answer="A"), "mine")
    assert made["question"] == "What?"


# -------------------------------------------------------------------------------------------------------- messages
ZOOM = '<think>I look.</think><video_zoom>{"segment": [1, 5], "fps": 1}</video_zoom>'
MESSAGES = [{"role": "system", "content": "Look."}, {"role": "user", "content": "<frame0_time0.00s><image><frame1_time2.00s><image>\nWhich?"},
            {"role": "assistant", "content": ZOOM}, {"role": "user", "content": "Here:\n<image><image><image>\nGo on."},
            {"role": "assistant", "content": "<think>I see.</think><answer>B</answer>"}]
TEMPLATE = """{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}"""  # Qwen2.5-VL's, as far as images and texts go


def parts(content):
    """A stored content in the processor's form."""
    return [part for n, text in enumerate(content.split("<image>")) for part in ([{"type": "image"}] * (n > 0) + [{"type": "text", "text": text}])]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A set of messages, with images of five shapes."""
    folder = tmp_path_factory.mktemp("sft")
    rng = np.random.default_rng(0)
    for n, (height, width) in enumerate([(240, 320), (144, 176), (280, 336), (60, 80), (224, 448)]):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    rows = [{"messages": MESSAGES, "images": [f"{n}.png" for n in range(5)]}, {"messages": MESSAGES[1:], "images": [f"{n}.png" for n in range(5)]}]
    write(folder / "sft.json", rows)
    return folder


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_ids_are_those_of_the_chat_template(place, number):
    """Qwen2_5_VLProcessor lays the messages out, sizes the images and expands their tokens; pixels are equal, too."""
    policy = random_policy()
    policy.env_config = EnvConfig(frame_unit=28)
    rows, bad = read_trajectories(place / "sft.json", 0)
    assert not bad and len(rows) == 2
    dialogue = encode_stored(policy, rows[number], place)
    images = [Image.open(place / name) for name in rows[number]["images"]]
    tokenizer = policy.tokenizer
    sizes = Qwen2VLImageProcessor(size={"shortest_edge": 3_136, "longest_edge": 12_845_056})
    processor = Qwen2_5_VLProcessor(sizes, tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)
    messages = [m | {"content": parts(m["content"])} for m in rows[number]["messages"]]
    pixels = processor(text=[processor.apply_chat_template(messages)], images=images, return_tensors="pt")
    assert dialogue.ids == pixels["input_ids"][0].tolist()
    mine = policy.image_processor([f.image for f in dialogue.frames], do_resize=False, return_tensors="pt")
    assert torch.equal(mine["image_grid_thw"], pixels["image_grid_thw"]) and torch.equal(mine["pixel_values"], pixels["pixel_values"])
    said = tokenizer.decode([i for i, trained in zip(dialogue.ids, dialogue.trained) if trained])
    assert said == ZOOM + "<|im_end|>" + MESSAGES[-1]["content"] + "<|im_end|>"  # each turn with its end


def test_stored_images_are_shown_as_viewers_show_them(tmp_path):
    """On white where they are clear, and of 16 bits the whole range."""
    Image.new("RGBA", (84, 84), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((84, 84), 100 * 257, np.uint16)).save(tmp_path / "wide.png")
    shown = [stored_frame(tmp_path / name, 100_352, 28).image for name in ("clear.png", "wide.png")]
    assert [image.unique().tolist() for image in shown] == [[255], [100]]


def test_a_bad_row_of_messages_is_named(tmp_path):
    def holds(messages, images, reason):
        good = {"messages": MESSAGES, "images": [f"{n}.png" for n in range(5)]}
        rows, bad = read_trajectories(write(tmp_path / "sft.json", [good, {"messages": messages, "images": images}]), 0.5)
        assert len(rows) == 1 and len(bad) == 1 and reason in bad[0][1]

    all_hold(holds, [
        (MESSAGES, ["0.png"], "5 <image>, 1 images"), (MESSAGES[:2], ["0.png"] * 2, "take turns"), (MESSAGES[2:], ["0.png"] * 3, "take turns"),
        ([], [], "not a list"), ([{"role": "user"}], [], "not a list"), (MESSAGES, "0.png", "not a list of paths"),
        ([MESSAGES[1], {"role": "assistant", "content": "<image>"}], ["0.png"] * 3, "in an assistant's turn")])


def test_images_that_cannot_be_read_leave_their_row_out(place, tmp_path):
    for file in place.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "3.png").write_bytes(b"no image")
    rows, _ = read_trajectories(tmp_path / "sft.json", 0)
    dialogues, bad = sft.load_dialogues(random_policy(), rows, tmp_path, 32_768)
    assert not dialogues and [where for where, _ in bad] == ["sft_0", "sft_1"] and all("3.png" in reason for _, reason in bad)


def test_messages_that_refer_to_what_is_not_shown_are_named(tmp_path):
    """Rows of LLaMA-Factory, ms-swift and ShareGPT about videos: their texts alone are not what they are."""
    asked, said = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "A"}
    good = {"messages": [asked, said], "videos": [], "images": None, "audios": None, "system": "", "tools": ""}

    def holds(row, reason):
        rows, bad = read_trajectories(write(tmp_path / "sft.json", [good, row]), 0.5)
        assert len(rows) == 1 and [where for where, _ in bad] == ["row 1"] and reason in bad[0][1], bad

    all_hold(holds, [
        *((good | {key: ["v1.mp4"]}, f'"{key}" would not be shown') for key in ("videos", "video", "audios", "audio", "image",
                                                                                  "objects", "tools", "system")),
        *(({"messages": [asked | {"content": mark + "What?"}, said]}, f"{mark} in a message")
          for mark in ("<video>", "<audio>", "<VIDEO>", "<|video_pad|>", "<|AUDIO|>", "<video_1>", "<video/>",
                       "<IMAGE>", "<image 1>", "<image_1>", "<|image_pad|>", "<img>")),
        ({"messages": [asked, said | {"content": "<video>"}]}, "<video> in a message"),
        ({"messages": [asked | {"video": "v1.mp4"}, said]}, '"video" would not be shown'),
        ({"messages": [asked, said | {"loss": False}]}, "every turn would be trained"),
        ({"messages": [asked | {"content": [{"type": "video", "video": "v1.mp4"}]}, said]}, "both of them texts"),
        ({"conversations": [{"from": "human", "value": "<video>What?"}], "videos": ["v1.mp4"]}, "no messages: \"conversations\""),
        ({"instruction": "<video>What?", "output": "A", "videos": ["v1.mp4"]}, "no messages"), (ROW, "no messages"), ("text", "no")])
    with pytest.raises(UserError, match="1 of 1 rows.*videos"):
        read_trajectories(write(tmp_path / "one.json", [good | {"videos": ["v1.mp4"]}]), 0.9)


# ------------------------------------------------------------------------------------------------ overlap and stats
def test_overlap_and_stats_read_what_the_stages_read(place, tmp_path, capsys):
    for file in place.iterdir():
        shutil.copy(file, tmp_path)
    write_video(tmp_path / "tiny.mp4", (np.full((144, 176, 3), n, np.uint8) for n in range(40)), 10)
    shutil.copy(tmp_path / "tiny.mp4", tmp_path / "copy.mp4")
    shutil.copy(tmp_path / "0.png", tmp_path / "other.png")
    rl = write(tmp_path / "rl.json", [ROW, ROW | {"problem": "<video>Who?\nA. x\nB. y", "videos": ["gone.mp4"]}, ROW | {"videos": []}])
    write(tmp_path / "mix.yaml", "datasets:\n  - json_path: rl.json\n    sampling_strategy: \"first:1\"\n")
    asked = [{"role": "user", "content": "<frame0><image>\nWho?\nA. x\nB. y"}, {"role": "assistant", "content": "A"}]
    sft_file = write(tmp_path / "few.json", [{"messages": asked, "images": ["other.png"]}, {"messages": asked, "images": ["none.png"]},
                                             {"messages": asked, "videos": ["tiny.mp4"]}])
    ours = {"id": "q", "video": "copy.mp4", "question": "Who?", "options": ["y", "x"], "answer": "A", "answer_type": "multiple_choice"}
    write(tmp_path / "ours.jsonl", json.dumps(ours))
    pairs = lambda *names: {what: found for what, found in overlap(*(tmp_path / name for name in names)).items() if found}
    assert pairs("rl.json", "ours.jsonl") == {"the same video by content": [("tiny.mp4", "copy.mp4")],
                                              "the same question and options": [("rl_1", "q")]}
    assert set(pairs("mix.yaml", "rl.json")) == {"the same video by content", "the same video by name", "the same question and options"}
    assert pairs("few.json", "rl.json") == {"the same question and options": [("few_0", "rl_1")]}
    assert pairs("few.json", "sft.json") == {"the same image by content": [("other.png", "0.png")]}
    capsys.readouterr()
    found = stats(rl)
    assert found["counts"] == {"questions": 2, "rows": 2, "unusable": 1, "videos": 2, "videos missing": 1, "with evidence": 0,
                               "with images": 0, "with subtitles": 0} and found["letters"] == {"B": 2}
    said = capsys.readouterr().out
    assert "unusable  row 2: not one video" in said and "missing  gone.mp4" in said
    found = stats(sft_file, sft.TINY_BASE)
    assert found["rounds"] == {1: 2} and found["kinds of trajectory"] == {"messages": 2} and found["counts"]["with images"] == 2
    assert found["tokens"][0]["n"] == 1 and found["tokens"][0]["least"] > 10
    said = capsys.readouterr().out
    assert 'unusable  row 2: its "videos" would not be shown' in said and "missing  none.png" in said
    assert stats(tmp_path / "mix.yaml")["counts"]["rows"] == 1
    for name in ("rl.json", "few.json"):  # not one row of it: the first reason
        rows = json.loads((tmp_path / name).read_text())[2:]
        with pytest.raises(UserError, match="1 of 1 rows cannot be used .row 0: "):
            stats(write(tmp_path / "bad.json", rows))
