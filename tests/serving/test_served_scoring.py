"""`almost-eval` on served models: vLLM's own servers give what transformers gives, and the runs say where from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from almost_eval.data.sources import find_data
from almost_eval.engines.base import GenerationEngine, LoglikelihoodEngine, SamplingParams
from almost_eval.engines.build import EngineOptions, loglikelihood_engine
from almost_eval.engines.hf import HFEngine
from almost_eval.engines.openai_loglikelihood import OpenAIScorer
from almost_eval.errors import InputError
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.rewards.http import HTTPRewardModel
from almost_eval.tasks.hhh import HHH
from almost_eval.types import LoglikelihoodRequest
from serving.vllm.launch import VLLMServer

Command = Callable[..., Any]
NATS = 1e-3
QUESTION = "\n\nHuman: what is the capital of the valley?\n\nAssistant:"
REQUESTS = [
    LoglikelihoodRequest(QUESTION, (" A", " B", " C", " D")),
    LoglikelihoodRequest(QUESTION, (" It is the town by the river.", " It is the town", " No.")),
    LoglikelihoodRequest(QUESTION * 20, (" I do not know that.", " yes", " yes and no")),
    LoglikelihoodRequest(QUESTION, tuple(f" {i}" for i in range(150))),  # more labels than one request takes
    LoglikelihoodRequest("", ("The town", "A river")),
    LoglikelihoodRequest("", (QUESTION * 150,), rolling=True),
]


@pytest.fixture(scope="module")
def hf() -> HFEngine:
    return HFEngine("nano/almost", dtype="float32", device="cpu")


def scorer(server: VLLMServer, **options: Any) -> OpenAIScorer:
    return OpenAIScorer(server.model, base_url=f"{server.url}/v1", **options)


# --- log-likelihoods ---


@pytest.mark.parametrize("route", ["ids", "echo"])
def test_log_likelihoods_equal_those_of_transformers(policy_server: VLLMServer, hf: HFEngine, route: str) -> None:
    engine = scorer(policy_server)
    engine.check_scores()
    assert engine.route == "ids"  # what vLLM can do; other servers only echo
    engine.route = route
    assert isinstance(engine, LoglikelihoodEngine)
    assert isinstance(engine, GenerationEngine)
    for _ in range(2):  # the second time the server's prefix cache holds everything
        for request, mine, theirs in zip(
            REQUESTS, engine.loglikelihood(REQUESTS), hf.loglikelihood(REQUESTS), strict=True
        ):
            if request.rolling:  # its windows are as long as the context, which differs by what the server samples
                total, other = (sum(score.logprob for score in scores) for scores in (mine, theirs))
                assert sum(s.n_tokens for s in mine) == sum(s.n_tokens for s in theirs)
                assert abs(total - other) < 0.01 * abs(other)
                continue
            assert [s.n_tokens for s in mine] == [s.n_tokens for s in theirs]
            assert [s.logprob for s in mine] == pytest.approx([s.logprob for s in theirs], abs=NATS)
            assert [s.is_greedy for s in mine] == [s.is_greedy for s in theirs]
    some = dict(engine.stream(engine.encode(REQUESTS), wanted=[1]))
    assert list(some) == [1]


@pytest.mark.parametrize("route", ["ids", "echo"])
def test_a_text_in_windows_of_the_same_size(policy_server: VLLMServer, route: str) -> None:
    request = LoglikelihoodRequest("", (QUESTION * 30,), rolling=True)
    engine = scorer(policy_server, max_length=64)
    engine.check_scores()
    engine.route = route
    [mine] = engine.loglikelihood([request])
    [theirs] = HFEngine("nano/almost", dtype="float32", device="cpu", max_length=64).loglikelihood([request])
    assert len(mine) > 5
    assert [s.logprob for s in mine] == pytest.approx([s.logprob for s in theirs], abs=NATS)


@pytest.mark.parametrize("route", ["ids", "echo"])
def test_a_full_context_is_scored_and_one_token_more_refused(
    policy_server: VLLMServer, hf: HFEngine, route: str
) -> None:
    engine = scorer(policy_server)
    engine.check_scores()
    engine.route = route
    assert engine.context_length is not None
    [ids] = engine.encoder.encode_texts([QUESTION * 400])
    text = str(engine.tokenizer.decode(ids[: engine.context_length]))
    request = LoglikelihoodRequest(text, (" yes",))
    positions = engine.encode([request])[0].n_positions
    assert abs(positions - engine.context_length) <= 1
    if positions <= engine.context_length:
        [[mine]], [[theirs]] = engine.loglikelihood([request]), hf.loglikelihood([request])
        assert mine.logprob == pytest.approx(theirs.logprob, abs=NATS)
    with pytest.raises(InputError, match="does not fit the context"):
        engine.loglikelihood([LoglikelihoodRequest(text, (" yes" * 9,))])


def test_what_the_spec_says_of_a_served_model(policy_server: VLLMServer) -> None:
    engine: Any = loglikelihood_engine(policy_server.model, EngineOptions("openai", base_url=f"{policy_server.url}/v1"))
    engine.check_scores()
    told = engine.settings()
    assert told["server"]["kind"] == "vllm"
    assert told["server"]["version"].startswith("0.")
    assert (told["route"], told["context_length"], told["model"]) == ("ids", 2047, "nano/almost")
    # The server runs here and names the folder: these are the files it was loaded from.
    assert engine.checkpoint.weight_digest() == find_checkpoint("nano/almost").weight_digest()
    assert engine.checkpoint.architecture == "LlamaForCausalLM"


def test_another_models_tokenizer_is_refused(policy_server: VLLMServer, tmp_path: Path) -> None:
    from almost_eval.nano.seeded import train_tokenizer

    train_tokenizer(["the town by the river is the capital"] * 4, vocab_size=300, model_max_length=256).save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError, match="the tokenizer is not the served model's; give --tokenizer"):
        scorer(policy_server, tokenizer=str(tmp_path)).check_scores()


def test_it_generates_too(policy_server: VLLMServer, hf: HFEngine) -> None:
    params = SamplingParams(max_new_tokens=12, stop=("\n\nHuman:",))
    assert [[c.text for c in row] for row in scorer(policy_server).generate([QUESTION], params)] == [
        [c.text for c in row] for row in hf.generate([QUESTION], params)
    ]


@pytest.mark.parametrize("protocol", ["choice", "likelihood"])
def test_a_run_on_an_endpoint(policy_server: VLLMServer, almost_eval: Command, tmp_path: Path, protocol: str) -> None:
    folder = tmp_path / "served"
    given = ["hhh", "--protocol", protocol, "--limit", 3, "--model", "nano/almost"]
    served = [*given, "--engine", "openai", "--base-url", f"{policy_server.url}/v1", "--output", folder]
    code, out, err = almost_eval(*served, "--json")
    assert (code, err) == (0, "")
    here = json.loads(almost_eval(*given, "--output", tmp_path / "here", "--json").out)
    there = json.loads(out)
    assert there["metrics"] == here["metrics"]
    for key in ("weight_digest", "prompt_ids_digest", "data_fingerprint", "template_digest"):
        assert there["provenance"][key] == here["provenance"][key], key
    assert there["provenance"]["dtype"] is None
    # The same command finds it done; a killed one goes on; verify asks the endpoint that the spec names.
    assert almost_eval(*served).code == 0
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join(lines[:5]))
    (folder / "results.json").unlink()
    assert json.loads(almost_eval(*served, "--json").out)["metrics"] == there["metrics"]
    code, out, err = almost_eval("verify", folder, "--model", "nano/almost", "--samples", 5)
    assert (code, err) == (0, "")
    assert "5 samples scored again" in out
    assert almost_eval("verify", folder, "--model", "nano/almost", "--engine", "hf").code == 0


def test_parity_with_a_served_model(policy_server: VLLMServer, almost_eval: Command, tmp_path: Path) -> None:
    given = ["parity", "--model", "nano/almost", "--engines", "hf,openai", "--base-url", f"{policy_server.url}/v1"]
    code, out, err = almost_eval(*given, "--limit", 3, "--output", tmp_path / "parity", "--json")
    assert (code, err) == (0, "")
    certificate = json.loads(out)
    assert [(row["task"], row["engine"], row["holds"]) for row in certificate["rows"]] == [
        (task, "openai", True) for task in ("hhh", "truthfulqa", "mmlu")
    ]
    assert all(0 < row["largest_nats"] <= NATS and row["samples"] > 0 for row in certificate["rows"])
    digests = {settings["weight_digest"] for settings in certificate["engines"].values()}
    assert digests == {certificate["weight_digest"]}


# --- rewards ---


@pytest.fixture(scope="module")
def conversations(data_root: Path) -> list[Any]:
    """Real texts of Static HHH that fit the nano model."""
    task = HHH("reward", find_data("hub", str(data_root)), limit=25)
    model = HFRewardModel("nano/reward", device="cpu")
    found = [one for sample in task.samples() for one in task.conversations(sample)]
    return [one for one, length in zip(found, model.lengths(found), strict=True) if length <= model.context_length]


@pytest.mark.parametrize("encoded", [True, False], ids=["ids", "messages"])
def test_rewards_equal_those_of_transformers(
    reward_server: VLLMServer, conversations: list[Any], encoded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HTTPRewardModel(reward_server.model, base_url=f"{reward_server.url}/v1")
    model.check()
    assert model.kind == "classify"
    if not encoded:
        monkeypatch.setitem(vars(model), "reader", None)
    assert len(conversations) >= 150
    mine, theirs = model.score(conversations), HFRewardModel("nano/reward", device="cpu").score(conversations)
    assert max(theirs) - min(theirs) > 1
    assert mine == pytest.approx(theirs, abs=1e-3)
    assert model.warnings == []
    if encoded:
        local = find_checkpoint("nano/reward", architectures=["SequenceClassification"])
        assert model.checkpoint.weight_digest() == local.weight_digest()


def test_a_conversation_that_the_server_refuses_is_unscored_and_told(reward_server: VLLMServer) -> None:
    from almost_eval.types import Message

    model = HTTPRewardModel(base_url=f"{reward_server.url}/v1")
    model.check()
    assert model.model == "nano/reward"
    model.__dict__["reader"] = None
    long = (Message("user", "hi"), Message("assistant", "the town by the river " * 2000))
    short = (Message("user", "hi"), Message("assistant", "the town"))
    first, second, third = model.score([short, long, short])
    assert first == third
    assert second != second  # NaN
    assert "the server refused 1 conversations, first: " in model.warnings[0]


def test_a_policy_gives_no_rewards(policy_server: VLLMServer) -> None:
    with pytest.raises(InputError, match="gives no rewards: it knows neither /v1/rewards nor /classify"):
        HTTPRewardModel(base_url=f"{policy_server.url}/v1").check()


def test_a_reward_run_on_an_endpoint(reward_server: VLLMServer, almost_eval: Command, tmp_path: Path) -> None:
    given = ["hhh", "--protocol", "reward", "--limit", 3, "--data", "nano", "--json"]
    served = [*given, "--engine", "openai", "--base-url", f"{reward_server.url}/v1", "--output", tmp_path / "there"]
    code, out, err = almost_eval(*served)
    assert (code, err) == (0, "")
    here, there = json.loads(almost_eval(*given, "--output", tmp_path / "here").out), json.loads(out)
    assert there["metrics"] == here["metrics"]
    assert there["provenance"]["weight_digest"] == here["provenance"]["weight_digest"]
    assert almost_eval("verify", tmp_path / "there", "--model", "nano/reward").code == 0
