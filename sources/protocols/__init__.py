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
from dataclasses import fields, replace

from common import UserError, read_text, warn
from scale.checkpoints import find_env_config
from sources.protocols.direct import Direct
from sources.protocols.longvt import LongVT
from sources.protocols.released import TEXTS, Released
from zoom_env import EnvConfig, ZoomEnv

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
        warn(f"{model} has no zoom_config.json: it is played by the protocol {protocol}, which it may never have "
             "seen; --protocol takes another")
    if protocol is None:
        return env_config
    changes = read_protocol(protocol) if protocol.endswith(".json") else {"protocol": protocol}
    env = PROTOCOLS.get(changes["protocol"])
    if env is None:
        raise UserError(f"--protocol must be one of {', '.join(PROTOCOLS)} or a .json file, not {protocol}")
    plain = {f.name: f.default for f in fields(EnvConfig)}
    changes = {"system_prompt": plain["system_prompt"], "texts": {}} | env.settings | changes
    if config.system_prompt:
        changes["system_prompt"] = env_config.system_prompt
    try:
        return replace(env_config, **changes)
    except ValueError as error:
        raise UserError(f"--protocol {protocol}: {error} give the file that data_prep.py protocol writes") from None


def check_protocol(config):
    """Raises UserError for a --protocol that cannot be used, before a model loads."""
    if config.protocol is not None:
        use_protocol(EnvConfig(), config, "")


def read_protocol(path):
    """The settings in a protocol's file: {"protocol", "system_prompt", "texts"}. Raises UserError."""
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


__all__ = ["PROTOCOLS", "TEXTS", "check_protocol", "use_protocol", "read_protocol"]
