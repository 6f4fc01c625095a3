"""What rank 0 shows: a bar on a terminal, plain lines elsewhere."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Steps done of a known number, with rate, time left, and a note.

    On a terminal it is a bar; elsewhere each note prints a line, at most one every `seconds` but for the last step.
    """

    def __init__(self, label: str, total: int, shown: bool, seconds: float = 2.0) -> None:
        self._label = label
        self._total = total
        self._shown = shown
        self._done = 0
        self._started = self._printed = time.monotonic()
        self._seconds = seconds
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=label, unit=" steps", dynamic_ncols=True) if shown and on_terminal else None

    def advance(self) -> None:
        """One step is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()

    def note(self, text: str) -> None:
        """Shows `text` beside how far things are."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        now = time.monotonic()
        if self._shown and (now - self._printed >= self._seconds or self._done == self._total):
            self._printed = now
            left = (now - self._started) / max(1, self._done) * (self._total - self._done)
            print(f"{self._label}: step {self._done:,}/{self._total:,} | {_clock(left)} left | {text}", flush=True)

    def restart_clock(self, paused_seconds: float) -> None:
        """Leaves time spent on something else out of the estimate of time left."""
        self._started += paused_seconds
        if self._bar is not None:
            self._bar.start_t += paused_seconds

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()

    def print(self, text: str) -> None:
        """Prints a line without spoiling the bar."""
        tqdm.write(text) if self._bar is not None else print(text, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
