"""Signals that end a run: SIGTERM, SIGHUP and Ctrl-C end it after the current step; a second one
ends it at once."""

import signal
import sys
import threading

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class StopSignals:
    """A context manager that handles these signals. A signal ends the process at once or, while
    `deferred` is set, is kept in `received`."""

    def __init__(self):
        self.received = 0
        self.deferred = False
        self._previous_handlers = {}

    def __enter__(self):
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            # ignored under nohup or in a shell's background
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._previous_handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.deferred and not self.received:
            self.received = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            sys.exit(128 + number)
