import json
import signal
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


@pytest.fixture(autouse=True)
def own_signals():
    """A run in this process takes SIGTERM over; after the test it is pytest's again."""
    handler, wake = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wake)
    yield
    signal.signal(signal.SIGTERM, handler)
    signal.set_wakeup_fd(wake)
