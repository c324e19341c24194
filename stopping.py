"""SIGTERM, Ctrl-C and the like: a thread saves what can be saved and ends the process in time.

The main thread is not asked: it may be in a rollout of minutes, or wait for another process or the device.
While it goes on, the thread calls `ENDING.save`, which a run sets (training/run.py, training/run_folder.py).
"""

import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP  # of a scheduler, Ctrl-C, a terminal that is closed
GRACE_S = 20.0  # seconds from the signal to the end; torchrun kills after 30
TWICE_S = 0.5  # in which a signal may come twice, as to a process and to its group


class Ending:
    """What this process does when a signal has come.

    save: called in a thread of its own; returns the line that is printed at the end.
    lost: returns that line where there is no time to save.
    begun: whether a signal has come."""

    begun = False

    def __init__(self):
        self.save = self.lost = lambda: "stopped; nothing was saved"


ENDING = Ending()


def end_at_signals():
    """From now on the first of SIGNALS ends this process within GRACE_S, with status 128 + its number, as
    ENDING says. A second one ends it at once where one of the two is Ctrl-C. A process that torchrun has
    started ends, too, within seconds and without saving, when torchrun is gone, as after its SIGKILL.

    The main thread calls this. A forked child ends by its own signals, and they do not end its parent."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)  # each signal writes its number at once
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, begin_to_end)
    os.register_at_fork(after_in_child=forget_signals)
    threading.Thread(target=wait_for_signals, args=(woken,), daemon=True).start()


def begin_to_end(*_):
    """The main thread calls this at a signal."""
    ENDING.begun = True


def wait_for_the_end():
    """The main thread has nothing left to do: if a signal has come, the thread ends the process."""
    if ENDING.begun:
        time.sleep(GRACE_S)


def forget_signals():
    """Signals do what they do without `end_at_signals`."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) == begin_to_end:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for_signals(woken):
    """The thread of `end_at_signals`. woken: descriptor from which it reads the signals' numbers."""
    started_by, number = starter(), None
    while number not in SIGNALS:
        if select.select([woken], [], [], 1.0)[0]:
            number = os.read(woken, 1)[0]
        elif "TORCHELASTIC_RUN_ID" in os.environ and starter() != started_by:
            leave(f"torchrun is gone; {ENDING.lost()}", 128 + signal.SIGKILL)
    began, status = time.monotonic(), 128 + number
    threading.Thread(target=lambda: leave(ENDING.save(), status), daemon=True).start()
    while (left_s := began + GRACE_S - 1 - time.monotonic()) > 0:
        if select.select([woken], [], [], left_s)[0]:
            second = os.read(woken, 1)[0]
            by_hand = signal.SIGINT in (number, second) and second in SIGNALS
            if by_hand and time.monotonic() - began > TWICE_S:
                break
    leave(ENDING.lost(), status)


def starter():
    """The number of the process that started this one's session. That is torchrun, which makes one for each
    of its processes, also where a shell script stands between them. It is another one when that is gone."""
    try:
        about = Path("/proc", str(os.getsid(0)), "stat").read_text()
        return int(about.rpartition(")")[2].split()[1])
    except OSError:  # not Linux
        return os.getppid()


def leave(message, status):
    """Ends this process, whatever its other threads do; of several processes the first one speaks."""
    def speak():
        line = f"{Path(sys.argv[0]).name}: {message}\n".encode()
        if os.environ.get("RANK", "0") == "0":
            try:
                os.write(2, line)
            except OSError:  # who reads it has ended; a terminal may be there all the same
                os.write(os.open("/dev/tty", os.O_WRONLY), line)
        sys.stdout.flush()
        sys.stderr.flush()

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    speaker.join(0.5)  # another thread may hold the streams and wait for whoever reads them
    os._exit(status)
