"""rl.py with rewards that depend on what is said, whatever it is: a random policy's would all be equal, and
nothing would be learned."""

import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rl  # noqa: E402
import zoom_env  # noqa: E402


def planted_rewards(env):
    """In place of zoom_env.reward_parts: 0, 0.5 or 1 for each part, by the text of the episode."""
    said = "".join(turn.text for turn in env.turns)
    return dict.fromkeys(zoom_env.REWARD_PARTS, zlib.crc32(said.encode()) % 3 / 2)


if __name__ == "__main__":
    sys.argv[0] = "rl.py"  # whose errors and settings these are
    zoom_env.reward_parts = planted_rewards
    rl.run_main(rl.main)
