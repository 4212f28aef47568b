"""What a finished run of `vicuna` says: `results.json` of its lines, the same once more, and with other settings.

All of it is a pure function of the run folder: it needs no model, no data set and no judge.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from almost_eval.errors import InputError, StoreError
from almost_eval.judge import grading
from almost_eval.judge.aggregate import Orders, Ties, aggregate, round_robin
from almost_eval.judge.answers import ALL_CHOICES, answer_files, digest_answers
from almost_eval.judge.api.endpoint import THOUGHT_ONLY
from almost_eval.judge.api.parameters import JSON_OBJECT, RESPONSE_FORMAT
from almost_eval.judge.judges import UNPARSED, Judgement, verdict_fields, without_answer
from almost_eval.judge.lines import (
    ORDERS,
    cases_of,
    check_reviews,
    grades_of,
    record_of,
    reviews_of,
    style_fields,
    withheld,
)
from almost_eval.judge.local import judge_by_oracle, judge_by_reward
from almost_eval.judge.names import STYLE_CONTROLLED, STYLE_STRENGTH
from almost_eval.judge.panel import Families, members_of, names_of, spread
from almost_eval.judge.panel_results import majority, score_of, summarise_panel
from almost_eval.judge.prompts import FORMS, load_family, parse_review
from almost_eval.judge.questions import read_answers, read_questions
from almost_eval.judge.records import Review, Solo, Subject, Unparsed
from almost_eval.judge.style import style_control, style_ranking
from almost_eval.run.store import origin, read_results, read_samples, read_spec
from almost_eval.run.validity import Validity
from almost_eval.run.verify import Verification, differences, score_differences
from almost_eval.stats import mean_metric
from almost_eval.types import JSONMapping, JSONObject, Metric, SampleRecord

HEADLINE = "win_rate"


def summarise(
    records: Sequence[SampleRecord],
    spec: JSONMapping,
    validity: Validity,
    engine: JSONMapping,
    digests: Mapping[str, str],
    *,
    ties: Ties | None = None,
    orders: Orders = "both",
) -> JSONObject:
    """`results.json` without its times. `digests` are of each system's answers; `ties` None is as the spec says;
    `orders` are those of the lines that count.
    """
    settings = spec["settings"]
    ties = ties or settings["ties"]
    single = settings.get("judging") == "single"
    stored = [] if single else reviews_of(records)
    judges = names_of(settings["judge"])
    reviews = majority(stored) if judges else stored
    if single:
        headline, metrics, judging = grading.summarise(grades_of(records), spec)
    elif len(settings["systems"]) > 2:
        headline, metrics, judging = _round_robin(
            reviews, [s["name"] for s in settings["systems"].values()], spec["seed"]
        )
    else:
        both = aggregate(reviews, ties=ties, orders=orders)
        headline, metrics, judging = HEADLINE, dict(both.metrics), both.to_dict()
        del judging["metrics"]
        if any(review.model_markdown is not None for review in reviews):  # older runs have no counts
            style = style_control(reviews, ties=ties, rng=np.random.default_rng(spec["seed"]))
            metrics[STYLE_CONTROLLED], judging["style"] = style.win_rate, style.to_dict()
    panel: JSONObject = {}
    if judges:
        names = [system["name"] for system in settings["systems"].values()]
        stated_families = Families(**settings.get("families", {}))
        more, panel = summarise_panel(stored, judges, names, stated_families, spec["seed"], ties=ties, orders=orders)
        metrics |= more
    stated = {name: metric.to_dict() for name, metric in metrics.items()}
    if not validity.passed:
        hidden = withheld(validity.reason)
        heads = ("win_rate", "strength", "score")
        stated |= {name: m | hidden for name, m in stated.items() if name.startswith(heads)}
        cleared: JSONObject = {"systems": {}, "differences": {}} if single else {"length_controlled": None}
        judging |= cleared
        if "style" in judging:
            judging["style"] |= {"effects": [], "problem": "withheld, as the win rate is"}
    if judges:
        _withhold_judges(stated, panel, records, validity)
        judging["panel"] = panel
    template = spec["template"] or {}
    return {
        "task": spec["task"],
        "protocol": spec["protocol"],
        "model": spec["model_name"],
        "headline": headline,
        "metrics": stated,
        "baselines": {},
        "details": _details(records, settings),
        "judging": judging,
        "validity": validity.to_dict(),
        "engine": dict(engine),
        "provenance": {
            "judge": settings["judge"],
            "judge_parameters": _parameters(records),
            "judge_models": sorted({r.outputs["judge_model"] for r in records if r.outputs.get("judge_model")}),
            "systems": settings["systems"],
            "answers": dict(digests),
            "weight_digest": spec["weight_digest"],
            "data_source": spec["data"]["source"],
            "data_fingerprint": spec["data"]["fingerprint"],
            "template": template.get("name"),
            "template_digest": template.get("digest"),
            "prompt_set": spec["prompt_set"],
            **origin(spec, records),
        },
    }


def _withhold_judges(
    stated: dict[str, JSONObject], panel: JSONObject, records: Sequence[SampleRecord], validity: Validity
) -> None:
    """Hide what the gate blocks of each judge of a panel by itself: one that failed does not hide the others."""
    for row in panel["judges"]:
        mine = [record for record in records if record.sample.metadata["judge"] == row["name"]]
        gate = check_reviews(mine, len(mine), dict(validity.allowed))
        row["withheld"] = None if gate.passed else gate.reason
        if not gate.passed and (name := f"judge_win_rate/{row['name']}") in stated:
            stated[name] |= withheld(gate.reason)
        if not gate.passed and "round_robin" in row:
            row["round_robin"] |= {"strengths": {}, "problem": gate.reason}
            row["win_rates"] = {system: rate | withheld(gate.reason) for system, rate in row["win_rates"].items()}
    if not validity.passed and "all" in panel:
        panel["all"] |= {"strengths": {}, "problem": validity.reason}


def _round_robin(
    reviews: Sequence[Review], names: Sequence[str], seed: int
) -> tuple[str, dict[str, Metric], JSONObject]:
    """Headline, metrics and the rest of several systems; each one's win rate is over all its games."""
    ranking = round_robin(reviews, rng=np.random.default_rng(seed))
    metrics = {f"strength/{name}": metric for name, metric in ranking.strengths.items()}
    for name in names:
        games = [review for review in reviews if name in (review.baseline, review.model)]
        scores = [score_of(review, name) for review in games]
        metrics[f"win_rate/{name}"] = mean_metric(scores, [review.question_id for review in games])
    unparsed = sum(review.model_score is None for review in reviews)
    metrics["unparsed"] = Metric(float(unparsed), None, None, len(reviews))
    judging = {key: value for key, value in ranking.to_dict().items() if key != "strengths"}
    if any(review.model_markdown is not None for review in reviews):
        style = style_ranking(reviews, rng=np.random.default_rng(seed))
        metrics |= {f"{STYLE_STRENGTH}{name}": metric for name, metric in style.strengths.items()}
        judging["style"] = style.to_dict()
    return f"win_rate/{names[-1]}", metrics, judging


def _parameters(records: Sequence[SampleRecord]) -> list[JSONObject]:
    """What was really sent beside the messages: each different set, with its number of reviews."""
    sets = Counter(json.dumps(sent, sort_keys=True) for r in records if (sent := r.outputs.get("parameters")))
    return [{"sent": json.loads(text), "reviews": n} for text, n in sets.most_common()]


def _refused_parameters(records: Sequence[SampleRecord], judges: Sequence[JSONMapping]) -> JSONObject:
    """How many reviews came about without a parameter that the spec states, as the endpoint refuses it."""
    by_name = {judge["name"]: judge for judge in judges}
    counts: Counter[str] = Counter()
    for record in records:
        judge = by_name[record.sample.metadata.get("judge", judges[0]["name"])]
        wanted = {"temperature", "max_tokens", *judge.get("options", {})}
        if judge.get("verdict") == "json":
            wanted.add(RESPONSE_FORMAT)
        sent = record.outputs.get("parameters")
        if not sent:
            continue  # made before parameters were kept, or no review
        if judge.get("verdict") == "json" and sent.get(RESPONSE_FORMAT, {}).get("type") == JSON_OBJECT:
            counts["reviews with json_schema sent as json_object: the endpoint refuses it"] += 1
        for name in sorted(wanted - sent.keys()):
            now = "max_completion_tokens" if name == "max_tokens" and "max_completion_tokens" in sent else None
            counts[f"reviews with {name} {'sent as ' + now if now else 'left out: the endpoint refuses it'}"] += 1
    return dict(counts)


def _details(records: Sequence[SampleRecord], settings: JSONMapping) -> JSONObject:
    """What the lines say besides the verdicts; only what is not zero."""
    # What a user can mend is said in its own words.
    reasons = Counter(
        r.outputs.get("problem") if r.score.reason == THOUGHT_ONLY else r.score.reason
        for r in records
        if r.score.reason not in (None, UNPARSED)
    )
    problems = Counter(r.outputs.get("problem") for r in records if r.score.reason == UNPARSED)
    counts = {
        **{f"failed: {reason}": n for reason, n in sorted(reasons.items(), key=str)},
        **{f"unparsed: {problem}": n for problem, n in sorted(problems.items(), key=str)},
        "asked twice": sum(bool(r.outputs.get("attempt")) for r in records),
        "reviews cut at their token limit": sum(r.outputs.get("finish_reason") == "length" for r in records),
        "reviews of cut answers": sum(any(r.outputs.get("cut", ())) for r in records),
        "reviews of answers without their thinking": sum(bool(r.outputs.get("reasoning_stripped")) for r in records),
        "reviews of empty answers": sum(0 in r.outputs["lengths"] for r in records),
        "reviews that used a reference known to be wrong": sum("wrong_references" in r.outputs for r in records),
        "reviews of texts with the prompt's own markers, quoted": sum("markers_quoted" in r.outputs for r in records),
        "prompt tokens": sum(r.outputs.get("prompt_tokens") or 0 for r in records),
        "completion tokens": sum(r.outputs.get("completion_tokens") or 0 for r in records),
        "of them thinking": sum(r.outputs.get("reasoning_tokens") or 0 for r in records),
        **_refused_parameters(records, members_of(settings["judge"])),
    }
    return {name: count for name, count in counts.items() if count}


# --- the same again


class StoredRun:
    """A finished run, read back from its folder.

    Raises:
        StoreError: not a finished run of `vicuna`.
        DataError: its questions or answers were damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec, self.results = read_spec(folder), read_results(folder)
        if self.spec.get("requires") != "judge":
            raise StoreError(f"{folder} is a run of {self.spec['task']}, not of vicuna; use almost-eval report")
        settings = self.spec["settings"]
        if "systems" not in settings:
            raise StoreError(f"{folder} is a check of a judge, not a run of vicuna; read its certificate.html")
        self.questions = read_questions(folder / "questions.jsonl")
        names = [system["name"] for system in settings["systems"].values()]
        choice = None if settings.get("choice") == ALL_CHOICES else 1
        files = answer_files(folder, names)
        self.answers = [read_answers(file, self.questions, choice=choice)[1] for file in files]
        self.digests = {name: digest_answers(mine) for name, mine in zip(names, self.answers, strict=True)}
        judged = cases_of(self.questions, self.answers, settings["orders"], settings["max_answer_chars"])
        ids, cases, cuts, judges = spread(names_of(settings["judge"]), *judged)
        self.pairs = {id: (case, cut) for id, case, cut in zip(ids, cases, cuts, strict=True)}
        self._judge_of = dict(zip(ids, judges, strict=True))
        self._members = {member["name"]: member for member in members_of(settings["judge"])}
        stored = {record.sample.id: record for record in read_samples(folder)}
        if unknown := next((id for id in stored if id not in self.pairs), None):
            raise StoreError(f"{folder} has a line for {unknown!r}, which its questions and systems do not make")
        self.records = [stored[id] for id in self.pairs if id in stored]

    def again(self, record: SampleRecord, family: str | None = None) -> SampleRecord:
        """The line as its own outputs, and the answers, make it; its review read by the parser of `family`, or as the
        run read it.
        """
        pair, cut = self.pairs[record.sample.id]
        outputs = {key: value for key, value in record.outputs.items() if key not in ("lengths", "markdown", "cut")}
        judgement = self._judgement(pair, record, outputs, family)
        again = record_of(pair, judgement, id=record.sample.id, cut=cut, judge=self._judge_of[record.sample.id])
        if "markdown" not in record.outputs:  # graded by itself, or of a run before it was counted
            again.outputs.pop("markdown", None)
        return again

    @property
    def graded(self) -> bool:
        """Whether each answer was graded by itself."""
        return bool(self.spec["settings"].get("judging") == "single")

    def with_markdown(self, record: SampleRecord) -> SampleRecord:
        """The line with the counts of its answers, which a run before they were counted lacks."""
        pair, _ = self.pairs[record.sample.id]
        return replace(record, outputs=record.outputs | style_fields(pair))

    def judge_of(self, record: SampleRecord) -> JSONMapping:
        """The spec of the judge whose line it is."""
        name = self._judge_of[record.sample.id]
        return next(iter(self._members.values())) if name is None else self._members[name]

    def _judgement(self, pair: Subject, record: SampleRecord, outputs: JSONObject, family: str | None) -> Judgement:
        judge = self.judge_of(record)
        if (unjudged := without_answer(pair)) is not None:
            return unjudged
        if judge["kind"] == "oracle":
            return judge_by_oracle(pair)
        if judge["kind"] == "reward" and outputs.get("rewards"):
            first, second = (math.nan if r is None else r for r in outputs["rewards"])
            return judge_by_reward(first, second)
        if outputs.get("review") is None:  # there was none
            return Judgement(None, record.score.reason, outputs)
        form = judge["form"] if family is None else load_family(family).form
        finish, sent, told = (outputs.get(key) for key in ("finish_reason", "parameters", "logprobs"))
        verdict = parse_review(
            form, outputs["review"], pair, finish or "stop", judge.get("verdict", "text"), sent, told
        )
        outputs = {key: value for key, value in outputs.items() if key not in ("problem", "shares")}
        outputs |= verdict_fields(verdict)
        if isinstance(verdict, Unparsed):
            return Judgement(None, UNPARSED, outputs | {"problem": verdict.reason})
        return Judgement(verdict, None, outputs)

    def summarise(
        self, records: Sequence[SampleRecord], *, ties: Ties | None = None, orders: Orders = "both"
    ) -> JSONObject:
        """The results that these lines make."""
        allowed = {name: entry["allowed"] for name, entry in self.results["validity"]["checks"].items()}
        records = [r for r in records if r.sample.metadata.get("order") in (None, *ORDERS[orders])]
        expected = sum(isinstance(c, Solo) or c.order in ORDERS[orders] for c, _ in self.pairs.values())
        validity = check_reviews(records, expected, allowed)
        return summarise(records, self.spec, validity, self.results["engine"], self.digests, ties=ties, orders=orders)


def redraw(folder: Path, *, ties: Ties | None = None, orders: Orders = "both", family: str | None = None) -> JSONObject:
    """The results of a finished run with other settings; nothing is sent and nothing is written. `ties` None is as the
    run had it; with `family` that prompt family's parser reads the stored reviews.

    Raises:
        InputError: the run has no lines of these orders, or no reviews to read.
        StoreError: see `StoredRun`.
    """
    run = StoredRun(folder)
    if run.graded and (ties, orders) != (None, "both"):
        raise InputError(f"{folder} graded each answer by itself: it has no orders and no ties; leave both out")
    have = run.spec["settings"]["orders"]
    results = run.summarise(redrawn_records(run, orders, family), ties=ties, orders=orders)
    return {**results, "orders": have if orders == "both" else orders}


def redrawn_records(run: StoredRun, orders: Orders = "both", family: str | None = None) -> list[SampleRecord]:
    """The lines of a finished run as `redraw` takes them.

    Raises:
        InputError: see `redraw`.
    """
    have = run.spec["settings"]["orders"]
    if have not in ("both", orders) and orders != "both":
        raise InputError(f"{run.folder} holds the order {have!r} only; leave --orders out")
    records = run.records
    if family is not None:
        writers = [judge for judge in members_of(run.spec["settings"]["judge"]) if judge["kind"] == "model"]
        if not writers:
            raise InputError(f"--prompt-family: the judge {run.spec['protocol']!r} wrote no reviews to read")
        if mode := next((judge["verdict"] for judge in writers if "verdict" in judge), None):
            raise InputError(f"--prompt-family: its verdicts were told by --verdict {mode}, which no parser reads anew")
        if any(FORMS[load_family(family).form].n_answers != FORMS[judge["form"]].n_answers for judge in writers):
            raise InputError(f"--prompt-family {family} reads reviews of another number of answers; name another")
        records = [run.again(r, family) if run.judge_of(r)["kind"] == "model" else r for r in records]
    if run.graded:
        return records
    return [run.with_markdown(record) for record in records if record.sample.metadata["order"] in ORDERS[orders]]


def verify_judged(folder: Path) -> Verification:
    """Read every review again, take lengths and digests from the answers again, and recompute every metric.

    Raises:
        StoreError: not a finished run of judged pairs.
        DataError: its questions or answers are damaged.
    """
    run = StoredRun(folder)
    verification = Verification(str(folder), len(run.records))
    for record in run.records:
        again = run.again(record)
        verification.problems += score_differences(record, again.score)
        verification.problems += [
            f"sample {record.sample.id}: {problem}"
            for problem in differences("outputs", record.outputs, again.outputs)
            + differences("sample", asdict(record.sample), asdict(again.sample))
        ]
    whole = run.summarise(run.records)
    verification.metrics = sum(len(whole[part]) for part in ("metrics", "judging", "details"))
    verification.metrics += len(whole["provenance"])
    for part, value in whole.items():
        verification.problems += differences(part, run.results.get(part), json.loads(json.dumps(value)))
    return verification
