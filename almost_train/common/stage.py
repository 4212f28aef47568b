"""A stage's folder: `stage.json` (what is made, of what), its outputs, `result.json` (written last: the stage is done).

The same command on the same folder goes on where it was killed, and does nothing where the stage is done. Other
settings or other inputs are refused. A pipeline reads these files to see which stages it can skip.

Some settings of a stage may grow: the steps of RLSF. The stage then goes on from its last checkpoint, also where it had
ended: it keeps that checkpoint in `state/`. `stage.json` lists the earlier values.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from almost_eval import __version__
from almost_eval.errors import InputError, RunError, StoreError
from almost_eval.files import digest_path, locked_folder, read_json, write_json
from almost_eval.run.shards import MARK
from almost_eval.types import JSONObject
from almost_train.common.config import settings_to_dict

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FREE_SETTINGS = frozenset(
    "device micro_batch_size sampling_batch_size gradient_checkpointing save_every save_minutes samples_every "
    "keep_every keep_state sampler_url sampler_memory sampler_sleep on_parity patience max_rounds accept_fewer".split()
)
"""Settings that may differ when a stage goes on: where it runs and in how much memory, how often and what it saves,
when it gives up. A pass over fewer items at once changes the rounding of a sum and nothing else."""

RECORDS = ("samples", "eval")
"""Outputs that people read and no stage does: one that is done may lack them."""
WORK = ".work"
"""The hidden folder with the checkpoints to resume from; removed when the stage is done."""
STATE = "state"
"""What becomes of it where a stage that is done may go on with more steps: it holds the last checkpoint alone."""


def cannot_write(error: BaseException) -> str:
    """Why a file could not be written, by the error of Python, safetensors or torch; empty for any other error."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in _FULL else ""
    text = str(error)
    if type(error).__name__ == "SafetensorError":  # its own number of the system's error stands in the text
        number = re.search(r"os error (\d+)", text)
        return os.strerror(int(number[1])) if number and int(number[1]) in _FULL else ""
    is_torch = isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text)
    return "a checkpoint could not be written to its end" if is_torch else ""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def model_input(model: str) -> Path | str:
    """A model as an input of a stage: a folder and a built-in model count by their content, a hub id by its name."""
    from almost_eval.nano import SHIPPED, shipped

    if model in SHIPPED:
        return shipped(model)
    folder = Path(os.path.expanduser(model))
    return folder if folder.is_dir() else model


class StageChanged(StoreError):
    """The folder holds this stage, made with other settings or inputs. A pipeline makes it anew.

    Args:
        folder: of the stage.
        change: what is other: `settings (seed was 2, is 3)`.
    """

    def __init__(self, folder: Path, change: str) -> None:
        super().__init__(f"{folder} was made with other {change}; choose another --output")
        self.folder, self.change = folder, change

    def __reduce__(self) -> tuple[type[StageChanged], tuple[Path, str]]:
        # To the other processes of a training it travels as a pickle, which by itself would keep the message alone.
        return StageChanged, (self.folder, self.change)


class Stage:
    """An open stage folder. Use as a context manager: the lock is held inside.

    Args:
        folder: where the stage writes; made if absent.
        name: of the stage: `reward`.
        settings: its settings dataclass (see `config.option`); seeds are among them.
        inputs: name -> file or folder it reads, or a built-in or hub name of a model, which stands for itself.
        grows: settings, whole numbers, that may be larger when the stage goes on.
        is_shard: the folder is that of a part of the stage (see `almost_eval.run.shards`).

    Raises:
        StageChanged: the folder holds this stage with other settings or inputs.
        StoreError: the folder is in use, or holds something else.
        DataError: an input that is not there.
        RunError: when left by an error that says that the disk is full.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        settings: DataclassInstance,
        inputs: Mapping[str, Path | str] = {},
        *,
        grows: Collection[str] = (),
        is_shard: bool = False,
    ) -> None:
        self.folder = folder
        self.name = name
        self.is_shard = is_shard
        pinned = {k: v for k, v in settings_to_dict(settings).items() if k not in FREE_SETTINGS}
        # Inputs by content, not by place: a moved or copied pipeline is the same pipeline.
        digests = {k: digest_path(v) if isinstance(v, Path) else str(v) for k, v in sorted(inputs.items())}
        self.spec: JSONObject = {"stage": name, "settings": pinned, "inputs": digests}
        self.inputs: dict[str, Path | str] = dict(inputs)
        self.result: JSONObject | None = None
        """What `finish` wrote, here or in an earlier process; None while the stage is not done."""
        self.grown: dict[str, list[int]] = {}
        """Setting -> its earlier, smaller values, oldest first."""
        self._grows = frozenset(grows)

    @classmethod
    def of_spec(cls, folder: Path, spec: JSONObject) -> Stage:
        """The stage that `stage.json` of another folder describes, to be written into this one."""
        stage = cls.__new__(cls)
        stage.folder, stage.name, stage.is_shard = folder, spec["stage"], False
        stage.spec = {key: spec[key] for key in ("stage", "settings", "inputs")}
        stage.inputs, stage.result, stage.grown, stage._grows = {}, None, {}, frozenset()
        return stage

    def __enter__(self) -> Stage:
        with ExitStack() as stack:  # a folder that is refused is released
            stack.enter_context(locked_folder(self.folder, "stage"))
            self._adopt()
            self._lock = stack.pop_all()
        self._began = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, InputError) and self._nothing_done():
            # Refused before any work: the corrected command must not be told that the folder is another's.
            for name in ("stage.json", MARK):
                (self.folder / name).unlink(missing_ok=True)
            for file in self._files():  # a log without a row
                file.unlink()
        self._lock.close()
        if error is not None and (reason := cannot_write(error)):
            raise RunError(
                f"cannot write to {self.folder} ({reason}); make room: what was saved before is kept, and the same "
                "command goes on from it"
            ) from None

    def _nothing_done(self) -> bool:
        return all(file.stat().st_size == 0 for file in self._files())

    def _files(self) -> list[Path]:
        own = ("stage.json", MARK, ".lock")
        return [path for path in self.folder.rglob("*") if path.is_file() and path.name not in own]

    def pin(self, name: str, value: str) -> None:
        """Hold the stage to what was settled only inside it, such as the dtype that `auto` stands for here.

        Raises:
            StageChanged: an earlier process settled it otherwise.
        """
        was = self.settle(name, value)
        if was != value:
            raise StageChanged(self.folder, f"settings ({name} was {_short(was)}, is {_short(value)})")

    def settle(self, name: str, value: str) -> str:
        """What an earlier process settled under this name; else the value, to which the stage is held from now on."""
        stored = read_json(self.folder / "stage.json", "stage", "settings", "inputs")
        pinned = stored.get("pinned", {})
        if name not in pinned:
            write_json(self.folder / "stage.json", {**stored, "pinned": {**pinned, name: value}})
        return str(pinned.get(name, value))

    def finish(
        self, metrics: Mapping[str, object], outputs: Mapping[str, Path] = {}, state: Path | None = None
    ) -> JSONObject:
        """Write `result.json` and return it: metrics (JSON), the digests of the outputs, seconds of this process.

        Args:
            metrics: JSON.
            outputs: name -> file or folder.
            state: a checkpoint in `WORK` from which the stage could go on with more steps; it is kept in `STATE`.
        """
        if state is not None:
            for other in (self.folder / WORK).iterdir():
                if other != state:
                    shutil.rmtree(other) if other.is_dir() else other.unlink()
            (self.folder / WORK).rename(self.folder / STATE)  # before the result: a kill in between undoes it
        self.result = {
            "stage": self.name,
            "metrics": dict(metrics),
            "outputs": {
                name: {"path": str(path.relative_to(self.folder)), "digest": digest_path(path)}
                for name, path in outputs.items()
            },
            "seconds": round(time.monotonic() - self._began, 1),
            "version": __version__,
        }
        write_json(self.folder / "result.json", self.result)
        return self.result

    def _adopt(self) -> None:
        file = self.folder / "stage.json"
        if (self.folder / MARK).exists() and not self.is_shard:
            raise StoreError(f"{self.folder} is a shard's; give its --shard, or choose another --output")
        if not file.exists():
            if any(p for p in self.folder.iterdir() if not p.name.startswith(".") and not (p / MARK).is_file()):
                raise StoreError(f"{self.folder} holds files but no stage.json; choose another --output")
            write_json(file, self.spec)
            return
        stored = read_json(file, "stage", "settings", "inputs")
        if stored["stage"] != self.name:
            raise StoreError(f"{self.folder} holds the stage {stored['stage']!r}, not {self.name!r}; choose another")
        self.grown = {name: list(values) for name, values in stored.get("grown", {}).items()}
        with suppress(StoreError):  # absent: not finished
            self.result = read_json(self.folder / "result.json", "metrics", "outputs")
        for name, output in self.result["outputs"].items() if self.result else ():
            if name not in RECORDS and not (self.folder / output["path"]).exists():
                raise StoreError(
                    f"{self.folder} is done, and its {output['path']} is not there; put it back, or remove "
                    f"{self.folder / 'result.json'} to make it anew"
                )
        larger = self._larger(stored["settings"])
        if {**stored["settings"], **larger} != self.spec["settings"] or stored["inputs"] != self.spec["inputs"]:
            raise StageChanged(self.folder, self._change(stored))
        if larger:
            self._grow(stored, larger)
        elif self.result is None and (self.folder / STATE).exists():  # killed while it finished or began to grow
            (self.folder / STATE).rename(self.folder / WORK)

    def _change(self, stored: JSONObject) -> str:
        """What differs first, for a reader: of an input only the name, its digest would say nothing."""
        for part in ("settings", "inputs"):
            was, now = stored[part], self.spec[part]
            differ = [key for key in {**now, **was} if was.get(key) != now.get(key)]
            if differ:
                key = differ[0]
                more = f", and {len(differ) - 1} more" if len(differ) > 1 else ""
                what = f"{key} was {_short(was.get(key))}, is {_short(now.get(key))}" if part == "settings" else key
                return f"{part} ({what}{more})"
        raise AssertionError("nothing differs")

    # --- more steps ---

    def _larger(self, was: JSONObject) -> JSONObject:
        """The settings that may grow and have, with their new values."""
        now = self.spec["settings"]
        return {name: now[name] for name in sorted(self._grows & was.keys()) if now[name] > was[name]}

    def _grow(self, stored: JSONObject, larger: JSONObject) -> None:
        """Make the stage one that is not done yet, with its last checkpoint where a killed one has it."""
        change = self._change(stored)
        if self.result is not None:
            if self.result["metrics"].get("stopped"):
                raise StageChanged(self.folder, f"{change}: a guard stopped it ({self.result['metrics']['stopped']})")
            if not (self.folder / STATE).is_dir():
                raise StageChanged(self.folder, f"{change}: it is done, and kept no {STATE}/ to go on from")
            # In this order: a kill between any two leaves a stage that goes on, with the old number or the new one.
            (self.folder / "result.json").unlink()
            self.result = None
        if (self.folder / STATE).exists():
            (self.folder / STATE).rename(self.folder / WORK)
        for name in larger:
            self.grown.setdefault(name, []).append(stored["settings"][name])
        write_json(self.folder / "stage.json", {**stored, "settings": self.spec["settings"], "grown": self.grown})


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
