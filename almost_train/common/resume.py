"""What a stage goes on from after a kill: the rows that it had written, and the last whole folder of its state."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from almost_eval.errors import RunError
from almost_eval.files import LineWriter, Row, read_rows


class RowLog(LineWriter):
    """A `LineWriter` that knows what an earlier process wrote: its `rows`, to which `append` adds."""

    def __enter__(self) -> RowLog:
        super().__enter__()
        self.rows: list[Row] = read_rows(self.file)
        return self

    def append(self, *values: Row) -> None:
        """Add rows; see `LineWriter.append`."""
        super().append(*values)
        self.rows.extend(values)


def refuse_gaps(log: Path, rows: int, done: int) -> None:
    """Refuse to go on with a log that lacks steps: figures, guards and the best model are taken from it.

    Args:
        log: of a training, one row a step.
        rows: it has, of the steps done.
        done: steps of the checkpoint that is gone on from.

    Raises:
        RunError: there are fewer.
    """
    if rows < done:
        raise RunError(
            f"{log} has rows of {rows} of the {done} steps that are done; put it back, or choose another --output to "
            "begin anew"
        )


@contextmanager
def replaced_folder(path: Path, scratch: Path) -> Iterator[Path]:
    """An empty `scratch` that takes the place of the folder `path` when the block ends well.

    Args:
        path: the folder; what it held is removed, if it is there.
        scratch: a folder on the same disk; what a killed process left in it is removed.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    scratch.replace(path)
