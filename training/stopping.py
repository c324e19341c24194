"""SIGTERM and Ctrl-C: a thread saves what can be saved and ends the process in time.

The main thread is not asked: it may be in a rollout of minutes, or wait for another process or for the device.
While it goes on, the thread calls `save`; what `save` needs to be left as it is, a lock keeps (training/run.py).
"""

import os
import signal
import sys
import threading

GRACE_S = 20.0  # seconds from the signal to the end; torchrun kills after 30


class Stopping:
    """From when it is made, SIGTERM or SIGINT ends this process with status 128 + the signal's number.

    save: called in a thread of its own; returns the line that is printed at the end.
    lost: returns the line for when `save` has not ended after GRACE_S seconds.
    It is made in the main thread. A forked child ends by its own signals, and they do not end its parent."""

    def __init__(self, save, lost):
        self.save, self.lost = save, lost
        self.woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)  # each signal writes its number at once
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        number = 0
        while number not in (signal.SIGTERM, signal.SIGINT):
            number = os.read(self.woken, 1)[0]
        status = 128 + number
        threading.Timer(GRACE_S - 1, lambda: leave(self.lost(), status)).start()
        leave(self.save(), status)

    @staticmethod
    def _forget():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave(message, status):
    """Ends this process, whatever its other threads do; of several processes the first one speaks."""
    def speak():
        if os.environ.get("RANK", "0") == "0":
            print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    speaker.join(0.5)  # another thread may hold the streams and wait for whoever reads them
    os._exit(status)
