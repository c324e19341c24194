import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A few synthetic videos: (folder, questions, trajectories)."""
    from demo.synthetic import synthetic

    folder = tmp_path_factory.mktemp("data")
    synthetic(folder, 10, 5, seed=3)
    read = lambda name: [json.loads(line) for line in open(folder / name)]
    return folder, read("train.jsonl"), read("sft.jsonl")


@pytest.fixture(scope="session")
def policy():
    from tiny import random_policy

    return random_policy()
