"""SIGINT and SIGTERM, which let the step that runs finish."""

import signal
import sys
import threading


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop, and its state is saved."""


class Signals:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between two steps.

    A second signal stops at once: what was done since the last save is lost.
    """

    def __enter__(self):
        self.received = False
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        print("stopping after this step", file=sys.stderr)

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
