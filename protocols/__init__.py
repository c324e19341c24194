"""What a policy meets, by name: the words it reads, the frames it sees, the rules it plays by.

    videozoomer   ours: zoom_env.ZoomEnv
    released      what the paper's released checkpoint was trained on; its sentences come from a file that
                  `python data_prep.py protocol` writes from a clone of the public repository
    direct        no tool: frames, question, and a plain request for an answer that the grader reads
    longvt        a <tool_call> with a JSON name and arguments, which crops in seconds

Each is a subclass of ZoomEnv in a file of its own, which says where its facts come from. A new one needs a
line in PROTOCOLS. A checkpoint keeps the name and the texts of the one that it was trained with
(zoom_config.json); `--protocol` takes another (training/environment.py).
"""

from dataclasses import replace

from protocols.direct import Direct
from protocols.longvt import LongVT
from protocols.released import Released
from zoom_env import ZoomEnv

PROTOCOLS = {"videozoomer": ZoomEnv, "released": Released, "direct": Direct, "longvt": LongVT}


def protocol_of(env_config):
    """The class that plays by an EnvConfig's protocol. Raises ValueError where there is none of that name."""
    if env_config.protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, not {env_config.protocol}")
    return PROTOCOLS[env_config.protocol]


def check_protocol(env_config):
    """Raises ValueError where an EnvConfig names no protocol, or lacks a sentence that its protocol needs."""
    needed = protocol_of(env_config).needs
    missing = [name for name in needed if not isinstance(env_config.texts.get(name), str)]
    if missing:
        raise ValueError(f"the protocol {env_config.protocol} lacks its texts {', '.join(missing[:2])}, ..")


def with_settings(env_config, settings):
    """An EnvConfig with other settings, a dict; where they name another protocol, with those of that, too."""
    name = settings.get("protocol", env_config.protocol)
    of_protocol = {} if name == env_config.protocol else PROTOCOLS[name].settings
    return replace(env_config, **of_protocol | settings)


def make_env(question, env_config, root="."):
    """An episode's environment: the question's row, under an EnvConfig, its video relative to `root`."""
    return protocol_of(env_config)(question, env_config, root)
