"""Several judges of the same pairs, as one judge to a run: each judges all of them, one judge after the other.

Their replies are in one journal and their cost is under one bound. A judge that fails wholly (a wrong key, an endpoint
that is gone) does not lose the others: its reviews are unscored with the reason `judge_failed` and are requested again
by the same command. Where all fail, the run ends as with one judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from almost_eval.errors import AlmostError, InputError, RunError, did_you_mean
from almost_eval.judge.judges import Judge, Judgement
from almost_eval.judge.model_judge import ModelJudge
from almost_eval.judge.records import Question, Subject
from almost_eval.types import JSONMapping, JSONObject, SampleRecord

KIND = "panel"
FAILED = "judge_failed"
"""The reason of a review whose judge could not be had at all."""


@dataclass(frozen=True, slots=True)
class Families:
    """Which judges and which systems are of one maker, as the user says; nothing is guessed from names."""

    judges: Mapping[str, str] = field(default_factory=dict)
    systems: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> JSONObject:
        """As JSON; empty where nothing was said."""
        if not self.judges and not self.systems:
            return {}
        return {"judges": dict(self.judges), "systems": dict(self.systems)}

    def check(self, judges: Sequence[str], systems: Sequence[str]) -> None:
        """Refuse names of nobody.

        Raises:
            InputError: there is no judge, or no system, of a name.
        """
        for flag, stated, known in (
            ("--judge-family", self.judges, judges),
            ("--system-family", self.systems, systems),
        ):
            if unknown := next((name for name in stated if name not in known), None):
                raise InputError(f"{flag} {unknown}: there is none of that name; {did_you_mean(unknown, known)}")


class Spread(NamedTuple):
    """The lines of a panel: those of the first judge, then those of the second, and so on."""

    ids: list[str]
    pairs: list[Subject]
    cuts: list[tuple[int, ...]]
    judges: list[str | None]
    """Who judges it; None where there is one judge, whose lines do not name it."""


def spread(
    judges: Sequence[str], ids: Sequence[str], pairs: Sequence[Subject], cuts: Sequence[tuple[int, ...]]
) -> Spread:
    """Each pair once for each judge, the judge's name in the id; as they are where no judges are named."""
    if not judges:
        return Spread(list(ids), list(pairs), list(cuts), [None] * len(ids))
    named = [f"{id}/{judge}" for judge in judges for id in ids]
    return Spread(named, [*pairs] * len(judges), [*cuts] * len(judges), [judge for judge in judges for _ in ids])


def members_of(spec: JSONMapping) -> list[JSONMapping]:
    """What decides each judge's verdicts, of a judge's spec; a judge alone is its own only member."""
    return list(spec["members"]) if spec["kind"] == KIND else [spec]


def names_of(spec: JSONMapping) -> list[str]:
    """The judges of a panel by name, of its spec; none where there is one judge."""
    return [member["name"] for member in spec["members"]] if spec["kind"] == KIND else []


class Panel:
    """Several judges, in the order of their lines.

    Raises:
        InputError: a judge twice.
    """

    kind = KIND

    def __init__(self, members: Sequence[Judge]) -> None:
        names = [member.name for member in members]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"--judge {twice} is given twice; name each judge once")
        self.members = list(members)
        self.name = " + ".join(names)
        self._errors: dict[str, AlmostError] = {}
        self._folder: Path | None = None
        self._notice: Callable[[str], None] | None = None
        models = [member for member in members if isinstance(member, ModelJudge)]
        for member in models:
            member.companions = [other for other in models if other is not member]

    def spec(self) -> JSONObject:
        """What decides the verdicts of each."""
        members = [member.spec() for member in self.members]
        prompt_set = next((member["prompt_set"] for member in members if "prompt_set" in member), None)  # one for all
        return {"name": self.name, "kind": self.kind, "prompt_set": prompt_set, "members": members}

    def check(self, questions: Sequence[Question]) -> None:
        """As each of them."""
        for member in self.members:
            member.check(questions)

    def plan(self, pairs: Sequence[Subject], folder: Path | None, repeats: int = 1) -> JSONObject:
        """What all of them take together, and what each takes; the prompt is that of the first behind an API."""
        mine = pairs[: len(pairs) // len(self.members)]
        plans = {member.name: member.plan(mine, folder, repeats) for member in self.members}
        prices = [plan["price_usd_at_most"] for plan in plans.values()]
        shown = next((plan for plan in plans.values() if plan["requests"]), next(iter(plans.values())))
        tokens = ("prompt_tokens_at_most", "completion_tokens_at_most")
        return {
            "requests": sum(plan["requests"] for plan in plans.values()),
            **{key: sum(plan.get(key, 0) for plan in plans.values()) for key in tokens},
            "price_usd_at_most": None if None in prices else round(sum(prices), 4),
            **{f"of_{name}": _words(plan) for name, plan in plans.items()},
            "prompt": shown["prompt"],
        }

    @contextmanager
    def open(self, folder: Path, notice: Callable[[str], None] | None = None) -> Iterator[None]:
        """Ready to judge inside; each judge is opened when its turn has come."""
        self._folder, self._notice = folder, notice
        try:
            yield
        finally:
            self._folder = self._notice = None

    def asks_again(self, record: SampleRecord) -> bool:
        """As the judge of the line says."""
        name = record.sample.metadata.get("judge")
        return any(member.asks_again(record) for member in self.members if member.name == name)

    def stream(
        self, pairs: Sequence[Subject], wanted: Sequence[int], attempt: int = 0
    ) -> Iterator[tuple[int, Judgement]]:
        """See `Judge.stream`; `pairs` are those of `spread`.

        Raises:
            InputError: all judges failed, the first one for this; likewise RunError.
        """
        assert self._folder is not None  # `open`
        n = len(pairs) // len(self.members)
        self._errors = {}
        waiting: list[tuple[int, Judgement]] = []
        for place, member in enumerate(self.members):
            mine = [index - place * n for index in wanted if place * n <= index < (place + 1) * n]
            left = dict.fromkeys(mine)
            try:
                with member.open(self._folder, self._notice):
                    own = pairs[place * n : (place + 1) * n]
                    for index, judgement in member.stream(own, mine, attempt) if mine else ():
                        left.pop(index)
                        yield place * n + index, judgement
            except (InputError, RunError) as error:
                self._errors[member.name] = error
                outputs: JSONObject = {"review": None, "problem": str(error), "attempt": attempt}
                waiting += [(place * n + index, Judgement(None, FAILED, outputs)) for index in left]
        if len(self._errors) == len(self.members):  # nobody could judge: the command ends as with one judge
            raise next(iter(self._errors.values()))
        yield from waiting

    def report(self) -> JSONObject:
        """The counts of all, and of each."""
        reports = {member.name: member.report() for member in self.members}
        sums: JSONObject = {}
        for key in dict.fromkeys(key for report in reports.values() for key in report):
            values = [report[key] for report in reports.values() if key in report]
            if all(isinstance(value, int | float) for value in values):
                sums[key] = round(sum(values), 6)
            elif any(value is None for value in values):
                sums[key] = None  # the price of one is unknown
        return {**sums, "judges": reports}

    def warnings(self) -> Sequence[str]:
        """Of each, and which of them failed."""
        failed = [f"judge {name} failed: {error}" for name, error in self._errors.items()]
        return (*(warning for member in self.members for warning in member.warnings()), *failed)


def _words(plan: JSONMapping) -> str:
    """What one judge takes, in a line."""
    if not plan["requests"]:
        return "no request"
    price = plan["price_usd_at_most"]
    cost = f"the price is {plan['price_from']}" if price is None else f"{price} USD at most by {plan['price_from']}"
    return f"{plan['requests']:,} requests, {cost}"
