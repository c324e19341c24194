"""The ways to play a question that eval.py's flags ask for."""

from dataclasses import dataclass

from common import UserError

CLIPS = {"shown": "zoom", "grey": "grey clips", "other": "other clips", "none": "no clips"}  # {flag: mode}
ZOOM = {"policy": "zoom", "always": "always zoom", "never": "zoom off", "gate": "gate"}
LEAST_VOTES = 3  # of a gate


@dataclass(frozen=True)
class Mode:
    """One way to play a question, by the name that the tables give it."""

    name: str
    clips: str = "shown"
    zoom: str = "policy"
    votes: int = 1  # samples of a question
    temperature: float = 0.0


def check_flags(config):
    """Raises UserError for words that are unknown, and flags that do not go together."""
    for flag, known in (("clips", CLIPS), ("zoom", ZOOM)):
        unknown = [word for word in getattr(config, flag) or [] if word not in known]
        if unknown:
            raise UserError(f"--{flag} must be some of {', '.join(known)}, not {unknown[0]}")
    zooms, others = set(config.zoom or ()) - {"policy"}, set(config.clips or ()) - {"shown"}
    if config.mode == "uniform" and (zooms or others):
        raise UserError(f"--{'zoom' if zooms else 'clips'} goes without --mode uniform, where nothing zooms")
    if others and (zooms or config.temperature or (config.votes or 1) > 1):
        raise UserError("--clips compares the same turns: it goes without --zoom, --votes and --temperature")
    if "gate" in zooms and (config.votes or 1) < LEAST_VOTES:
        raise UserError(f"--zoom gate needs --votes {LEAST_VOTES} or more, the samples that may disagree")


def check_tool(config, name, env_config, tools):
    """Raises UserError where a checkpoint is to be played with a tool that it does not have."""
    needs = [f"--zoom {word}" for word in config.zoom or [] if word in ("always", "gate")]
    needs += [f"--clips {word}" for word in config.clips or [] if word != "shown"]
    if needs and not (tools and env_config.max_zooms):
        raise UserError(f"{needs[0]} needs a tool, and {name} is played without one")


def modes_of(config, is_demo):
    """The Modes that are played, by name. A gate is made of two of them, see `gate_modes`."""
    def sampled(name, **how):
        votes = config.votes or 1
        temperature = config.temperature if votes == 1 else config.temperature or 1.0
        return Mode(name if votes == 1 else f"{name} x{votes}", votes=votes, temperature=temperature, **how)

    words, clips = config.zoom or ["policy"], [word for word in config.clips or [] if word != "shown"]
    modes = []
    for word in words:
        if word == "gate":
            modes.append(Mode(ZOOM["policy"], temperature=config.temperature))
            modes.append(sampled(ZOOM["never"], zoom="never"))
        elif config.mode == "uniform":
            modes.append(sampled("uniform"))
        else:
            modes.append(sampled(ZOOM[word], zoom=word))
    if config.mode is None and config.zoom is None and not clips and is_demo:
        modes.append(sampled(ZOOM["never"], zoom="never"))
    modes += [Mode(CLIPS[word], clips=word) for word in clips]
    return {mode.name: mode for mode in modes}


def settings(mode):
    """What stands beside a Mode's numbers."""
    more = {"temperature": mode.temperature}
    if mode.clips != "shown":
        more["clips"] = mode.clips
    if mode.zoom != "policy":
        more["zoom"] = mode.zoom
    if mode.votes > 1:
        more["votes"] = mode.votes
    return more


def gate_modes(config):
    """The names of a gate, of its direct answers and of its zooms; None where none is asked for."""
    if "gate" not in (config.zoom or ()):
        return None
    return f"{ZOOM['gate']} x{config.votes}", f"{ZOOM['never']} x{config.votes}", ZOOM["policy"]
