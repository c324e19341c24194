"""SIGTERM and Ctrl-C: a thread saves what can be saved and ends the process in time.

The main thread is not asked: it may be in a rollout of minutes, or wait for another process or the device.
While it goes on, the thread calls `save`; a lock keeps what `save` reads as it is (training/run.py).
"""

import os
import signal
import sys
import threading

SIGNALS = signal.SIGTERM, signal.SIGINT
GRACE_S = 20.0  # seconds from the signal to the end; torchrun kills after 30


def stop_at_signals(save, lost):
    """From now on the first SIGTERM or SIGINT ends this process in GRACE_S, with status 128 + its number.

    save: called in a thread of its own; returns the line that is printed at the end.
    lost: returns that line if `save` does not end in time.
    The main thread calls this. A forked child ends by its own signals, and they do not end its parent."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)  # each signal writes its number at once
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    os.register_at_fork(after_in_child=forget)

    def watch():
        number = 0
        while number not in SIGNALS:
            number = os.read(woken, 1)[0]
        threading.Timer(GRACE_S - 1, lambda: leave(lost(), 128 + number)).start()
        leave(save(), 128 + number)

    threading.Thread(target=watch, daemon=True).start()


def forget():
    """Signals do what they do without `stop_at_signals`."""
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
