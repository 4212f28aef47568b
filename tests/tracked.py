"""What trackers have stored, read back from their own files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve of a run's event files -> its (step, value)."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def wandb_rows(folder: Path) -> list[dict[str, float]]:
    """Every step that a W&B run without a network has kept for `wandb sync`, W&B's own fields left out.

    The file is a log of protobuf records: seven bytes, then for each a checksum, its length and its kind (1 is whole;
    it is cut at blocks of 32 KiB, which these tests do not fill).
    """
    pytest.importorskip("wandb", reason="pip install wandb")
    from wandb.proto import wandb_internal_pb2

    record_type: Any = vars(wandb_internal_pb2)["Record"]  # made when it is imported, and in no type stub

    rows = []
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        data = file.read_bytes()
        assert len(data) < 2**15
        at = 7
        while at < len(data):
            _, length, kind = struct.unpack_from("<IHB", data, at)
            assert kind == 1
            record = record_type.FromString(data[at + 7 : at + 7 + length])
            at += 7 + length
            if record.WhichOneof("record_type") == "history":
                said = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                numbers = {name: value for name, value in said.items() if not name.startswith("_")}
                rows.append({"step": said["_step"], **numbers})
    return rows
