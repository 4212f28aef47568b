"""MMLU: subjects, shots, averages, and prompts that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from almost_eval.data.prompt_sets import load_prompt_set
from almost_eval.data.sources import DataSource, find_data
from almost_eval.engines.scripted import ScriptedEngine
from almost_eval.errors import DataError, InputError
from almost_eval.files import write_rows
from almost_eval.models.chat import load_template
from almost_eval.run.prompts import prepare
from almost_eval.run.validity import check
from almost_eval.tasks.base import Prompting
from almost_eval.tasks.harness import load_lm_eval_tasks
from almost_eval.tasks.mmlu import CATEGORIES, MMLU
from almost_eval.types import Sample, SampleRecord

pytest_plugins = ["benchmark_fixtures"]

DATASET = "cais/mmlu"
Ask = Callable[..., dict[str, SampleRecord]]
NOWHERE = DataSource("hub", None)


def says_b(_: str, continuation: str) -> float:
    return {" A": -3.0, " B": -1.0, " C": -2.0, " D": -4.0}[continuation]


class TestSubjects:
    def test_fifty_seven_in_four_categories(self) -> None:
        categories = MMLU([], 5, NOWHERE).categories
        sizes = {c: list(categories.values()).count(c) for c in CATEGORIES}
        assert sizes == {"stem": 19, "humanities": 13, "social_sciences": 12, "other": 13}
        assert categories["anatomy"] == "stem"
        assert categories["professional_law"] == "humanities"

    def test_all_questions(self, hub: DataSource) -> None:
        samples = MMLU([], 5, hub).samples()
        assert len(samples) == 14042
        assert len({s.id for s in samples}) == 14042
        sizes = {c: sum(s.metadata["category"] == c for s in samples) for c in CATEGORIES}
        assert sizes == {"stem": 3153, "humanities": 4705, "social_sciences": 3077, "other": 3107}

    def test_names_and_categories(self) -> None:
        assert list(MMLU(["virology", "anatomy"], 5, NOWHERE).categories) == ["anatomy", "virology"]
        assert set(MMLU(["stem"], 5, NOWHERE).categories.values()) == {"stem"}
        assert len(MMLU(["stem", "anatomy", "virology"], 5, NOWHERE).categories) == 20

    def test_unknown(self) -> None:
        with pytest.raises(InputError, match=r"unknown subject 'anatomie'; did you mean 'anatomy'\?"):
            _ = MMLU(["anatomie"], 5, NOWHERE).categories
        with pytest.raises(InputError, match="did you mean 'humanities'"):
            _ = MMLU(["humanites"], 5, NOWHERE).categories

    @pytest.mark.parametrize("shots", [-1, 6])
    def test_shots_out_of_range(self, shots: int) -> None:
        with pytest.raises(InputError, match="each subject has 5 examples"):
            MMLU([], shots, NOWHERE)


class TestPrompts:
    def test_shots(self, hub: DataSource) -> None:
        for shots in (0, 2, 5):
            task = MMLU(["anatomy"], shots, hub, limit=2)
            sample = task.samples()[0]
            (request,) = task.requests(sample, shots)
            assert request.continuations == (" A", " B", " C", " D")
            assert request.context.startswith(
                "The following are multiple choice questions (with answers) about anatomy.\n\n"
            )
            assert request.context.count("\nAnswer:") == shots + 1
            assert request.context.endswith(f"D. {sample.choices[3]}\nAnswer:")

    @pytest.mark.parametrize("shots", [0, 5])
    def test_builtin(self, hub: DataSource, shots: int) -> None:
        task = MMLU(["high_school_us_history"], shots, hub, Prompting(load_prompt_set("builtin", hub)), limit=1)
        (sample,) = task.samples()
        (request,) = task.requests(sample, shots)
        assert request.context.startswith("Each question below about high school us history has four possible answers")
        assert request.context.count("\nAnswer: ") == shots
        assert request.context.endswith("\nAnswer:")
        dev = hub.read(DATASET, "high_school_us_history", "dev")
        for row in dev[:shots]:
            assert f"D. {row['choices'][3]}\nAnswer: {'ABCD'[row['answer']]}\n\n" in request.context

    @pytest.mark.parametrize("prompts", ["lm-eval", "builtin"])
    def test_a_template_takes_the_question_as_a_turn(self, hub: DataSource, prompts: str) -> None:
        prompt_set = load_prompt_set("builtin", hub) if prompts == "builtin" else None
        plain = MMLU(["anatomy"], 2, hub, Prompting(prompt_set), limit=1)
        templated = MMLU(["anatomy"], 2, hub, Prompting(prompt_set, load_template("almost")), limit=1)
        (sample,) = plain.samples()
        text, turn = plain.requests(sample, 2)[0].context, templated.requests(sample, 2)[0].context
        if prompts == "builtin":
            assert turn == "\n\nHuman: " + text.removesuffix("\nAnswer:") + "\n\nAssistant: Answer:"
        else:  # lm-eval's description is a system turn, and its "Answer:" is part of the question
            header, rest = text[: text.index(".\n\n") + 3], text[text.index(".\n\n") + 3 :]
            assert turn == header + "\n\nHuman: " + rest + "\n\nAssistant:"

    def test_the_letter_follows_as_the_template_writes_answers(self, hub: DataSource) -> None:
        # "\n\nAssistant: A", but "### Response:A": lm-eval itself puts nothing between in either.
        for name, letters in (("almost", (" A", " B", " C", " D")), ("alpaca", ("A", "B", "C", "D"))):
            task = MMLU(["anatomy"], 1, hub, Prompting(None, load_template(name)), limit=1)
            assert task.requests(task.samples()[0], 1)[0].continuations == letters

    @pytest.mark.parametrize("prompts", ["lm-eval", "builtin"])
    def test_by_words_the_choices_follow_and_answer_the_shots(self, hub: DataSource, prompts: str) -> None:
        prompt_set = load_prompt_set("builtin", hub) if prompts == "builtin" else None
        task = MMLU(["anatomy"], 2, hub, Prompting(prompt_set), limit=1, words=True)
        (sample,) = task.samples()
        (request,) = task.requests(sample, 2)
        assert request.continuations == tuple(f" {choice}" for choice in sample.choices)
        for row in hub.read(DATASET, "anatomy", "dev")[:2]:
            assert f"Answer: {row['choices'][row['answer']]}\n\n" in request.context
        assert request.context.endswith("\nAnswer:")
        # lm-eval's continuation tasks do not list the choices, our own wording does.
        assert (f"D. {sample.choices[3]}" in request.context) == (prompts == "builtin")

    def test_words_are_another_measure(self, hub: DataSource) -> None:
        letters, words = (MMLU(["anatomy"], 5, hub, limit=1, words=words) for words in (False, True))
        assert (letters.protocol, words.protocol) == ("5-shot", "5-shot, words")
        assert "words" not in letters.settings()
        assert MMLU.build("", {**words.settings()}, hub).words

    def test_nano_has_its_own_subjects(self) -> None:
        nano = find_data("nano", None)
        task = MMLU([], 2, nano, Prompting(load_prompt_set("builtin", nano)), limit=1)
        assert {s.group for s in task.samples()} == set(nano.configs(DATASET)) == set(task.categories)


class TestAverages:
    """Two subjects: anatomy 1 right of 2, virology 3 right of 4."""

    def records(self) -> tuple[MMLU, list[SampleRecord]]:
        task = MMLU(["anatomy", "virology"], 0, NOWHERE)
        records = []
        for subject, category, golds in (("anatomy", "stem", [1, 0]), ("virology", "other", [1, 1, 1, 2])):
            for i, gold in enumerate(golds):
                name = f"{subject}/{i}"
                sample = Sample(name, (), ("w", "x", "y", "z"), gold, name, subject, {"category": category})
                outputs = {"loglikelihoods": [[-3.0, -1.0, -2.0, -4.0]]}  # says B
                records.append(SampleRecord(sample, outputs, task.score(sample, outputs)))
        return task, records

    def test_per_question_and_per_subject(self) -> None:
        task, records = self.records()
        metrics = {name: metric.value for name, metric in task.metrics(records).items()}
        assert metrics == {
            "accuracy": 4 / 6,
            "accuracy_macro": (1 / 2 + 3 / 4) / 2,
            "accuracy/stem": 1 / 2,
            "accuracy/other": 3 / 4,
            "accuracy/anatomy": 1 / 2,
            "accuracy/virology": 3 / 4,
        }

    def test_baseline(self) -> None:
        task, records = self.records()
        assert {k: v.value for k, v in task.baselines(records).items()} == {"always B": 4 / 6}

    def test_ties(self) -> None:
        task, records = self.records()
        sample = records[0].sample
        shared = task.score(sample, {"loglikelihoods": [[-1.0, -1.0, -2.0, -2.0]]})
        assert (shared.value, shared.reason) == (0.5, "tied")
        nothing = task.score(sample, {"loglikelihoods": [[-1.0] * 4]})
        assert (nothing.value, nothing.reason) == (None, "all_tied")


def write_subject(root: Path, question_words: list[int], shot_words: int = 10) -> DataSource:
    """One subject, anatomy, with questions of so many words (choices and letters come to it) and five shots."""
    folder = root / DATASET / "anatomy"
    folder.mkdir(parents=True)
    for split, words in (("test", question_words), ("dev", [shot_words] * 5)):
        rows = [
            {"question": " ".join(f"{split}{i}" for _ in range(n)), "choices": list("wxyz"), "answer": 1}
            for i, n in enumerate(words)
        ]
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    return DataSource("hub", root)


class TestOverLongPrompts:
    """The scripted engine's tokens are words: a shot of 10 words is 20 with its choices, letters and answer.

    The header has 14 words, a question of n words n + 9: with five shots n + 14 + 9 + 100.
    """

    def task(self, tmp_path: Path, words: list[int]) -> MMLU:
        data = write_subject(tmp_path, words)
        return MMLU(["anatomy"], 5, data, Prompting(load_prompt_set("builtin", data)))

    def test_word_counts(self, tmp_path: Path) -> None:
        task = self.task(tmp_path, [10])
        prepared = prepare(task, ScriptedEngine(says_b), task.samples())
        assert prepared.longest == 10 + 14 + 9 + 100

    def test_whole_shots_are_dropped(self, ask: Ask, tmp_path: Path) -> None:
        task = self.task(tmp_path, [10] * 3)
        contexts: list[str] = []

        def script(context: str, continuation: str) -> float:
            contexts.append(context)
            return says_b(context, continuation)

        # 10 + 14 + 9 + 2 * 20 = 73: two shots fit in 75, three do not.
        records = list(ask(task, ScriptedEngine(script, context_length=75)).values())
        assert [r.prompt_tokens_truncated for r in records] == [60, 60, 60]
        assert {r.score.value for r in records} == {1.0}
        assert {c.count("\nAnswer: ") for c in contexts} == {2}
        assert all(c.startswith("Each question below about anatomy") for c in contexts)
        validity = check(records, 3)
        assert validity.counts["truncated"] == 3
        assert validity.blocking == ["truncated"]
        assert validity.reason == "3 of 3 samples have a prompt that does not fit as a whole (allowed 1.0%)"

    def test_one_in_a_hundred_is_allowed(self, ask: Ask, tmp_path: Path) -> None:
        for long, passed in ((1, True), (2, False)):
            task = self.task(tmp_path / str(long), [10] * (100 - long) + [30] * long)
            records = list(ask(task, ScriptedEngine(says_b, context_length=140)).values())
            assert sum(r.prompt_tokens_truncated > 0 for r in records) == long
            assert check(records, 100).passed is passed

    def test_what_fits_with_no_shot_is_unscored(self, ask: Ask, tmp_path: Path) -> None:
        task = self.task(tmp_path, [10, 10, 200])
        records = list(ask(task, ScriptedEngine(says_b, context_length=150)).values())
        scores = {r.sample.id: (r.score.value, r.score.reason) for r in records}
        assert scores == {"anatomy/0": (1.0, None), "anatomy/1": (1.0, None), "anatomy/2": (None, "context_too_long")}
        assert [r.outputs for r in records if r.sample.id == "anatomy/2"] == [{}]
        metric = task.metrics(records)["accuracy"]
        assert (metric.value, metric.n, metric.unscored) == (1.0, 2, 1)
        assert check(records, 3).blocking == ["truncated"]

    def test_nothing_fits(self, ask: Ask, tmp_path: Path) -> None:
        task = self.task(tmp_path, [50, 40])
        with pytest.raises(InputError, match="no sample fits: the shortest prompt has 63 tokens, the context 20"):
            ask(task, ScriptedEngine(says_b, context_length=20))


@pytest.mark.parametrize("split", ["test", "dev"])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"question": None}, "`question` is not a text"),
        ({"choices": ["a", "b", "c"]}, "`choices` are not four texts"),
        ({"choices": None}, "`choices` are not four texts"),
        ({"answer": 4}, "`answer` is 4, not 0 to 3"),
        ({"answer": None}, "`answer` is None, not 0 to 3"),
    ],
)
def test_malformed_row(tmp_path: Path, split: str, change: dict[str, Any], problem: str) -> None:
    data = write_subject(tmp_path, [3, 3])
    file = tmp_path / DATASET / "anatomy" / f"{split}-00000-of-00001.parquet"
    rows = parquet.read_table(file).to_pylist()
    rows[1] |= change
    parquet.write_table(pa.Table.from_pylist(rows), file)
    with pytest.raises(DataError, match=rf"malformed data: {DATASET}, anatomy \({split}\), row 2: {problem}"):
        MMLU(["anatomy"], 5, data).samples()


def test_true_is_no_answer(tmp_path: Path) -> None:
    """Python takes True for 1, which is B."""
    data = write_subject(tmp_path, [3, 3])
    file = tmp_path / DATASET / "anatomy" / "test-00000-of-00001.parquet"
    rows = parquet.read_table(file).to_pylist()
    file.unlink()
    write_rows(file.with_name("test.jsonl"), [row | {"answer": True} for row in rows])
    with pytest.raises(DataError, match="row 1: `answer` is True, not 0 to 3"):
        MMLU(["anatomy"], 0, data).samples()


def test_a_split_that_lm_eval_looks_for_is_named(tmp_path: Path) -> None:
    data = write_subject(tmp_path, [3])
    (tmp_path / DATASET / "anatomy" / "dev-00000-of-00001.parquet").unlink()
    with pytest.raises(InputError, match="cannot load mmlu_anatomy: it looks for 'dev', a split or a column that its"):
        load_lm_eval_tasks(["mmlu_anatomy"], data)


def test_too_few_examples(tmp_path: Path) -> None:
    data = write_subject(tmp_path, [3])
    file = tmp_path / DATASET / "anatomy" / "dev-00000-of-00001.parquet"
    parquet.write_table(parquet.read_table(file).slice(0, 2), file)
    MMLU(["anatomy"], 2, data).samples()
    with pytest.raises(DataError, match="anatomy: 2 rows in dev, 3 shots need as many"):
        MMLU(["anatomy"], 3, data).samples()


def test_a_category_that_the_data_lacks_is_not_offered() -> None:
    nano = find_data("nano", None, built_in_model=True)
    task = MMLU(["stem"], 0, nano, Prompting(load_prompt_set("builtin", nano)))
    with pytest.raises(InputError, match=r"unknown subject 'stem'; known: .*other"):
        task.samples()
