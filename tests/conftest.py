import json
import os
import signal
import sys
from pathlib import Path

# one thread a process, here and in those that tests start: beside another job two of them spin
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "cuda"],
                     help="only the tests of what a device computes, there, slow ones, too")
    parser.addoption("--times", type=int, default=1, help="so many times as many random faults, with -m slow")


def pytest_configure(config):
    """With --device all tests that are marked so, and what they and their processes compute is there."""
    if config.getoption("device"):
        os.environ["TEST_DEVICE"] = config.getoption("device")
        config.option.markexpr = "device"


@pytest.fixture(scope="session")
def times(pytestconfig):
    """How many times as many random faults a test tries."""
    return pytestconfig.getoption("times")


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
    """A run in this process takes these signals over; after the test they are pytest's again."""
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    handlers, wake = [signal.getsignal(number) for number in numbers], signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wake)
    yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)
    signal.set_wakeup_fd(wake)
