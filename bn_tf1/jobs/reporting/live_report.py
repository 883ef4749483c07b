"""The page of a run while it is being made: at each checkpoint, and at the end.

Contract: a page that cannot be written is a warning, once, and costs the run nothing else.
Pages take at most a twentieth of a run's time: of a long run, whose files take long to
read, not every checkpoint gets one. The last one is always written.
"""

from __future__ import annotations

import os
import sys
import time

from bn_tf1.jobs.reporting import run_page

_SHARE_OF_TIME = 0.05


class LiveReport:
    """`report.html` of a run that goes on."""

    def __init__(self, model_dir: str):
        self._model_dir = model_dir
        self._path = os.path.join(model_dir, run_page.REPORT_FILE)
        self._next = 0.0
        self._has_failed = False

    def write_if_due(self) -> None:
        """Writes the page, unless that would take too much of the run's time."""
        if time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        """Writes the page, of what the event files hold now; none of none."""
        start = time.monotonic()
        try:
            run_page.write_page(self._path, [run_page.read_run(self._model_dir)])
        except ValueError:
            return  # nothing was written down yet
        # A full disk ends the run when it saves, with the step; not here, for a picture.
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                print(
                    f"warning: {self._path} cannot be written: {error.strerror}",
                    file=sys.stderr,
                )
        now = time.monotonic()
        self._next = now + (now - start) / _SHARE_OF_TIME
