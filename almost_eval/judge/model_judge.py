"""A judge that is a model behind an API: what it is sent, what that costs, and what becomes of its replies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import overload

from almost_eval.errors import InputError
from almost_eval.judge.api.batch_files import batch_facts
from almost_eval.judge.api.batch_ledger import under_way
from almost_eval.judge.api.bills import ClientStats
from almost_eval.judge.api.client import JudgeClient
from almost_eval.judge.api.connection import Connection
from almost_eval.judge.api.cost import Budget, estimate, price_of, retirement_of
from almost_eval.judge.api.endpoint import THOUGHT_ONLY
from almost_eval.judge.api.endpoints import judge_endpoints
from almost_eval.judge.api.journal import Journal, Ledger
from almost_eval.judge.judges import UNPARSED, Judgement, shown, verdict_fields
from almost_eval.judge.modes import check_mode, fields_of
from almost_eval.judge.probabilities import tells
from almost_eval.judge.prompts import JudgePrompts
from almost_eval.judge.raised import amended, was_cut
from almost_eval.judge.records import Failure, JudgeRequest, Question, Reply, Subject, Unparsed
from almost_eval.types import JSONMapping, JSONObject, SampleRecord

MOST_ALONE = 3
"""Requests that are sent one by one to learn whether an endpoint tells probabilities; failures say nothing of it."""


class ModelJudge:
    """A model behind an API.

    Args:
        name: the model, as the provider calls it.
        prompts: what it is shown, and how its reviews are read.
        connection: how to reach it.
        options: more fields of each request's body: a reasoning effort, and whatever the judge takes.
        reask: whether a review that cannot be read is requested once more.
        dry: nothing will be sent, so that no key is needed.

    Raises:
        InputError: no key, a key in the address, an unknown price where one is needed.
    """

    kind = "model"

    def __init__(
        self,
        name: str,
        prompts: JudgePrompts,
        connection: Connection,
        *,
        options: JSONMapping | None = None,
        reask: bool = False,
        dry: bool = False,
    ) -> None:
        self.name = name
        self.prompts = prompts
        self.connection = connection
        self.options = dict(options or {})
        check_mode(prompts.verdict, prompts.kind, self.options)
        self._fields = fields_of(prompts.verdict, prompts.kind) | self.options
        self._tells = prompts.verdict != "logprobs"
        self.companions: Sequence[ModelJudge] = ()
        """The other judges of a panel behind an API: one bound holds for what all of them spend."""
        self._reask = reask
        self._client: JudgeClient | None = None
        self._stats = ClientStats()
        self._ledger: JSONObject = {}
        self._announced: dict[int, Requests] = {}
        Budget(connection.max_cost, **connection.prices, judge=name)
        if not dry:
            endpoints = judge_endpoints(name, connection.judge_base_url, connection.timeout)
            retired, today = retirement_of(name), date.today().isoformat()
            if retired and any(one.is_openai for one in endpoints) and retired.date <= today:
                raise InputError(f"--judge {name}: {retired.words(name, today)} ({retired.source}); name another judge")

    def spec(self) -> JSONObject:
        """What it is shown, and where."""
        return {
            "name": self.name,
            "kind": self.kind,
            "family": self.prompts.name,
            "form": self.prompts.kind,
            "prompt_set": {"name": self.prompts.prompt_set, "digest": self.prompts.digest},
            "temperature": self.prompts.temperature,
            "max_tokens": self.prompts.max_tokens,
            **({} if self.prompts.verdict == "text" else {"verdict": self.prompts.verdict}),
            **({"options": self.options} if self.options else {}),
        }

    def amend(self, stored: JSONObject, now: JSONObject) -> tuple[JSONObject, JSONObject]:
        """A stored spec and the present one, where the run goes on with a higher bound on tokens; see `raised`."""
        return amended(stored, now, self.prompts)

    def check(self, questions: Sequence[Question]) -> None:
        """Refuse questions of several turns where the prompts know one only.

        Raises:
            InputError: they do.
        """
        if any(question.later for question in questions) and not self.prompts.for_later_turns:
            raise InputError(
                f"the prompts {self.prompts.name} ({self.prompts.prompt_set}) have no words for a second turn; use "
                "--prompt-family mt-bench, or --turns 1"
            )

    def plan(self, pairs: Sequence[Subject], folder: Path | None, repeats: int = 1) -> JSONObject:
        """Requests that no reply in the folder's journal answers, their tokens and their price, at most."""
        prices = self.connection.prices
        places = range(len(pairs))
        requests = (r for k in range(repeats) for r in self._requests(pairs, places, k))
        file = folder / "journal.sqlite" if folder else None
        with Journal(file) if file and file.is_file() else nullcontext() as journal:
            batch = self.connection.batch
            ahead = None if not batch else 1 if not journal or not journal.has_reply_of(self.name) else 0
            needed = estimate(requests, **prices, journal=journal, less=under_way(journal), ahead=ahead)
            spent = self._spent(journal) if journal else {}
        price, retired = price_of(self.name, **prices), retirement_of(self.name)
        source = f"{price.source} {price.date}".strip() if price else "unknown: give --price-in and --price-out"
        return {
            "requests": needed.requests,
            "answered_by_the_journal_or_the_same": len(pairs) * repeats - needed.requests - needed.n_under_way,
            "prompt_tokens_at_most": needed.prompt_tokens,
            "completion_tokens_at_most": needed.completion_tokens,
            "price_usd_at_most": None if needed.price is None else round(needed.price, 4),
            "price_from": source,
            **batch_facts(needed, price, batch=bool(batch)),
            **spent,
            **({"retires": retired.words(self.name, date.today().isoformat())} if retired else {}),
            "prompt": shown(self.prompts.messages(pairs[0])),
        }

    @contextmanager
    def open(self, folder: Path, notice: Callable[[str], None] | None = None) -> Iterator[None]:
        """Inside, there is a client, and every reply is kept in `journal.sqlite`."""
        connection = self.connection
        with Journal(folder / "journal.sqlite") as journal:
            budget = Budget(connection.max_cost, **connection.prices, judge=self.name)
            # What was sent before counts, and what the others of a panel have spent.
            budget.spent = sum(judge.spent_in(journal) for judge in (self, *self.companions))
            self._client = JudgeClient(
                self.name,
                journal,
                base_url=connection.judge_base_url,
                timeout=connection.timeout,
                concurrency=connection.concurrency,
                budget=budget,
                notice=notice,
                batch=bool(connection.batch),
                batch_wait=connection.batch_wait,
            )
            self._stats = self._client.stats
            try:
                yield
            finally:
                self._ledger = self._spent(journal)
                self._client = None

    def spent_in(self, journal: Journal) -> float:
        """USD that this judge has spent in the folder of a journal, at most."""
        budget = Budget(**self.connection.prices, judge=self.name)
        return sum(budget.of_ledger(self._ledger_in(journal)))

    def _ledger_in(self, journal: Journal) -> Ledger:
        return journal.ledger(self.name if self.companions else None)

    def _spent(self, journal: Journal) -> JSONObject:
        """What all runs in the folder of a journal were billed, and may have been billed beside it."""
        ledger = self._ledger_in(journal)
        facts: JSONObject = {"cost_uncertain_requests_all_runs": ledger.n_unsure}
        budget = Budget(**self.connection.prices, judge=self.name)
        if not budget.is_known(ledger) or (budget.price is None and not ledger.entries):
            return facts
        billed, unsure = budget.of_ledger(ledger)
        return {
            "cost_usd_all_runs": round(billed + unsure, 6),
            "of_it_uncertain_usd": round(unsure, 6),
            **facts,
        }

    def asks_again(self, record: SampleRecord) -> bool:
        """A review that was cut at a lower bound; with `reask` one that cannot be read, and was requested once only."""
        if was_cut(record, self.prompts.max_tokens):
            return True
        return self._reask and record.score.reason == UNPARSED and record.outputs.get("attempt") == 0

    def stream(
        self, pairs: Sequence[Subject], wanted: Sequence[int], attempt: int = 0
    ) -> Iterator[tuple[int, Judgement]]:
        """See `Judge.stream`; what cannot be read is requested once more at the end, as `attempt` + 1."""
        again = []
        for index, judgement in self._ask(pairs, wanted, attempt):
            if self._reask and judgement.reason == UNPARSED:
                again.append(index)
            else:
                yield index, judgement
        if again:
            yield from self._ask(pairs, again, attempt + 1)

    def announce(self, pairs: Sequence[Subject], wanted: Sequence[int], attempt: int) -> None:
        """Say what a later `stream` will be called with, so that one batch holds it all."""
        self._announced[attempt] = self._requests(pairs, wanted, attempt)

    def report(self) -> JSONObject:
        """The client's counts: what was sent, stored already, sent again, and what it cost."""
        stats = self._stats
        return {
            "requests_sent": stats.sent,
            "replies_stored_before": stats.cached,
            "sent_again": dict(stats.retried),
            "cost_usd": None if stats.cost is None else round(stats.cost, 6),
            "cost_uncertain_usd": None if stats.cost is None else round(stats.cost_unsure, 6),
            "cost_uncertain_requests": stats.unmetered,
            **(self._spent(self._client.journal) if self._client else self._ledger),
        }

    def warnings(self) -> Sequence[str]:
        """That the judge is to be shut down, or its name is of one that was; that an endpoint was lost."""
        retired = retirement_of(self.name)
        words = (retired.words(self.name, date.today().isoformat()),) if retired else ()
        return (*words, *(f"lost on the way: {address}" for address in self._stats.lost))

    def _ask(self, pairs: Sequence[Subject], wanted: Sequence[int], attempt: int) -> Iterator[tuple[int, Judgement]]:
        assert self._client is not None  # `open`
        self._client.ahead = later = [requests for number, requests in self._announced.items() if number > attempt]
        if self.companions:
            for requests in later:
                self._client.journal.name_judge(self.name, (request.digest for request in requests))
        at = 0
        while at < len(wanted):
            # One by one until it is known that the endpoint tells probabilities: without them all is spent for nothing.
            # In a batch it is the request that goes ahead that shows it, or the replies that are there.
            is_shown = self.connection.batch and self._client.journal.has_reply_of(self.name)
            count = 1 if not self._tells and at < MOST_ALONE and not is_shown else len(wanted) - at
            part = wanted[at : at + count]
            if self.companions:
                requests = self._requests(pairs, part, attempt)
                self._client.journal.name_judge(self.name, (request.digest for request in requests))
            for place, answer in self._client.stream(self._requests(pairs, part, attempt)):
                self._check_telling(answer)
                yield part[place], judgement_of(self.prompts, pairs[part[place]], answer, attempt)
            at += count

    def _check_telling(self, answer: Reply | Failure) -> None:
        """End with an InputError where the endpoint's first reply has no probabilities, though they were requested."""
        if self._tells or not isinstance(answer, Reply):
            return
        if not tells(answer.logprobs):
            raise InputError(
                f"the endpoint tells no log-probabilities of {self.name} (its first reply holds none; nothing more was "
                "sent): give --verdict json or text with another --output, or another judge"
            )
        self._tells = True

    def _requests(self, pairs: Sequence[Subject], wanted: Sequence[int], attempt: int) -> Requests:
        return Requests(self.name, self.prompts, pairs, wanted, attempt, self._fields)


@dataclass(frozen=True, eq=False)
class Requests(Sequence[JudgeRequest]):
    """What is sent for the wanted pairs, each rendered when it is looked at: ten thousand prompts fill a memory."""

    judge: str
    prompts: JudgePrompts
    pairs: Sequence[Subject]
    wanted: Sequence[int]
    attempt: int
    options: JSONMapping = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.wanted)

    @overload
    def __getitem__(self, place: int) -> JudgeRequest: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[JudgeRequest]: ...

    def __getitem__(self, place: int | slice) -> JudgeRequest | Sequence[JudgeRequest]:
        if isinstance(place, slice):
            return replace(self, wanted=self.wanted[place])
        messages, prompts = self.prompts.messages(self.pairs[self.wanted[place]]), self.prompts
        return JudgeRequest(self.judge, messages, prompts.temperature, prompts.max_tokens, self.attempt, self.options)


def judgement_of(prompts: JudgePrompts, pair: Subject, answer: Reply | Failure, attempt: int = 0) -> Judgement:
    """A reply read, or a failure as it is."""
    if isinstance(answer, Failure):
        about: JSONObject = {"review": None, "problem": answer.message, "attempt": attempt}
        if answer.reason == THOUGHT_ONLY:
            about["max_tokens"] = prompts.max_tokens
        return Judgement(None, answer.reason, about)
    verdict = prompts.parse(answer.text, pair, answer.finish_reason, answer.parameters, answer.logprobs)
    outputs = {
        # A reply may hold half a surrogate pair, which no file can.
        "review": answer.text.encode("utf-8", "replace").decode("utf-8"),
        **verdict_fields(verdict),
        "finish_reason": answer.finish_reason,
        "judge_model": answer.model,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "attempt": attempt,
        "parameters": dict(answer.parameters),
    }
    if answer.logprobs is not None:
        outputs["logprobs"] = [[token, [list(other) for other in others]] for token, others in answer.logprobs]
    if answer.thinking:
        outputs["thinking"] = answer.thinking.encode("utf-8", "replace").decode("utf-8")
    if answer.reasoning_tokens or answer.cached_tokens:
        outputs |= {"reasoning_tokens": answer.reasoning_tokens, "cached_tokens": answer.cached_tokens}
    if quoted := prompts.neutralised(pair):
        outputs["markers_quoted"] = quoted
    if wrong := prompts.wrong_references(pair):
        outputs["wrong_references"] = wrong
    if isinstance(verdict, Unparsed):
        return Judgement(None, UNPARSED, outputs | {"problem": verdict.reason})
    return Judgement(verdict, None, outputs)
