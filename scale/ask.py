"""One question about one video: eval.py --video FILE --question TEXT."""

from pathlib import Path

import torch
from torchvision.io import write_png

from common import UserError
from rollout import Engine
from scale import runs
from scale.first_day import check_decoder
from sources.overview import use_overview
from video import open_video
from zoom_env import EnvConfig


def ask(config, world, checkpoints, load, question_error):
    """Plays one question about one video and prints the dialogue.

    Args:
        config: eval.py's, with video, question, options, save_frames. world: number of processes.
        checkpoints: gives the names in question. load: gives the Policy of a name.
        question_error: why a question row cannot be used, or None.
    Raises UserError."""
    if world > 1 or config.video is None or not (config.question or "").strip():
        raise UserError("to ask about a video give both --video FILE and --question TEXT, to one process")
    question = {"id": "question", "video": config.video, "question": config.question,
                "options": config.options, "answer": "A" if config.options else "unknown",
                "answer_type": "multiple_choice" if config.options else "open_ended"}
    if reason := question_error(question):
        raise UserError(reason)
    open_video(config.video)  # before the model loads
    if config.save_frames:
        runs.open_folder(config.save_frames)
    use_overview(EnvConfig(), [question], config.overview, config.max_bad)
    policy = load(checkpoints(config)[0 if config.model else -1])
    generator = torch.Generator(policy.device).manual_seed(config.seed)
    engine = Engine(policy, 1, config, generator)
    check_decoder(engine.decoder)
    groups, skipped = engine.play([question])
    if skipped:
        raise UserError(skipped[0][1])
    env = groups[0][0].env
    print(env.describe())
    print(f"answer: {env.answer() if env.answer() is not None else 'none (the policy gave no answer)'}")
    seen = [(number, frames) for number, frames in enumerate(env.watched) if frames]
    for number, frames in seen if config.save_frames else []:
        times = f"{frames[0].time_s:.2f}s-{frames[-1].time_s:.2f}s"
        name = Path(config.save_frames, f"{number}_{'zoom' if number else 'overview'}_{times}.png")
        write_png(strip([f.image for f in frames]), str(name))
        print(f"wrote {name}")


def strip(images):
    """(3, H, W) images side by side, upper edges in line; where a film's size changes, some are higher."""
    height = max(image.shape[1] for image in images)
    return torch.cat([torch.nn.functional.pad(i, (0, 0, 0, height - i.shape[1])) for i in images], dim=2)
