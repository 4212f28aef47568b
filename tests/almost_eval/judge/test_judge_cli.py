"""`almost-eval vicuna` and `almost-eval judge`: what they refuse and how, and what a run folder holds."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from replay_server import Fault, ReplayServer, read_archive

Command = Callable[..., Any]
KEY = "sk-test-0123456789abcdefghijklmnop"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no endpoint, no data root, and a folder of its own."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ALMOST_API_KEY", "ALMOST_DATA_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import almost_eval.rewards.hf  # before anything is replaced, or it would keep the replacement

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("almost_eval.engines.hf.load_weights", loaded)
    monkeypatch.setattr(almost_eval.rewards.hf, "load_weights", loaded)


@pytest.fixture
def server() -> Iterator[ReplayServer]:
    """A judge behind HTTP that gives the same two reviews in turn: no archive is needed."""
    served = ReplayServer([])
    served.review = lambda prompt: "8 6\nThe first is better." if len(prompt) % 2 else "7 7\nEqual."  # type: ignore[method-assign]
    yield served
    served.close()


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    file = Path(name)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


QUESTIONS = [
    {"question_id": 1, "text": "What is a cat?", "category": "generic"},
    {"question_id": 2, "text": "What is 2 + 3?", "category": "math"},
    {"question_id": 3, "text": "Write a loop.", "category": "coding"},
]


def answers(model: str, texts: list[str] | None = None) -> list[dict[str, Any]]:
    texts = texts or [f"{model} says {i}" for i in range(3)]
    return [{"question_id": i + 1, "text": text, "model_id": model} for i, text in enumerate(texts)]


@pytest.fixture
def files() -> list[str]:
    """Three questions and two answer files, as arguments."""
    write("questions.jsonl", QUESTIONS)
    write("a.jsonl", answers("model-a"))
    write("b.jsonl", answers("model-b", ["", "five", "for i in range(3): pass"]))
    return ["--questions", "questions.jsonl", "--answers", "a.jsonl", "--baseline", "b.jsonl", "--data", "hub"]


def lines(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


# --- a run with nothing given


def test_the_default_run_needs_nothing(almost_eval: Command) -> None:
    code, out, err = almost_eval("vicuna", "--limit", 12, "--output", "run")
    assert (code, err) == (0, "")
    assert "nano/almost" in out
    assert "nano/vanilla-medium" in out
    results = json.loads(Path("run/results.json").read_text())
    assert results["task"] == "vicuna"
    assert results["protocol"] == "nano"
    names = {"win_rate", "wins", "ties", "losses", "unparsed"}
    assert names | {"total_score/nano/almost", "total_score/nano/vanilla-medium"} <= results["metrics"].keys()
    assert all({"value", "stderr", "ci95", "n", "unscored"} <= m.keys() for m in results["metrics"].values())
    assert results["metrics"]["win_rate"]["value"] > 0.6
    assert sorted(p.name for p in Path("run/answers").iterdir()) == ["nano_almost.jsonl", "nano_vanilla-medium.jsonl"]
    stored = lines("run")
    assert len(stored) == 24
    assert {"id", "score", "reason", "outputs", "prompt_tokens_truncated"} <= stored[0].keys()
    assert {line["id"] for line in stored} == {f"{i}/{order}" for i in range(1, 13) for order in ("forward", "reverse")}
    assert {"review", "scores", "winner", "lengths"} <= stored[0]["outputs"].keys()
    assert almost_eval("report", "run").out == out
    verified = almost_eval("verify", "run")
    assert verified.code == 0, verified.out
    assert "24 samples" in verified.out


def test_the_same_command_again_loads_nothing_and_says_the_same(
    almost_eval: Command, request: pytest.FixtureRequest
) -> None:
    given = ["vicuna", "--limit", 4, "--judge", "nano", "--output", "run"]
    first = almost_eval(*given)
    assert first.code == 0
    request.getfixturevalue("no_weights")
    assert almost_eval(*given) == first
    with pytest.raises(AssertionError, match="weights were loaded"):
        almost_eval(*given[:-1], "another")
    spec = json.loads(Path("run/spec.json").read_text())
    assert spec["settings"]["systems"]["model"]["sampling"]["temperature"] == 0.7


def test_answers_of_one_run_are_files_for_the_next(almost_eval: Command) -> None:
    almost_eval("vicuna", "--limit", 6, "--output", "first")
    given = ["--answers", "first/answers/nano_almost.jsonl", "--baseline", "first/answers/nano_vanilla-medium.jsonl"]
    code, out, _ = almost_eval("vicuna", *given, "--data", "nano", "--limit", 6, "--output", "second", "--json")
    assert code == 0
    first = json.loads(Path("first/results.json").read_text())
    second = json.loads(out)
    assert second["metrics"] == first["metrics"]
    assert second["provenance"]["answers"] == first["provenance"]["answers"]


def test_another_command_in_the_folder_is_refused(almost_eval: Command) -> None:
    almost_eval("vicuna", "--limit", 2, "--output", "run")
    before = Path("run/samples.jsonl").read_bytes()
    code, out, err = almost_eval("vicuna", "--limit", 2, "--output", "run", "--temperature", 0.5)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "run holds another run: " in err
    assert "temperature was 0.7, is 0.5" in err
    assert Path("run/samples.jsonl").read_bytes() == before


def test_a_reward_model_judges(almost_eval: Command) -> None:
    code, out, _ = almost_eval("vicuna", "--limit", 6, "--judge", "reward:nano/reward", "--output", "run", "--json")
    assert code == 0
    results = json.loads(out)
    assert results["metrics"]["win_rate"]["value"] > 0.5
    assert not any(name.startswith("total_score") for name in results["metrics"])
    assert all(len(line["outputs"]["rewards"]) == 2 for line in lines("run"))
    verified = almost_eval("verify", "run")
    assert verified.code == 0, verified.out


def test_a_round_robin(almost_eval: Command) -> None:
    models = ["nano/vanilla-small", "nano/vanilla-large", "nano/almost"]
    code, out, err = almost_eval("vicuna", "--limit", 10, "--models", *models, "--output", "run", "--orders", "forward")
    assert (code, err) == (0, "")
    assert "round robin" in out
    results = json.loads(Path("run/results.json").read_text())
    assert len(lines("run")) == 30
    assert len({line["id"] for line in lines("run")}) == 30
    assert results["headline"] in results["metrics"]
    strengths = {name: m["value"] for name, m in results["metrics"].items() if name.startswith("strength/")}
    assert max(strengths, key=strengths.__getitem__) == "strength/nano/almost"
    assert {f"win_rate/{model}" for model in models} <= results["metrics"].keys()
    assert almost_eval("report", "run").out == out
    verified = almost_eval("verify", "run")
    assert verified.code == 0, verified.out


# --- what is refused, and when

REFUSED: dict[str, tuple[list[str], str]] = {
    "no baseline": (["--answers", "a.jsonl"], "--baseline is missing"),
    "two models": (["--model", "nano/almost", "--answers", "a.jsonl"], "--answers are the model's answers"),
    "models and model": (["--models", "a.jsonl", "b.jsonl", "--model", "x"], "--models names all systems"),
    "one of many": (["--models", "a.jsonl"], "--models needs two systems or more"),
    "stray": (["stray", "--answers", "a.jsonl", "--baseline", "b.jsonl"], "unexpected argument 'stray'"),
    "the same": (
        ["--answers", "a.jsonl", "--baseline", "a.jsonl", "--judge", "reward:nano/reward"],
        "called 'model-a'",
    ),
    "no file": (["--answers", "nope.jsonl", "--baseline", "b.jsonl"], "nope.jsonl cannot be read"),
    "other question": (["--answers", "extra.jsonl", "--baseline", "b.jsonl"], "questions that are not asked: 9"),
    "twice": (["--answers", "twice.jsonl", "--baseline", "b.jsonl"], "question 1 was answered before"),
    "missing": (["--answers", "missing.jsonl", "--baseline", "b.jsonl"], "has no answer to 1 of 3 questions: 3"),
    "not UTF-8": (["--answers", "latin.jsonl", "--baseline", "b.jsonl"], "latin.jsonl is not UTF-8"),
    "2 MB": (["--answers", "long.jsonl", "--baseline", "b.jsonl"], "longer than 100,000 characters"),
    "questions twice": (
        ["--questions", "same.jsonl", "--answers", "a.jsonl", "--baseline", "b.jsonl"],
        "was given before",
    ),
    "no questions": (["--questions", "nope.jsonl", "--answers", "a.jsonl", "--baseline", "b.jsonl"], "cannot be read"),
    "prompt": (["--judge-prompt", "nope.yaml", "--answers", "a.jsonl", "--baseline", "b.jsonl"], "nope.yaml cannot be"),
    "nano judge": (["--judge", "nano", "--answers", "a.jsonl", "--baseline", "b.jsonl"], "knows no other"),
    "reward prompts": (
        ["--judge", "reward:nano/reward", "--prompt-set", "builtin"],
        "belongs to a judge behind an API",
    ),
    "no reward model": (["--judge", "reward:nano/almost"], "holds a LlamaForCausalLM"),
    "price": (["--price-in", "1", "--answers", "a.jsonl", "--baseline", "b.jsonl"], "--price-in and --price-out go"),
    "no price": (["--judge", "x", "--max-cost", "1", "--answers", "a.jsonl", "--baseline", "b.jsonl"], "price of 'x'"),
    "tokens": (["--model", "nano/almost", "--baseline", "nano/sft", "--max-new-tokens", "9999"], "do not fit the 2048"),
    "engine": (["--model", "nano/almost", "--baseline", "b.jsonl", "--engine", "hg"], "unknown engine 'hg'"),
    "flag of another engine": (
        ["--model", "nano/almost", "--baseline", "b.jsonl", "--gpu-memory", "0.5"],
        "takes no gpu",
    ),
    "model": (["--model", "nano/almots", "--baseline", "b.jsonl"], "did you mean 'nano/almost'?"),
    "template": (
        ["--model", "nano/almost", "--baseline", "b.jsonl", "--template", "vicunna"],
        "did you mean 'vicuna'?",
    ),
    "share": (["--allow", "unparsed=2"], "give a share from 0 to 1"),
    "URL": (
        ["--judge-base-url", "nonsense", "--answers", "a.jsonl", "--baseline", "b.jsonl"],
        "is not an http(s) address",
    ),
}


@pytest.mark.usefixtures("no_weights", "files")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, almost_eval: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("something was sent"))
    write("extra.jsonl", [*answers("m"), {"question_id": 9, "text": "a", "model_id": "m"}])
    write("twice.jsonl", [*answers("m"), *answers("m")[:1]])
    write("missing.jsonl", answers("m")[:2])
    write("long.jsonl", answers("m", ["a", "x" * 2_000_000, "b"]))
    write("same.jsonl", [*QUESTIONS, QUESTIONS[0]])
    Path("latin.jsonl").write_bytes(b'{"question_id": 1, "text": "caf\xe9", "model_id": "m"}\n')
    arguments, expected = REFUSED[case]
    arguments = ["--data", "hub", *arguments]
    if not {"--prompt-set", "--judge-prompt", "nano"} & {*arguments} and "reward:" not in str(arguments):
        arguments += ["--prompt-set", "builtin"]
    if "--questions" not in arguments:
        arguments += ["--questions", "questions.jsonl"]
    code, out, err = almost_eval("vicuna", *arguments, "--output", "run")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert not Path("run").exists()


API = ["--judge", "gpt-4", "--prompt-set", "builtin", "--output", "run"]


def test_no_key(almost_eval: Command, files: list[str]) -> None:
    code, out, err = almost_eval("vicuna", *files, *API)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "set OPENAI_API_KEY" in err
    assert not Path("run").exists()


def test_a_key_in_the_address(almost_eval: Command, files: list[str]) -> None:
    for address in (f"http://{KEY}@127.0.0.1:9/v1", f"http://127.0.0.1:9/v1?key={KEY}"):
        code, out, err = almost_eval("vicuna", *files, *API, "--judge-base-url", address)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "give the bare address" in err
        assert KEY not in err
        assert not Path("run").exists()


def test_an_unknown_judge_is_said_once(almost_eval: Command, files: list[str], server: ReplayServer) -> None:
    server.fault = lambda call: Fault("status", 404, "The model `gpt-5000` does not exist", "model_not_found")
    code, out, err = almost_eval("vicuna", *files, *API, "--judge-base-url", server.url, "--judge", "gpt-5000")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.count("The model `gpt-5000` does not exist") == 1


# --- a judge behind HTTP


def test_a_run_by_an_api(almost_eval: Command, files: list[str], server: ReplayServer) -> None:
    given = ["vicuna", *files, *API, "--judge-base-url", server.url]
    code, out, err = almost_eval(*given)
    assert (code, err) == (0, "")
    assert server.count == 6
    stored = lines("run")
    assert len(stored) == 6
    assert {line["outputs"]["judge_model"] for line in stored} == {"gpt-4-0314"}
    assert {tuple(line["outputs"]["scores"]) for line in stored} <= {(8.0, 6.0), (7.0, 7.0)}
    assert [0 in line["outputs"]["lengths"] for line in stored].count(True) == 2  # the empty answer, in both orders
    results = json.loads(Path("run/results.json").read_text())
    provenance = results["provenance"]
    assert provenance["judge_models"] == ["gpt-4-0314"]
    assert provenance["prompt_set"]["name"] == "builtin"
    assert re.fullmatch(r"[0-9a-f]{64}", provenance["prompt_set"]["digest"])
    assert provenance["answers"].keys() == {"model-a", "model-b"}
    assert results["metrics"]["win_rate"]["n"] == 6
    assert Path("run/journal.sqlite").is_file()
    assert almost_eval(*given).out == out
    assert server.count == 6
    verified = almost_eval("verify", "run")
    assert verified.code == 0, verified.out
    assert almost_eval("report", "run").out == out


def test_verify_finds_what_was_changed(almost_eval: Command, files: list[str], server: ReplayServer) -> None:
    almost_eval("vicuna", *files, *API, "--judge-base-url", server.url)
    samples, results, file = Path("run/samples.jsonl"), Path("run/results.json"), Path("run/answers/model-a.jsonl")
    kept = {path: path.read_text() for path in (samples, results, file)}
    for path, old, new, found in (
        (samples, '"winner": "1"', '"winner": "2"', "outputs.winner: 2, recomputed 1"),
        (samples, "8 6\\nThe", "2 9\\nThe", "recomputed"),
        (results, '"wins"', '"won"', "wins"),
        (file, "model-a says 1", "model-a says it all", "outputs.lengths"),
    ):
        assert old in kept[path]
        path.write_text(kept[path].replace(old, new, 1))
        verified = almost_eval("verify", "run")
        assert verified.code == 1
        assert found in verified.out
        path.write_text(kept[path])
    assert almost_eval("verify", "run").code == 0


def test_the_key_is_nowhere(
    almost_eval: Command, files: list[str], server: ReplayServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    given = ["vicuna", *files, *API, "--judge-base-url", server.url]
    said = []
    for fault in (
        Fault("status", 401, f"Incorrect API key provided: {KEY}", "invalid_api_key"),
        Fault("status", 400, f"bad {KEY}"),
        Fault("status", 404, f"no model for {KEY}"),
        None,
    ):
        server.fault = lambda call, fault=fault: fault if fault and fault.kind == "status" else None  # type: ignore[misc]
        said += [str(part) for part in almost_eval(*given)]
    assert server.log[-1].key == KEY  # it was sent
    said += [str(part) for command in ("report", "verify") for part in almost_eval(command, "run")]
    said += [str(part) for part in almost_eval("judge", "report", "run", "--json")]
    assert not [text for text in said if KEY in text]
    assert "Traceback" not in "".join(said)
    read = [path for path in Path("run").rglob("*") if path.is_file()]
    assert {"spec.json", "samples.jsonl", "results.json", "journal.sqlite"} <= {path.name for path in read}
    assert not [path for path in read if KEY.encode() in path.read_bytes()]


def test_what_cannot_be_read_blocks_the_headline(almost_eval: Command, files: list[str], server: ReplayServer) -> None:
    server.review = lambda prompt: "Both are fine." if "five" in prompt else "9 4\nThe first."  # type: ignore[method-assign]
    given = ["vicuna", *files, *API, "--judge-base-url", server.url]
    code, out, _ = almost_eval(*given)
    assert code == 3
    assert "withheld" in out
    results = json.loads(Path("run/results.json").read_text())
    assert results["metrics"]["win_rate"]["value"] is None
    assert results["metrics"]["unparsed"]["value"] == 2
    assert "2 of 6 samples have a verdict that cannot be read" in results["validity"]["reason"]
    unread = [line for line in lines("run") if line["reason"] == "unparsed"]
    assert [(line["score"], line["outputs"]["winner"], line["outputs"]["scores"]) for line in unread] == [
        (None,) * 3
    ] * 2
    assert all(line["outputs"]["review"] == "Both are fine." for line in unread)
    # The same command with --reask asks for these two, and for nothing else.
    asked = server.count
    server.review = lambda prompt: "5 9\nThe second."  # type: ignore[method-assign]
    code, out, _ = almost_eval(*given, "--reask", "--json")
    assert (code, server.count) == (0, asked + 2)
    results = json.loads(out)
    assert results["metrics"]["unparsed"]["value"] == 0
    assert results["details"]["asked twice"] == 2
    assert almost_eval(*given, "--allow", "unparsed=1").code == 0


def test_reask_asks_once(almost_eval: Command, files: list[str], server: ReplayServer) -> None:
    server.review = lambda prompt: "Both are fine."  # type: ignore[method-assign]
    given = ["vicuna", *files, *API, "--judge-base-url", server.url, "--reask"]
    assert almost_eval(*given).code == 3
    assert server.count == 12
    assert almost_eval(*given).code == 3
    assert server.count == 12


def test_long_answers_are_cut_on_purpose_and_counted(
    almost_eval: Command, files: list[str], server: ReplayServer
) -> None:
    write("a.jsonl", answers("model-a", ["x" * 2_000_000, "short", "short"]))
    given = ["vicuna", *files, *API, "--judge-base-url", server.url, "--max-answer-chars", 1000]
    assert almost_eval(*given).code == 3
    stored = lines("run")
    assert sorted(line["prompt_tokens_truncated"] for line in stored) == [0, 0, 0, 0, 499_750, 499_750]
    assert max(max(line["outputs"]["lengths"]) for line in stored) == 1000
    assert json.loads(Path("run/results.json").read_text())["details"]["reviews of cut answers"] == 2
    assert almost_eval(*given, "--allow", "truncated=0.5").code == 0
    assert almost_eval("verify", "run").code == 0


def test_a_dry_run_sends_nothing(
    almost_eval: Command, files: list[str], no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("something was sent"))
    before = sorted(Path().rglob("*"))
    code, out, err = almost_eval("vicuna", *files, *API, "--dry-run", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["requests"] == 6
    assert facts["completion_tokens_at_most"] == 6 * 1024
    assert facts["price_usd_at_most"] == pytest.approx(
        (facts["prompt_tokens_at_most"] * 30 + facts["completion_tokens_at_most"] * 60) / 1e6, abs=1e-4
    )
    assert "What is a cat?" in facts["prompt"]
    given = ["--price-in", 1, "--price-out", 2]
    other = json.loads(almost_eval("vicuna", *files, *API, "--dry-run", "--json", *given).out)
    assert other["price_usd_at_most"] < facts["price_usd_at_most"]
    models = ["--model", "nano/almost", "--baseline", "b.jsonl", "--questions", "questions.jsonl", "--data", "hub"]
    longer = json.loads(almost_eval("vicuna", *models, *API, "--dry-run", "--json").out)
    assert longer["prompt_tokens_at_most"] > facts["prompt_tokens_at_most"] + 6 * 1000
    assert "nano/almost" in longer["taken_as_long_as_they_may_become"]
    assert "requests: 6" in almost_eval("vicuna", *files, *API, "--dry-run").out
    assert sorted(Path().rglob("*")) == before


# --- redrawn without a call


def test_redrawn_offline(almost_eval: Command, files: list[str], server: ReplayServer) -> None:
    almost_eval("vicuna", *files, *API, "--judge-base-url", server.url)
    server.close()
    stored = {line["id"]: line for line in lines("run")}
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}

    def redraw(*arguments: object) -> dict[str, Any]:
        code, out, _ = almost_eval("judge", "report", "run", "--json", *arguments)
        assert code == 0
        found: dict[str, Any] = json.loads(out)
        return found["metrics"]

    scores = [line["score"] for line in stored.values()]
    assert redraw()["win_rate"]["value"] == pytest.approx(sum(scores) / 6)
    forward = [line["score"] for id, line in stored.items() if id.endswith("/forward")]
    assert redraw("--orders", "forward")["win_rate"]["value"] == pytest.approx(sum(forward) / 3)
    decisive = [score for score in scores if score != 0.5]
    assert redraw("--ties", "drop")["win_rate"]["value"] == pytest.approx(sum(decisive) / len(decisive))
    assert almost_eval("judge", "report", "run", "--prompt-family", "mt-bench").code == 3  # no letters in them
    assert {path: path.read_bytes() for path in before} == before


def test_reports_that_cannot_be(almost_eval: Command) -> None:
    almost_eval("hhh", "--limit", 1, "--output", "hhh")
    almost_eval("vicuna", "--limit", 2, "--orders", "forward", "--output", "run")
    for arguments, expected in (
        ([], "give the folder of a run, or --archive"),
        (["nope"], "nope/spec.json is not there"),
        (["hhh"], "is a run of hhh, not of vicuna"),
        (["run", "--orders", "reverse"], "holds the order 'forward' only"),
        (["run", "--prompt-family", "vicuna"], "the judge 'nano' wrote no reviews"),
        (["--archive", "run"], "run is no archive"),
    ):
        extra = ["--questions", "run/questions.jsonl"] if "--archive" in arguments else []
        code, out, err = almost_eval("judge", "report", *arguments, *extra)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert expected in err


@pytest.fixture
def archive(data_root: Path) -> Path:
    found = data_root.parent / "vicuna"
    if not found.is_dir():
        pytest.skip(f"no archived reviews at {found}")
    return found


TOTALS = {
    "review_llama-13b_vicuna-13b.jsonl": (513, 694),
    "review_alpaca-13b_vicuna-13b.jsonl": (583, 704),
    "review_bard_vicuna-13b.jsonl": (664, 655.5),
    "review_gpt35_vicuna-13b.jsonl": (693, 638),
    "review_llama_alpaca-13b.jsonl": (525, 605),
}
"""The hand-checked totals of both sides."""


def test_archived_reviews(almost_eval: Command, archive: Path, data_root: Path) -> None:
    given = ["judge", "report", "--archive", archive, "--data-root", data_root]
    code, out, err = almost_eval(*given, "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    found = {}
    for row in rows:
        metrics = row["metrics"]
        totals = [metrics[f"total_score/{row[side]}"]["value"] for side in ("baseline", "model")]
        for other in row["other_scores_than_stored"]:  # two reviews say something else than what was written down
            totals = [t + s - r for t, s, r in zip(totals, other["stored"], other["read"], strict=True)]
            assert (other["question"], other["stored"], other["read"]) == ("70", [10, 2], [10, 4])
        found[row["file"]] = tuple(totals)
        assert tuple(row["recorded_totals"]) == TOTALS[row["file"]]
        assert metrics["unparsed"]["value"] == 0
    assert found == TOTALS
    table = almost_eval(*given).out
    assert "664 : 657.5" in table
    assert "review_bard_vicuna-13b.jsonl: by its own scores, the totals are 664 : 655.5" in table


def test_archived_reviews_and_their_server_agree(almost_eval: Command, archive: Path, data_root: Path) -> None:
    """A whole run on archived answers against a server that replays the reviews gives the archived totals."""
    served = ReplayServer(read_archive(archive.parent))
    try:
        given = [
            "--answers",
            archive / "answer/answer_vicuna-13b.jsonl",
            "--baseline",
            archive / "answer/answer_bard.jsonl",
        ]
        given += ["--data-root", data_root, "--judge", "gpt-4", "--judge-base-url", served.url, "--orders", "forward"]
        code, out, err = almost_eval("vicuna", *given, "--output", "run", "--json")
    finally:
        served.close()
    assert (code, err) == (0, "")
    metrics = json.loads(out)["metrics"]
    totals = {name: metric["value"] for name, metric in metrics.items() if name.startswith("total_score")}
    # Question 70's review says 10 and 4; the file's own score, hence its total, is 2 less.
    assert totals == {"total_score/bard:20230327": 664, "total_score/vicuna-13b:20230322-clean-lang": 657.5}
    assert metrics["win_rate"]["n"] == 80


@pytest.mark.parametrize(
    ("orders", "said"),
    [
        ("both", "both orders"),
        ("forward", "forward order only, the baseline is Assistant 1"),
        ("reverse", "reverse order only, the model is Assistant 1"),
    ],
)
def test_the_table_says_which_orders_ran(
    almost_eval: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orders: str, said: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    given = ["vicuna", "--limit", 4, "--max-new-tokens", 16, "--orders", orders, "--output", tmp_path / "run"]
    assert said in " ".join(almost_eval(*given).out.split())
    assert json.loads((tmp_path / "run" / "results.json").read_text())["orders"] == orders
