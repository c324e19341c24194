"""The suite in which the place must be found: no one zoom shows what is asked for.

    python data_prep.py synthetic --suite search --out runs/search

Videos are those of synthetic.py with nine scenes of a minute each, nine to nine and a half minutes in all
(below ten, so that the overview is of uniform frames). In each coloured scene an empty black card, the cue,
stands for 11 seconds at a random place, and what is asked for flashes on it for 0.75 seconds, about in the
middle (several of 0.375 seconds where they are to be counted). Elsewhere in the scene a shape without a card
flashes, which nobody asks about.

A zoom over the scene has 16 frames at most: at 0.2 frames a second 12, about 5 seconds apart, of which two
show the cue, one before the flash and one after it, and none the flash. A second zoom from the one to the
other, at 3 frames a second, shows it. Zooms at 3 frames a second that know nothing would need a dozen for a
scene.

The teacher is careless in both steps: often it takes half of the frames that it may, and mostly it does not
look a second time, but guesses. So looking twice is in a third of its trajectories at most, and using it is
left for RL to find out.
"""

from functools import partial

from demo import synthetic
from demo.synthetic import (MARGIN_S, NUM_SLOTS, Flash, Picture, Scene, Suite, Visit, answer, between_cards,
                            draw_figure, look, named_scenes, overview_of, signed, teach_without_zooms,
                            transcript, with_frames)
from protocols import make_env

SLOT_S = (60.0, 62.4)  # a slot's length: 16 frames are 3 a second between two of the first look
FIRST_FPS, SECOND_FPS = ("0.10", "0.20"), ("1.00", "3.00")  # of the teacher's two looks, hasty and careful
HASTE = 0.5  # how often it is hasty
SECOND_LOOK = 0.3  # how often it looks a second time
TRIES = 2  # plays of a question about flashes
NUM_FRAMES = 9, 9, 9, 9, 17, 33  # of its overviews where it may zoom, drawn for each question
MOST_FRAMES = 80  # ... by the protocol without a tool: few numbers of frames show a flash
FIRST_FRAMES = 12  # of a careful first look at a scene
CUE_S = 11.0
FLASH_S = 0.75  # a flash's length where it is alone
SHORT_S, PAUSE_S = 0.375, 0.25  # ... and where there are several, with the time between two
APART_S = 0.5  # least time between a flash and a frame of the first look
ON = " on the card"  # where a question says that the shapes are


def make_scene(rng, colour, start_s, number, overview_s, last_s, slot_s):
    """A scene with a cue, `number` flashes on it, and a shape without a card, all between the time of its
    frame in the overview and last_s."""
    first_s = overview_s + MARGIN_S
    # the flashes lie between two frames of a careful first look
    flash_s = FLASH_S if number == 1 else SHORT_S
    length_s = number * flash_s + (number - 1) * PAUSE_S
    step_s = slot_s / FIRST_FRAMES
    while True:
        frame_s = overview_s + (rng.randrange(FIRST_FRAMES) + 0.5) * step_s
        flashes_s = frame_s + rng.uniform(APART_S, step_s - APART_S - length_s)
        cue_s = flashes_s + length_s / 2 - CUE_S / 2
        if first_s <= cue_s and cue_s + CUE_S <= last_s:
            break
    offset = (rng.randint(-2, 2), rng.randint(-2, 2))
    flashes, before = [], colour
    for k in range(number):
        figure = draw_figure(rng, colour, before)
        before = figure.colour
        flash_start_s = flashes_s + k * (flash_s + PAUSE_S)
        picture = Picture(colour, figure, offset)
        flashes.append(Flash(flash_start_s, flash_start_s + flash_s, picture))
    cue = Flash(cue_s, cue_s + CUE_S, Picture(colour, offset=offset, cue=True))
    # a shape without a card, away from the cue
    while True:
        loose_s = rng.uniform(first_s, last_s - FLASH_S)
        if loose_s + FLASH_S + 1 < cue_s or loose_s > cue_s + CUE_S + 1:
            break
    loose = Flash(loose_s, loose_s + FLASH_S, Picture(colour, draw_figure(rng, colour), offset, card=False))
    return Scene(colour, start_s, flashes, [cue, loose])


def teach(question, scenes, rng, root, wrong_first=False):
    """Plays a question through the environment, see the module's docstring. As `synthetic.teach`."""
    env = make_env(question, synthetic.TINY_ENV, root)
    env.reset()
    overview = overview_of(env, scenes)
    turns, thoughts, found, visits = [], [overview.survey()], [], []
    if question["evidence"]:
        clauses, visits = overview.order_visits(named_scenes(question))
        thoughts += clauses
    if wrong_first:
        right = ["grey", *(visit.scene for visit in visits)]
        wrong = rng.choice([colour for colour in overview.scenes if colour not in right])
        visits = [Visit(wrong, "", is_wrong=True), *visits]
    for visit in visits:
        # where the card is
        clause, start_s, end_s = overview.place(visit, rng)
        fps = choose_fps(rng, FIRST_FPS, end_s - start_s)
        pictures = look(env, turns, [*thoughts, clause], start_s, end_s, fps, scenes)
        if env.done:  # no zoom was left
            return None
        clause, flashes = transcript(visit.scene, pictures)
        thoughts = [clause]
        if visit.is_wrong:
            thoughts.append("not found")
            continue
        # what is on it
        cards = [i for i, picture in enumerate(pictures) if picture.cue and picture.background == visit.scene]
        if cards and not flashes and rng.random() < SECOND_LOOK:
            times_s = [frame.time_s for frame in env.watched[-1]]
            clause, start_s, end_s = between_cards(visit.scene, cards[0], times_s)
            fps = choose_fps(rng, SECOND_FPS, end_s - start_s)
            pictures = look(env, turns, [*thoughts, clause], start_s, end_s, fps, scenes)
            if env.done:
                return None
            clause, flashes = transcript(visit.scene, pictures)
            thoughts = [clause]
        found.append(flashes)
    kind = "reflection" if wrong_first else "exemplar"
    return answer(question, env, rng, turns, thoughts, found, overview, kind, {})


def choose_fps(rng, two, length_s):
    """One of two frame rates, the hasty one where the careful one gives too many frames."""
    hasty, careful = two
    fits = length_s * float(careful) <= synthetic.TINY_ENV.zoom_max_frames
    return careful if fits and rng.random() >= HASTE else hasty


def teach_all(questions, scenes, rng, root, seed):
    """The trajectory rows of a video's questions: what is right of TRIES plays of each, a quarter of them with
    a first zoom to a wrong scene, and plays without zooms."""
    rows = []
    for question in questions:
        shown = with_frames(question, rng.choice(NUM_FRAMES))
        for _ in range(TRIES if question["evidence"] else 1):
            wrong_first = bool(question["evidence"]) and rng.random() < 0.25
            rows.append(teach(shown, scenes, rng, root, wrong_first))
        numbers = rng.sample(range(NUM_SLOTS, MOST_FRAMES + 1), MOST_FRAMES + 1 - NUM_SLOTS)
        plays = 1 if question["evidence"] else rng.randrange(2)
        rows += teach_without_zooms(question, scenes, rng, root, plays, numbers)
    return signed(rows, seed)


SEARCH = Suite("search", partial(synthetic.make_scenes, limits_s=SLOT_S, make_scene=make_scene),
               partial(synthetic.make_questions, on=ON), teach_all)
