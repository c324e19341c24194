"""Which environment a run plays: what its checkpoint was trained with, changed by the run's flags.

A checkpoint's zoom_config.json holds its EnvConfig: the protocol with its words, frames, pixels, zooms. One
function, `run_environment`, decides for sft.py, rl.py and eval.py alike what a run plays; one without that
file is taken for the paper's.

    flag                           what it changes
    --protocol                     the rules and words; frames and pixels stay where the protocol names none
    --system_prompt                the system prompt
    --overview, --num_frames       how the first look chooses its frames, and how many it takes; of several
                                   numbers each question gets one, and the checkpoint keeps its own
    --zoom_fps                     frames a second of all zooms, in place of what a call asks for
    --max_zooms                    how many zooms an episode has; 0: no tool
    --max_turn_tokens              tokens after which an assistant turn is cut off
    --accuracy_weight, ... (RL)    the weights of the reward's parts
"""

import functools
import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path

from transformers.utils import cached_file

from common import UserError, check_bad, first_line, read_text, warn
from protocols import PROTOCOLS, check_protocol, protocol_of
from zoom_env import ANY_FPS, EnvConfig, RewardWeights


# ------------------------------------------------------------------------------------ of a checkpoint
def find_env_config(name_or_path):
    """The path of a checkpoint's zoom_config.json, fetched where it is a name on the hub, or None. Raises
    UserError where there is no such folder."""
    path, name = Path(name_or_path), str(name_or_path)
    if path.is_dir():
        if (path / "zoom_config.json").is_file():
            return path / "zoom_config.json"
        if not (path / "config.json").is_file():
            raise UserError(f"cannot load {name}: it is not a checkpoint folder (it has no config.json)")
        return None
    if path.exists() or name.startswith((".", "/", "~", "runs/")) or "/" not in name:
        hint = "; python sft.py makes it" if name == "runs/sft" else ""
        raise UserError(f"cannot load {name}: there is no checkpoint folder of that name{hint}")
    return fetch_env_config(name)


@functools.cache
def fetch_env_config(name):
    """`find_env_config` of a name on the hub."""
    found = cached_file(name, "zoom_config.json", _raise_exceptions_for_missing_entries=False,
                        _raise_exceptions_for_connection_errors=False)
    return found and Path(found)


def load_env_config(name_or_path):
    """The environment settings of a checkpoint, else the paper's. Raises UserError."""
    path = find_env_config(name_or_path)
    if not path:
        return EnvConfig()
    try:
        settings = json.loads(read_text(path))
        for f in fields(EnvConfig):
            value = settings.get(f.name, getattr(EnvConfig(), f.name))
            fits = isinstance(value, (int, float) if f.type is float else f.type)
            if not fits or isinstance(value, bool) or value in (float("inf"), -float("inf")):
                raise ValueError(f"{f.name} must be a finite {f.type.__name__}, not {value!r}"[:200])
        env_config = EnvConfig(**settings)
        check_protocol(env_config)
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: {first_line(error)}; correct it or remove it") from None
    return env_config


# ------------------------------------------------------------------------------------------ of a run
def run_environment(model, config):
    """The EnvConfig that a run plays.

    Args:
        model: the checkpoint's folder or name; None: what plays is on a server, by the paper's settings.
        config: the run's settings, a RunConfig; in RL with the weights of RewardWeights.
    Raises UserError."""
    env_config = EnvConfig() if model is None else load_env_config(model)
    protocol = config.protocol
    if protocol is None and model is not None and find_env_config(model) is None:
        protocol = "direct" if config.max_zooms == 0 else "videozoomer"
        warn(f"{model} has no zoom_config.json, so it is played by the protocol {protocol}; "
             "--protocol takes another")
    if protocol is not None:
        env_config = with_protocol(env_config, protocol)
    changes = {field.name: getattr(config, field.name) for field in fields(RewardWeights)
               if hasattr(config, field.name)}
    if config.system_prompt is not None:
        changes["system_prompt"] = read_text(config.system_prompt).strip()
    if config.overview is not None and not chosen_by_file(config):
        changes["overview"] = config.overview
    if config.num_frames is not None and min(config.num_frames) < 1:
        raise UserError(f"--num_frames must be at least 1, not {min(config.num_frames)}")
    if config.num_frames is not None and len(config.num_frames) == 1:  # several: `with_num_frames`
        changes |= {"overview_max_frames": config.num_frames[0], "overview_fps": ANY_FPS}
    for name in ("max_zooms", "zoom_fps", "max_turn_tokens"):
        if getattr(config, name, None) is not None:
            changes[name] = getattr(config, name)
    try:
        return replace(env_config, **changes)
    except ValueError as error:
        hint = ", or a .json file of chosen frames" if str(error).startswith("overview must") else ""
        raise UserError(f"--{error}{hint}") from None


def with_protocol(env_config, protocol):
    """An EnvConfig under another protocol, a name or a .json file. Frames and pixels stay where the protocol
    names none. Raises UserError."""
    changes = read_protocol(protocol)
    if changes["protocol"] != env_config.protocol:
        # what the protocol before named is the paper's again
        before = ("system_prompt", "texts", *protocol_of(env_config).settings)
        plain = {name: getattr(EnvConfig(), name) for name in before}
        changes = plain | PROTOCOLS[changes["protocol"]].settings | changes
    try:
        env_config = replace(env_config, **changes)
        check_protocol(env_config)
    except ValueError as error:
        hint = "give the file that data_prep.py protocol writes"
        raise UserError(f"--protocol {protocol}: {error} {hint}") from None
    return env_config


def read_protocol(protocol):
    """What a name or a file of --protocol says: {"protocol"}, of a file also "system_prompt" and "texts".
    Raises UserError."""
    said = {"protocol": protocol}
    if str(protocol).endswith(".json"):
        said = read_protocol_file(protocol)
    if said["protocol"] not in PROTOCOLS:
        raise UserError(f"--protocol must be one of {', '.join(PROTOCOLS)} or a .json file, not {protocol}")
    return said


def read_protocol_file(path):
    try:
        file = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read --protocol {path}: {error}") from None
    known = {"protocol": str, "system_prompt": str, "texts": dict, "source": str}
    fits = isinstance(file, dict) and "protocol" in file and set(file) <= set(known)
    fits = fits and all(isinstance(value, known[name]) for name, value in file.items())
    if not (fits and all(isinstance(text, str) for text in file.get("texts", {}).values())):
        raise UserError(f"--protocol {path} must be an object with protocol, system_prompt and texts")
    file.pop("source", None)
    return file


# ------------------------------------------------------------------------------- frames of a question
def with_num_frames(questions, config):
    """Questions whose overview has as many frames as --num_frames says, in place of their own number. Where
    it names several each question gets one of them, by a hash of its id and --seed: in every epoch, and on
    every process, the same."""
    numbers = config.num_frames
    if numbers is None:
        return questions

    def drawn(question):
        digest = hashlib.sha256(f"{config.seed} {question['id']}".encode()).digest()
        return numbers[int.from_bytes(digest[:8]) % len(numbers)]

    return [q | {"num_frames": drawn(q)} if len(numbers) > 1 or "num_frames" in q else q for q in questions]


def largest_environment(env_config, config):
    """An EnvConfig with the largest overview of a run, which --num_frames may draw for each question: what
    memory has to be there for."""
    numbers = getattr(config, "num_frames", None) or []  # RolloutConfig alone has none
    if len(numbers) < 2:
        return env_config
    return replace(env_config, overview_max_frames=max(numbers), overview_fps=ANY_FPS)


def chosen_by_file(config):
    """Whether --overview names a file of chosen frames."""
    return (config.overview or "").endswith(".json")


def with_chosen_frames(questions, config):
    """Gives questions the number of frames of --num_frames, and the frames that another selector chose, where
    --overview names a file of them.

    Such a file is a list of {"video_name", "question", "frame_idx"} (TSPO's format). A row belongs to the
    question with the same file name and the same first line, which gets it as overview_frames.
    Returns ({number in `questions`: the question}, [(id, reason)] of those without frames). Raises UserError,
    also when more than the share --max_bad has none."""
    if config.overview is not None and not all("video" in question for question in questions):
        raise UserError("--overview chooses frames of videos; these rows hold image files")
    questions = with_num_frames(questions, config)
    if not chosen_by_file(config):
        return dict(enumerate(questions)), []

    def key(video, question):
        return Path(video).name, question.strip().splitlines()[0].strip()

    try:
        chosen = {key(row["video_name"], row["question"]): [float(n) for n in row["frame_idx"]]
                  for row in json.loads(read_text(config.overview)) if row.get("frame_idx")}
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"cannot read --overview {config.overview}: {first_line(error)}") from None
    known, bad = {}, []
    for number, question in enumerate(questions):
        frames = chosen.get(key(question["video"], question["question"]))
        if frames:
            known[number] = question | {"overview_frames": frames}
        else:
            bad.append((question["id"], "no frames chosen for it"))
    check_bad(bad, len(questions), config.max_bad, config.overview)
    return known, bad
