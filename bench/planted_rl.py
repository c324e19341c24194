"""rl.py with rewards that depend on what is said, whatever it is: a random policy's would all be equal, and nothing
would be learned."""

import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.argv[0] = "rl.py"

import rl
import zoom_env

zoom_env.reward_parts = lambda env: dict.fromkeys(
    zoom_env.REWARD_PARTS, zlib.crc32("".join(turn.text for turn in env.turns).encode()) % 3 / 2)

if __name__ == "__main__":
    rl.run_main(rl.main)
