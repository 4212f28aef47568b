"""Is a judge any good? It reviews pairs that GPT-4 reviewed, and is compared with what GPT-4 said.

Agreement is chance-corrected (Cohen 1960), with an interval clustered by question. Beside it stands what can mislead a
judge: the place in the prompt (seen by judging both orders) and the length of the answers. The same two are measured
of the archived verdicts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from almost_eval.errors import DataError, InputError
from almost_eval.judge.archive import Archive, as_review
from almost_eval.judge.calibration import brier
from almost_eval.judge.judges import LASTING, Judge, ModelJudge
from almost_eval.judge.lines import ORDERS, check_reviews, record_of, review_of, stored_verdict
from almost_eval.judge.records import Pair, Review, Verdict
from almost_eval.progress import Progress
from almost_eval.run import provenance
from almost_eval.run.store import RunStore, default_folder
from almost_eval.run.validity import ALLOWED
from almost_eval.stats import cohen_kappa, mean_metric
from almost_eval.types import JSONMapping, JSONObject, Metric, SampleRecord

if TYPE_CHECKING:
    from almost_eval.judge.prompts import JudgePrompts

TASK = "judge-check"


@dataclass(frozen=True, slots=True)
class Case:
    """An archived pair, and what was said of it."""

    archive: str
    """Name of the review file."""
    pair: Pair
    verdict: Verdict
    """The archived one, by place in the archived order."""
    review: Review
    """The same for aggregation."""


class JudgeCheck:
    """Archived pairs and a judge, checked and ready.

    Args:
        archives: the review files.
        reader: reads the archived reviews.
        judge: who is checked.
        fingerprint: of the question file.
        orders: `both` shows the position bias; agreement is on the archived order alone.
        limit: pairs, drawn from all files with `seed`; None is all.
        repeats: times that each pair is judged.
        seed: of the draw.

    Raises:
        DataError: no archived review can be read.
        InputError: repeats of a judge that always says the same; whatever the judge refuses.
    """

    def __init__(
        self,
        archives: Sequence[Archive],
        reader: JudgePrompts,
        judge: Judge,
        fingerprint: str,
        *,
        orders: str = "both",
        limit: int | None = None,
        repeats: int = 1,
        seed: int = 0,
    ) -> None:
        if orders == "reverse":
            raise InputError("--orders reverse: agreement is on the archived order; use forward or both")
        if repeats > 1 and judge.kind != "model":
            raise InputError(f"--repeats: {judge.name} says the same each time; leave it out")
        self.judge, self.fingerprint = judge, fingerprint
        self.orders, self.repeats, self.seed = orders, repeats, seed
        cases, self.unreadable = _cases(archives, reader)
        if not cases:
            raise DataError("no archived review has a verdict that can be read, so there is nothing to compare with")
        if limit is not None and limit < len(cases):
            cases = [cases[i] for i in sorted(random.Random(seed).sample(range(len(cases)), limit))]
        self.cases = cases
        judge.check([case.pair.question for case in cases])
        self.pairs: list[Pair] = []
        self.ids: list[str] = []
        for case in cases:
            for order in ORDERS[orders]:
                self.pairs.append(case.pair if order == "forward" else reversed_pair(case.pair))
                self.ids.append(f"{case.archive}/{case.pair.question.id}/{order}")

    def spec(self) -> JSONObject:
        """Everything that decides the numbers, and the command that requested them."""
        texts = ((pair.answer_1.text, pair.answer_2.text) for pair in self.pairs)
        pairs = sorted(zip(self.ids, texts, strict=True))
        return {
            "schema": 1,
            "task": TASK,
            "task_version": 1,
            "protocol": self.judge.name,
            "settings": {
                "judge": self.judge.spec(),
                "orders": self.orders,
                "repeats": self.repeats,
                "archived": provenance.digest({"verdicts": [str(case.verdict) for case in self.cases]}),
            },
            "requires": "judge",
            "model_name": self.judge.name,
            "engine": {"name": "file"},
            "data": {"source": "hub", "fingerprint": self.fingerprint, "pairs_digest": provenance.digest({"p": pairs})},
            "n_samples": len(self.pairs) * self.repeats,
            "seed": self.seed,
            "versions": provenance.versions(),
            "command": provenance.command(),
            "commit": provenance.commit(),
        }

    def default_folder(self) -> Path:
        """`runs/judge-check-<judge>-<digest of the spec>`; see `store.default_folder`."""
        return default_folder(self.spec(), TASK, self.judge.name)

    def describe(self, folder: Path | None = None) -> JSONObject:
        """What `--dry-run` prints."""
        facts = {"pairs": len(self.cases), "orders": self.orders, "repeats": self.repeats, "judge": self.judge.name}
        return facts | self.judge.plan(self.pairs, folder, self.repeats)

    def execute(self, folder: Path, progress: Progress | None = None) -> JSONObject:
        """Judge what is missing, then write and return the results.

        Raises:
            StoreError: see `RunStore`.
            InputError: the judge's provider refuses the judge, the key or the request.
        """
        progress = progress or Progress()
        spec = self.spec()
        amend = self.judge.amend if isinstance(self.judge, ModelJudge) else None
        with RunStore(folder, spec, amend) as store, self.judge.open(folder, progress.notice):
            store.forget([id for id, record in store.done.items() if self._asks_again(record)])
            total = len(self.ids) * self.repeats
            with progress.track(f"{TASK} {self.judge.name}", total, len(store.done)) as advance:
                missing = [
                    [at for at, id in enumerate(self.ids) if f"{id}/{attempt}" not in store.done]
                    for attempt in range(self.repeats)
                ]
                for attempt, mine in enumerate(missing):
                    if isinstance(self.judge, ModelJudge):
                        self.judge.announce(self.pairs, mine, attempt)
                for attempt, mine in enumerate(missing):
                    for at, judgement in self.judge.stream(self.pairs, mine, attempt):
                        store.append(record_of(self.pairs[at], judgement, id=f"{self.ids[at]}/{attempt}"))
                        advance(1)
            records = [[store.done[f"{id}/{attempt}"] for id in self.ids] for attempt in range(self.repeats)]
            results = self._results(records, store.spec)
            store.finish(results)
        return results

    def _asks_again(self, record: SampleRecord) -> bool:
        reason = record.score.reason
        return reason is not None and (reason not in LASTING or self.judge.asks_again(record))

    def _results(self, records: Sequence[Sequence[SampleRecord]], spec: JSONMapping) -> JSONObject:
        every = [record for mine in records for record in mine]
        validity = check_reviews(every, len(every), dict(ALLOWED))
        reviews = [review_of(record, stored_verdict(record)) for record in records[0]]
        metrics = self._agreement(records[0]) | self._consistency(records) | self._orders(reviews)
        metrics |= _biases(reviews) | {f"archived/{k}": m for k, m in _biases([c.review for c in self.cases]).items()}
        stated = {name: metric.to_dict() for name, metric in metrics.items()}
        if not validity.passed:
            stated["kappa"] |= {"value": None, "stderr": None, "ci95": None, "withheld": validity.reason}
        return {
            "task": TASK,
            "protocol": self.judge.name,
            "model": self.judge.name,
            "headline": "kappa",
            "metrics": stated,
            "baselines": {},
            "details": {"pairs": len(self.cases), "archived reviews that cannot be read": self.unreadable},
            "judging": {},
            "validity": validity.to_dict(),
            "engine": {"path": "judge", "warnings": list(self.judge.warnings())},
            "timing": self.judge.report(),
            "provenance": {
                "judge_models": sorted({r.outputs["judge_model"] for r in every if r.outputs.get("judge_model")}),
                **{key: spec[key] for key in ("settings", "data", "seed", "versions", "command", "commit")},
            },
        }

    def _agreement(self, records: Sequence[SampleRecord]) -> dict[str, Metric]:
        """With the archived verdicts, in the archived order."""
        said = {id: stored_verdict(record) for id, record in zip(self.ids, records, strict=True)}
        mine = [said[f"{case.archive}/{case.pair.question.id}/forward"] for case in self.cases]
        both = [(case, verdict) for case, verdict in zip(self.cases, mine, strict=True) if verdict is not None]
        unscored = len(self.cases) - len(both)
        decisive = [(c, v) for c, v in both if "tie" not in (c.verdict.winner, v.winner)]
        metrics = {}
        for name, chosen, lost in (("", both, unscored), ("/decisive", decisive, len(self.cases) - len(decisive))):
            kappa = cohen_kappa(
                [(str(case.verdict.winner), str(verdict.winner)) for case, verdict in chosen],
                [case.pair.question.id for case, _ in chosen],
                rng=np.random.default_rng(self.seed),
            )
            metrics[f"kappa{name}"] = replace(kappa, unscored=lost)
            same: list[float | None] = [float(case.verdict.winner == verdict.winner) for case, verdict in chosen]
            agreed = mean_metric(same, [case.pair.question.id for case, _ in chosen])
            metrics[f"agreement{name}"] = replace(agreed, unscored=lost)
        told = brier([(v, c.verdict.winner, c.pair.question.id) for c, v in both if c.verdict.winner is not None])
        return metrics if told is None else metrics | {"brier": replace(told, unscored=unscored)}

    def _consistency(self, records: Sequence[Sequence[SampleRecord]]) -> dict[str, Metric]:
        """With itself: the same pair judged again."""
        if len(records) < 2:
            return {}
        clusters, same = [], []
        for repeats in zip(*records, strict=True):
            winners = [verdict.winner if (verdict := stored_verdict(r)) else None for r in repeats]
            for again in winners[1:]:
                clusters.append(repeats[0].sample.cluster)
                same.append(None if None in (winners[0], again) else float(winners[0] == again))
        return {"self_consistency": mean_metric(same, clusters)}

    def _orders(self, reviews: Sequence[Review]) -> dict[str, Metric]:
        """Whether the same answer wins in both places; reviews of one pair follow each other."""
        if self.orders != "both":
            return {}
        couples = list(zip(reviews[::2], reviews[1::2], strict=True))
        same = [None if None in (a.outcome, b.outcome) else float(a.outcome == b.outcome) for a, b in couples]
        return {"consistency": mean_metric(same, [review.question_id for review, _ in couples])}


def _biases(reviews: Sequence[Review]) -> dict[str, Metric]:
    """Shares of decisive verdicts: for Assistant 1, and for the longer of two unequal answers."""
    decisive = [(r, r.verdict.winner == "1") for r in reviews if r.verdict is not None and r.verdict.winner != "tie"]
    unequal = [r for r, _ in decisive if r.model_length != r.baseline_length]
    longer = [float((r.model_length > r.baseline_length) == r.model_won) for r in unequal]
    return {
        "first_wins": mean_metric([float(first) for _, first in decisive], [r.question_id for r, _ in decisive]),
        "longer_wins": mean_metric(longer, [r.question_id for r in unequal]),
    }


def _cases(archives: Sequence[Archive], reader: JudgePrompts) -> tuple[list[Case], int]:
    """Pairs with a verdict, and the number of those without."""
    cases, unreadable = [], 0
    for archive in archives:
        for archived, verdict in zip(archive.reviews, archive.verdicts(reader), strict=True):
            if isinstance(verdict, Verdict):
                review = as_review(archived.pair, archive.baseline, archive.model, verdict)
                cases.append(Case(archive.file.stem, archived.pair, verdict, review))
            else:
                unreadable += 1
    return cases, unreadable


def reversed_pair(pair: Pair) -> Pair:
    """The same answers with their places changed."""
    return Pair(pair.question, pair.answer_2, pair.answer_1, "reverse" if pair.order == "forward" else "forward")
