"""The alignment tax: its rule worked by hand, its figures on the nano family, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import torch
from changed import change_config

from almost_eval.cli.command_line import run_command_line
from almost_eval.cli.tax import tax
from almost_eval.compare.comparison import compare_runs
from almost_eval.compare.tax.measure import _named
from almost_eval.compare.tax.tasks import nano_prompts, read_prompts
from almost_eval.compare.tax.tax import (
    Finding,
    MeasuredPolicy,
    Paired,
    Tax,
    adjusted,
    findings,
    judge,
    kl_source,
    paired,
    sentence,
)
from almost_eval.compare.tax.training import read_training
from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.errors import DataError, InputError
from almost_eval.files import digest_path
from almost_eval.nano import shipped
from almost_eval.report.tax_page import draw, html
from almost_eval.run import prompts as run_prompts
from almost_eval.run.store import read_samples

pytestmark = pytest.mark.usefixtures("one_thread")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["almost-eval", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run_command_line(tax, "almost-eval tax")
        return Outcome(int(exit.value.code or 0), *capsys.readouterr())

    return run


# --- the rule, by hand ---


def series(folder: Path, name: str, values: Sequence[float]) -> Path:
    """A run folder with one value for each of some samples."""
    run = folder / name
    run.mkdir()
    lines = [{"id": f"s{i}", "score": value, "metrics": {"m": value}} for i, value in enumerate(values)]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (run / "spec.json").write_text(json.dumps({"task": "t", "protocol": "p"}), encoding="utf-8")
    return run


def pair(folder: Path, measure: str, before: Sequence[float], after: Sequence[float]) -> Paired:
    a, b = series(folder, f"{measure}-a", before), series(folder, f"{measure}-b", after)
    (metric,) = compare_runs(a, b).metrics
    return paired(measure, "after", "before", metric)


@pytest.mark.parametrize(
    ("rewards", "worth", "kind"),
    [
        # The reward of all 8 prompts rises by 1: every resample has the mean 1, and the interval is 1 to 1.
        # Preference falls by 1 on 4 of 8, so a draw is a fall with probability 1/2. A resample of 8 draws has at most
        # one fall with probability (1 + 8) / 256 = 3.5 %, and none with 1 / 256 = 0.4 %. So 97.5 % of the resamples
        # are at or below -1/8: the interval ends below zero.
        (([0] * 8, [1] * 8), ([1] * 8, [0] * 4 + [1] * 4), "over-optimised"),
        # The same on 4 prompts, 2 of which fall: no fall at all with probability 1/16 = 6.3 %, more than 2.5 %, so the
        # interval ends at zero. Half as many prompts show the same fall, and yet nothing is shown.
        (([0] * 4, [1] * 4), ([1] * 4, [0] * 2 + [1] * 2), "not shown to follow"),
        (([0] * 8, [1] * 8), ([0] * 8, [0] * 4 + [1] * 4), "both rise"),
        (([0] * 4, [1] * 2 + [0] * 2), ([1] * 8, [0] * 4 + [1] * 4), "reward does not rise"),
        (([1] * 8, [0] * 8), ([1] * 8, [0] * 8), "reward does not rise"),
    ],
)
def test_the_rule(
    rewards: tuple[list[float], list[float]], worth: tuple[list[float], list[float]], kind: str, tmp_path: Path
) -> None:
    reward, preference = pair(tmp_path, "reward", *rewards), pair(tmp_path, "hhh", *worth)
    assert judge(reward, preference) == kind
    (found,) = findings([reward, preference], ["before", "after"])
    assert found.kind == kind


def test_what_has_no_interval_is_not_judged(tmp_path: Path) -> None:
    reward = pair(tmp_path, "reward", [0] * 8, [1] * 8)
    assert judge(reward, None) == "unknown"
    withheld = Paired("hhh", "after", "before", 0, 0, None, None, None, note="the headline is withheld")
    assert judge(reward, withheld) == "unknown"
    found = findings([reward, withheld], ["before", "after"])
    assert sentence(found, ["before", "after"]).startswith("Over-optimisation cannot be judged: from before to after")


def step(measure: str, checkpoint: str, against: str, low: float, high: float) -> Paired:
    return Paired(measure, checkpoint, against, 50, 0, (low + high) / 2, (low, high), 0.01)


def test_a_fall_from_the_best_checkpoint_is_found_though_it_is_still_above_the_first() -> None:
    # Preference: 0.50, 0.70, 0.60. Against the first both later ones are better; from the second to the third it falls.
    comparisons = [
        step("reward", "b", "a", 0.5, 1.5),
        step("oracle", "b", "a", 0.15, 0.25),
        step("reward", "c", "a", 2.0, 3.0),
        step("oracle", "c", "a", 0.05, 0.15),
        step("reward", "c", "b", 1.0, 2.0),
        step("oracle", "c", "b", -0.15, -0.05),
    ]
    found = findings(comparisons, ["a", "b", "c"])
    assert [(f.checkpoint, f.against, f.kind) for f in found] == [
        ("b", "a", "both rise"),
        ("c", "a", "both rise"),
        ("c", "b", "over-optimised"),
    ]
    assert sentence(found, ["a", "b", "c"]) == (
        "Over-optimised: from b to c mean reward rises (+1.50, 95 % +1.00 to +2.00, n 50) while the oracle's score of "
        "the answers falls (-10.0 points, 95 % -15.0 to -5.0, n 50)."
    )


def test_the_oracle_speaks_before_hhh() -> None:
    comparisons = [
        step("reward", "b", "a", 0.5, 1.5),
        step("hhh", "b", "a", -0.2, -0.1),
        step("oracle", "b", "a", 0.1, 0.2),
    ]
    found = findings(comparisons, ["a", "b"])
    assert {f.preference: f.kind for f in found} == {"oracle": "both rise", "hhh": "over-optimised"}
    assert sentence(found, ["a", "b"]).startswith("No sign of over-optimisation")
    without = [f for f in found if f.preference == "hhh"]
    assert sentence(without, ["a", "b"]).startswith("Over-optimised: from a to b mean reward rises")
    assert sentence([], ["a", "b"]).startswith("Over-optimisation was not looked for")


def test_holm_is_over_the_benchmarks_alone() -> None:
    # p 0.01 and 0.04 of two benchmarks: 2 x 0.01 and 1 x 0.04. The reward is no benchmark, nor is (c, b) the family's.
    rows = [("hhh", "b", "a", 0.01), ("mmlu", "b", "a", 0.04), ("reward", "b", "a", 0.001), ("hhh", "c", "b", 0.02)]
    made = [Paired(measure, at, against, 9, 0, 0.1, (0.0, 0.2), p) for measure, at, against, p in rows]
    assert [p.p_holm for p in adjusted(made, "a")] == [pytest.approx(0.02), pytest.approx(0.04), None, None]
    assert [p.mark for p in adjusted(made, "a")] == ["better", "better", "unknown", "unknown"]


# --- names, steps, prompts ---


def test_steps_are_the_numbers_in_the_names_or_else_places() -> None:
    models, steps, _ = _named(["nano/sft", "runs/x/checkpoint-200", "runs/x/checkpoint-1000"])
    assert (list(models), steps) == (["nano/sft", "checkpoint-200", "checkpoint-1000"], [0, 200, 1000])
    models, steps, said = _named(["runs/sft/model", "runs/rlsf/policy", "other/rlsf/policy"])
    assert (list(models), steps) == (["sft/model", "rlsf/policy", "rlsf/policy-2"], [0, 1, 2])
    assert said == "places in the order given"


def test_nano_prompts_are_of_the_pool_that_training_does_not_see() -> None:
    from almost_eval.nano.world import World

    world, prompts = World(), nano_prompts(50, 0)
    assert len({prompt.text for prompt in prompts}) == 50
    queries = [world.parse(prompt.text) for prompt in prompts]
    assert all(query is not None and world.pool(query) == "eval" for query in queries)
    assert nano_prompts(50, 0) == prompts
    assert nano_prompts(50, 1) != prompts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompts"),
        ('{"id": "a"}\n', "row 1"),
        ('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n', "row 2: the id 'a' is there twice"),
        ("[]\n", "row 1"),
    ],
)
def test_malformed_prompts_are_refused_with_their_row(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / "prompts.jsonl")


# --- the nano family ---

FAMILY = ("--before", "nano/vanilla-medium", "--after", "nano/sft", "--after", "nano/almost")
SMALL = ("--limit", 4, "--n-prompts", 24, "--max-new-tokens", 64, "--shots", 1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tax")
    assert tax.main([*map(str, (*FAMILY, *SMALL, "--output", folder, "--json"))], standalone_mode=False) == 0
    return folder


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "tax.json").read_text(encoding="utf-8"))
    return found


def test_training_raises_reward_and_the_oracle_agrees(measured: Path) -> None:
    found = read(measured)
    assert [policy["label"] for policy in found["policies"]] == ["nano/vanilla-medium", "nano/sft", "nano/almost"]
    rewards = [policy["measures"]["reward"]["value"] for policy in found["policies"]]
    assert rewards[0] < rewards[1] < rewards[2]
    assert found["sentence"].startswith(
        "No sign of over-optimisation: from nano/vanilla-medium to nano/almost mean reward rises (+"
    )
    kinds = {(f["checkpoint"], f["preference"]): f["kind"] for f in found["over_optimisation"]["findings"]}
    assert kinds["nano/sft", "oracle"] == kinds["nano/almost", "oracle"] == "both rise"
    for policy in found["policies"]:
        assert {"hhh", "truthfulqa", "mmlu", "reward", "oracle", "characters", "finished"} <= policy["measures"].keys()
        assert policy["measures"]["reward"]["n"] == 24


def test_every_comparison_is_paired_on_the_same_samples(measured: Path) -> None:
    found = read(measured)
    with_before = [c for c in found["comparisons"] if c["against"] == "nano/vanilla-medium"]
    sizes = {c["measure"]: c["n"] for c in with_before}
    assert sizes["reward"] == sizes["oracle"] == sizes["characters"] == 24
    assert sizes["hhh"] == 16  # 4 of each category
    assert sum(c["p_holm"] is not None for c in found["comparisons"]) == 6  # 3 benchmarks, 2 checkpoints
    assert all(c["p_holm"] >= c["p_value"] for c in found["comparisons"] if c["p_holm"] is not None)


def test_kl_is_the_difference_of_two_likelihoods(measured: Path) -> None:
    # Anew with transformers alone: the sum of log-probabilities of the answer's tokens behind the prompt.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = measured / "nano_almost"
    sampled = {r.sample.id: r.outputs["token_ids"][0] for r in read_samples(folder / "answers")}
    record = next(iter(read_samples(folder / "likelihoods")))
    prompt = next(
        row["prompts"][0]
        for row in map(json.loads, (folder / "likelihoods" / "prompts.jsonl").read_text().splitlines())
        if row.get("id") == record.sample.id
    )
    context = prompt["text"] if isinstance(prompt, dict) else prompt
    tokenizer = AutoTokenizer.from_pretrained(shipped("nano/almost"))
    prompt_ids = tokenizer(context)["input_ids"]
    start = len(prompt_ids)
    ids = torch.tensor([prompt_ids + sampled[record.sample.id]])
    for name, run in (("nano/almost", "likelihoods"), ("nano/vanilla-medium", "likelihoods-before")):
        model = AutoModelForCausalLM.from_pretrained(shipped(name), dtype=torch.float32)
        with torch.no_grad():
            table = model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
        expected = table.gather(-1, ids[0, start:, None]).sum().item()
        stored = {r.sample.id: r.score.value for r in read_samples(folder / run)}
        assert stored[record.sample.id] == pytest.approx(expected, abs=1e-3)
    own, before = (
        {r.sample.id: r.score.value or 0.0 for r in read_samples(folder / run)}
        for run in ("likelihoods", "likelihoods-before")
    )
    mean = sum(own[id] - before[id] for id in own) / len(own)
    assert read(measured)["policies"][2]["measures"]["kl"]["value"] == pytest.approx(mean)
    assert "kl" not in read(measured)["policies"][0]["measures"]


def test_it_goes_on_where_it_was_and_ends_in_the_same_figures(
    measured: Path, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    shutil.copytree(measured, tmp_path / "cut")
    for run in ("answers", "hhh"):
        file = tmp_path / "cut" / "nano_sft" / run / "samples.jsonl"
        file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:5]), encoding="utf-8")
        (file.parent / "results.json").unlink()
    shown = command(*FAMILY, *SMALL, "--output", tmp_path / "cut")
    assert shown.code == 0, shown.err
    assert "Paired with nano/vanilla-medium" in shown.out
    assert "\u2026" not in shown.out  # no figure is cut short
    assert read(measured)["sentence"] in shown.out
    one, other = read(measured), read(tmp_path / "cut")
    assert one.pop("command") != other.pop("command")
    assert one == other


def test_kl_scores_sampled_tokens_whatever_their_text_would_be(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Random models write what their tokenizer would encode in another way."""
    from transformers import AutoTokenizer

    before, after = tiny_checkpoint("llama-gqa"), tiny_checkpoint("llama-tied")
    (tmp_path / "p.jsonl").write_text("".join(f'{{"id": "p{i}", "prompt": "Hello {i}"}}\n' for i in range(4)))
    flags = ("--prompts", tmp_path / "p.jsonl", "--max-new-tokens", 8, "--tasks", "", "--data", "hub", "--json")
    arguments = ("--before", before, "--after", after, *flags, "--output", tmp_path / "out")
    assert tax.main([*map(str, arguments)], standalone_mode=False) == 0
    folder = tmp_path / "out" / after.name
    tokenizer = AutoTokenizer.from_pretrained(after)
    answers = {r.sample.id: r.outputs for r in read_samples(folder / "answers")}
    assert any(
        tokenizer(a["completions"][0], add_special_tokens=False)["input_ids"] != a["token_ids"][0]
        for a in answers.values()
    )
    engine = HFEngine(str(after), device="cpu")
    prompts = {row.id: row.prompts[0].text for row in run_prompts.read_prompts(folder / "likelihoods").values()}
    for record in read_samples(folder / "likelihoods"):
        ids = answers[record.sample.id]["token_ids"][0]
        prompt = tokenizer(prompts[record.sample.id])["input_ids"]
        with torch.no_grad():
            table = engine.model(torch.tensor([prompt + ids])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        expected = float(table.gather(-1, torch.tensor(ids)[:, None]).sum())
        assert record.score.value == pytest.approx(expected, abs=1e-3)


def test_answers_cut_at_the_limit_are_in_the_table_and_on_the_page(
    tiny_checkpoint: Callable[[str], Path], command: Callable[..., Outcome], tmp_path: Path
) -> None:
    before, after = tiny_checkpoint("llama-gqa"), tiny_checkpoint("llama-tied")
    (tmp_path / "p.jsonl").write_text("".join(f'{{"id": "p{i}", "prompt": "Hello {i}"}}\n' for i in range(7)))
    flags = ("--prompts", tmp_path / "p.jsonl", "--max-new-tokens", 8, "--tasks", "", "--data", "hub")
    done = command("--before", before, "--after", after, *flags, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    page = (tmp_path / "out" / "tax.html").read_text(encoding="utf-8")
    assert "<th>cut</th>" in page
    means = done.out.partition("Paired with")[0].splitlines()
    for policy in read(tmp_path / "out")["policies"]:
        label, cut = policy["label"], policy["measures"]["cut"]
        answers = read_samples(tmp_path / "out" / label / "answers")
        count = [answer.outputs["finish_reasons"][0] for answer in answers].count("length")
        assert (cut["value"], cut["n"]) == (count, 7)
        assert count > 0  # random models rarely end
        assert [row.split()[-1] for row in means if row.split()[:1] == [label]] == [str(count)]
        assert re.search(rf"<td>{label}</td>.*?<td>{count}</td></tr>", page)


def test_what_cannot_be_measured_is_said(
    tiny_checkpoint: Callable[[str], Path], command: Callable[..., Outcome], tmp_path: Path
) -> None:
    """KL of policies with two tokenizers, and the rewards of a model that can read no answer."""
    reward = shutil.copytree(shipped("nano/reward"), tmp_path / "reward")
    change_config(reward, max_position_embeddings=4)
    (tmp_path / "p.jsonl").write_text("".join(f'{{"id": "p{i}", "prompt": "Hello {i}"}}\n' for i in range(3)))
    flags = ("--prompts", tmp_path / "p.jsonl", "--max-new-tokens", 8, "--tasks", "", "--data", "hub")
    models = ("--before", tiny_checkpoint("llama-gqa"), "--after", "nano/vanilla-small", "--reward-model", reward)
    done = command(*models, *flags, "--output", tmp_path / "out")
    assert done.code == 3, done.err
    one, other = read(tmp_path / "out")["policies"]
    kl = other["measures"]["kl"]
    assert (kl["value"], kl["n"], kl["unscored"]) == (None, 0, 3)
    for policy in (one, other):
        metric = policy["measures"]["reward"]
        assert (metric["value"], metric["n"], metric["unscored"]) == (None, 0, 3)
    page = (tmp_path / "out" / "tax.html").read_text(encoding="utf-8")
    for said in (
        f"no KL of nano/vanilla-small: its tokens are not those of {one['label']}",
        "nano/vanilla-small, reward: withheld, as 3 of 3 samples have a prompt that does not fit",
        "nano/vanilla-small, KL, nats: 3 of 3 not measured",
    ):
        assert said in done.out
        assert said in page


def test_kl_says_how_its_answers_were_drawn(measured: Path) -> None:
    assert "drawn at temperature 1, of log p(answer)" in read(measured)["kl_source"]
    assert "drawn at temperature 0.7 and top-p 0.9, of" in kl_source(SamplingParams(8, 0.7, 0.9))
    settings = json.loads((measured / "nano_sft" / "answers" / "spec.json").read_text())["settings"]
    assert (settings["temperature"], settings["top_p"], settings["judge"]) == (1.0, 1.0, "nano oracle")


def test_answers_without_token_ids_cannot_be_continued(
    measured: Path, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    shutil.copytree(measured, tmp_path / "old")
    file = tmp_path / "old" / "nano_sft" / "answers" / "spec.json"
    spec = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**spec, "task_version": 1}), encoding="utf-8")
    shown = command(*FAMILY, *SMALL, "--output", tmp_path / "old")
    assert shown.code != 0
    assert "task_version was 1, is 2; choose another --output" in shown.err
    assert shown.err.count("error: ") == 1


def test_the_plot_and_the_page(measured: Path) -> None:
    assert (measured / "tax.png").read_bytes().startswith(b"\x89PNG")
    svg = ElementTree.fromstring((measured / "tax.svg").read_text(encoding="utf-8"))
    texts = {"".join(element.itertext()).strip() for element in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"nano/vanilla-medium", "nano/sft", "nano/almost", "Mean reward, raw logit", "HHH", "MMLU"} <= texts
    page = (measured / "tax.html").read_text(encoding="utf-8")
    assert "No sign of over-optimisation" in page
    assert "<svg" in page
    assert "<script" not in page


def test_names_are_no_markup() -> None:
    metric = {"value": 0.5, "ci95": [0.4, 0.6], "stderr": 0.05, "n": 9, "unscored": 0}
    policies = [MeasuredPolicy(name, name, at, None, {"hhh": metric}) for at, name in enumerate(["a$x", "<b>$\\frac$"])]
    found = Tax(policies, "places", [], [Finding("b", "a", "hhh", "unknown", "")], "<i>sentence", "KL")
    svg, _ = draw(found)
    assert "&lt;b&gt;$\\frac$" in svg
    page = html(found, svg)
    assert "<b>" not in page
    assert "&lt;i&gt;sentence" in page


# --- a training run ---


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """What `almost-train run` leaves while PPO goes on: a log, and a checkpoint that is weights alone."""
    stage = tmp_path / "recipe" / "rlsf"
    work = stage / ".work" / "step-000004"
    work.mkdir(parents=True)
    shutil.copyfile(shipped("nano/almost") / "model.safetensors", work / "policy.safetensors")
    (work / "numbers.json").write_text("{}")
    half = stage / ".work" / "step-000008"
    half.mkdir()
    (half / "policy.safetensors").write_bytes(b"half")
    rows = [{"step": i, "reward": 1.0 + i, "kl": 0.5 * i, "length": 10.0 + i, "seconds": 1} for i in range(6)]
    (stage / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "rew')
    for name, model in (("sft", "nano/sft"), ("reward", "nano/reward")):
        shutil.copytree(shipped(model), tmp_path / "recipe" / name / "model")
    return tmp_path / "recipe"


def test_the_checkpoints_and_the_log_of_a_training_run(
    training: Path, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    output = tmp_path / "tax"
    options = ("--data", "nano", "--tasks", "hhh", "--limit", 2, "--n-prompts", 6, "--max-new-tokens", 32, "--json")
    shown = command("--run", training, *options, "--output", output)
    assert shown.code == 0, shown.err
    found = json.loads(shown.out)
    assert [(p["label"], p["step"]) for p in found["policies"]] == [("before", 0), ("step-4", 4)]
    assert found["policies"][0]["model"] == str(training / "sft" / "model")
    assert found["reward_model"] == str(training / "reward" / "model")
    assert [row["kl"] for row in found["training_log"]] == [0, 0.5, 1, 1.5, 2, 2.5]  # the half line is left out
    assert found["training_log_apart"] == []
    again = command("--run", training / "rlsf", *options, "--output", output)
    assert json.loads(again.out)["policies"] == found["policies"]


def test_the_models_that_training_read_are_known_by_their_content(training: Path) -> None:
    inputs = {"policy": digest_path(training / "sft" / "model"), "reward_model": "org/on-the-hub"}
    (training / "rlsf" / "stage.json").write_text(json.dumps({"inputs": inputs}))
    run = read_training(training)
    assert run.read("policy", "nano/sft")
    assert not run.read("policy", "nano/almost")
    assert not run.read("reward_model", str(training / "reward" / "model"))


def test_a_finished_stage_gives_the_policy_at_its_step(training: Path) -> None:
    stage = training / "rlsf"
    shutil.rmtree(stage / ".work")
    with pytest.raises(InputError, match="holds no checkpoint yet"):
        read_training(stage)
    shutil.copytree(shipped("nano/almost"), stage / "policy")
    (stage / "result.json").write_text(json.dumps({"metrics": {"policy_step": 5}}))
    assert read_training(training).checkpoints == [(5, stage / "policy")]
    kept = stage / "policies" / "step-000003"
    shutil.copytree(shipped("nano/sft"), kept)
    assert read_training(training).checkpoints == [(3, kept), (5, stage / "policy")]


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--after", "nano/almost"], "--before CKPT is missing"),
        (["--before", "nano/sft"], "give the checkpoints by --after"),
        (["--before", "nano/sft", "--after", "nano/almots"], "did you mean 'nano/almost'"),
        (["--before", "nano/sft", "--after", "nano/almost", "--tasks", "hhhh"], "did you mean 'hhh'"),
        (["--before", "nano/sft", "--after", "nano/almost", "--engine", "openai"], "use hf or vllm"),
        (
            ["--before", "nano/sft", "--after", "nano/almost", "--data", "hub", "--reward-model", "nano/reward"],
            "--prompts FILE is missing",
        ),
        (["--before", "nano/sft", "--after", "nano/almost", "--reward-model", "nano/sft"], "SequenceClassification"),
        (["--run", "nowhere"], "holds no log.jsonl"),
    ],
)
def test_refused_in_one_line_before_anything_is_written(
    arguments: list[str], message: str, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    found = command(*arguments, "--output", tmp_path / "tax")
    assert (found.code, found.out) == (2, "")
    assert message in found.err
    assert found.err.count("\n") == 1
    assert not (tmp_path / "tax").exists()
