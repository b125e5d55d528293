"""SIGINT and SIGTERM, which let the step that runs finish."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from linvideo_jax.parallel import hosts


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop, and its state is saved."""


class Waiting(Exception):
    """A signal came while something was done that need not be finished."""


class Signals:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between two steps.

    A second signal stops at once: what was done since the last save is lost. With several hosts
    SIGTERM is left to JAX, which tells all of them (`hosts.stop_now`), and SIGINT becomes one.
    """

    def __enter__(self):
        self.received, self._raises = False, False
        self._previous = {}
        if hosts.several():
            as_sigterm = signal.signal(
                signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM)
            )
            self._previous[signal.SIGINT] = as_sigterm
        elif threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        print("stopping after this step", file=sys.stderr)
        if self._raises:
            raise Waiting

    @contextlib.contextmanager
    def cutting(self) -> Iterator[None]:
        """What is done inside is cut short by a signal."""
        self._raises = True
        try:
            yield
        except Waiting:
            pass
        finally:
            self._raises = False

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
