"""The gate: what is counted, at which share it closes, what it says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from almost_eval.errors import InputError
from almost_eval.run.validity import ALLOWED, check, parse_allowed
from almost_eval.types import Sample, SampleRecord, Score


def records(n: int, flagged: int, reason: str | None, *, truncated: int = 0, value: float | None = None) -> list[Any]:
    """`n` records, the first `flagged` of them with a reason."""
    made = []
    for i in range(n):
        score = Score(value, reason) if i < flagged else Score(1.0)
        made.append(SampleRecord(Sample(str(i), (), (), 0, str(i)), {}, score, truncated if i < flagged else 0))
    return made


FLAGS: dict[str, dict[str, Any]] = {
    "non_finite": {"reason": "non_finite"},
    "all_tied": {"reason": "all_tied"},
    "truncated": {"reason": "context_too_long"},
    "unparsed": {"reason": "unparsed"},
}


def test_defaults_are_those_of_the_design() -> None:
    assert ALLOWED == {"non_finite": 0.0, "all_tied": 0.01, "truncated": 0.01, "unparsed": 0.01, "missing": 0.01}


@pytest.mark.parametrize("name", FLAGS)
def test_blocks_over_its_share_and_not_at_it(name: str) -> None:
    at = int(ALLOWED[name] * 200)  # 0 or 2 of 200
    assert check(records(200, at, **FLAGS[name]), 200).passed
    over = check(records(200, at + 1, **FLAGS[name]), 200)
    assert over.blocking == [name]
    assert over.counts[name] == at + 1
    assert over.reason is not None
    assert over.reason.startswith(f"{at + 1} of 200 samples ")
    assert over.reason.endswith(f"(allowed {ALLOWED[name]:.1%})")


def test_missing_samples_block() -> None:
    assert check(records(198, 0, None), 200).passed
    found = check(records(197, 0, None), 200)
    assert found.reason == "3 of 200 samples are missing (allowed 1.0%)"


def test_dropped_shots_count_as_truncated() -> None:
    found = check(records(100, 2, None, truncated=17, value=1.0), 100)
    assert found.blocking == ["truncated"]
    assert found.counts == {"non_finite": 0, "all_tied": 0, "truncated": 2, "unparsed": 0, "missing": 0}


@pytest.mark.parametrize(("count", "n"), [(29, 100), (7, 100), (1, 3), (57, 100), (999, 1000)])
def test_exactly_the_share_passes_whatever_the_rounding(count: int, n: int) -> None:
    allowed = {**ALLOWED, "all_tied": count / n}  # 0.29 * 100 is 28.999999999999996
    assert check(records(n, count, "all_tied"), n, allowed).passed
    assert not check(records(n, count + 1, "all_tied"), n, allowed).passed


def test_several_reasons_in_one_line() -> None:
    mixed = records(10, 1, "non_finite") + records(10, 3, "all_tied")
    assert check(mixed, 20).reason == (
        "1 of 20 samples have a score that is not a finite number (allowed 0.0%); "
        "3 of 20 samples have all choices tied (allowed 1.0%)"
    )


def test_harmless_reasons_are_not_flagged() -> None:
    assert check(records(10, 10, "tied", value=0.5), 10).passed


def test_no_samples_is_no_result() -> None:
    assert not check([], 0).passed


def test_as_json() -> None:
    found = check(records(2, 1, "unparsed"), 2).to_dict()
    assert found["passed"] is False
    assert found["checks"]["unparsed"] == {"count": 1, "allowed": 0.01}
    assert list(found["checks"]) == list(ALLOWED)


def test_allow() -> None:
    assert parse_allowed([]) == ALLOWED
    assert parse_allowed(["truncated=0.05", "missing=1"]) == {**ALLOWED, "truncated": 0.05, "missing": 1.0}


@pytest.mark.parametrize(
    "item", ["truncated", "truncated=", "truncated=-0.1", "truncated=1.1", "truncated=nan", "t=0.1"]
)
def test_allow_refuses(item: str) -> None:
    with pytest.raises(InputError, match=f"--allow {item}: "):
        parse_allowed([item])
    with pytest.raises(InputError, match="did you mean 'truncated'"):
        parse_allowed(["truncted=0.1"])


# --- on real runs


def test_a_withheld_headline(almost_eval: Callable[..., Any], tmp_path: Path) -> None:
    """A context of 170 tokens holds some HHH prompts and not others: over 1 %, no headline and exit code 3."""
    given = ["hhh", "--model", "nano/seeded", "--limit", 6, "--max-length", 170, "--output", tmp_path / "run"]
    code, out, err = almost_eval(*given)
    stored = json.loads((tmp_path / "run/results.json").read_text())
    count = stored["validity"]["checks"]["truncated"]["count"]
    assert 0 < count < 24
    assert (code, err) == (3, "")
    reason = f"{count} of 24 samples have a prompt that does not fit as a whole (allowed 1.0%)"
    assert stored["validity"] | {"checks": None} == {"passed": False, "reason": reason, "checks": None}
    headline = stored["metrics"]["accuracy"]
    assert headline == {"value": None, "stderr": None, "ci95": None, "n": 24 - count, "unscored": count} | {
        "withheld": reason
    }
    (row,) = (line for line in out.splitlines() if line.startswith("│ accuracy "))
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "accuracy",
        "withheld",
        "-",
        str(24 - count),
        str(count),
    ]
    assert f"counted: truncated {count}" in out
    assert f"headline withheld: {reason}" in " ".join(out.split())

    # The same lines under another rule; nothing is computed again.
    code, out, _ = almost_eval(*given, "--allow", "truncated=1", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["metrics"]["accuracy"]["value"] is not None
    assert "withheld" not in found["metrics"]["accuracy"]
    assert found["timing"] == stored["timing"]
    assert almost_eval("report", tmp_path / "run").code == 0
    assert almost_eval("verify", tmp_path / "run").code == 0


def test_the_contract_of_results(almost_eval: Callable[..., Any], tmp_path: Path) -> None:
    given = ["--model", "nano/seeded", "--limit", 3, "--output", tmp_path / "run", "--json"]
    found = json.loads(almost_eval("hhh", *given).out)
    assert list(found) == [
        *("task", "protocol", "model", "headline", "metrics", "baselines"),
        *("details", "validity", "engine", "provenance", "timing"),
    ]
    assert (found["task"], found["protocol"], found["model"], found["headline"]) == (
        *("hhh", "choice", "nano/seeded", "accuracy"),
    )
    categories = ["helpful", "harmless", "honest", "other"]
    assert list(found["metrics"]) == ["accuracy", *(f"accuracy/{name}" for name in categories)]
    for metric in [*found["metrics"].values(), *found["baselines"].values()]:
        assert list(metric) == ["value", "stderr", "ci95", "n", "unscored"]
        low, high = metric["ci95"]
        assert 0 <= low <= metric["value"] <= high <= 1
    assert found["metrics"]["accuracy"]["n"] == 12
    assert list(found["baselines"]) == ["longer response", "first response"]
    provenance = found["provenance"]
    assert list(provenance) == [
        *("weight_digest", "data_source", "data_fingerprint", "template", "template_digest", "template_text"),
        *(
            "prompt_set",
            "prompt_ids_digest",
            "samples_digest",
            "dtype",
            "device",
            "seed",
            "versions",
            "command",
            "commit",
        ),
    ]
    for key in ("weight_digest", "data_fingerprint", "template_digest", "prompt_ids_digest", "samples_digest"):
        assert len(bytes.fromhex(provenance[key])) == 32
    assert provenance["prompt_set"]["name"] == "builtin"
    assert (provenance["dtype"], provenance["device"], provenance["seed"]) == ("float32", "cpu", 0)
    assert provenance["command"] == ["almost-eval", "hhh", *map(str, given)]
    assert {"python", "torch", "transformers", "almost-toolkit", "lm_eval"} <= provenance["versions"].keys()
    assert list(found["timing"]) == ["seconds", "seconds_to_first_sample", "samples_computed_now"]
    assert {"path", "tokens_computed", "tokens_in_trie", "computed_over_trie", "warnings"} <= found["engine"].keys()
    assert found["engine"]["computed_over_trie"] <= 1.10

    spec = json.loads((tmp_path / "run/spec.json").read_text())
    assert {
        "task",
        "task_version",
        "protocol",
        "settings",
        "engine",
        "weight_digest",
        "seed",
        "n_samples",
    } <= spec.keys()
    lines = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    for line in lines:
        assert {"id", "score", "reason", "outputs", "prompt_tokens_truncated"} <= line.keys()
        assert [len(row) for row in line["outputs"]["loglikelihoods"]] == [2, 2]  # both orders, A and B
        assert all(value < 0 for row in line["outputs"]["loglikelihoods"] for value in row)
