"""Trajectories of a teacher behind a server (sources/served.py), for sft.py.

    python data_prep.py exemplars --questions Q.jsonl --base_url URL --out T.jsonl
    python data_prep.py reflections --questions Q.jsonl --student DIR_or_URL --base_url URL --out R.jsonl

An exemplar: the teacher plays a question as a policy would, in the environment of the checkpoint --model,
else the student's, else the paper's; it is told nothing more. A reflection: the student plays, at temperature
1; where it is wrong, the teacher sees its dialogue without its answer, and a note (NOTE) that it was wrong,
and goes on. The row is the student's turns, then the teacher's; the note is not in it. The loss covers all
turns, as in the paper; --learn corrections leaves the student's out. Each is asked for --samples times, and at
most --keep are kept.

The verifier's rules; what breaks one is counted by the first that it breaks, and kept in OUT.rejected.jsonl:

    cut off              no turn and no episode was cut off at a limit
    wrong                the answer is right (a segment: from an overlap of 0.5 on)
    not well formed      every turn of the teacher's is, and no call was beyond the limits or failed
    too many turns       there are at most --rounds turns, the student's among them
    speaks of hints      a reflection: no turn speaks of the note, or of being told
    told                 a reflection: nothing that the student said gives the right answer away
    nothing new          a reflection: a zoom shows what the failed ones did not: of each of them a fifth of it
                         is outside, or it has half as many frames a second more
    luck                 at least half of the samples of the question are right, or a zoom of this one hits
                         the evidence: who guesses among four options is right at least once in four samples
                         in 68% of the questions
    said before          no other row of the question has the same turns

Everything is kept in the folder OUT.work: the student's episodes, the server's answers, the episodes that are
over. So a run that was stopped goes on, and asks again only for what was on its way.
"""

import hashlib
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

from common import RunConfig, UserError, choose_dtype, open_folder, start_processes, warn, write_jsonl
from grading import grade, normalise
from rollout import RolloutConfig
from sources import served
from sources.files import check_out, moved_question, write_skipped
from sources.read import read_questions
from sources.served import Answers, ServedConfig, ServedEngine, Server, same_model
from training import run_folder
from training.checkpoints import load_policy
from training.environment import run_environment, with_chosen_frames
from training.held_out import make_player, missing_file
from training.tables import waits_for_judge
from zoom_env import Message

NOTE = """

Your zooms so far did not lead to the right answer. Think about why: was it the wrong part of the video, \
or were its frames too few? Say in your thought what was wrong with the last zoom, then zoom in elsewhere or \
more closely, and answer. Write as if you had noticed this by yourself: do not mention this message."""
HINTS = re.compile(r"""\b(?: did\ not\ lead | (?:this|your|the)\ (?:hint|feedback)
    | (?:this|your)\ (?:note|message) | ground.?truth | reference\ answer | pointed\ out
    | according\ to\ (?:you|the\ (?:user|prompt|system))
    | (?:the\ (?:user|prompt|system|instructions?)|you)\ (?:say|said|told|tell|note|point|mention|want)(?:s|ed)?
    | (?:I|we)(?:\ was|\ were|['’]m|\ am|\ are|['’]?(?:ve|d)\ been|\ ha(?:ve|d)\ been)\ (?:told|informed|asked)
    )\b""", re.IGNORECASE | re.VERBOSE)
NEW_SHARE, NEW_DENSITY = 0.2, 1.5  # of a zoom that shows something new
BEFORE, STUDENT = "student_turns", "student_name"  # a question's keys, while it is played
STUDENT_TEMPERATURE = 1.0


@dataclass(frozen=True)
class TeacherConfig(RunConfig, ServedConfig):
    """Settings of data_prep.py exemplars."""

    questions: str | None = None  # question file
    out: str | None = None  # .jsonl file of trajectories to write
    model: str | None = None  # folder that says what is played; else the student's; else as in the paper
    samples: int = 1  # episodes of the teacher a question
    keep: int = 1  # trajectories a question, at most
    temperature: float | None = None  # of the teacher; by default 0 of one sample, 1 of several
    rounds: int | None = None  # turns of a trajectory, at most; else what the environment allows
    max_turn_tokens: int | None = None  # a turn is cut off here; else as --model, or 1,024
    max_response_tokens: int = 32_768  # after the prompt, of an episode
    resume: str = "auto"  # auto: an unfinished run goes on; never: it is moved aside


@dataclass(frozen=True)
class ReflectionConfig(TeacherConfig):
    """Settings of data_prep.py reflections."""

    student: str | None = None  # checkpoint folder, or address of a server, whose wrong episodes are mended
    student_model: str | None = None  # the student's name on its server
    learn: str = "all"  # all turns, or corrections alone


def distil(config):
    """Writes a trajectory file, exemplars or with a ReflectionConfig reflections; prints counts. Returns its
    rows. Raises UserError, also where there is none."""
    kind = "reflection" if isinstance(config, ReflectionConfig) else "exemplar"
    check_flags(config)
    _, world, device = start_processes(config.device)
    if world > 1:
        raise UserError("one process asks, --concurrency episodes at one time")
    questions, skipped = playable(config)
    out = Path(config.out)
    of_student = config.student if kind == "reflection" and not is_address(config.student) else None
    env_config = run_environment(config.model or of_student, config)
    folder, stopped = open_folder(out.with_suffix(".work")), None
    # play
    rows = begin(config, folder)
    if config.resume == "never" and out.exists():
        run_folder.move_aside([out])
    if kind == "reflection":
        questions, unread = student_failures(config, questions, env_config, folder, device)
        skipped += unread
    try:
        skipped += teach(config, questions, env_config, folder, rows)
    except UserError as error:  # what was played is written all the same
        stopped = error
    # choose and write
    kept, rejected = chosen_rows(config, kind, questions, rows.merge(), env_config)
    rules = Counter(row["rule"] for row in rejected)
    named = ", ".join(f"{rule} {number}" for rule, number in rules.most_common()) or "none"
    print(f"{kind}s: {len({row['question']['id'] for row in kept})} of {len(questions)} questions, {len(kept)} "
          f"trajectories; rejected: {named}; not played: {len(skipped)}; "
          f"tokens: {Answers(folder / 'answers.jsonl').tokens}")
    write_jsonl(out.with_suffix(".rejected.jsonl"), rejected)
    write_skipped(out, skipped)
    if kept:
        write_jsonl(out, kept)
        print(f"wrote {out}", flush=True)
    if stopped:
        raise stopped
    if skipped:
        where, reason = skipped[0]
        warn(f"{len(skipped)} were not played ({where}: {reason}); the same command tries again")
    if not kept:
        raise UserError(f"no {kind} was kept, {len(rejected)} were rejected: see "
                        f"{out.with_suffix('.rejected.jsonl')}")
    run_folder.finish_run(folder)
    return kept


def check_flags(config):
    """Raises UserError."""
    needed = ["questions", "out", "base_url"] + ["student"] * isinstance(config, ReflectionConfig)
    if missing := [name for name in needed if not getattr(config, name)]:
        raise UserError(f"--{missing[0]} is needed")
    check_out(config.out, config.questions)
    for name, known in (("resume", ("auto", "never")), ("learn", ("all", "corrections"))):
        if getattr(config, name, known[0]) not in known:
            raise UserError(f"--{name} must be {' or '.join(known)}, not {getattr(config, name)}")


def playable(config):
    """({number: question}, [(id, reason)] of those that cannot be played). Raises UserError."""
    rows, skipped = read_questions(config.questions, config.max_bad)
    questions, without = with_chosen_frames(rows, config)
    skipped += without
    for number, question in list(questions.items()):
        reason = missing_file(question, Path(config.questions).parent)
        if waits_for_judge(question):
            reason = "its answer waits for a judge"
        if reason:
            skipped.append((question["id"], reason))
            del questions[number]
    return questions, skipped


def is_address(name):
    return name.startswith(("http://", "https://"))


# -------------------------------------------------------------------------------------------------- episodes
def begin(config, folder):
    """The run in the folder begins or goes on. Returns the Rows of its episodes."""
    episodes = run_folder.Rows(folder, "episodes", lambda line: (line["number"], line["sample"]), 0)
    student = getattr(config, "student", None)
    inputs = {"question file": config.questions, "checkpoint": config.model} | run_folder.files_of(config)
    if student and not is_address(student):
        inputs["student"] = student
    may_differ = (*served.MAY_DIFFER, "questions", "model", "student", "keep", "learn")
    episodes.begin(config, may_differ, inputs, r"(answers|episodes|student(_answers)?)\.jsonl", lambda: None,
                   lambda done: False)  # those that were skipped are tried again
    return episodes


def student_failures(config, questions, env_config, folder, device):
    """({number: question with the turns of a wrong episode of the student's, without its answer}, [(id,
    reason)] of questions that were not played)."""
    rows, unread = run_folder.Rows(folder, "student", lambda line: line["number"], 0), []
    there = {line["number"]: line for line in rows.merge()}
    left = [number for number in questions if number not in there]
    if left:
        engine = student_engine(config, env_config, folder, device)
        name = engine.server.model if is_address(config.student) else config.student
        with tqdm(total=len(left), desc="student", unit="episode", dynamic_ncols=True) as bar:
            def on_end(e):
                line = student_line(e) | {"number": left[e.question_number], "student": name}
                there[line["number"]] = line
                rows.write(line)
                e.forget_frames()
                bar.update()

            _, unread = engine.play([questions[number] for number in left], Path(config.questions).parent,
                                    env_config, on_end)
    failed, most = {}, env_config.max_zooms - 1  # a zoom is left for the teacher
    for number, line in sorted(there.items()):
        if number in questions and line["right"] < 0.5 and "call" in line["kinds"][:most]:
            failed[number] = questions[number] | {BEFORE: line["turns"][:most], STUDENT: line["student"]}
    print(f"student: {len(there)} questions, {sum(line['right'] < 0.5 for line in there.values())} wrong, "
          f"{len(failed)} of them with zooms", flush=True)
    return failed, unread


def student_line(e):
    """What is kept of an episode of the student's: its turns before its answer, without one that was cut
    off."""
    turns = e.env.turns[:-1] if e.truncated or e.env.turns[-1].kind == "answer" else e.env.turns
    return {"right": e.env.rewards["accuracy"], "turns": [turn.text for turn in turns],
            "kinds": [turn.kind for turn in turns]}


def student_engine(config, env_config, folder, device):
    """What plays the student's episodes: here, or on its server."""
    how = RolloutConfig(temperature=STUDENT_TEMPERATURE, max_turn_tokens=env_config.max_turn_tokens,
                        max_response_tokens=config.max_response_tokens)
    if is_address(config.student):
        own = replace(config, base_url=config.student, served_model=config.student_model)
        server = Server(own, folder / "student_answers.jsonl", env_config, "STUDENT_API_KEY")
        same_model(folder, "student", server.model)
        return ServedEngine(server, 1, how, config.seed)
    policy = load_policy(config.student, device, choose_dtype(config.dtype, device), env_config)
    return make_player(policy, how, torch.Generator(device).manual_seed(config.seed))


def teach(config, questions, env_config, folder, rows):
    """The teacher plays what is left of the questions; each of its episodes becomes a line of `rows`. Returns
    [(id, reason)] of those that were not played."""
    there = {(line["number"], line["sample"]) for line in rows.read()}
    every = range(config.samples)
    left = [number for number in questions if any((number, sample) not in there for sample in every)]
    if not left:
        return []
    server = Server(config, folder / "answers.jsonl", env_config)
    same_model(folder, "teacher", server.model)
    temperature = config.temperature
    if temperature is None:
        temperature = 0.0 if config.samples == 1 else 1.0
    how = RolloutConfig(temperature=temperature, max_turn_tokens=env_config.max_turn_tokens,
                        max_response_tokens=config.max_response_tokens)
    engine = ServedEngine(server, config.samples, how, config.seed, with_student)
    with tqdm(total=len(left) * config.samples, desc="teacher", unit="episode", dynamic_ncols=True) as bar:
        def on_end(e):
            number = left[e.question_number]
            if (number, e.number) not in there:
                rows.write({"number": number, "sample": e.number, "teacher": server.model,
                            "temperature": temperature} | line_of(e, config))
            e.forget_frames()
            bar.update()

        _, unread = engine.play([questions[number] for number in left], Path(config.questions).parent,
                                env_config, on_end)
    return unread


def line_of(e, config):
    """What is kept of an episode of the teacher's."""
    own = e.env.turns[len(e.env.question.get(BEFORE) or []):]
    hits = [bool(call.hit) for call in calls_in(own)]
    return {"right": e.env.rewards["accuracy"], "hits": sum(hits) / max(1, len(hits)),
            "rule": broken_rule(e, config.rounds), "turns": [turn.text for turn in e.env.turns],
            "max_zooms": e.env.config.max_zooms, "date": date.today().isoformat(),
            "refused": e.token_counts()["refused_parameters"]}


def with_student(env):
    """The messages with which the teacher's part begins: where there is a student's, behind it."""
    messages, turns = env.reset(), env.question.get(BEFORE) or ()
    for text in turns:
        messages += [Message("assistant", [text]), *env.step(text)]
    if turns:
        messages[-1] = Message("user", [*messages[-1].content, NOTE])
    return messages


# -------------------------------------------------------------------------------------------------- verifier
def broken_rule(e, rounds=None):
    """The first of the rules of one episode that it breaks, or None."""
    env, before = e.env, e.env.question.get(BEFORE) or []
    student, own = env.turns[:len(before)], env.turns[len(before):]
    alone = env.fork()
    alone.turns = own
    if e.truncated:
        return "cut off"
    if env.rewards["accuracy"] < 0.5:
        return "wrong"
    if not alone.is_well_formed() or any(turn.kind not in ("call", "answer") for turn in own):
        return "not well formed"
    if rounds is not None and len(env.turns) > rounds:
        return "too many turns"
    if before and any(HINTS.search(turn.text) for turn in own):
        return "speaks of hints"
    if any(tells(turn.text, env.question) for turn in student):
        return "told"
    if before and not any(is_new(call, calls_in(student)) for call in calls_in(own)):
        return "nothing new"
    return None


def tells(text, question):
    """Whether a turn gives a question's answer away: what stands between two of its tags says it, or, but for
    letters and segments, holds its words; of a segment it is also a call that has it."""
    for part in re.split(r"</?\w+>", text):
        if part.lstrip().startswith("{"):  # a call
            segment = re.search(r"\[([^][]*),([^][]*)\]", part)
            part = f"{segment[1]} - {segment[2]}" if segment and question["answer_type"] == "segment" else ""
        if grade(part, question) >= 0.5:
            return True
        has_words = question["answer_type"] in ("open_ended", "number")
        if has_words and f" {normalise(question['answer'])} " in f" {normalise(part)} ":
            return True
    return False


def calls_in(turns):
    """The calls that were carried out."""
    return [call for turn in turns if turn.kind == "call" for call in turn.calls]


def is_new(call, others):
    """Whether a call shows what the other ones did not."""
    start_s, end_s = call.arguments["segment"]
    for other in others:
        first, last = other.arguments["segment"]
        shared_s = max(0.0, min(end_s, last) - max(start_s, first))
        is_inside = shared_s > (1 - NEW_SHARE) * (end_s - start_s)
        if is_inside and density(call) < NEW_DENSITY * density(other):
            return False
    return True


def density(call):
    """Frames a second that it showed."""
    start_s, end_s = call.arguments["segment"]
    return call.num_frames / max(end_s - start_s, 1e-6)


def choose(lines, keep):
    """(those of a question's episodes that are kept, [(rule, line)] of the others)."""
    enough = lines and 2 * sum(line["right"] >= 0.5 for line in lines) >= len(lines)
    good, others, texts = [], [], []
    for line in lines:
        rule = line["rule"]
        if not rule and not (enough or line["hits"]):
            rule = "luck"
        if not rule and line["turns"] in texts:
            rule = "said before"
        if rule:
            others.append((rule, line))
            continue
        texts.append(line["turns"])
        good.append(line | {"right_samples": f"{sum(x['right'] >= 0.5 for x in lines)} of {len(lines)}"})
    good.sort(key=lambda line: -line["hits"])  # equal ones stay in order
    return good[:keep], others + [("more than --keep", line) for line in good[keep:]]


# --------------------------------------------------------------------------------------------------- writing
def chosen_rows(config, kind, questions, lines, env_config):
    """(rows of the trajectory file, those that were rejected), of the lines of all episodes."""
    samples, kept, rejected = defaultdict(list), [], []
    for line in lines:
        samples[line["number"]].append(line)
    for number, question in questions.items():
        whole = len(samples[number]) == config.samples
        chosen, others = choose(samples[number] if whole else [], config.keep)
        kept += [row_of(line, question, kind, config, env_config) for line in chosen]
        for rule, line in others:
            rejected.append({"question": question["id"], "rule": rule, "turns": line["turns"]})
    return kept, rejected


def row_of(line, question, kind, config, env_config):
    """A row of the trajectory file."""
    before, student = question.get(BEFORE) or [], question.get(STUDENT)
    question = {name: value for name, value in question.items() if name not in (BEFORE, STUDENT)}
    learns = getattr(config, "learn", "all") == "all"
    prompt = env_config.system_prompt + (NOTE if before else "")
    made = {"teacher": line["teacher"], "temperature": line["temperature"], "seed": config.seed,
            "sample": line["sample"], "right": line["right_samples"], "date": line["date"],
            "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(), "max_zooms": line["max_zooms"],
            "protocol": env_config.protocol}
    if line["refused"]:
        made["refused"] = line["refused"]
    if kind == "reflection":
        made["student"] = student
    return {"question": moved_question(question, Path(config.questions).parent, config.out), "kind": kind,
            "turns": line["turns"], "provenance": made,
            "learn": [learns or number >= len(before) for number in range(len(line["turns"]))]}
