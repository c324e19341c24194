"""What a policy meets, by name: the words it reads, the frames it sees, the rules it plays by.

    videozoomer   ours: zoom_env.ZoomEnv
    released      what the paper's released checkpoint was trained on; its sentences come from a file that
                  `python data_prep.py protocol` writes from a clone of the public repository
    direct        no tool: frames, question, and a plain request for an answer that the grader reads
    longvt        a <tool_call> with a JSON name and arguments, which crops in seconds

Each is a subclass of ZoomEnv in a file of its own, which says where its facts come from. A checkpoint keeps the
name and the texts of the one that it was trained with (zoom_config.json); `--protocol` takes another.
"""

import json
from dataclasses import replace
from pathlib import Path

from common import UserError, read_text, warn
from scale.checkpoints import find_env_config, load_env_config, loading
from sources.protocols.direct import Direct
from sources.protocols.longvt import LongVT
from sources.protocols.released import Released
from zoom_env import EnvConfig, ZoomEnv, protocol_of

PROTOCOLS = {env.protocol: env for env in (ZoomEnv, Released, Direct, LongVT)}


def use_protocol(env_config, config, model, tool=True):
    """Applies --protocol to the settings that come with a checkpoint.

    Args:
        env_config: EnvConfig of the checkpoint, with the text of --system_prompt, if that is given.
        config: RunConfig. Its protocol is a name, a .json file, or None: as the checkpoint was trained.
        model: the checkpoint's folder or name. Where it says nothing of a protocol, a warning tells which one
            is played: ours, or without a tool the direct one.
        tool: whether a tool is offered.
    Returns an EnvConfig. Raises UserError."""
    protocol = config.protocol
    if protocol is None and find_env_config(model) is None:
        protocol = ZoomEnv.protocol if tool else Direct.protocol
        warn(f"{model} has no zoom_config.json, so it is played by the protocol {protocol}; --protocol takes another")
    if protocol in (None, env_config.protocol):
        return env_config
    changes = read_protocol(protocol)
    env = PROTOCOLS[changes["protocol"]]
    plain, others = EnvConfig(), {name for each in PROTOCOLS.values() for name in each.settings}
    if env.protocol == env_config.protocol:
        others = ()  # its numbers stay
    changes = {name: getattr(plain, name) for name in ("system_prompt", "texts", *others)} | env.settings | changes
    if config.system_prompt:
        changes["system_prompt"] = env_config.system_prompt
    try:
        return replace(env_config, **changes)
    except ValueError as error:
        raise UserError(f"--protocol {protocol}: {error} give the file that data_prep.py protocol writes") from None


def check_protocol(config, model=None):
    """Raises UserError, before a model loads, for a --protocol that cannot be used, or that a run of RL on the
    checkpoint folder `model` cannot train by."""
    if config.protocol is not None:
        read_protocol(config.protocol)
    if model and Path(model).is_dir():  # else it has to be fetched first
        with loading(model):
            env_config = load_env_config(model)
        check_end_tokens(config, use_protocol(env_config, config, model) if config.protocol else env_config)


def check_end_tokens(config, env_config):
    """Raises UserError where RL would train an end token that may not have been sampled."""
    if getattr(config, "old_log_probs", None) == "sampled" and protocol_of(env_config).trains_appended_end:
        raise UserError(f"the protocol {env_config.protocol} trains an appended end token, which has no "
                        "log-probability of sampling: add --old_log_probs recomputed")


def read_protocol(protocol):
    """What a name or a file of --protocol says: {"protocol"}, of a file also "system_prompt" and "texts".
    Raises UserError."""
    path, said = protocol, {"protocol": protocol}
    if str(path).endswith(".json"):
        said = read_file(path)
    if said["protocol"] not in PROTOCOLS:
        raise UserError(f"--protocol must be one of {', '.join(PROTOCOLS)} or a .json file, not {protocol}")
    return said


def read_file(path):
    try:
        file = json.loads(read_text(path))
        known = {"protocol": str, "system_prompt": str, "texts": dict}
        fits = isinstance(file, dict) and set(file) <= {*known, "source"} and "protocol" in file and all(
            isinstance(file[key], kind) for key, kind in known.items() if key in file)
        fits = fits and all(isinstance(text, str) for text in file.get("texts", {}).values())
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read --protocol {path}: {error}") from None
    if not fits:
        raise UserError(f"--protocol {path} must be an object with protocol, system_prompt and texts")
    file.pop("source", None)
    return file
