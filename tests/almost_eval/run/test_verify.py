"""Recomputing a run: what was changed is found and named; what was not passes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from almost_eval.nano.seeded import build_checkpoint

Command = Callable[..., Any]
RUNS = {
    "hhh": "hhh --limit 4",
    "likelihood": "hhh --limit 4 --protocol likelihood --normalise",
    "reward": "hhh --limit 4 --protocol reward",
    "truthfulqa": "truthfulqa --limit 6 --metrics mc1,mc2,mc1_true_prompt",
    "mmlu": "mmlu --limit 3 --shots 2",
    "template": "mmlu --limit 2 --shots 1 --template vicuna",
    "no template": "hhh --limit 2 --template none",
    "reward template": "hhh --limit 2 --protocol reward --template alpaca",
}


def model_of(name: str) -> str:
    """Random weights: any mix-up shows, and no trained model's change reaches these tests."""
    return "nano/seeded-reward" if name.startswith("reward") else "nano/seeded"


@pytest.fixture
def made(almost_eval: Command, tmp_path: Path) -> Callable[[str], Path]:
    """`made("hhh")`: a finished run, shared by the module and copied for each test."""

    def make(name: str) -> Path:
        if name not in _MADE:
            kept = tmp_path.parent / f"verify-{name}"
            given = [*RUNS[name].split(), "--model", model_of(name), "--output", kept, "--allow", "all_tied=1"]
            assert almost_eval(*given).code == 0
            _MADE[name] = kept
        return Path(shutil.copytree(_MADE[name], tmp_path / name))

    return make


_MADE: dict[str, Path] = {}


def edit(file: Path, change: Callable[[Any], None], line: int | None = None) -> None:
    """Change a JSON file, or one line of a JSONL file."""
    if line is None:
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        return
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    change(lines[line])
    file.write_text("".join(json.dumps(row) + "\n" for row in lines))


@pytest.mark.parametrize("name", RUNS)
def test_a_fresh_run_passes(name: str, made: Callable[[str], Path], almost_eval: Command) -> None:
    folder = made(name)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    code, out, err = almost_eval("verify", folder)
    assert (code, err) == (0, "")
    assert out.endswith("\nverified\n")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_needs_no_data(
    made: Callable[[str], Path], almost_eval: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = made("hhh")
    edit(folder / "spec.json", lambda spec: spec["data"].update(source="hub"))
    edit(folder / "results.json", lambda results: results["provenance"].update(data_source="hub"))
    monkeypatch.delenv("ALMOST_DATA_ROOT", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert almost_eval("verify", folder).code == 0


def set_score(line: Any) -> None:
    line["score"] = 1.0 - line["score"] if line["score"] != 0.5 else 1.0


def set_line_metric(line: Any) -> None:
    line["metrics"]["accuracy"] = 0.25


def set_flip(line: Any) -> None:
    """Turn the answers round: A and B in both orders."""
    line["outputs"]["loglikelihoods"] = [row[::-1] for row in line["outputs"]["loglikelihoods"]]


def set_slightly(line: Any) -> None:
    line["outputs"]["loglikelihoods"][0][0] += 1e-9


def set_gone(line: Any) -> None:
    del line["outputs"]["loglikelihoods"]


def set_gold(line: Any) -> None:
    line["sample"]["gold"] = 1 - line["sample"]["gold"]


def set_cluster(line: Any) -> None:
    line["sample"]["cluster"] = "another"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (set_score, r"sample \S+: score: \S+, recomputed"),
        (set_line_metric, r"sample \S+: metrics.accuracy: 0.25, recomputed"),
        (set_flip, r"sample \S+: score: \S+, recomputed"),
        (set_slightly, r"provenance.samples_digest: \S+, recomputed"),
        (set_gone, r"sample \S+: its outputs cannot be scored \(KeyError\('loglikelihoods'\)\)"),
        (set_gold, r"sample \S+: score: \S+, recomputed"),
        (set_cluster, r"provenance.samples_digest: \S+, recomputed"),
    ],
)
def test_a_changed_line_is_named(
    change: Callable[[Any], None], named: str, made: Callable[[str], Path], almost_eval: Command
) -> None:
    folder = made("hhh")
    edit(folder / "samples.jsonl", change, line=5)
    code, out, err = almost_eval("verify", folder)
    assert (code, err) == (1, "")
    assert re.search(f"differs: {named}", out)
    assert re.search(r"\nnot verified: \d+ differences\n$", out)


@pytest.mark.parametrize(
    ("file", "keys", "value", "named"),
    [
        ("results.json", ["metrics", "accuracy", "value"], 0.99, "metrics.accuracy.value: 0.99, recomputed"),
        ("results.json", ["metrics", "accuracy", "ci95"], [0.9, 1.0], "metrics.accuracy.ci95: 0.9, recomputed"),
        ("results.json", ["metrics", "accuracy", "n"], 99, "metrics.accuracy.n: 99, recomputed 16"),
        ("results.json", ["baselines", "longer response", "value"], 0.0, "baselines.longer response.value: 0.0, rec"),
        ("results.json", ["details", "tied"], 7, "details.tied: 7, recomputed 0"),
        (
            "results.json",
            ["validity", "checks", "missing", "count"],
            3,
            "validity.checks.missing.count: 3, recomputed 0",
        ),
        ("results.json", ["provenance", "weight_digest"], "0", "provenance.weight_digest: 0, recomputed"),
        ("results.json", ["model"], "gpt-7", "model: gpt-7, recomputed nano/seeded"),
        ("results.json", ["metrics", "fame"], {"n": 3, "value": 1.0}, "metrics.fame: {'n': 3, 'value': 1.0}, rec"),
        ("spec.json", ["n_samples"], 17, "validity.checks.missing.count: 0, recomputed 1"),
        ("spec.json", ["seed"], 5, "provenance.seed: 0, recomputed 5"),
    ],
)
def test_a_changed_result_is_named(
    file: str, keys: list[str], value: Any, named: str, made: Callable[[str], Path], almost_eval: Command
) -> None:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    folder = made("hhh")
    edit(folder / file, change)
    code, out, _ = almost_eval("verify", folder)
    assert code == 1
    assert f"differs: {named}" in out


def test_a_missing_line_is_found(made: Callable[[str], Path], almost_eval: Command) -> None:
    folder = made("hhh")
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join(lines[:-1]))
    code, out, _ = almost_eval("verify", folder)
    assert code == 1
    assert "differs: validity.checks.missing.count: 0, recomputed 1" in out


def test_an_invented_score_of_what_did_not_fit_is_named(almost_eval: Command, tmp_path: Path) -> None:
    given = ["--limit", 2, "--max-length", 140, "--model", "nano/seeded", "--output", tmp_path / "run"]
    almost_eval("hhh", *given)
    lines = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    (at, *_) = (i for i, line in enumerate(lines) if line["reason"] == "context_too_long")
    edit(tmp_path / "run/samples.jsonl", lambda line: line.update(score=1.0, reason=None), line=at)
    code, out, _ = almost_eval("verify", tmp_path / "run")
    assert code == 1
    assert f"sample {lines[at]['id']}: score: 1.0, recomputed None" in out


def test_an_unfinished_run_is_refused(made: Callable[[str], Path], almost_eval: Command) -> None:
    folder = made("hhh")
    (folder / "results.json").unlink()
    code, out, err = almost_eval("verify", folder)
    assert (code, out) == (2, "")
    assert err == f"error: {folder} is not finished; run its command again, and it goes on\n"


# --- with the model


@pytest.mark.parametrize("name", RUNS)
def test_the_same_model_says_the_same(name: str, made: Callable[[str], Path], almost_eval: Command) -> None:
    """Batched in another way, on the plain path where there is one."""
    folder = made(name)
    other = ["--batch-size", 3, "--no-share-prefixes", "--samples", 5, "--seed", 3]
    code, out, err = almost_eval("verify", folder, "--model", model_of(name), *other)
    assert (code, err) == (0, "")
    assert "5 samples scored again, largest difference" in out
    assert out.endswith("\nverified\n")


def test_another_model_is_found_out(made: Callable[[str], Path], almost_eval: Command, tmp_path: Path) -> None:
    folder, other = made("hhh"), build_checkpoint(tmp_path / "other", seed=1)
    code, out, err = almost_eval("verify", folder, "--model", other, "--samples", 4)
    assert (code, err) == (1, "")
    assert "differs: weight_digest is not the run's: " in out
    assert out.count(" when scored again\n") == 4
    assert "not verified: 5 differences" in out


def test_changed_loglikelihoods_are_found_out(made: Callable[[str], Path], almost_eval: Command) -> None:
    folder = made("hhh")

    def shift(line: Any) -> None:
        line["outputs"]["loglikelihoods"] = [[v - 0.001 for v in row] for row in line["outputs"]["loglikelihoods"]]

    edit(folder / "samples.jsonl", shift, line=2)
    changed = json.loads((folder / "samples.jsonl").read_text().splitlines()[2])["id"]
    code, out, _ = almost_eval("verify", folder, "--model", "nano/seeded", "--samples", 99)
    assert code == 1
    assert f"differs: sample {changed}: off by 0.001 when scored again" in out
    assert out.count("when scored again") == 1
    assert "16 samples scored again" in out


def test_a_run_in_half_precision_is_rescored_in_it(almost_eval: Command, tmp_path: Path) -> None:
    given = ["hhh", "--limit", 2, "--dtype", "bfloat16", "--output", tmp_path / "run", "--allow", "all_tied=1"]
    assert almost_eval(*given, "--model", "nano/seeded").code == 0
    code, out, _ = almost_eval("verify", tmp_path / "run", "--model", "nano/seeded", "--batch-size", 1)
    assert code == 0, out


# --- two runs


def test_compare_two_checkpoints(made: Callable[[str], Path], almost_eval: Command, tmp_path: Path) -> None:
    a, b = made("hhh"), tmp_path / "b"
    model = build_checkpoint(tmp_path / "other", seed=1)
    almost_eval("hhh", "--limit", 4, "--model", model, "--data", "nano", "--output", b, "--allow", "all_tied=1")
    code, out, err = almost_eval("compare", a, b, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    values = [json.loads((f / "results.json").read_text())["metrics"]["accuracy"]["value"] for f in (a, b)]
    metric = found["metrics"]["accuracy"]
    assert (metric["n"], metric["mean_a"], metric["mean_b"]) == (16, *values)
    assert metric["difference"] == pytest.approx(values[1] - values[0])
    assert found["warnings"] == []
    code, out, err = almost_eval("compare", a, b)
    assert (code, err) == (0, "")
    assert metric["verdict"] in out
    assert json.loads(almost_eval("compare", a, a, "--json").out)["metrics"]["accuracy"]["difference"] == 0
    assert "not distinguishable at 95 %" in almost_eval("compare", a, a).out
