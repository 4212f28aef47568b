import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from almost_eval.compare.comparison import Comparison, Flip, compare_runs, render
from almost_eval.errors import DataError, InputError


def line(id: str, score: float | None, *, cluster: str = "", gold: int = 0, **extra: Any) -> dict[str, Any]:
    sample = {"gold": gold, "cluster": cluster or id, "group": "", "metadata": {}}
    return {"id": id, "score": score, "reason": None, "outputs": {}, "sample": sample, **extra}


def write_run(
    folder: Path,
    lines: list[dict[str, Any]],
    *,
    task: str = "hhh",
    protocol: str = "loglikelihood",
    provenance: dict[str, Any] | None = None,
    spec: dict[str, Any] | None = None,
) -> Path:
    folder.mkdir()
    (folder / "spec.json").write_text(json.dumps({"task": task, "protocol": protocol, **(spec or {})}))
    results = {"task": task, "protocol": protocol, "model": "m", "metrics": {}, "provenance": provenance or {}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def write_scores(folder: Path, scores: Sequence[float | None], **kwargs: Any) -> Path:
    return write_run(folder, [line(f"s{i:03}", score) for i, score in enumerate(scores)], **kwargs)


def shown(comparison: Comparison) -> str:
    console = Console(file=io.StringIO(), width=200)
    render(comparison, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- what is compared


def test_right_or_wrong_is_judged_by_mcnemar(tmp_path: Path) -> None:
    # 20 samples: 10 right in both, 1 only in A, 8 only in B, 1 in neither.
    a = write_scores(tmp_path / "a", [1.0] * 10 + [1.0] + [0.0] * 8 + [0.0])
    b = write_scores(tmp_path / "b", [1.0] * 10 + [0.0] + [1.0] * 8 + [0.0])
    comparison = compare_runs(a, b)
    (metric,) = comparison.metrics
    assert (metric.name, metric.n, metric.n_clusters, metric.unscored) == ("score", 20, 20, 0)
    assert (metric.mean_a, metric.mean_b) == pytest.approx((0.55, 0.90))
    assert metric.difference == pytest.approx(0.35)
    assert metric.mcnemar
    assert (metric.mcnemar.only_a_right, metric.mcnemar.only_b_right) == (1, 8)
    assert metric.p_value == metric.mcnemar.p_value == pytest.approx(20 / 512)  # see test_stats
    assert metric.verdict.startswith("B is better by 35.0 points (95 % interval ")
    assert [flip.id for flip in comparison.flipped] == [f"s{i:03}" for i in range(10, 19)]
    assert comparison.flipped[0] == Flip("s010", a=1.0, b=0.0)


def test_swapping_the_runs_swaps_the_answer(tmp_path: Path) -> None:
    a = write_scores(tmp_path / "a", [0.0] * 8 + [1.0] * 2)
    b = write_scores(tmp_path / "b", [1.0] * 10)
    (forth,), (back,) = compare_runs(a, b).metrics, compare_runs(b, a).metrics
    assert forth.ci95
    assert back.ci95 == pytest.approx((-forth.ci95[1], -forth.ci95[0]))
    assert forth.verdict.replace("B is", "A is") == back.verdict


def test_shared_clusters_are_judged_by_the_bootstrap(tmp_path: Path) -> None:
    # 8 wins of B look like p = 2/256, but they are one context asked eight times, and another that did not change.
    lines_a = [line(f"x{i}", 0.0, cluster="x") for i in range(8)] + [line(f"y{i}", 1.0, cluster="y") for i in range(8)]
    lines_b = [line(f"x{i}", 1.0, cluster="x") for i in range(8)] + [line(f"y{i}", 1.0, cluster="y") for i in range(8)]
    (metric,) = compare_runs(write_run(tmp_path / "a", lines_a), write_run(tmp_path / "b", lines_b)).metrics
    assert metric.mcnemar
    assert metric.mcnemar.p_value == pytest.approx(2 / 256)
    assert metric.n_clusters == 2
    assert metric.p_value == metric.p_bootstrap == pytest.approx(0.5, abs=0.03)
    assert metric.verdict == "not distinguishable at 95 %"


def test_one_cluster_cannot_be_judged(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [line("1", 0.2, cluster="x"), line("2", 0.4, cluster="x")])
    b = write_run(tmp_path / "b", [line("1", 0.9, cluster="x"), line("2", 0.8, cluster="x")])
    (metric,) = compare_runs(a, b).metrics
    assert (metric.ci95, metric.p_value) == (None, None)
    assert metric.verdict.startswith("cannot be judged")


def test_a_scale_beyond_one_is_not_told_in_points(tmp_path: Path) -> None:
    a = write_scores(tmp_path / "a", [5.0, 6.0, 7.0, 8.0, 6.0])
    b = write_scores(tmp_path / "b", [7.0, 8.0, 9.0, 10.0, 8.0])
    (metric,) = compare_runs(a, b).metrics
    assert metric.mcnemar is None
    assert metric.verdict == "B is better by 2.000 (95 % interval 2.000 to 2.000)"


def test_left_out_samples_are_counted(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [line("1", 1.0), line("2", None), line("3", 0.0), line("only-a", 1.0)])
    b = write_run(tmp_path / "b", [line("3", 1.0), line("2", 1.0), line("1", None), line("b1", 1.0), line("b2", 0.0)])
    comparison = compare_runs(a, b)
    assert (comparison.shared, comparison.only_in_a, comparison.only_in_b, comparison.unscored) == (3, 1, 2, 2)
    (metric,) = comparison.metrics
    assert (metric.n, metric.unscored, metric.mean_a, metric.mean_b) == (1, 2, 0.0, 1.0)


def test_metrics_both_runs_name(tmp_path: Path) -> None:
    def rows(mc1: float, mc2: float, other: str) -> list[dict[str, Any]]:
        scored = [line(f"s{i}", mc1, metrics={"mc1": mc1, "mc2": mc2, other: 1.0}) for i in range(6)]
        return [*scored, line("failed", None, metrics={})]  # unscored under every name, and no metric "score"

    comparison = compare_runs(
        write_run(tmp_path / "a", rows(0.0, 0.25, "old")), write_run(tmp_path / "b", rows(1.0, 0.75, "new"))
    )
    assert [(m.name, m.n, m.unscored) for m in comparison.metrics] == [("mc1", 6, 1), ("mc2", 6, 1)]
    mc1, mc2 = comparison.metrics
    assert mc1.mcnemar
    assert mc2.mcnemar is None
    assert mc2.verdict == "B is better by 50.0 points (95 % interval 50.0 to 50.0)"


@pytest.mark.parametrize(("listed", "in_both"), [(["mc2", "mc1"], ["mc1", "mc2"]), (["mc2"], ["mc2"])])
def test_the_order_in_which_metrics_are_listed_says_nothing(
    tmp_path: Path, listed: list[str], in_both: list[str]
) -> None:
    """A sample's score is the first metric that its run lists: what flipped must be told by one metric of both."""
    both, values = ["mc1", "mc2"], {"mc1": 1.0, "mc2": 0.25}

    def run(name: str, metrics: list[str]) -> Path:
        rows = [line("s", values[metrics[0]], metrics={metric: values[metric] for metric in metrics})]
        spec = {"settings": {"metrics": metrics}}
        return write_run(tmp_path / name, rows, task="truthfulqa", protocol="+".join(metrics), spec=spec)

    comparison = compare_runs(run("a", both), run("b", listed))
    assert [metric.name for metric in comparison.metrics] == in_both
    assert [metric.difference for metric in comparison.metrics] == [0.0] * len(in_both)
    assert comparison.flipped == ()
    assert comparison.protocol == "+".join(in_both)
    assert len(comparison.warnings) == (listed == ["mc2"])  # that one has fewer metrics; the order is no difference


def test_a_metric_of_another_category_is_not_unscored(tmp_path: Path) -> None:
    rows = [line("1", 1.0, metrics={"accuracy/honest": 1.0}), line("2", 1.0, metrics={"accuracy/other": 1.0})]
    comparison = compare_runs(write_run(tmp_path / "a", rows), write_run(tmp_path / "b", rows))
    assert [(m.name, m.n, m.unscored) for m in comparison.metrics] == [
        ("accuracy/honest", 1, 0),
        ("accuracy/other", 1, 0),
    ]


def test_flipped_crosses_one_half(tmp_path: Path) -> None:
    a = write_scores(tmp_path / "a", [0.4, 0.6, 0.5, 0.9])
    b = write_scores(tmp_path / "b", [0.6, 0.7, 0.4, 0.5])  # crosses; stays right; stays wrong; crosses (0.5 is no win)
    assert [flip.id for flip in compare_runs(a, b).flipped] == ["s000", "s003"]


def test_same_seed_same_answer_whatever_the_order_of_the_lines(tmp_path: Path) -> None:
    lines_a = [line(f"s{i}", i % 5 / 4) for i in range(20)]
    lines_b = [line(f"s{i}", i % 3 / 2) for i in range(20)]
    a, b = write_run(tmp_path / "a", lines_a), write_run(tmp_path / "b", lines_b)
    resumed = write_run(tmp_path / "resumed", lines_a[::-1])
    first = compare_runs(a, b, seed=3, n_resamples=500)
    assert compare_runs(a, b, seed=3, n_resamples=500) == first
    assert compare_runs(resumed, b, seed=3, n_resamples=500).metrics == first.metrics
    assert compare_runs(a, b, seed=4, n_resamples=500).metrics != first.metrics


# --- what is refused, what is warned of


def test_refuses_a_folder_that_is_no_run(tmp_path: Path) -> None:
    a = write_scores(tmp_path / "a", [1.0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty is no run folder: expected samples\.jsonl"):
        compare_runs(a, tmp_path / "empty")


@pytest.mark.parametrize(("key", "other"), [("task", "mmlu"), ("protocol", "judge")])
def test_refuses_another_task_or_protocol(tmp_path: Path, key: str, other: str) -> None:
    a = write_scores(tmp_path / "a", [1.0])
    b = write_scores(tmp_path / "b", [1.0], **{key: other})
    with pytest.raises(InputError, match=f"differ in {key}: .* '{other}'"):
        compare_runs(a, b)


def test_a_run_without_a_spec_is_told(tmp_path: Path) -> None:
    a, b = write_scores(tmp_path / "a", [1.0]), write_scores(tmp_path / "b", [1.0])
    (b / "spec.json").write_text("{}")
    assert compare_runs(a, b).warnings == (f"{b}/spec.json is not there or empty: nothing says how it was run",)


def test_refuses_runs_without_a_shared_sample(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", [line("1", 1.0)]), write_run(tmp_path / "b", [line("2", 1.0)])
    with pytest.raises(InputError, match="share no sample id"):
        compare_runs(a, b)


def test_a_half_written_last_line_is_ignored(tmp_path: Path) -> None:
    a, b = write_scores(tmp_path / "a", [1.0, 0.0]), write_scores(tmp_path / "b", [1.0, 0.0])
    with (b / "samples.jsonl").open("ab") as file:
        file.write('{"id": "s002", "reason": "é'.encode()[:-1])  # cut inside a character
    assert compare_runs(a, b).shared == 2


@pytest.mark.parametrize(
    "bad",
    [
        '{"id": "half',
        "",
        "[1, 2]",
        '{"id": 7, "score": 1.0}',
        '{"id": "x"}',
        '{"id": "x", "score": "1"}',
        '{"id": "x", "score": NaN}',
        '{"id": "x", "score": 1.0, "metrics": {"m": Infinity}}',
        '{"id": "s000", "score": 1.0}',  # a second time
    ],
)
def test_any_other_malformed_line_is_named(tmp_path: Path, bad: str) -> None:
    a, b = write_scores(tmp_path / "a", [1.0]), write_scores(tmp_path / "b", [1.0])
    with (b / "samples.jsonl").open("a") as file:
        file.write(bad + "\n")
    with pytest.raises(DataError, match=r"samples\.jsonl line 2"):
        compare_runs(a, b)


def test_warns_where_data_prompts_or_templates_differ(tmp_path: Path) -> None:
    a = write_scores(
        tmp_path / "a", [1.0], provenance={"data_fingerprint": "f1", "template_digest": "t"}, spec={"prompt_set": "o"}
    )
    b = write_scores(tmp_path / "b", [1.0], provenance={"data_fingerprint": "f2"}, spec={"prompt_set": "builtin"})
    assert compare_runs(a, b).warnings == (
        "the data differ (data_fingerprint): f1 in A, f2 in B",
        "the prompt sets differ (prompt_set): o in A, builtin in B",
    )


def test_warns_where_samples_or_runs_do_not_match(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [line("1", 1.0, gold=0, cluster="x")])
    b = write_run(tmp_path / "b", [line("1", 1.0, gold=1, cluster="y")])
    (b / "results.json").unlink()
    unfinished, gold, cluster = compare_runs(a, b).warnings
    assert "b has no results.json" in unfinished
    assert gold.startswith("1 shared samples have another right answer")
    assert cluster.startswith("1 shared samples are in another cluster")


SPEC = {
    "task_version": 1,
    "requires": "loglikelihood",
    "model_name": "a",
    "weight_digest": "0" * 64,
    "settings": {"normalise": False, "limit": 25, "shots": 5, "versions": {"t": "1.0"}},
    "engine": {"name": "hf", "dtype": "float32"},
    "template": {"name": "tokenizer", "digest": "1" * 64, "text": "{{ x }}"},
    "prompt_set": {"name": "official", "digest": "2" * 64},
    "prompt_ids_digest": "3" * 64,
    "data": {"source": "hub", "fingerprint": "4" * 64},
    "seed": 0,
    "versions": {"torch": "2.13.0"},
    "commit": "aaa",
    "command": ["almost-eval", "--output", "a"],
}


def changed(key: str, value: Any) -> dict[str, Any]:
    spec = json.loads(json.dumps(SPEC))
    *path, last = key.split(".")
    part = spec
    for name in path:
        part = part[name]
    part[last] = value
    return dict(spec)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("settings.limit", None, "settings.limit: 25 in A, not set in B"),
        ("settings.shots", 0, "settings.shots: 5 in A, 0 in B"),
        ("settings.fewshot_as_multiturn", True, "settings.fewshot_as_multiturn: not set in A, true in B"),
        ("engine.name", "vllm", "engine.name: hf in A, vllm in B"),
        ("engine.dtype", "bfloat16", "engine.dtype: float32 in A, bfloat16 in B"),
        ("template.name", "vicuna", "template.name: tokenizer in A, vicuna in B"),
        ("template.digest", "5" * 64, "template.digest: 111111111111 in A, 555555555555 in B"),
        (
            "prompt_set.name",
            "builtin",
            "the prompt sets differ (prompt_set): official (222222222222) in A, builtin (222222222222) in B",
        ),
        ("prompt_ids_digest", "5" * 64, "prompt_ids_digest: 333333333333 in A, 555555555555 in B"),
        ("data.fingerprint", "5" * 64, "data.fingerprint: 444444444444 in A, 555555555555 in B"),
        ("data.source", "nano", "data.source: hub in A, nano in B"),
        ("seed", 1, "seed: 0 in A, 1 in B"),
        ("versions.torch", "2.14.0", "versions.torch: 2.13.0 in A, 2.14.0 in B"),
        ("commit", "bbb", "commit: aaa in A, bbb in B"),
    ],
)
def test_every_setting_that_differs_is_named(tmp_path: Path, key: str, value: Any, told: str) -> None:
    a, b = write_scores(tmp_path / "a", [1.0], spec=SPEC), write_scores(tmp_path / "b", [1.0], spec=changed(key, value))
    assert compare_runs(a, b).warnings == (told,)
    assert told in shown(compare_runs(a, b))


def test_no_template_against_one(tmp_path: Path) -> None:
    a, b = (
        write_scores(tmp_path / "a", [1.0], spec=SPEC),
        write_scores(tmp_path / "b", [1.0], spec=SPEC | {"template": None}),
    )
    assert "template.name: tokenizer in A, not set in B" in compare_runs(a, b).warnings


def test_two_models_are_no_difference_of_settings(tmp_path: Path) -> None:
    other = SPEC | {"model_name": "b", "weight_digest": "9" * 64, "architecture": "X", "command": ["almost-eval"]}
    a, b = write_scores(tmp_path / "a", [1.0], spec=SPEC), write_scores(tmp_path / "b", [1.0], spec=other)
    assert compare_runs(a, b).warnings == ()


def test_an_adapter_against_whole_weights_is_no_difference_but_for_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    files = {"config.json": "1" * 64, "tokenizer.json": "2" * 64}
    whole: dict[str, Any] = SPEC | {"model_files": files}
    engine = whole["engine"] | {"adapter": {"base": "b", "base_digest": "3" * 64, "adapter_digest": "4" * 64}}

    def adapter(tokenizer: str) -> dict[str, Any]:
        own = {"adapter/adapter_config.json": "5" * 64, "adapter/tokenizer.json": tokenizer}
        return whole | {"engine": engine, "model_files": files | own}

    a = write_scores(tmp_path / "a", [1.0], spec=whole)
    same = write_scores(tmp_path / "same", [1.0], spec=adapter("2" * 64))
    other = write_scores(tmp_path / "other", [1.0], spec=adapter("6" * 64))
    assert compare_runs(a, same).warnings == compare_runs(same, a).warnings == ()
    assert compare_runs(a, other).warnings == ("model_files.tokenizer.json: 222222222222 in A, 666666666666 in B",)


@pytest.mark.parametrize(
    ("key", "value"),
    [("settings.normalise", True), ("task_version", 2), ("settings.versions.t", "2.0"), ("requires", "generation")],
)
def test_refuses_another_metric(tmp_path: Path, key: str, value: Any) -> None:
    a, b = write_scores(tmp_path / "a", [1.0], spec=SPEC), write_scores(tmp_path / "b", [1.0], spec=changed(key, value))
    with pytest.raises(InputError, match=f"differ in {key}: .* in A, .* in B .* their metric is not the same") as error:
        compare_runs(a, b)
    assert error.value.exit_code == 2


# --- how it is told


def test_to_dict_is_json(tmp_path: Path) -> None:
    a, b = write_scores(tmp_path / "a", [0.0, 1.0, 1.0]), write_scores(tmp_path / "b", [1.0, 1.0, 1.0])
    told = compare_runs(a, b).to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["metrics"]["score"]["mcnemar"] == {"only_a_right": 0, "only_b_right": 1, "p_value": 1.0}
    assert told["flipped"] == [{"id": "s000", "a": 0.0, "b": 1.0}]


def test_render_shows_counts_verdicts_and_at_most_twenty_flips(tmp_path: Path) -> None:
    lines_a, lines_b = [line(f"[b]{i:02}", 0.0) for i in range(25)], [line(f"[b]{i:02}", 1.0) for i in range(25)]
    a = write_run(tmp_path / "a", [*lines_a, line("extra", 1.0)], provenance={"data_fingerprint": "f1"})
    b = write_run(tmp_path / "b", lines_b, provenance={"data_fingerprint": "f2"})
    text = shown(compare_runs(a, b))
    assert "warning: the data differ" in text
    assert "25 samples in both; left out: 1 only in A, 0 only in B, 0 unscored in either" in text
    assert "score: B is better by 100.0 points (95 % interval 100.0 to 100.0)" in text
    assert "[b]19" in text  # an id is text, not markup
    assert "[b]20" not in text
    assert "and 5 more" in text


def test_render_of_nothing_scored(tmp_path: Path) -> None:
    a, b = write_scores(tmp_path / "a", [None]), write_scores(tmp_path / "b", [1.0])
    assert "no sample is scored in both runs" in shown(compare_runs(a, b))
