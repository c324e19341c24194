"""The next batch is prepared while this one is trained, so that nobody waits for frames.

    for batch, loaded, waited_s in prefetch(load, batches):
        ...                                       trains on `loaded`; meanwhile load(the next batch) runs

Two batches are in memory at most, the one in training and the next one, which is begun when this one is
handed out. Within `load`, `in_threads` decodes a batch's videos side by side and stops when the loop does.
"""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

here = threading.local()  # of a thread that prepares batches: `stop`, set when nobody wants them any more


class Unwanted(Exception):
    """Raised in a thread whose batch nobody waits for."""


def decoder_threads():
    """How many videos a process decodes side by side: its share of the machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def in_threads(function, rows):
    """[function(row) for row in rows], `decoder_threads` of them at a time. An exception, the first one
    in the order of the rows, leaves out the rows that are not begun yet, and so does the end of the loop."""
    stop = getattr(here, "stop", None)

    def call(row):
        if stop and stop.is_set():
            raise Unwanted
        return function(row)

    with ThreadPoolExecutor(decoder_threads()) as pool:
        return list(pool.map(call, rows))


def prefetch(load, batches):
    """Yields (batch, load(batch), seconds waited for it) in the order of `batches`, each prepared by a thread
    while the one before is in use. What `load` raises comes out in the place of its batch, the last one then.
    When the loop ends early, by an exception too, nothing more is begun (see `in_threads`)."""
    stop, upcoming = threading.Event(), iter(batches)

    def prepare(batch):
        here.stop = stop
        return load(batch)

    def begin_next():
        for batch in upcoming:
            return batch, thread.submit(prepare, batch)
        return None

    thread = ThreadPoolExecutor(1)
    try:
        begun = begin_next()
        while begun:
            batch, future = begun
            began = time.monotonic()
            wait([future])
            waited_s = time.monotonic() - began
            # the loop alone keeps what it gets; what it had before goes as it takes this
            loaded = [future.result()]
            future, begun = None, begin_next()
            yield batch, loaded.pop(), waited_s
    finally:
        stop.set()
        thread.shutdown(cancel_futures=True)
