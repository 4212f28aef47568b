"""What is not a checkpoint is refused in one line, before torch is imported; what is one is known to the byte."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from changed import change_config

from almost_eval.engines.hf import HFEngine
from almost_eval.errors import ModelError
from almost_eval.models.checkpoint import context_length, find_checkpoint

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def copy(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return shutil.copytree(tiny_checkpoint("llama-gqa"), tmp_path / "model")


def _shard(folder: Path, **weight_map: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": weight_map or {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def _only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _broken_index(folder: Path) -> None:
    _shard(folder)
    (folder / "model.safetensors.index.json").write_text("{")


def _cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken JSON": (_write("config.json", '{"architectures": ['), "not valid JSON"),
    "JSON of another kind": (_write("config.json", "[]"), "not valid JSON"),
    "architectures of another kind": (_write("config.json", '{"architectures": 5}'), "not valid JSON"),
    "bytes that are no text": (_write("config.json", b"\xff\xfe"), "not valid JSON"),
    "pickles only": (_only_pickles, "only pickled weights (pytorch_model.bin)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "weights under another name": (
        lambda f: (f / "model.safetensors").rename(f / "adapter.safetensors"),
        "no model.safetensors",
    ),
    "truncated weights": (_cut_short, "not a whole safetensors file"),
    "empty weights": (_write("model.safetensors", b""), "not a whole safetensors file"),
    "text as weights": (_write("model.safetensors", "version https://git-lfs\n" * 5), "not a whole safetensors file"),
    "header without offsets": (
        _write("model.safetensors", struct.pack("<Q", 25) + b'{"w":{"data_offsets": []}}'),
        "not a whole safetensors file",
    ),
    "missing shard": (lambda f: _shard(f, a="model-00002-of-00002.safetensors"), "lacks 1 of 1 weight files"),
    "shard outside": (lambda f: _shard(f, a="../outside.safetensors"), "not a file of its own folder"),
    "shard at a root": (lambda f: _shard(f, a="/etc/outside.safetensors"), "not a file of its own folder"),
    "broken index": (_broken_index, "not a valid index"),
    "wrong architecture": (
        lambda f: change_config(f, architectures=["LlamaForSequenceClassification"]),
        "holds a LlamaForSequenceClassification",
    ),
    "weights pointed elsewhere": (lambda f: change_config(f, transformers_weights="x.bin"), "transformers_weights"),
}

BAD_NAMES = {
    "/no/such/model": "no model at",
    "./no-such-model": "no model at",
    "two words": "no model at",
    "~nobody-at-all/model": "no model at",
    "x" * 5000: "no model at",
    "nano/seded": "did you mean 'nano/seeded'",
    "no-such-org/no-such-model": "the hub could not give it",
}

_FIND = """
import json, sys
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.errors import ModelError
messages = []
for name in json.load(sys.stdin):
    try:
        find_checkpoint(name)
        messages.append(None)
    except ModelError as error:
        messages.append(str(error))
heavy = [name for name in ("torch", "transformers") if name in sys.modules]
print(json.dumps([messages, heavy]))
"""


def test_bad_input_is_one_line_and_loads_no_torch(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "outside.safetensors").write_bytes((tiny_checkpoint("llama-gqa") / "model.safetensors").read_bytes())
    expected = dict(BAD_NAMES)
    expected[str(tmp_path / "outside.safetensors")] = "is a file"
    for i, (change, message) in enumerate(BAD.values()):
        folder = shutil.copytree(tiny_checkpoint("llama-gqa"), tmp_path / f"bad-{i}")
        change(folder)
        expected[str(folder)] = message
    done = subprocess.run(
        [sys.executable, "-c", _FIND],
        cwd=REPOSITORY,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        input=json.dumps(list(expected)),
        capture_output=True,
        text=True,
        check=True,
    )
    messages, heavy = json.loads(done.stdout)
    assert heavy == []
    for (name, part), message in zip(expected.items(), messages, strict=True):
        assert message is not None, name[:80]
        assert part in message
        assert "\n" not in message


def test_pickles_are_taken_when_asked_for(copy: Path) -> None:
    import torch
    from safetensors.torch import load_file

    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    (copy / "training_args.bin").write_bytes(b"not weights")
    torch.save(weights, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="accept pickled weights"):
        find_checkpoint(str(copy))
    found = find_checkpoint(str(copy), allow_pickle=True)
    assert [file.name for file in found.weight_files] == ["pytorch_model.bin"]
    assert found.tensor_names() == set()
    loaded = HFEngine(found, device="cpu").model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_allowing_pickles_does_not_ask_for_them(copy: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"never read")
    found = find_checkpoint(str(copy), allow_pickle=True)
    assert [file.name for file in found.weight_files] == ["model.safetensors"]
    assert HFEngine(found, device="cpu").model is not None


def test_the_digest_is_of_the_files_that_are_loaded(copy: Path) -> None:
    before = find_checkpoint(str(copy))
    digest = before.weight_digest()
    assert "lm_head.weight" in before.tensor_names()
    (copy / "consolidated.safetensors").write_bytes(before.weight_files[0].read_bytes())  # as some repositories hold
    assert find_checkpoint(str(copy)).weight_digest() == digest
    data = bytearray(before.weight_files[0].read_bytes())
    data[-1] ^= 1
    before.weight_files[0].write_bytes(bytes(data))
    assert find_checkpoint(str(copy)).weight_digest() != digest


def test_shards_are_found_by_their_index(copy: Path) -> None:
    plain = find_checkpoint(str(copy))
    names, digest = plain.tensor_names(), plain.weight_digest()
    _shard(copy, **dict.fromkeys(names, "model-00001-of-00001.safetensors"))
    sharded = find_checkpoint(str(copy))
    assert (sharded.tensor_names(), sharded.weight_digest()) == (names, digest)
    assert HFEngine(sharded, device="cpu").model is not None


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_lost_weights_are_not_made_up(lost: str, copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights[lost]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 weights") as refused:
        _ = HFEngine(str(copy), device="cpu").model
    assert lost in str(refused.value)
    assert "\n" not in str(refused.value)


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    change_config(copy, intermediate_size=64)
    with pytest.raises(ModelError) as refused:
        _ = HFEngine(str(copy), device="cpu").model
    assert "\n" not in str(refused.value)


def test_tied_weights_are_not_missing(tiny_checkpoint: Callable[[str], Path]) -> None:
    found = find_checkpoint(str(tiny_checkpoint("llama-tied")))
    assert "lm_head.weight" not in found.tensor_names()
    assert HFEngine(found, device="cpu").model is not None


def test_a_folder_without_tokenizer_says_so(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="no tokenizer") as refused:
        HFEngine(str(copy))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 77}, 77),
        ({"n_positions": 5, "max_position_embeddings": 77}, 5),
        ({"text_config": {"max_position_embeddings": 9}, "max_position_embeddings": 77}, 9),
        ({}, 31),
    ],
)
def test_context_length(config: dict[str, Any], expected: int) -> None:
    class Tokenizer:
        model_max_length = 31

    assert context_length(config, Tokenizer()) == expected
    assert context_length({}) == 2048
    Tokenizer.model_max_length = 10**30  # what transformers writes for "unknown"
    assert context_length({}, Tokenizer()) == 2048
