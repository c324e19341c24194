"""The tiny base: lessons show what they say, a few steps of training help, the shipped one has learned."""

import random
import re
from collections import Counter

import pytest
import torch

from demo.synthetic import COLOURS, SHAPES, TINY_ENV
from demo.tiny_base import (CURRICULUM, QWEN_SPECIAL, TINY_BASE, Lessons, Stage, answer_probabilities,
                            lesson_log_probs, make_frame_bank, make_tiny_model, make_tokenizer, pretrain,
                            tokenizer_texts)
from test_synthetic import nearest
from tiny import DEVICE
from training.checkpoints import load_policy
from video import Frame

SKILLS = ("repeat", "letter", "caption", "scenes", "where", "whole", "clip", "visit", "direct")


@pytest.fixture(scope="module")
def bank():
    return make_frame_bank()


@pytest.fixture(scope="module")
def shipped():
    return load_policy(TINY_BASE, device=DEVICE)


@pytest.fixture
def lessons(bank):
    torch.manual_seed(0)  # of the pictures' noise
    return Lessons(bank, 0)


def shown(lesson):
    return [item for user, _ in lesson for item in user if isinstance(item, Frame)]


# --------------------------------------------------------------------------------------------------- lessons
def test_the_trained_tokens_of_a_lesson_are_its_texts(shipped, lessons):
    """Each turn's, with the token that ends it; in tags or not, amid random text or not."""
    drawn, draw, wrong = [], lessons.lesson, []
    lessons.lesson = lambda *args: drawn.append(draw(*args)) or drawn[-1]
    skills = [(kind, level) for kind in SKILLS for level in (0, 1, 2, 3)]
    for in_tags, amid_text in ((False, False), (True, False), (True, True)):
        lessons.in_tags, lessons.amid_text = in_tags, amid_text
        for kind, level in skills * 3:
            dialogue = lessons.dialogue(shipped, kind, level)
            texts = [said for _, said in drawn[-1]]
            if in_tags and "\nso " in texts[-1]:
                assert texts[-1][-1] in "ABCD"
                texts[-1] = f"<think>{texts[-1]}</think><answer> {texts[-1][-1]}</answer>"
            trained = [token for token, is_trained in zip(dialogue.ids, dialogue.trained) if is_trained]
            said = shipped.tokenizer.decode(trained, clean_up_tokenization_spaces=False)
            right = said == "".join(text + "<|im_end|>" for text in texts) and len(said) > 10
            if not right or not len(dialogue.frames) == len(shown(drawn[-1])) == sum(dialogue.is_image):
                wrong.append((kind, level, in_tags, amid_text, said))
    assert not wrong and len(drawn) == 3 * 3 * 36


def test_every_skill_of_the_curriculum_can_be_drawn_and_none_knows_the_tool(lessons):
    skills = {skill for stage in CURRICULUM for skill in stage.skills}
    assert {kind for kind, _ in skills} == set(SKILLS)
    for kind, level in sorted(skills):
        for _ in range(20):
            text = "".join(item for user, said in lessons.lesson(kind, level)
                           for item in [*user, said] if isinstance(item, str))
            assert len(text) > 20 and "zoom" not in text and "fps" not in text


def scene_in(frame):
    """The colour of most corners: a card lies near one or two of them."""
    return Counter(nearest(frame.image[:, y, x]) for y in (0, 27) for x in (0, 27)).most_common(1)[0][0]


def has_card(frame):
    return "black" in {nearest(frame.image[:, y, x]) for y in range(5, 23, 2) for x in range(5, 23, 2)}


def test_captions_say_what_the_frames_show(lessons):
    figures = 0
    for _ in range(40):
        lesson = lessons.lesson("caption", 3)
        captions = lesson[0][1].rstrip(".").split(". ")
        for caption, frame in zip(captions, shown(lesson), strict=True):
            background, _, figure = caption.partition(" ")
            assert scene_in(frame) == background
            centre = nearest(frame.image[:, 14, 14])
            if figure in ("-", "card"):
                assert centre == (background if figure == "-" else "black")
            else:
                colour, shape = figure.removeprefix("loose ").split()
                around = {nearest(frame.image[:, y, x]) for y in range(11, 18) for x in range(11, 18)}
                assert colour in around and shape in SHAPES
                assert ("loose" not in figure) == has_card(frame)
                figures += 1
    assert figures > 100


def test_transcripts_and_answers_follow_from_the_frames(lessons):
    """A clip's flashes are where its pictures have them, on a card in the scene, and support the option whose letter
    is said; where only empty cards are shown, the place between two of them is."""
    asked, longer, cards, others = 0, 0, 0, 0
    for _ in range(150):
        (user, said), = lesson = lessons.lesson("clip", 3)
        transcript, _, chosen = said.partition("\nso ")
        scene, _, entries = transcript.partition("\n")[0].partition("; ")[0].partition(": ")
        found = re.findall(r"(-|same|card|[a-z]+ [a-z]+)\d+", entries)
        frames = shown(lesson)
        for i, (entry, frame) in enumerate(zip(found, frames, strict=True)):
            if entry == "same":
                longer += 1
                entry = found[i] = found[i - 1]
            centre, background = nearest(frame.image[:, 14, 14]), scene_in(frame)
            if entry == "-":
                assert background != scene or centre == scene or not has_card(frame)
                others += background != scene and centre != background
            else:
                assert background == scene and has_card(frame)
                assert centre == ("black" if entry == "card" else entry.split()[0])
        if place := re.search(r"(\w+) card(\d+): <frame(\d+)_time([\d.]+)s> to <frame(\d+)_time([\d.]+)s>", said):
            assert found[int(place[2])] == "card" and "=" not in entries and int(place[5]) == int(place[3]) + 1
            assert int(place[3]) == min(int(place[2]), len(frames) - 2)
            assert [f"{frames[int(place[k])].time_s:.2f}" for k in (3, 5)] == [place[4], place[6]]
            cards += 1
        if chosen:
            option, letter = chosen[:-2], chosen[-1]
            assert f"\n{letter}. {option}\n" in user[0]
            flashes = re.findall(r"(\w+) ([a-z]+)\d+=\d+", entries)  # (colour, shape)
            asks = next(word for word in ("many", "colour", "shape") if word in user[0])
            colour, shape = flashes[0]
            assert option == {"many": str(len(flashes)), "colour": colour, "shape": shape}[asks]
            asked += 1
    assert asked > 40 and longer > 10 and cards > 2 and others > 5  # a flash that is seen in two frames is one


def test_an_overview_shows_scenes_in_order_and_times_that_follow(lessons):
    """Short ones each scene once; long ones in any number of frames, with shapes in some."""
    sizes, unseen, figures = set(), 0, 0
    for level in (0, 1, 2) * 20:
        lessons.anything = level == 2
        overview = lessons.draw_overview((4, 7, 9)[level])
        frames = [item for item in lessons.show(overview) if isinstance(item, Frame)]
        colours = [scene_in(f) for f in frames]
        assert colours == [picture.background for picture in overview.pictures]
        assert list(overview.scenes) == sorted(overview.scenes, key=colours.index)
        assert [colours.index(colour) for colour in overview.scenes] == list(overview.scenes.values())
        assert overview.times_s == sorted(overview.times_s) and overview.times_s[-1] < overview.duration_s
        assert [f.time_s for f in frames] == overview.times_s
        tags = [item.strip() for item in lessons.show(overview) if isinstance(item, str)]
        assert tags == [f"<frame{i}_time{t:.2f}s>" for i, t in enumerate(overview.times_s)]
        if level < 2:
            assert len(set(colours)) == len(colours) == (4, 7)[level]
        else:
            sizes.add(len(frames))
            unseen += len(overview.scenes) < 9
        figures += sum(has_card(frame) for frame in frames)
    assert {5, 9, 17} <= sizes and unseen and figures > 10


def scenes_of(frames):
    """{scene: the number of its first frame}."""
    colours = [scene_in(frame) for frame in frames]
    return {colour: colours.index(colour) for colour in colours}


def test_where_scenes_are_and_which_comes_first(lessons):
    """What "where" and "whole" say follows from the tags and pictures of the overview."""
    missed = 0
    for _ in range(150):
        (user, said), = lesson = lessons.lesson("where", 3)
        frames, scenes = shown(lesson), scenes_of(shown(lesson))
        duration = re.search(r"lasts ([\d.]+) seconds", user[0])[1]
        seconds = [f"{frame.time_s:.2f}" for frame in frames] + [duration]
        named = [c for c in COLOURS if f"the {c} scene" in user[0]]
        found = re.findall(r"(first|second|unseen) (\w+?)(\d*): <frame(\d+)_time([\d.]+)s> to (?:<frame\d+_time|end )([\d.]+)s?>?; "
                           r"from \[([\d.]+), ([\d.]+)\]", said)
        assert {f[1] for f in found} == set(named)
        if found[0][0] == "unseen":
            assert len(named) == 1 and named[0] not in scenes
            missed += 1
        else:
            assert [f[0] for f in found] == ["first", "second"][:len(named)]
            assert [int(f[2]) for f in found] == sorted(scenes[c] for c in named)
        for order, scene, number, start, *span in found:
            i = int(start)
            later = [n for n in scenes.values() if n > i] if order != "unseen" else [i + 1]
            j = min(later, default=len(frames))
            assert order == "unseen" or scenes[scene] == i == int(number)
            assert span == [seconds[i], seconds[j]] * 2
    assert missed
    for kind in ("whole", "direct") * 30:
        (user, said), = lesson = lessons.lesson(kind, 3)
        scenes = [scene for scene in scenes_of(shown(lesson)) if scene != "grey"]
        text = "".join(item for item in user if isinstance(item, str))
        question, letter = text.split("\n")[0], said[-1]
        if "flash" in question:
            continue
        right = scenes[0] if "first" in question else scenes[-1] if "last" in question else None
        if right is None:
            right = scenes[scenes.index(re.search(r"after the (\w+) scene", question)[1]) + 1]
        assert f"\n{letter}. {right}" in text and said.endswith(f"so {right} {letter}")


def test_a_question_on_what_the_overview_shows_is_answered_at_once(lessons):
    answered = 0
    for _ in range(200):
        exchanges = lessons.lesson("direct", 3)
        (user, said), frames = exchanges[0], shown(exchanges)
        text = "".join(item for item in user if isinstance(item, str))
        if "colour is the shape" in text:
            scene = re.search(r"in the (\w+) scene", text)[1]
            colours = [nearest(f.image[:, 14, 14]) for f in frames if scene_in(f) == scene and has_card(f)]
            assert re.search(r"so (\w+) \w$", said)[1] == next(c for c in colours if c != "black")
            assert "frame" not in text + said
            answered += 1
    assert answered > 5


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


@pytest.mark.device
def test_the_first_layer_starts_out_looking_back_one_to_four_tokens():
    torch.manual_seed(0)
    policy = make_tiny_model(make_tokenizer(["red green blue"] * 9, vocab_size=300)).to(DEVICE)
    policy.hf.set_attn_implementation("eager")
    ids = torch.randint(20, 200, (1, 40)).to(DEVICE)
    with torch.no_grad():
        weights = policy.hf.model.language_model(input_ids=ids, output_attentions=True).attentions[0][0]
    for head, attention in enumerate(weights.cpu()):  # (query, key)
        back = torch.arange(10, 40) - attention[10:].argmax(-1)
        assert (back == head + 1).float().mean() > 0.9


# ------------------------------------------------------------------------------------------------ pretraining
@pytest.mark.device
@pytest.mark.slow
def test_training_lowers_the_loss_and_goes_through_the_stages(lessons):
    """Of lessons that were not trained on; the vision encoder learns, too. A stage ends after its most steps, or when its
    skills are answered well enough."""
    lessons.rng.seed(0)
    texts = tokenizer_texts(lessons)
    torch.manual_seed(0)
    policy = make_tiny_model(make_tokenizer(texts, vocab_size=400)).to(DEVICE)
    skills = {("repeat", 0): 1, ("caption", 0): 1}
    held_out = [lessons.dialogue(policy, *skill) for skill in skills for _ in range(6)]

    def loss():
        with torch.no_grad():
            return -lesson_log_probs(policy, held_out).mean().item()

    drawn, draw = [], lessons.dialogue
    lessons.dialogue = lambda policy, kind, level: drawn.append(kind) or draw(policy, kind, level)
    before, weight = loss(), next(policy.visual.parameters()).detach().clone()
    stages = [Stage(skills, 200, enough=2.0, most_steps=25), Stage({("letter", 0): 1}, 2, enough=0.0),
              Stage({("scenes", 1): 1}, 2)]
    pretrain(policy, lessons, stages, steps=53, scale=1.0, seed=1)
    assert set(drawn[:-28]) == {"repeat", "caption"} and drawn[-28:] == ["letter"] * 25 + ["scenes"] * 3
    assert loss() < before - 0.3
    assert not torch.equal(weight, next(policy.visual.parameters()))


# ------------------------------------------------------------------------------------------- the shipped one
def right_answers(policy, dialogues):
    """How many of the dialogues greedy decoding gives to the last token: so it does where their probability is above
    a half."""
    with torch.no_grad():
        return sum(p > 0.5 for p in answer_probabilities(lesson_log_probs(policy, dialogues), dialogues))


@pytest.mark.device
def test_the_shipped_base_has_learned(shipped, lessons):
    lessons.in_tags = True  # as its training ended
    right = {}
    for skill in (("repeat", 0), ("clip", 2), ("where", 2), ("whole", 2), ("visit", 2)):
        right[skill] = right_answers(shipped, [lessons.dialogue(shipped, *skill) for _ in range(10)])
    assert min(right.values()) >= 7, right


@pytest.mark.device
def test_the_shipped_base_looks_at_the_frames(shipped, lessons):
    """With the same pictures in another order, the same answers are no longer likely."""
    lessons.in_tags, rng = True, random.Random(0)
    dialogues = [lessons.dialogue(shipped, "whole", 2) for _ in range(8)]
    assert right_answers(shipped, dialogues) >= 6
    for d in dialogues:
        d.frames = rng.sample(d.frames, len(d.frames))
    assert right_answers(shipped, dialogues) == 0


def test_the_shipped_base_has_the_environment_of_the_data(shipped):
    assert shipped.env_config == TINY_ENV
    assert sum(p.numel() for p in shipped.hf.parameters()) < 3_000_000
