"""The first seconds and the last two: imports without what no run needs, and a Ctrl-C that is always prompt."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = "interrupted; what was done is kept, and the same command goes on from there"
PATIENCE = 1.2
"""Seconds that an interrupted process has to end by itself."""


def import_transformers() -> None:
    """Import transformers in about 60 % of the time it takes otherwise.

    It imports scikit-learn (and so pandas and scipy.stats) for assisted generation, and scipy.optimize for the losses
    of object detection. Nothing here uses either, so its own switches say while it is imported that they are absent.
    And the garbage collector need not walk half a million new objects, again and again, that are all there to stay.
    """
    if "transformers.modeling_utils" in sys.modules:
        return
    collecting = gc.isenabled()
    gc.disable()
    try:
        from transformers import utils

        switches = {name: getattr(utils, name) for name in ("is_sklearn_available", "is_scipy_available")}
        for name in switches:
            setattr(utils, name, lambda: False)
        try:
            import transformers.modeling_utils
            import transformers.models.auto.auto_factory  # noqa: F401

            utils.logging.set_verbosity_error()  # a command says itself what there is to say
            if not sys.stderr.isatty():  # a pipe gets errors and nothing else
                utils.logging.disable_progress_bar()
        finally:
            for name, own in switches.items():
                setattr(utils, name, own)
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


@contextmanager
def prompt_interrupt() -> Iterator[None]:
    """Inside, Ctrl-C ends the process within two seconds, wherever it is.

    Python hands an interrupt to the main thread, and only between two of its instructions: not while that thread
    waits for a long matrix product or reads a large file. So a thread of its own is told as well, through the wake-up
    pipe of the signal handler, and where the process is still there after `PATIENCE` seconds, it ends it. Nothing is
    lost: what was scored is on disk, and a line that was cut short is mended on resume.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    over = threading.Event()

    def watch() -> None:
        while signals := os.read(reader, 64):
            if signal.SIGINT in signals and not over.wait(PATIENCE):
                own_line = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # and the cursor, which a progress bar hides
                os.write(2, f"{own_line}error: {INTERRUPTED}\n".encode())
                os._exit(1)

    watcher = threading.Thread(target=watch, name="interrupt", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(earlier)
        os.close(writer)  # the watcher reads the end of the pipe and is done
        watcher.join()
        os.close(reader)
