"""The tiny base: lessons show what they say, a few steps of training help, the shipped one has learned."""

import random
import re

import pytest
import torch

from demo.synthetic import COLOURS, GREY, PALETTE, SHAPES, TINY_ENV
from demo.tiny_base import (CURRICULUM, QWEN_SPECIAL, TINY_BASE, Lessons, lesson_log_probs, make_frame_bank,
                            make_tiny_model, make_tokenizer, pretrain)
from training.checkpoints import load_policy
from video import Frame

SKILLS = ("repeat", "letter", "caption", "scenes", "where", "whole", "clip", "visit")


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return make_frame_bank(tmp_path_factory.mktemp("bank"))


@pytest.fixture(scope="module")
def shipped():
    return load_policy(TINY_BASE)


@pytest.fixture
def lessons(bank):
    torch.manual_seed(0)  # of the pictures' noise
    return Lessons(bank, 0)


def shown(lesson):
    return [item for user, _ in lesson for item in user if isinstance(item, Frame)]


def nearest(pixel):
    colours = PALETTE | {"grey": GREY, "black": (0, 0, 0)}
    return min(colours, key=lambda c: sum((int(a) - b) ** 2 for a, b in zip(pixel, colours[c])))


# --------------------------------------------------------------------------------------------------- lessons
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("kind", SKILLS)
def test_the_trained_tokens_of_a_lesson_are_its_texts(shipped, lessons, kind, level):
    """Each turn's, with the token that ends it; in tags or not, amid random text or not."""
    drawn, draw = [], lessons.lesson
    lessons.lesson = lambda *args: drawn.append(draw(*args)) or drawn[-1]
    for in_tags, amid_text in ((False, False), (True, False), (True, True)):
        lessons.in_tags, lessons.amid_text = in_tags, amid_text
        for _ in range(5):
            dialogue = lessons.dialogue(shipped, kind, level)
            texts = [said for _, said in drawn[-1]]
            if in_tags and "\nso " in texts[-1]:
                assert texts[-1][-1] in "ABCD"
                texts[-1] = f"<think>{texts[-1]}</think><answer> {texts[-1][-1]}</answer>"
            trained = [token for token, is_trained in zip(dialogue.ids, dialogue.trained) if is_trained]
            said = shipped.tokenizer.decode(trained, clean_up_tokenization_spaces=False)
            assert said == "".join(text + "<|im_end|>" for text in texts) and len(said) > 10
            assert len(dialogue.frames) == len(shown(drawn[-1])) == sum(dialogue.is_image)
    assert len(drawn) == 15


def test_every_skill_of_the_curriculum_can_be_drawn_and_none_knows_the_tool(lessons):
    skills = {skill for shares, _, _ in CURRICULUM for skill in shares}
    assert {kind for kind, _ in skills} == set(SKILLS)
    for kind, level in sorted(skills):
        for _ in range(20):
            text = "".join(item for user, said in lessons.lesson(kind, level)
                           for item in [*user, said] if isinstance(item, str))
            assert len(text) > 20 and "zoom" not in text and "fps" not in text


def test_captions_say_what_the_frames_show(lessons):
    figures = 0
    for _ in range(40):
        lesson = lessons.lesson("caption", 2)
        captions = lesson[0][1].rstrip(".").split(". ")
        for caption, frame in zip(captions, shown(lesson), strict=True):
            background, _, figure = caption.partition(" ")
            assert nearest(frame.image[:, 0, 0]) == background
            centre = nearest(frame.image[:, 14, 14])
            if figure == "-":
                assert centre == background
            else:
                colour, shape = figure.split()
                assert centre == colour and shape in SHAPES
                figures += 1
    assert figures > 100


def test_transcripts_and_answers_follow_from_the_frames(lessons):
    """A clip's flashes are where its pictures have them, and support the option whose letter is said."""
    asked = 0
    for _ in range(60):
        (user, said), = lesson = lessons.lesson("clip", 2)
        transcript, _, chosen = said.partition("\nso ")
        entries = transcript.partition("\n")[0].partition(": ")[2]
        for i, frame in enumerate(shown(lesson)):
            says_flash = f"-{i}" not in entries.split()
            assert says_flash == (nearest(frame.image[:, 14, 14]) != nearest(frame.image[:, 0, 0]))
        if chosen:
            option, letter = chosen[:-2], chosen[-1]
            assert f"\n{letter}. {option}\n" in user[0]
            flashes = re.findall(r"(\w+) ([a-z]+)\d+=\d+", entries)  # (colour, shape)
            asks = next(word for word in ("many", "colour", "shape") if word in user[0])
            colour, shape = flashes[0]
            assert option == {"many": str(len(flashes)), "colour": colour, "shape": shape}[asks]
            asked += 1
    assert asked > 20


def test_an_overview_has_each_scene_once_and_times_that_follow(lessons):
    for _ in range(20):
        overview = lessons.draw_overview(9)
        assert sorted(overview.colours) == sorted([*COLOURS, "grey"]) and overview.colours[-1] == "grey"
        frames = [item for item in overview.items if isinstance(item, Frame)]
        assert [nearest(f.image[:, 3, 3]) for f in frames] == overview.colours
        assert [f.time_s for f in frames] == overview.times == sorted(overview.times)
        assert [f"<frame{i}_time{t:.2f}s>" for i, t in enumerate(overview.times)] == overview.tags


def test_the_same_seed_draws_the_same_lessons(bank):
    def draw(seed):
        torch.manual_seed(seed)
        lessons = Lessons(bank, seed)
        return [lessons.lesson(kind, 2) for kind in SKILLS]

    first, again, other = draw(3), draw(3), draw(4)
    texts = lambda drawn: [said for lesson in drawn for _, said in lesson]
    assert texts(first) == texts(again) != texts(other)
    pictures = [torch.stack([f.image for lesson in drawn for f in shown(lesson)]) for drawn in (first, again)]
    assert torch.equal(*pictures)


# -------------------------------------------------------------------------------------- tokenizer and weights
def test_the_tokenizer_encodes_any_text_and_splits_as_qwen_does(shipped):
    fresh = make_tokenizer(["the blue scene is at <frame1_time12.04s>"] * 50, vocab_size=300)
    for tokenizer in (fresh, shipped.tokenizer):
        for text in ("The blue scene", "12.04 and 777", "naïve 红色 🎬\n\n  x", "<think>it's</think>"):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert tokenizer.tokenize("12345") == list("12345")
        for special in QWEN_SPECIAL:
            assert tokenizer.tokenize(special) == [special]


def test_the_first_layer_starts_out_looking_back_one_to_four_tokens():
    torch.manual_seed(0)
    policy = make_tiny_model(make_tokenizer(["red green blue"] * 9, vocab_size=300))
    policy.hf.set_attn_implementation("eager")
    ids = torch.randint(20, 200, (1, 40))
    with torch.no_grad():
        weights = policy.hf.model.language_model(input_ids=ids, output_attentions=True).attentions[0][0]
    for head, attention in enumerate(weights):  # (query, key)
        back = torch.arange(10, 40) - attention[10:].argmax(-1)
        assert (back == head + 1).float().mean() > 0.9


# ------------------------------------------------------------------------------------------------ pretraining
def test_a_few_steps_lower_the_loss(lessons, tmp_path):
    """Of lessons that were not trained on; the vision encoder learns, too."""
    drawn = [lessons.lesson(kind, 0) for kind in ("repeat", "caption") for _ in range(100)]
    texts = [item for (user, said), in drawn for item in [*user, said] if isinstance(item, str)]
    torch.manual_seed(0)
    policy = make_tiny_model(make_tokenizer(texts, vocab_size=400))
    skills = {("repeat", 0): 1, ("caption", 0): 1}
    held_out = [lessons.dialogue(policy, *skill) for skill in skills for _ in range(6)]

    def loss():
        with torch.no_grad():
            return -lesson_log_probs(policy, held_out).mean().item()

    before, weight = loss(), next(policy.visual.parameters()).detach().clone()
    stages = [(skills, None, None)]
    pretrain(policy, lessons, stages, steps=12, lr=1.5e-3, seed=1, out=tmp_path, batch_tokens=600)
    assert loss() < before - 0.5
    assert not torch.equal(weight, next(policy.visual.parameters()))
    assert not list(tmp_path.iterdir())  # it saves every 100 steps


def test_the_next_stage_begins_after_most_steps(lessons, policy, tmp_path):
    drawn, draw = [], lessons.dialogue
    lessons.dialogue = lambda policy, kind, level: drawn.append(kind) or draw(policy, kind, level)
    policy = policy.frozen_copy()
    for p in policy.parameters():
        p.requires_grad_(True)
    stages = [({("repeat", 0): 1}, 2.0, 25), ({("letter", 0): 1}, None, None)]
    pretrain(policy, lessons, stages, steps=30, lr=1e-4, seed=0, out=tmp_path, batch_tokens=2)
    assert drawn == ["repeat"] * 25 + ["letter"] * 5


# ------------------------------------------------------------------------------------------- the shipped one
def right_answers(policy, dialogues):
    """For each dialogue, whether greedy decoding gives its assistant's texts to the last token: so it does
    where their probability is above a half."""
    with torch.no_grad():
        log_probs = lesson_log_probs(policy, dialogues)
    return [part.sum().exp().item() > 0.5 for part in log_probs.split([sum(d.trained) for d in dialogues])]


@pytest.mark.parametrize("skill", [("repeat", 0), ("clip", 2), ("where", 2), ("whole", 2), ("visit", 2)])
def test_the_shipped_base_has_learned(shipped, lessons, skill):
    lessons.in_tags = True  # as its training ended
    assert sum(right_answers(shipped, [lessons.dialogue(shipped, *skill) for _ in range(20)])) >= 15


def test_the_shipped_base_looks_at_the_frames(shipped, lessons):
    """With the same pictures in another order, the same answers are no longer likely."""
    lessons.in_tags, rng = True, random.Random(0)
    dialogues = [lessons.dialogue(shipped, "whole", 2) for _ in range(8)]
    assert sum(right_answers(shipped, dialogues)) >= 6
    for d in dialogues:
        d.frames = rng.sample(d.frames, len(d.frames))
    assert sum(right_answers(shipped, dialogues)) == 0


def test_the_shipped_base_has_the_environment_of_the_data(shipped):
    assert shipped.env_config == TINY_ENV
    assert sum(p.numel() for p in shipped.hf.parameters()) < 3_000_000
