"""One stage in several processes, as `accelerate launch` starts them: the main one writes, the others follow."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from almost_eval.errors import InputError
from almost_eval.models.loading import pick_device
from almost_eval.types import JSONObject
from almost_train.common.card import write_cards
from almost_train.common.lora import ADAPTER
from almost_train.common.stage import WORK, Stage

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    class TrainedSettings(DataclassInstance, Protocol):
        """Settings of a stage that trains."""

        @property
        def device(self) -> str:
            """Where it trains."""
            ...


T = TypeVar("T")


def world_size() -> int:
    """How many processes `accelerate launch` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


class SharedStage:
    """A `Stage` that the main process holds and all processes follow."""

    def __init__(self, folder: Path, stage: Stage | None, result: JSONObject | None) -> None:
        self.folder = folder
        self.result = result
        """What `finish` wrote, the same in every process; None while the stage is not done."""
        self.grown: dict[str, list[int]] = from_main(stage.grown if stage else {})
        """Of the main process: see `Stage`."""
        self._stage = stage

    def finish(
        self, metrics: Mapping[str, object], outputs: Mapping[str, Path], state: Path | None = None
    ) -> JSONObject:
        """`Stage.finish` in the main process; every process gets its result. `metrics` of the others are not read.

        Every checkpoint of the stage gets its model card.
        """
        if self._stage:
            folders = dict.fromkeys([*outputs.values(), self.folder / ADAPTER], True)
            folders |= dict.fromkeys(sorted(self.folder.glob("policies/step-*")), False)
            write_cards(folders, self._stage.spec, self._stage.inputs, metrics)
        self.result = from_main(self._stage.finish(metrics, outputs, state) if self._stage else None)
        assert self.result is not None
        shutil.rmtree(self.folder / WORK, ignore_errors=True)
        return self.result


@contextmanager
def shared_stage(
    folder: Path,
    name: str,
    settings: TrainedSettings,
    inputs: Mapping[str, Path | str],
    *,
    grows: Collection[str] = (),
) -> Iterator[SharedStage]:
    """Open a stage in all processes: the main one locks and writes it, the others wait for its result.

    Inside, what is printed to stdout goes to stderr: stdout is for results, and transformers prints there.

    Raises:
        InputError: the device cannot be used, or `Stage` refuses the folder; in all processes.
    """
    device = pick_device(settings.device)
    if world_size() > 1:
        from accelerate import PartialState

        # The others wait while the main process evaluates, which may take longer than the usual 10 to 30 minutes.
        PartialState(cpu=device == "cpu", timeout=timedelta(hours=24))
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        stage, refusal = None, None
        if is_main():
            try:
                stage = stack.enter_context(Stage(folder, name, settings, inputs, grows=grows))
            except InputError as error:
                refusal = error
        refusal, result = from_main((refusal, stage.result if stage else None))
        if refusal is not None:  # raised in every process: otherwise they would wait for one that has ended
            raise refusal
        if result is not None and is_main():  # a process that was killed just before its end left it
            shutil.rmtree(folder / WORK, ignore_errors=True)
        yield SharedStage(folder, stage, result)


def from_main(value: T) -> T:
    """The main process's value, in every process."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    values: list[T] = broadcast_object_list([value], from_process=0)
    return values[0]


def wait_for_all() -> None:
    """Wait until every process has called this."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
