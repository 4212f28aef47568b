"""The table of engines: what is built, and what is refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from almost_eval.engines import build
from almost_eval.engines.base import GenerationEngine, LoglikelihoodEngine
from almost_eval.engines.build import (
    ENGINES,
    SCORERS,
    SCORERS_TAKE,
    TAKES,
    EngineOptions,
    generation_engine,
    loglikelihood_engine,
)
from almost_eval.engines.hf import HFEngine
from almost_eval.engines.vllm import VLLMEngine
from almost_eval.errors import InputError, MissingDependencyError, ModelError

FIELDS = {field.name for field in dataclasses.fields(EngineOptions)} - {"engine"}


@pytest.mark.parametrize(("classes", "takes"), [(ENGINES, TAKES), (SCORERS, SCORERS_TAKE)], ids=["generate", "score"])
@pytest.mark.parametrize("name", ENGINES)
def test_the_table_names_classes_and_their_options(
    name: str, classes: dict[str, str], takes: dict[str, set[str]]
) -> None:
    module, _, cls = classes[name].partition(":")
    engine = getattr(importlib.import_module(module), cls)
    assert engine.name == name
    assert takes[name] <= FIELDS
    # Whatever an option says by default is what the engine does by itself. It knows nothing of workers that hold it.
    defaults: dict[str, Any] = {"workers": None, "ray": None, "worker_timeout": None}
    for made_of in reversed(engine.__mro__):
        defaults |= getattr(made_of.__init__, "__kwdefaults__", None) or {}
    assert {option: defaults[option] for option in takes[name]} == {
        field.name: field.default for field in dataclasses.fields(EngineOptions) if field.name in takes[name]
    }


def test_every_option_belongs_to_an_engine() -> None:
    assert set().union(*SCORERS_TAKE.values()) == FIELDS


def test_builds_what_was_asked_for(tiny_checkpoint: Callable[[str], Path]) -> None:
    model = str(tiny_checkpoint("llama-gqa"))
    assert isinstance(generation_engine(model), HFEngine)
    hf = loglikelihood_engine(model, EngineOptions(dtype="bfloat16", max_length=64, batch_size=3))
    assert isinstance(hf, HFEngine)
    assert (hf.dtype, hf.context_length, hf.batch_size) == ("bfloat16", 64, 3)
    vllm = generation_engine(model, EngineOptions("vllm", tensor_parallel_size=2, pipeline_parallel_size=2))
    assert isinstance(vllm, VLLMEngine)
    assert vllm.options.parallel == {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    for engine in (hf, vllm):
        assert isinstance(engine, GenerationEngine)
        assert isinstance(engine, LoglikelihoodEngine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EngineOptions("vlm"), "unknown engine 'vlm'; did you mean 'vllm'"),
        (EngineOptions("hf", base_url="http://x/v1"), "'hf' takes no base_url; leave it out, or use the engine openai"),
        (
            EngineOptions("openai", dtype="float32"),
            "'openai' takes no dtype; leave it out, or use the engine hf or vllm",
        ),
        (EngineOptions("vllm", device="cuda"), "'vllm' takes no device"),
        (EngineOptions("vllm", data_parallel_size=2), "use --workers 2 for an engine on each GPU"),
        (EngineOptions("openai"), "needs an endpoint"),
        (EngineOptions("openai", base_url="localhost:8000"), "not an http"),
        (EngineOptions("openai", base_url="http://x/v1", concurrency=0), "concurrency must be 1 or more"),
    ],
)
def test_refused(options: EngineOptions, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(InputError, match=message):
        generation_engine("some/model", options)


def test_a_checkpoint_is_looked_at_at_once(tmp_path: Path) -> None:
    for name in ("hf", "vllm"):
        with pytest.raises(ModelError, match=r"no config\.json"):
            generation_engine(str(tmp_path), EngineOptions(name))


def test_only_a_scorer_takes_a_tokenizer() -> None:
    given = EngineOptions("openai", base_url="http://localhost:9/v1", tokenizer="nano/almost")
    with pytest.raises(InputError, match="'openai' takes no tokenizer; leave it out"):
        generation_engine("m", given)
    with pytest.raises(InputError, match="is not reachable"):
        loglikelihood_engine("m", given)


@pytest.mark.parametrize(("name", "line"), [("vllm", r"almost-toolkit\[vllm\]"), ("openai", "pip install 'openai")])
def test_a_missing_package_is_named_with_its_install_line(
    name: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=line):
        generation_engine("some/model", EngineOptions(name))
