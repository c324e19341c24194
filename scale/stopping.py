"""SIGTERM: a job that is taken away saves what it can and ends with exit status 143 in time."""

import os
import signal
import sys
import threading
import time

EXIT_STATUS = 128 + signal.SIGTERM


class Stopped(BaseException):
    """Raised where the main thread is when SIGTERM comes, within `interruptibly`."""


class Stopping:
    """From when it is made, SIGTERM sets `requested`. The training loop looks at it where all processes meet;
    within `interruptibly` Stopped is raised at once; before `armed` is set, the process ends right away. In
    any case it ends after `grace_s` seconds (a little earlier), with the line that `lost()` returns.

    It is made in the main thread, in which signals' handlers run: between two of its instructions, so not
    while it waits for another process or a kernel. The time runs in a thread, which a pipe wakes."""

    def __init__(self, grace_s, lost=lambda: "stopped"):
        self.grace_s, self.lost = grace_s, lost
        self.requested, self.armed, self.inside = False, False, False
        self.woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)  # each signal writes its number at once
        signal.signal(signal.SIGTERM, self._handle)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._end_in_time, daemon=True).start()

    def _handle(self, *_):
        self.requested = True
        if self.inside:
            self.inside = False  # once
            raise Stopped

    def _end_in_time(self):
        while signal.SIGTERM not in os.read(self.woken, 64):
            pass
        self.requested, message = True, "stopped; nothing is lost"
        try:
            if self.armed:
                time.sleep(max(0.0, self.grace_s - 1))
                message = self.lost()
        finally:
            self.leave(message)

    @staticmethod
    def _forget():
        """A forked child ends by its own signals, and they do not end its parent."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def interruptibly(self, function, *args, **how):
        """What the function returns, or None if SIGTERM came before or in it: it is left at once."""
        try:
            try:
                self.inside = True
                if self.requested:
                    raise Stopped
                return function(*args, **how)
            finally:
                self.inside = False
        except Stopped:  # in `finally`, too
            return None

    @staticmethod
    def leave(message):
        """Ends this process, whatever its other threads do; of several processes the first one speaks."""
        def speak():
            if os.environ.get("RANK", "0") == "0":
                print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
            sys.stdout.flush(), sys.stderr.flush()
        speaker = threading.Thread(target=speak, daemon=True)
        speaker.start()
        speaker.join(0.5)  # another thread may hold the streams and wait for whoever reads them
        os._exit(EXIT_STATUS)
