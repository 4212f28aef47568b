"""vLLM against the transformers engine on one small checkpoint: what is refused at once, and the same answers."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from almost_eval.engines.base import GenerationEngine, LoglikelihoodEngine, SamplingParams
from almost_eval.engines.decoding import decode
from almost_eval.engines.hf import HFEngine
from almost_eval.engines.openai import OpenAIEngine
from almost_eval.engines.openai_loglikelihood import OpenAIScorer
from almost_eval.engines.vllm import VLLMEngine
from almost_eval.errors import InputError, RunError
from almost_eval.nano.seeded import build_checkpoint
from almost_eval.types import Completion, LoglikelihoodRequest
from serving.vllm.launch import VLLMServer

CONTEXT = 128  # tokens
TEXT = ["The cat sat on the mat, and the dog sat by the door. Hello world, hello there; numbers 1 2 3 and 42."] * 4
PROMPTS = ["Human: where is the cat?\n\nAssistant:", "The dog", "hello world, hello there; " * 3, "a"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Head size 32, the smallest that vLLM's CPU attention takes."""
    return build_checkpoint(
        tmp_path_factory.mktemp("llama") / "model",
        hidden_size=128,
        layers=2,
        vocab_size=320,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,
        tokenizer_text=TEXT,
    )


@pytest.fixture(scope="module")
def hf(checkpoint: Path) -> HFEngine:
    return HFEngine(str(checkpoint), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[VLLMEngine]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    engine = VLLMEngine(str(checkpoint), dtype="float32")
    yield engine
    engine.close()


# --- without vLLM ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float23"}, "unknown dtype 'float23'; did you mean 'float32'"),
        ({"max_length": CONTEXT + 1}, f"beyond the model's own context of {CONTEXT}"),
        ({"tensor_parallel_size": 0}, "tensor parallel size is 0; it must be 1 or more"),
        ({"data_parallel_size": 2}, "use --workers 2 for an engine on each GPU, or `almost-serve policy"),
        ({"tensor_parallel_size": 3}, "3 does not divide the 4 attention heads of .*; take one of 1, 2, 4"),
        ({"pipeline_parallel_size": 3}, "pipeline parallel size 3 is more than the 2 layers of "),
        ({"speculative_config": "ngram"}, r"speculative_config is not JSON .*; write \{"),
        ({"speculative_config": "[4]"}, "speculative_config is not an object"),
        ({"speculative_config": {"num_speculative_tokens": 4}}, "has no method: ngram, or draft_model with a model"),
        (
            {"speculative_config": {"method": "ngram"}},
            "num_speculative_tokens is None; it must be a number of at least 1",
        ),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 0}}, "num_speculative_tokens is 0"),
        (
            {"speculative_config": '{"method": "ngram", "num_speculative_tokens": 4}', "pipeline_parallel_size": 2},
            "guesses no tokens where the layers are divided",
        ),
        ({"speculative_config": {"method": "draft_model", "num_speculative_tokens": 4}}, "draft_model needs a model"),
        (
            {"speculative_config": {"method": "ngram", "model": "nano/almost", "num_speculative_tokens": 4}},
            "ngram guesses from the text itself, so it takes no model",
        ),
        (
            {"speculative_config": {"model": "nano/almost", "num_speculative_tokens": 4}},
            r"nano/almost has \d+ tokens and .* 320; a draft model has the same ones",
        ),
        ({"gpu_memory": 1.5}, "a share above 0 and at most 1"),
    ],
)
def test_refused_at_once(checkpoint: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VLLMEngine(str(checkpoint), **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_quantization_that_vllm_does_not_know(checkpoint: Path) -> None:
    """Slow: the names are in vLLM's own list, and it takes seconds to import."""
    with pytest.raises(InputError, match="vLLM has no quantization 'fp9'; did you mean 'fp8'"):
        VLLMEngine(str(checkpoint), quantization="fp9")


def test_what_does_not_fit_is_refused_before_anything_loads(checkpoint: Path) -> None:
    engine = VLLMEngine(str(checkpoint))
    assert isinstance(engine, GenerationEngine)
    assert isinstance(engine, LoglikelihoodEngine)
    with pytest.raises(InputError, match="do not fit the context of 128; lower max_new_tokens"):
        engine.generate(["a"], SamplingParams(max_new_tokens=CONTEXT))
    with pytest.raises(InputError, match="does not fit the context"):
        engine.loglikelihood([LoglikelihoodRequest("a " * CONTEXT, (" b",))])
    with pytest.raises(InputError, match=r"vLLM cannot sample so: .*temperature must be in \[0, 2\]"):
        engine.generate(["a"], SamplingParams(max_new_tokens=1, temperature=3.0))
    assert "llm" not in vars(engine)
    assert engine.settings()["context_length"] == CONTEXT


# --- with vLLM ---


def _text(completion: Completion) -> str:
    return completion.text.rstrip("\ufffd")


@pytest.mark.slow
def test_greedy_completions_equal_those_of_transformers(engine: VLLMEngine, hf: HFEngine) -> None:
    params = SamplingParams(max_new_tokens=24, n=2)
    ours, theirs = engine.generate(PROMPTS, params), hf.generate(PROMPTS, params)
    assert [c.token_ids for row in ours for c in row] == [c.token_ids for row in theirs for c in row]
    # A character whose last bytes are missing at the end shows as U+FFFD there, and not at all in vLLM.
    assert [_text(c) for row in ours for c in row] == [_text(c) for row in theirs for c in row]
    assert {c.finish_reason for row in ours for c in row} <= {"stop", "length"}


@pytest.mark.slow
def test_stop_strings_and_end_tokens(engine: VLLMEngine, hf: HFEngine) -> None:
    free = hf.generate(PROMPTS, SamplingParams(max_new_tokens=24))
    stop = tuple({row[0].text[3:5] for row in free if len(row[0].text) > 5} | {"</s>"})
    params = SamplingParams(max_new_tokens=24, stop=stop)
    ours, theirs = engine.generate(PROMPTS, params), hf.generate(PROMPTS, params)
    assert [(_text(c), c.finish_reason) for row in ours for c in row] == [
        (_text(c), c.finish_reason) for row in theirs for c in row
    ]
    assert any(c.finish_reason == "stop" for row in ours for c in row)


@pytest.mark.slow
def test_a_completion_depends_on_what_is_asked_alone(engine: VLLMEngine) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=1.0, top_p=0.9, n=3, seed=5)
    whole = engine.generate(PROMPTS, params)
    assert len({c.token_ids for row in whole for c in row}) > len(PROMPTS)
    assert engine.generate(PROMPTS[2:], params) == whole[2:]
    assert engine.generate(PROMPTS[::-1], params) == whole[::-1]
    more = SamplingParams(max_new_tokens=12, temperature=1.0, top_p=0.9, n=4, seed=5)
    assert [row[:3] for row in engine.generate(PROMPTS, more)] == whole
    other = SamplingParams(max_new_tokens=12, temperature=1.0, top_p=0.9, n=3, seed=6)
    assert engine.generate(PROMPTS, other) != whole


@pytest.mark.slow
def test_more_prompts_than_a_step_takes(engine: VLLMEngine) -> None:
    """A prompt that is cut between two steps ends vLLM on a CPU where it has a seed."""
    prompts = [f"{i} {TEXT[0]}" for i in range(200)]  # several times what a step takes
    params = SamplingParams(max_new_tokens=4, temperature=1.0, n=2)
    whole = engine.generate(prompts, params)
    assert engine.generate(prompts[70:80], params) == whole[70:80]


@pytest.mark.slow
def test_a_stream_may_be_left_and_not_shared(engine: VLLMEngine) -> None:
    params = SamplingParams(max_new_tokens=30, temperature=1.0, n=2, stop=("e", "a", "t"))  # they end at various steps
    stream = engine.stream_completions(PROMPTS * 3, params)
    next(iter(stream))
    with pytest.raises(RunError, match="in the middle of another stream"):
        engine.generate(PROMPTS, params)
    stream.close()  # type: ignore[attr-defined]
    assert len(engine.generate(PROMPTS, params)) == len(PROMPTS)


REQUESTS = [
    LoglikelihoodRequest("Human: is the cat on the mat?\n\nAssistant: The answer is", (" A", " B")),
    LoglikelihoodRequest(f"{TEXT[0]} The cat", (" sat on the mat", " sat on the door and 42 numbers", " sat")),
    LoglikelihoodRequest(f"{TEXT[0]} The cat", (" sat on the mat", "!")),
    LoglikelihoodRequest(f"{TEXT[0]} The dog sat", tuple(f" {i}" for i in range(40))),
    LoglikelihoodRequest("", ("hello", "numbers")),
    # A whole block of 32 tokens is cached past the beginning of these: their rows must be computed again.
    LoglikelihoodRequest("The", (f" cat. {TEXT[0]} and", f" cat. {TEXT[0]} or")),
]


@pytest.mark.slow
def test_log_likelihoods_equal_those_of_transformers(engine: VLLMEngine, hf: HFEngine) -> None:
    requests = [*REQUESTS, LoglikelihoodRequest("", (TEXT[0] * 3,), rolling=True)]
    theirs = hf.loglikelihood(requests)
    for _ in range(2):  # the second time everything is cached
        ours = engine.loglikelihood(requests)
        for request, mine, other in zip(requests, ours, theirs, strict=True):
            assert [s.n_tokens for s in mine] == [s.n_tokens for s in other], request
            assert [s.logprob for s in mine] == pytest.approx([s.logprob for s in other], abs=1e-3), request
            assert [s.is_greedy for s in mine] == [s.is_greedy for s in other], request
    assert engine.report.tokens_plain == hf.report.tokens_plain
    some = dict(engine.stream(engine.encode(requests), wanted=[1, 4]))
    assert sorted(some) == [1, 4]
    assert [s.logprob for s in some[1]] == pytest.approx([s.logprob for s in theirs[1]], abs=1e-3)


@pytest.mark.slow
def test_a_context_that_is_full_is_scored(engine: VLLMEngine, hf: HFEngine) -> None:
    [ids] = hf.encoder.encode_texts(["a b" * CONTEXT])
    text = hf.tokenizer.decode(ids[1 : CONTEXT + 1])
    request = LoglikelihoodRequest(text[:-4], (text[-4:],))
    assert engine.encode([request])[0].n_positions == CONTEXT
    [[mine]], [[other]] = engine.loglikelihood([request]), hf.loglikelihood([request])
    assert mine.logprob == pytest.approx(other.logprob, abs=1e-3)


@pytest.mark.slow
def test_two_models_at_once(engine: VLLMEngine, tmp_path: Path) -> None:
    path = build_checkpoint(
        tmp_path / "other", seed=1, hidden_size=64, heads=2, layers=1, vocab_size=300,
        max_position_embeddings=64, tokenizer_text=TEXT,
    )  # fmt: skip
    params = SamplingParams(max_new_tokens=8)
    before = engine.generate(PROMPTS[:2], params)
    other = VLLMEngine(str(path), dtype="float32", max_length=32)
    [[mine]], [[theirs]] = other.generate(PROMPTS[1:2], params), HFEngine(str(path)).generate(PROMPTS[1:2], params)
    assert mine.token_ids == theirs.token_ids
    other.close()
    assert engine.generate(PROMPTS[:2], params) == before


@pytest.mark.slow
def test_closed_and_used_again(checkpoint: Path, engine: VLLMEngine) -> None:
    params = SamplingParams(max_new_tokens=8)
    before = engine.generate(PROMPTS, params)
    for _ in range(2):
        engine.close()
        assert engine.generate(PROMPTS, params) == before


SCRIPT = """
import sys, psutil
from almost_eval.engines.base import SamplingParams
from almost_eval.engines.vllm import VLLMEngine
engine = VLLMEngine(sys.argv[1])
engine.generate(["a"], SamplingParams(max_new_tokens=2))
print(len(psutil.Process().children(recursive=True)), "children", flush=True)
raise SystemExit(3)
"""


@pytest.mark.slow
def test_nothing_is_left_behind(checkpoint: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(checkpoint)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (3, ["0 children"]), done.stderr[-2000:]


@pytest.mark.slow
def test_a_model_that_vllm_cannot_run_is_one_line(tmp_path: Path) -> None:
    path = build_checkpoint(
        tmp_path / "narrow", hidden_size=32, heads=4, layers=1, vocab_size=300, max_position_embeddings=64,
        tokenizer_text=TEXT,
    )  # fmt: skip
    with pytest.raises(RunError, match=r"vLLM stopped while it ran .* head_dim=8") as caught:
        VLLMEngine(str(path)).generate(["a"], SamplingParams(max_new_tokens=2))
    assert "\n" not in str(caught.value)


# --- thoughts ---


@pytest.fixture(scope="module")
def thinking(checkpoint: Path, hf: HFEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with two of its tokens made special ones that mark a thought, and likely to be written."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("thinking") / "model"
    shutil.copytree(checkpoint, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    ids = {name: vocabulary.pop(token) for name, token in (("[THINK]", "z"), ("[/THINK]", "q"))}
    for name, number in ids.items():
        vocabulary[name] = number
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": number, "content": name, "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    weights = load_file(folder / "model.safetensors")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    said = hf.generate(["The dog"], SamplingParams(max_new_tokens=8))[0][0].token_ids
    for number, like in zip(ids.values(), dict.fromkeys(said), strict=False):
        head[number] = 1.1 * head[like]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_the_marks_of_a_thought_stay_in_what_vllm_wrote(thinking: Path) -> None:
    """Skipped, as vLLM skips all special tokens, they would make the thought a part of the answer."""
    engine = VLLMEngine(str(thinking), dtype="float32", kv_cache_gib=0.25)
    try:
        params = SamplingParams(max_new_tokens=60, temperature=2.0, n=12, seed=1)
        completions = engine.generate(["The dog"], params)[0]
        marked = [c for c in completions if "[THINK]" in c.text or "[/THINK]" in c.text]
        ids = engine.tokenizer.convert_tokens_to_ids(["[THINK]", "[/THINK]"])
        assert marked
        assert marked == [c for c in completions if not {*ids}.isdisjoint(c.token_ids)]
        assert all(c.text == decode(engine.tokenizer, c.token_ids) for c in marked)
        stopped = engine.generate(["The dog"], replace(params, stop=("a",)))[0]
        assert all("a" not in c.text for c in stopped)
    finally:
        engine.close()


@pytest.mark.slow
def test_the_marks_of_a_thought_come_through_vllms_server_too(thinking: Path) -> None:
    with VLLMServer("policy", str(thinking), options=["--dtype", "float32"]) as server:
        server.wait_ready(timeout_s=300)
        engine = OpenAIScorer(server.model, base_url=f"{server.url}/v1", tokenizer=str(thinking))
        params = SamplingParams(max_new_tokens=60, temperature=2.0, n=12, seed=1)
        completions = engine.generate(["The dog"], params)[0]
        marked = [c for c in completions if "[THINK]" in c.text or "[/THINK]" in c.text]
        assert marked
        stopped = engine.generate(["The dog"], replace(params, stop=("a",)))[0]
        assert all("a" not in c.text for c in stopped)
        assert any("THINK]" in c.text for c in stopped)
        # Without a tokenizer nobody here knows the marks: the text is the server's.
        plain = OpenAIEngine(server.model, base_url=f"{server.url}/v1")
        unmarked = plain.generate(["The dog"], params)[0]
    assert [c.text for c in unmarked] == [c.text.replace("[THINK]", "").replace("[/THINK]", "") for c in completions]
