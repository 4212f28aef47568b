"""The run that joins everything: questions -> answers -> pairs -> judgements -> lines -> results.

What can be refused is refused before a weight is loaded or a request is sent. An answer is on disk before the next is
made, a review before the next is waited for, and a killed run goes on with what is missing. What failed for a reason
that may pass (a timeout, a budget) has a line that says so. The same command requests it again, and nothing else.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from almost_eval.errors import InputError
from almost_eval.files import write_rows
from almost_eval.judge.answers import AnswerReasoning, System, answer_files, digest_answers, distinct, question_line
from almost_eval.judge.judges import Judge, is_open, shown, without_answer
from almost_eval.judge.lines import ORDERS, cases_of, check_reviews, paired_choices, record_of
from almost_eval.judge.local import RewardJudge
from almost_eval.judge.model_judge import ModelJudge
from almost_eval.judge.model_system import ModelSystem
from almost_eval.judge.panel import Families, Panel, Spread, members_of, spread
from almost_eval.judge.prompts import JudgePrompts
from almost_eval.judge.raised import kept_lines
from almost_eval.judge.records import Answer, Answers, AnswerTurn, Question
from almost_eval.judge.results import summarise
from almost_eval.progress import Progress
from almost_eval.run import provenance
from almost_eval.run.prompts import Prompt, SamplePrompts, write_prompts
from almost_eval.run.store import RunStore, default_folder, read_spec
from almost_eval.run.validity import ALLOWED, Validity
from almost_eval.types import JSONObject

TASK = "vicuna"
Judging = Literal["pairwise", "single"]
"""Two answers compared, or each graded by itself."""


class JudgeRun:
    """Questions, systems and a judge, checked and ready.

    Args:
        questions: what both systems answer.
        fingerprint: of the question file.
        data_name: `hub` or `nano`.
        systems: baseline and model; or more than two for a round robin, each against each.
        judge: who decides.
        orders: `both`, `forward` (the baseline is Assistant 1) or `reverse`.
        ties: `half` (a tie is half a win) or `drop`.
        max_answer_chars: cut longer answers, and count them; None cuts nothing.
        answer_reasoning: what became of thoughts in the systems' answers; recorded.
        choice: `all` where each of a file's answers to a question is judged; recorded.
        judging: `pairwise`, or `single`: each answer is graded by itself, and there are no orders and no ties.
        questions_named: what the questions and their reference answers are called, where they have names; recorded.
        seed: recorded, and of the bootstrap.
        allowed: shares for the validity gate, or None for the defaults.
        families: which judges and systems are of one maker.

    Raises:
        InputError: a family of nobody; two systems of one name; whatever the judge refuses.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        fingerprint: str,
        data_name: str,
        systems: Sequence[System],
        judge: Judge,
        *,
        orders: Literal["both", "forward", "reverse"] = "both",
        ties: Literal["half", "drop"] = "half",
        max_answer_chars: int | None = None,
        answer_reasoning: AnswerReasoning = "strip",
        choice: Literal["all"] | None = None,
        judging: Judging = "pairwise",
        questions_named: Mapping[str, str] = {},
        seed: int = 0,
        allowed: Mapping[str, float] | None = None,
        families: Families | None = None,
    ) -> None:
        self.questions = questions
        self.fingerprint = fingerprint
        self.data_name = data_name
        self.systems = distinct(systems)
        self.judge = judge
        self.judging = judging
        self.choice = choice
        self.questions_named = dict(questions_named)
        self.orders = orders if judging == "pairwise" else None
        self.ties = ties if judging == "pairwise" else None
        self.max_answer_chars = max_answer_chars
        self.answer_reasoning = answer_reasoning
        self.seed = seed
        self.allowed = dict(allowed or ALLOWED)
        self.families = families or Families()
        self._judges = judge.members if isinstance(judge, Panel) else [judge]
        self.families.check([one.name for one in self._judges], [system.name for system in self.systems])
        if self.families.judges and not isinstance(judge, Panel):
            raise InputError(
                "--judge-family marks what a judge prefers beside the other judges of a panel, and there is one judge; "
                "give another --judge, or leave it out"
            )
        judge.check(questions)

    @property
    def n_samples(self) -> int:
        """Reviews of a whole run."""
        known = [system.known() for system in self.systems]
        total = 0
        for question in self.questions:
            counts = [len(mine[question.id].choices) if mine else 1 for mine in known]
            if self.orders is None:
                total += len(question.turns) * sum(counts)
            else:
                pairs = sum(paired_choices(question, *two) for two in itertools.combinations(counts, 2))
                total += len(question.turns) * len(ORDERS[self.orders]) * pairs
        return total * len(self._judges)

    def spec(self) -> JSONObject:
        """Everything that decides the numbers, and the command that requested them."""
        judge = self.judge.spec()
        roles = ["baseline", "model"] if len(self.systems) == 2 else [system.name for system in self.systems]
        if self.judging == "single":  # none is the baseline of another
            roles = [*(system.name for system in self.systems[:-1]), "model"]
        systems = {role: system.spec() for role, system in zip(roles, self.systems, strict=True)}
        settings: JSONObject = {
            "orders": self.orders,
            "ties": self.ties,
            "max_answer_chars": self.max_answer_chars,
            "judge": judge,
            "systems": systems,
        }
        if self.answer_reasoning != "strip":
            settings["answer_reasoning"] = self.answer_reasoning
        if self.judging != "pairwise":
            settings["judging"] = self.judging
        if self.choice is not None:
            settings["choice"] = self.choice
        settings |= self.questions_named
        if families := self.families.to_dict():
            settings["families"] = families
        model = systems[roles[-1]]
        return {
            "schema": 1,
            "task": TASK,
            "task_version": 1,
            "protocol": self.judge.name,
            "settings": settings,
            "requires": "judge",
            "model_name": self.title(),
            "architecture": model.get("architecture"),
            "weight_digest": model.get("weight_digest"),
            "model_files": model.get("model_files"),
            "engine": model.get("engine") or {"name": "file", "dtype": None, "device": None},
            "template": model.get("template"),
            "template_asked": True,
            "prompt_set": judge.get("prompt_set"),
            "prompt_ids_digest": None,
            "data": {"source": self.data_name, "fingerprint": self.fingerprint},
            "n_samples": self.n_samples,
            "seed": self.seed,
            "versions": provenance.versions(),
            "command": provenance.command(),
            "commit": provenance.commit(),
        }

    def title(self) -> str:
        """`model vs baseline`, or all names of a round robin."""
        names = [system.name for system in self.systems]
        return f"{names[1]} vs {names[0]}" if len(names) == 2 and self.judging == "pairwise" else ", ".join(names)

    def default_folder(self) -> Path:
        """`runs/vicuna-<judge>-<model>-<digest of the spec>`; see `store.default_folder`."""
        return default_folder(self.spec(), TASK, self.judge.name, Path(self.systems[-1].name).name)

    def execute(
        self, folder: Path, progress: Progress | None = None, *, started: float | None = None
    ) -> tuple[JSONObject, Validity]:
        """Make what is missing, then write and return `results.json`'s content and the gate's verdict.

        Arguments are those of `Run.execute`.

        Raises:
            StoreError: see `RunStore`.
            InputError: the judge's provider refuses the judge, the key or the request.
            RunError: out of memory or disk.
        """
        progress = progress or Progress()
        started = time.perf_counter() if started is None else started
        if (folder / "spec.json").is_file():
            self.adopt_dates(read_spec(folder)["settings"])
        spec = self.spec()
        amend = self.judge.amend if isinstance(self.judge, ModelJudge) else None
        with RunStore(folder, spec, amend) as store, self.judge.open(folder, progress.notice):
            write_rows(folder / "questions.jsonl", map(question_line, self.questions), ascii_only=True)
            files = answer_files(folder, [system.name for system in self.systems])
            answers = [s.write(file, progress) for s, file in zip(self.systems, files, strict=True)]
            ids, pairs, cuts, judges = self._spread(answers)
            if prompts := self._prompts_by_judge():
                shown_to = zip(ids, pairs, judges, strict=True)
                write_prompts(
                    folder,
                    (
                        SamplePrompts(id, (), (Prompt(shown(prompts[judge].messages(pair))),))
                        for id, pair, judge in shown_to
                        if judge in prompts
                    ),
                )
            again = [id for id, record in store.done.items() if is_open(record, self.judge)]
            if again:
                progress.note(f"asking again for {len(again)} reviews that failed before")
                store.forget(again)
            missing = [at for at, id in enumerate(ids) if id not in store.done]
            if known := len(ids) - len(missing):
                progress.note(f"going on in {folder}: {known} of {len(ids)} reviews are there")
            with progress.track(f"{TASK} {self.judge.name}", len(ids), known) as advance:
                without = {at: judgement for at in missing if (judgement := without_answer(pairs[at])) is not None}
                asked = self.judge.stream(pairs, [at for at in missing if at not in without])
                for at, judgement in itertools.chain(without.items(), asked):
                    store.append(record_of(pairs[at], judgement, id=ids[at], cut=cuts[at], judge=judges[at]))
                    advance(1)
            records = [store.done[id] for id in ids]
            validity = check_reviews(records, len(ids), self.allowed)
            begun = store.spec
            warnings = [*self.judge.warnings(), *(note for system in self.systems for note in system.notes)]
            if spec["commit"] != begun["commit"]:
                warnings.append(f"begun on commit {begun['commit']}, ended on {spec['commit']}")
            if wrong := [record.sample.cluster for record in records if "wrong_references" in record.outputs]:
                warnings.append(
                    f"{len(wrong)} reviews used a reference answer that is known to be wrong (questions "
                    f"{', '.join(dict.fromkeys(wrong))}); --reference corrected mends these"
                )
            for system, mine in zip(self.systems, answers, strict=True):
                made = [about for answer in mine.values() for about in answer.turn_metadata]
                if cut := sum(about.get("finish_reason") == "length" for about in made):
                    warnings.append(
                        f"{cut} of {len(made)} answers of {system.name} were cut at the limit of new tokens"
                    )
            digests = {s.name: digest_answers(a) for s, a in zip(self.systems, answers, strict=True)}
            engine = {"path": "judge", "warnings": warnings}
            results = summarise(records, begun, validity, engine, digests)
            results["orders"] = self.orders
            results["timing"] = {
                "seconds": round(time.perf_counter() - started, 3),
                "samples_computed_now": len(missing),
                **self.judge.report(),
            }
            store.finish(results)
        return results, validity

    def adopt_dates(self, stored: JSONObject) -> None:
        """Let all templates write the time that they wrote when the run began, of whose spec `stored` is the part."""
        for system, part in zip(self.systems, stored.get("systems", {}).values(), strict=False):
            if isinstance(system, ModelSystem):
                system.adopt_date(part)
        judge = stored.get("judge") or {}
        parts = {part.get("name"): part for part in (members_of(judge) if "kind" in judge else ())}
        for member in self._judges:
            if isinstance(member, RewardJudge):
                member.adopt_date(parts.get(member.name, {}))

    def describe(self, folder: Path | None = None) -> JSONObject:
        """What `--dry-run` prints; answers that are yet to be written count as long as they may become."""
        unwritten = [system.name for system in self.systems if system.known() is None]
        answers = [system.known() or self._longest(system) for system in self.systems]
        cases = self._spread(answers)
        ids, pairs = cases.ids, cases.pairs
        facts: JSONObject = {"questions": len(self.questions), "reviews": len(pairs), "judge": self.judge.name}
        facts |= {"systems": ", ".join(system.name for system in self.systems)}
        if unwritten:
            facts["taken_as_long_as_they_may_become"] = f"answers of {', '.join(unwritten)}"
        if isinstance(self.judge, ModelJudge) and (kept := kept_lines(folder, self.spec(), self.judge.prompts)):
            stay = {record.sample.id for record in kept if not is_open(record, self.judge)}
            facts |= {"reviews_that_stay": len(stay)}
            wanted = [pair for id, pair in zip(ids, pairs, strict=True) if id not in stay]
            return facts | (self.judge.plan(wanted, folder) if wanted else self.judge.plan(pairs, folder, 0))
        return facts | self.judge.plan(pairs, folder)

    def _spread(self, answers: Sequence[Answers]) -> Spread:
        """What is judged, by whom."""
        names = [member.name for member in self._judges] if isinstance(self.judge, Panel) else []
        return spread(names, *cases_of(self.questions, answers, self.orders, self.max_answer_chars))

    def _prompts_by_judge(self) -> dict[str | None, JudgePrompts]:
        """What the judges behind an API are shown; a judge alone is named None, as in its lines."""
        is_panel = isinstance(self.judge, Panel)
        return {one.name if is_panel else None: one.prompts for one in self._judges if isinstance(one, ModelJudge)}

    def _longest(self, system: System) -> Answers:
        # Four letters are a token to the estimate, and to most tokenizers.
        text = "long " * system.spec()["sampling"]["max_new_tokens"]
        return {q.id: Answer(q.id, text, system.name, later=(AnswerTurn(text),) * len(q.later)) for q in self.questions}
