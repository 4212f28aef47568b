"""Is a judge any good? It reviews pairs that GPT-4 reviewed, or people voted on, and is compared with what they said.

The run itself: what is asked, the folder, the lines, `results.json`. What the reviews say is in `certificate`.

One judge in the place of another: both are checked on the same cases, and `certificate.json` says what changes. The new
judge's run is in the folder itself, that of the old one in `old/` inside it, so that an old judge can be named later
and nothing is asked twice.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from almost_eval.errors import DataError, InputError, RunError
from almost_eval.files import read_json, write_json
from almost_eval.judge.api.journal import Journal
from almost_eval.judge.cases import Archive, Case, HumanVote, archived_cases, drawn, reversed_pair, voted_cases
from almost_eval.judge.certificate import (
    Checked,
    between,
    check_metrics,
    moves_between,
    moves_from_archive,
    sentence,
)
from almost_eval.judge.judges import Judge, is_open
from almost_eval.judge.lines import ORDERS, check_reviews, record_of, review_of, stored_verdict, withheld
from almost_eval.judge.model_judge import ModelJudge
from almost_eval.judge.names import CHECK_TASK
from almost_eval.judge.prompts import JudgePrompts
from almost_eval.judge.records import Pair
from almost_eval.progress import Progress
from almost_eval.run import provenance
from almost_eval.run.store import RunStore, default_folder, read_results, read_samples
from almost_eval.run.validity import ALLOWED
from almost_eval.types import JSONMapping, JSONObject, SampleRecord


class JudgeCheck:
    """Known cases and a judge, checked and ready.

    Args:
        archives: the review files; may be none where there are votes.
        reader: reads the archived reviews.
        judge: who is checked.
        fingerprint: of the question file.
        votes: of people, each on two answers.
        unread_votes: why a vote of the file is none of them -> how many.
        archive_judge: whose the archived verdicts are.
        orders: `both` shows the position bias; agreement with an archive is on the archived order alone.
        limit: pairs, drawn with `seed` from all files, and as many of those with votes; None is all.
        repeats: times that each pair is judged.
        seed: of the draw and of the resamples.

    Raises:
        DataError: no archived review can be read, and there are no votes.
        InputError: repeats of a judge that always says the same; whatever the judge refuses.
    """

    def __init__(
        self,
        archives: Sequence[Archive],
        reader: JudgePrompts,
        judge: Judge,
        fingerprint: str,
        *,
        votes: Sequence[HumanVote] = (),
        unread_votes: Mapping[str, int] | None = None,
        archive_judge: str = "GPT-4",
        orders: str = "both",
        limit: int | None = None,
        repeats: int = 1,
        seed: int = 0,
    ) -> None:
        if orders == "reverse":
            raise InputError("--orders reverse: agreement is on the archived order; use forward or both")
        if repeats > 1 and judge.kind != "model":
            raise InputError(f"--repeats: {judge.name} says the same each time; leave it out")
        self.judge, self.fingerprint, self.archive_judge = judge, fingerprint, archive_judge
        self.orders, self.repeats, self.seed = orders, repeats, seed
        archived, self.unreadable = archived_cases(archives, reader)
        self.unread_votes = dict(unread_votes or {})
        voted = voted_cases(votes)
        if not archived and not voted:
            raise DataError("no archived review has a verdict that can be read, so there is nothing to compare with")
        self.cases: list[Case] = drawn(archived, limit, seed) + drawn(voted, limit, seed)
        judge.check([case.pair.question for case in self.cases])
        self.pairs: list[Pair] = []
        self.ids: list[str] = []
        for case in self.cases:
            for order in ORDERS[orders]:
                self.pairs.append(case.pair if order == "forward" else reversed_pair(case.pair))
                self.ids.append(f"{case.id}/{order}")

    def spec(self) -> JSONObject:
        """Everything that decides the numbers, and the command that requested them."""
        texts = ((pair.answer_1.text, pair.answer_2.text) for pair in self.pairs)
        pairs = sorted(zip(self.ids, texts, strict=True))
        return {
            "schema": 1,
            "task": CHECK_TASK,
            "task_version": 1,
            "protocol": self.judge.name,
            "settings": {
                "judge": self.judge.spec(),
                "orders": self.orders,
                "repeats": self.repeats,
                "archived": provenance.digest(
                    {"verdicts": [str(verdict) for case in self.cases for verdict in case.verdicts]}
                ),
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
        return default_folder(self.spec(), CHECK_TASK, self.judge.name)

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
        spec, started, computed = self.spec(), time.perf_counter(), 0
        amend = self.judge.amend if isinstance(self.judge, ModelJudge) else None
        with RunStore(folder, spec, amend) as store:
            with self.judge.open(folder, progress.notice):
                store.forget([id for id, record in store.done.items() if is_open(record, self.judge)])
                total = len(self.ids) * self.repeats
                with progress.track(f"{CHECK_TASK} {self.judge.name}", total, len(store.done)) as advance:
                    for line in self._judged(store.done):
                        store.append(line)
                        advance(1)
                        computed += 1
            seconds = round(time.perf_counter() - started, 3)
            timing = {"seconds": seconds, "samples_computed_now": computed, **self.judge.report()}
            records = self._lines(store.done)
            results = self._results(records, store.spec)
            results["timing"] = timing | {"verdicts": self._price(folder, records, timing)}
            store.finish(results)
        return results

    def _judged(self, done: Mapping[str, SampleRecord]) -> Iterator[SampleRecord]:
        """The lines that are not there, each as soon as it is known."""
        missing = [
            [at for at, id in enumerate(self.ids) if f"{id}/{attempt}" not in done] for attempt in range(self.repeats)
        ]
        if isinstance(self.judge, ModelJudge):
            for attempt, mine in enumerate(missing):
                self.judge.announce(self.pairs, mine, attempt)
        for attempt, mine in enumerate(missing):
            for at, judgement in self.judge.stream(self.pairs, mine, attempt):
                yield record_of(self.pairs[at], judgement, id=f"{self.ids[at]}/{attempt}")

    def stored(self, folder: Path) -> list[Checked]:
        """The cases with the reviews that a finished run of this check left in its folder."""
        return self.checked(self._lines({record.sample.id: record for record in read_samples(folder)}))

    def _lines(self, done: Mapping[str, SampleRecord]) -> list[list[SampleRecord]]:
        """The lines of each repeat, in the order of `ids`."""
        return [[done[f"{id}/{attempt}"] for id in self.ids] for attempt in range(self.repeats)]

    def checked(self, records: Sequence[Sequence[SampleRecord]]) -> list[Checked]:
        """The cases with their reviews; `records` are the lines of each repeat, in the order of `ids`."""
        reviews = [[review_of(record, stored_verdict(record)) for record in mine] for mine in records]
        orders = ORDERS[self.orders]
        return [
            Checked(
                case,
                {
                    order: tuple(mine[at * len(orders) + place] for mine in reviews)
                    for place, order in enumerate(orders)
                },
            )
            for at, case in enumerate(self.cases)
        ]

    def _results(self, records: Sequence[Sequence[SampleRecord]], spec: JSONMapping) -> JSONObject:
        every = [record for mine in records for record in mine]
        validity = check_reviews(every, len(every), dict(ALLOWED))
        checked = self.checked(records)
        metrics = {name: metric.to_dict() for name, metric in check_metrics(checked, seed=self.seed).items()}
        moves = moves_from_archive(checked, seed=self.seed)
        headline = "kappa" if "kappa" in metrics else "human/kappa"
        sentences = [sentence(move, self.judge.name, self.archive_judge) for move in moves]
        if not validity.passed:
            metrics[headline] |= withheld(validity.reason)
            moves, sentences = [], []
        people = [case for case in self.cases if case.by_people]
        return {
            "task": CHECK_TASK,
            "protocol": self.judge.name,
            "model": self.judge.name,
            "headline": headline,
            "metrics": metrics,
            "baselines": {},
            "details": {
                "pairs": len(self.cases),
                "archived reviews that cannot be read": self.unreadable,
                "pairs with votes": len(people),
                "votes": sum(len(case.verdicts) for case in people),
                **{f"votes not read: {reason}": n for reason, n in self.unread_votes.items()},
            },
            "judging": {"moves": [move.to_dict() for move in moves], "sentences": sentences},
            "validity": validity.to_dict(),
            "engine": {"path": "judge", "warnings": list(self.judge.warnings())},
            "provenance": {
                "archive_judge": self.archive_judge,
                "judge_models": sorted({r.outputs["judge_model"] for r in every if r.outputs.get("judge_model")}),
                **{key: spec[key] for key in ("settings", "data", "seed", "versions", "command", "commit")},
            },
        }

    def _price(self, folder: Path, records: Sequence[Sequence[SampleRecord]], timing: JSONMapping) -> JSONObject:
        """What a verdict costs and takes: by the journal of the folder, or by this process for a judge without one.

        A process that had nothing to judge knows no time of its own and keeps that of the one before.
        """
        n = sum(stored_verdict(record) is not None for mine in records for record in mine)
        cost, seconds = timing.get("cost_usd_all_runs"), None
        if self.judge.kind == "model":
            with Journal(folder / "journal.sqlite") as journal:
                waits = journal.waits()
            seconds = statistics.median(waits) if waits else None
        elif timing["samples_computed_now"]:
            seconds = timing["seconds"] / timing["samples_computed_now"]
        elif (folder / "results.json").is_file():
            seconds = read_results(folder)["timing"].get("verdicts", {}).get("seconds_each")
        if self.judge.kind != "model":
            cost = 0.0
        return {
            "n": n,
            "usd_each": None if cost is None or not n else cost / n,
            "seconds_each": None if seconds is None else round(seconds, 6),
        }


# --- one judge in the place of another

CERTIFICATE = "certificate.json"
OLD = "old"
"""Name of the folder of the judge that is replaced."""


def certify(new: JudgeCheck, old: JudgeCheck | None, folder: Path, progress: Progress | None = None) -> JSONObject:
    """Judge what is missing, then write `certificate.json` and return its content. `folder` is of the new judge's run;
    `old` is None where the archive is all there is to compare with.

    Raises:
        StoreError: see `JudgeCheck.execute`.
        InputError: see `JudgeCheck.execute`.
        RunError: the certificate cannot be written.
    """
    results = new.execute(folder, progress)
    certificate = certificate_of(results)
    if old is not None:
        theirs = old.execute(folder / OLD, progress)
        certificate |= {"old": old.judge.name}
        certificate["results"][OLD] = theirs
        if results["validity"]["passed"] and theirs["validity"]["passed"]:
            both = new.stored(folder), old.stored(folder / OLD)
            moves = moves_between(*both, seed=new.seed)
            certificate["between"] = {name: metric.to_dict() for name, metric in between(*both, seed=new.seed).items()}
            certificate["moves"] = [move.to_dict() for move in moves]
            certificate["sentences"] = [
                *(sentence(move, new.judge.name, old.judge.name) for move in moves),
                *certificate["sentences"],
            ]
    try:
        write_json(folder / CERTIFICATE, certificate)
    except OSError as error:
        raise RunError(f"cannot write to {folder} ({error.strerror}); the reviews are kept") from None
    return certificate


def certificate_of(results: JSONMapping) -> JSONObject:
    """What one check says, as a certificate without an old judge; results of an earlier version have no moves and no
    price.
    """
    known = results["provenance"].get("archive_judge", "GPT-4")
    return {
        "new": results["model"],
        "old": None,
        "archive_judge": known if "kappa" in results["metrics"] else None,
        "sentences": list(results["judging"].get("sentences", ())),
        "results": {"new": results},
        "between": None,
        "moves": None,
    }


def stored_certificate(results: JSONMapping, folder: Path | None) -> JSONObject:
    """The certificate that stands in the folder of a check, or what its results alone say."""
    file = folder / CERTIFICATE if folder else None
    stored: JSONObject = read_json(file) if file and file.is_file() else certificate_of(results)
    return stored
