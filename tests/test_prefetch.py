"""Batches that are prefetched: the same as without, two in memory at most, errors in their place, an end at any moment,
and the time of the slower side alone."""

import os
import random
import threading
import time
import weakref

import pytest

from training.prefetch import prefetch, decoder_threads, in_threads


def slowly(row):
    time.sleep(random.Random(row).uniform(0, 0.01))  # they do not end in their order
    return row * row


def test_batches_and_their_order_are_those_of_the_plain_loop():
    batches = [list(range(n, n + 1 + n % 5)) for n in range(12)] + [[]]
    load = lambda rows: in_threads(slowly, rows)
    prefetched = [(batch, loaded) for batch, loaded, waited_s in prefetch(load, (b for b in batches)) if waited_s >= 0]
    assert prefetched == [(batch, [row * row for row in batch]) for batch in batches]
    assert list(prefetch(load, [])) == []


def test_the_next_batch_is_prepared_and_no_other():
    begun, prefetched = [], prefetch(lambda batch: begun.append(batch) or batch, range(5))
    for expected in ([0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]):
        next(prefetched)
        time.sleep(0.05)  # it is begun while this one is trained, the one after is not
        assert begun == expected
    assert next(prefetched, None) is None


class Frames:
    """What a batch takes memory for."""


def test_two_batches_at_most_are_in_memory():
    alive, most = weakref.WeakSet(), []

    def load(batch):
        time.sleep(0.01)  # decoding takes longer than taking the batch before
        frames = Frames()
        alive.add(frames)
        most.append(len(alive))
        return frames

    for batch, frames, _ in prefetch(load, range(20)):
        time.sleep(0.03 if batch % 3 else 0)  # now training is slower, now decoding
        most.append(len(alive))
    assert max(most) == 2
    prefetched = prefetch(load, range(20))
    assert next(prefetched)[0] == 0  # the loop keeps nothing of it, and so does nobody else
    time.sleep(0.05)
    assert len(alive) == 2 and isinstance(frames, Frames)  # the last one of above, and the next


def test_an_error_comes_out_in_its_place():
    seen, loaded = [], []

    def load(batch):
        loaded.append(batch)
        return in_threads(lambda row: 1 // (3 - row), [batch, batch])

    with pytest.raises(ZeroDivisionError):
        for batch, _, _ in prefetch(load, range(10)):
            seen.append(batch)
            time.sleep(0.02)
    assert seen == [0, 1, 2] and loaded == [0, 1, 2, 3]


@pytest.mark.parametrize("end", ["close", "break", "exception"])
def test_the_end_waits_for_no_more_than_the_videos_in_work(end):
    begun, before = [], threading.active_count()
    load = lambda rows: in_threads(lambda row: begun.append(row) or time.sleep(0.2), rows)
    batches = [[], list(range(200))]
    began = time.monotonic()
    if end == "close":
        prefetched = prefetch(load, batches)
        next(prefetched)
        time.sleep(0.05)
        prefetched.close()
    else:
        try:
            for _ in prefetch(load, batches):
                time.sleep(0.05)
                if end == "break":
                    break
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert time.monotonic() - began < 1  # ended already, though this frame still lives
    assert threading.active_count() == before and time.monotonic() - began < 1
    assert 1 <= len(begun) <= decoder_threads()


@pytest.mark.slow
@pytest.mark.parametrize("decoding_s, training_s", [([0.3, 0.1, 0.3, 0.2, 0.3], [0.1, 0.3, 0.2, 0.3, 0.1])])
def test_a_step_takes_as_long_as_the_slower_of_decoding_and_training(decoding_s, training_s):
    """From the second step on, in the mean; each measured apart, as a sleep on a busy machine is longer than asked for."""
    decoded, trained, waits = [], [], []

    def timed(seconds, taken):
        began = time.monotonic()
        time.sleep(seconds)
        taken.append(time.monotonic() - began)

    for i, _, waited_s in prefetch(lambda i: timed(decoding_s[i], decoded), range(5)):
        waits.append(waited_s)
        if i == 1:
            began = time.monotonic()  # with the second batch in hand
        timed(training_s[i], trained)
    took = time.monotonic() - began
    expected = sum(max(decoded[i + 1], trained[i]) for i in range(1, 4)) + trained[4]
    assert took <= 1.02 * expected, (took, expected)
    for i in range(1, 5):  # and what was waited for is known
        assert waits[i] == pytest.approx(max(0, decoded[i] - trained[i - 1]), abs=0.02)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process cannot be kept to some cores here")
def test_decoders_share_the_cores(monkeypatch):
    cores = os.sched_getaffinity(0)

    def threads(processes, cores):
        os.sched_setaffinity(0, cores)
        if processes:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        return decoder_threads()

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    try:
        assert threads(None, cores) == len(cores) and threads(None, {min(cores)}) == 1
        assert threads(2, cores) == max(1, len(cores) // 2) and threads(1000, cores) == 1
    finally:
        os.sched_setaffinity(0, cores)
