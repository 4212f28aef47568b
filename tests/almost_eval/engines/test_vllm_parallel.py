"""One engine of vLLM divided among processes, or with guessed tokens, against the plain one; and what it refuses.

Each form runs in a process of its own: vLLM's process groups are global. Data parallelism is refused (`test_build.py`);
quantised weights need a GPU, so here they are refused by vLLM itself, in one line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from almost_eval.engines.build import EngineOptions
from almost_eval.engines.vllm import VLLMEngine
from almost_eval.errors import InputError
from almost_eval.nano.seeded import build_checkpoint
from almost_eval.run.runner import RunRequest, open_run

TEXT = ["The cat sat on the mat, and the dog sat by the door. Hello world, hello there; numbers 1 2 3 and 42."] * 4
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
PROGRAM = """
import json, sys
from pathlib import Path
from almost_eval.engines.base import SamplingParams
from almost_eval.engines.vllm import VLLMEngine
from almost_eval.run.runner import RunRequest, open_run
from almost_eval.types import LoglikelihoodRequest

def main():
    model, options, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    engine = VLLMEngine(model, dtype="float32", **options)
    prompts = ["Human: where is the cat?\\n\\nAssistant:", "The dog", "hello world, hello there; " * 3, "a"]
    greedy = SamplingParams(max_new_tokens=24)
    sampled = SamplingParams(max_new_tokens=24, temperature=1.0, top_p=0.9, n=2, seed=3)
    answers = {
        name: [[c.token_ids for c in row] for row in engine.generate(prompts, params)]
        for name, params in (("greedy", greedy), ("sampled", sampled), ("again", sampled))
    }
    requests = [LoglikelihoodRequest(prompt, (" a", " b the dog")) for prompt in prompts]
    scores = [[s.logprob for s in row] for row in engine.loglikelihood(requests)]
    run = open_run(RunRequest(task="mmlu", settings={"shots": 0}, data="nano", limit=1, template="none"), engine)
    results, _ = run.execute(folder)
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    print(json.dumps({
        **answers,
        "scores": scores,
        "ids": [line["id"] for line in lines],
        "order": [sample.id for sample in run.samples],
        "accuracy": results["metrics"]["accuracy"]["value"],
        "settings": engine.settings(),
    }))
    engine.close()

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Head size 32, the smallest that vLLM's CPU attention takes; a context that a question of nano's fits."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    return build_checkpoint(
        folder,
        hidden_size=128,
        layers=2,
        vocab_size=320,
        max_position_embeddings=1024,
        initializer_range=0.1,
        tokenizer_text=TEXT,
    )


def answers(checkpoint: Path, folder: Path, **options: Any) -> dict[str, Any]:
    """What the engine says in a process of its own."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    folder.mkdir(exist_ok=True)
    file = folder / "program.py"  # a file: worker processes import it
    file.write_text(PROGRAM, encoding="utf-8")
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, str(file), str(checkpoint), json.dumps(options), str(folder / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


@pytest.fixture(scope="module")
def plain(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return answers(checkpoint, tmp_path_factory.mktemp("plain"))


def assert_same(one: dict[str, Any], plain: dict[str, Any]) -> None:
    """The same greedy tokens, log-likelihoods up to rounding, samples and their order."""
    assert one["greedy"] == plain["greedy"]
    for scores, expected in zip(one["scores"], plain["scores"], strict=True):
        assert scores == pytest.approx(expected, abs=2e-5)
    assert one["ids"] == one["order"] == plain["ids"]
    assert one["accuracy"] == plain["accuracy"]


@pytest.mark.slow
@pytest.mark.timeout(3600)  # two starts of vLLM, which wait for cores on a busy machine
@pytest.mark.parametrize("size", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_processes_equal_one(size: str, checkpoint: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    divided = answers(checkpoint, tmp_path, **{size: 2})
    assert_same(divided, plain)
    assert divided["sampled"] == plain["sampled"]
    assert divided["settings"][size] == 2


@pytest.mark.slow
@pytest.mark.timeout(3600)  # two starts of vLLM, which wait for cores on a busy machine
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_guessed_tokens_change_no_greedy_answer(
    method: str, checkpoint: Path, plain: dict[str, Any], tmp_path: Path
) -> None:
    """A sampled answer is another draw, the same each time."""
    draft = {"method": "draft_model", "model": str(checkpoint), "num_speculative_tokens": 3}
    guessed = answers(checkpoint, tmp_path, speculative_config=NGRAM if method == "ngram" else draft)
    assert_same(guessed, plain)
    assert guessed["sampled"] == guessed["again"]
    spec = guessed["settings"]["speculative_config"]
    assert spec["method"] == method
    assert ("draft_digest" in spec) == (method == "draft_model")


# --- without vLLM ---


def test_what_is_guessed_is_recorded(checkpoint: Path) -> None:
    assert "speculative_config" not in VLLMEngine(str(checkpoint)).settings()
    engine = VLLMEngine(str(checkpoint), speculative_config=json.dumps(NGRAM))
    assert engine.settings()["speculative_config"] == NGRAM
    assert "llm" not in vars(engine)


def test_scoring_has_nothing_to_guess(checkpoint: Path) -> None:
    options = EngineOptions("vllm", speculative_config=json.dumps(NGRAM))
    with pytest.raises(InputError, match="mmlu scores given texts, so there is no token to guess"):
        open_run(RunRequest(task="mmlu", data="nano", model=str(checkpoint), engine=options))
