"""SIGTERM: a job that is taken away saves what it can and ends with exit status 143 in time."""

import os
import signal
import sys
import threading

EXIT_STATUS = 128 + signal.SIGTERM


class Stopped(BaseException):
    """Raised where the main thread is when SIGTERM comes, within `interruptibly`."""


class Stopping:
    """From when it is made, SIGTERM sets `requested`. The training loop looks at it where all processes meet;
    within `interruptibly` Stopped is raised at once; before `armed` is set, the process ends right away. In
    any case it ends after `grace_s` seconds (a little earlier), with the line that `lost()` returns.

    It is made in the main thread, whose handlers signals call."""

    def __init__(self, grace_s, lost=lambda: "stopped"):
        self.grace_s, self.lost = grace_s, lost
        self.requested, self.armed, self.inside = False, False, False
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, *_):
        if not self.armed:
            self.leave("stopped before training began")
        if not self.requested:
            self.requested = True
            timer = threading.Timer(max(0.0, self.grace_s - 1), lambda: self.leave(self.lost()))
            timer.daemon = True
            timer.start()
        if self.inside:
            self.inside = False  # once
            raise Stopped

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
        if os.environ.get("RANK", "0") == "0":
            print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(EXIT_STATUS)
