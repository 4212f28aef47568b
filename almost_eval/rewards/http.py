"""Rewards over HTTP, of two kinds of servers behind one class.

- `rewards`: ALMoST's gateway, or whatever answers `POST /v1/rewards` with `{"rewards": [...]}` to
  `{"conversations": [[{"role", "content"}, ...], ...]}`. The server writes the conversations as text.
- `classify`: vLLM's server of a reward model (`/classify` beside `/v1`). The conversations are encoded here, where the
  checkpoint is at hand, and sent as token ids with `use_activation: false`; else the server's own template writes them.

One request before the start tells which kind of server it is, and whether its rewards are raw logits. Of several
servers each is sent some more conversations: their rewards must agree, or whose they are would depend on who answered
first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, NoReturn, Unpack

from almost_eval.engines.openai_client import ClientOptions, EndpointModel, OpenAIClient, post_json, vllm_version
from almost_eval.errors import InputError, ModelError
from almost_eval.models.chat import ChatTemplate, dialogue_text
from almost_eval.models.endpoints import EndpointAddress
from almost_eval.rewards.base import ARCHITECTURES, StreamedRewards
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import Conversation, JSONObject, Message

if TYPE_CHECKING:
    import openai

PROBE: Conversation = (
    Message("user", "What is the capital of France?"),
    Message("assistant", "The capital of France is Paris."),
)
PARITY: tuple[Conversation, ...] = (
    PROBE,
    (Message("user", "What is the capital of France?"), Message("assistant", "I would rather not say, you fool.")),
    (
        Message("user", "Name an animal that swims."),
        Message("assistant", "An otter."),
        Message("user", "What does it eat?"),
        Message("assistant", "It eats fish, and 12 times 12 is 144."),
    ),
)
"""What several servers are compared on."""
TOLERANCE = 0.1
"""By which a raw logit of several servers may differ, and beside it 2 % of its size: several times what half precision
on two kinds of hardware does."""
_ABSENT = (404, 405, 501)


@dataclass(frozen=True, slots=True)
class _Server:
    """One of the servers, before the start."""

    address: EndpointAddress
    client: openai.OpenAI
    kind: str
    """See `HTTPRewardModel.kind`."""
    name: str
    """Of the reward model, as the server tells it."""
    card: JSONObject
    """What its `/v1/models` says of it."""

    @property
    def shown(self) -> str:
        """The address, as it is shown."""
        return self.address.shown

    def knows_the_field(self) -> bool:
        """Whether this is a vLLM that has `use_activation`: 0.31 and later, read in its source."""
        version = re.match(r"(\d+)\.(\d+)", vllm_version(self.client, self.address, self.card) or "")
        return version is not None and (int(version[1]), int(version[2])) >= (0, 31)


class HTTPRewardModel(OpenAIClient, StreamedRewards):
    """A reward model behind an address, or behind several that serve the same.

    Args:
        model: the name it is served under, or None for whatever is served.
        tokenizer: the reward model's checkpoint, from which conversations are encoded here; None is the model's own
            where its name, or what vLLM's server says it has loaded, is a folder here. Only for `classify`.
        template: how a conversation is written; only where it is encoded here.
        max_length: a context length below the server's.
        client: see `ClientOptions`.

    Raises:
        InputError: see `OpenAIClient`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        tokenizer: str | None = None,
        template: ChatTemplate | str | None = None,
        max_length: int | None = None,
        **client: Unpack[ClientOptions],
    ) -> None:
        super().__init__(model, **client)
        self._tokenizer = tokenizer
        self._template = template
        self._max_length = max_length
        self.kind = ""
        """`rewards` or `classify`; known after `check`."""
        self.warnings: list[str] = []
        """What the last `stream` did that its caller should show."""

    # --- the server ---

    def check(self) -> None:
        """Find out which kind of server this is, once.

        Raises:
            InputError: it is down, serves no such model, gives no rewards, or gives probabilities in their place; of
                several, one that answers is of another kind than the rest, or gives other rewards.
        """
        if self.kind:
            return
        servers = [self._identified(address, served) for address, served in self._served()]
        first = servers[0]
        if other := next((one for one in servers if (one.kind, one.name) != (first.kind, first.name)), None):
            raise InputError(
                f"the endpoint {other.shown} serves {other.name!r} by /{other.kind}, and {first.shown} serves "
                f"{first.name!r} by /{first.kind}: all must serve the same reward model in the same way"
            )
        self._adopt([one.card for one in servers])
        if len(servers) > 1:
            _compare({one.shown: self._rewards_of(one, PARITY) for one in servers})
        self.model = self.model or first.name
        self.kind = first.kind

    def _identified(self, address: EndpointAddress, served: dict[str, JSONObject]) -> _Server:
        """What one server is, by a request to it; `served` is what it lists.

        Raises:
            InputError: see `check`.
        """
        import openai

        # A gateway lists its policy; the reward model behind it shows in the answer alone.
        card = served.get(self.model) or (next(iter(served.values())) if len(served) == 1 else {})
        server = _Server(address, self.client if len(self._reachable) == 1 else self._client(address), "", "", card)
        try:
            kind, name = self._probe_rewards(server) or self._probe_classify(server)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            self._refuse(server, f"it answers {error.status_code}: {self.words(error)}")
        except openai.NotFoundError as error:
            self._refuse(server, f"it knows neither /v1/rewards nor /classify, or no such model ({self.words(error)})")
        except openai.OpenAIError as error:
            self.fail(error, "/rewards")
        except (AttributeError, LookupError, TypeError, ValueError):
            self._refuse(server, "it answers with something else than one number for a conversation")
        if self.model and name and name != self.model:
            raise InputError(f"the endpoint {server.shown} serves the reward model {name!r}, not {self.model!r}")
        if kind == "rewards":
            card = served.get(name, {})
            if self._template or self._tokenizer or self._max_length:
                raise InputError(
                    f"{server.shown} writes the conversations itself: leave out --template, --tokenizer, --max-length"
                )
        return replace(server, kind=kind, name=name, card=card)

    def _probe_rewards(self, server: _Server) -> tuple[str, str] | None:
        import openai

        try:
            answer = post_json(server.client, "rewards", self._fields() | {"conversations": [_messages(PROBE)]})
        except openai.APIStatusError as error:
            code = error.body.get("code") if isinstance(error.body, dict) else None
            if error.status_code in _ABSENT and code != "model_not_found":
                return None
            raise
        [reward] = answer["rewards"]
        float(reward)
        return "rewards", str(answer.get("model") or "")

    def _probe_classify(self, server: _Server) -> tuple[str, str]:
        url = server.address.beside("/classify")
        body = self._fields() | {"messages": _messages(PROBE)}
        answers = [post_json(server.client, url, body | {"use_activation": on}) for on in (False, True)]
        raw, activated = (_one_number(answer) for answer in answers)
        # A server that does not know the field gives a sigmoid, or a raw logit, both times: which, cannot be told
        # from a number between 0 and 1. (One that was started without a sigmoid never applies one.)
        obeyed = abs(activated - 1 / (1 + math.exp(-max(raw, -700.0)))) <= 1e-3 < abs(activated - raw)
        if not obeyed and 0 <= raw <= 1 and not server.knows_the_field():
            why = f"its rewards seem to be probabilities ({raw:.3f}), and raw logits cannot be asked of it"
            self._refuse(server, why)
        return "classify", str(answers[0].get("model") or "")

    def _rewards_of(self, server: _Server, conversations: Sequence[Conversation]) -> list[float]:
        """Raw logits from one server of several, written by its own template.

        Raises:
            InputError: it refuses them.
        """
        import openai

        try:
            if server.kind == "rewards":
                body = self._fields() | {"conversations": [_messages(one) for one in conversations]}
                rewards = [float(reward) for reward in post_json(server.client, "rewards", body)["rewards"]]
                if len(rewards) != len(conversations):
                    raise ValueError
                return rewards
            url, fields = server.address.beside("/classify"), self._fields() | {"use_activation": False}
            bodies = (fields | {"messages": _messages(one)} for one in conversations)
            return [_one_number(post_json(server.client, url, body)) for body in bodies]
        except (openai.OpenAIError, LookupError, TypeError, ValueError) as error:
            reason = self.words(error) if isinstance(error, openai.APIStatusError) else type(error).__name__
            self._refuse(server, f"the conversations that all endpoints are compared on fail ({reason})")

    def _fields(self) -> JSONObject:
        return {"model": self.model} if self.model else {}

    def _refuse(self, server: _Server, reason: str) -> NoReturn:
        raise InputError(
            f"the endpoint {server.shown} gives no rewards: {reason}; give the address of almost-serve gateway or of "
            "almost-serve reward, up to and with /v1"
        ) from None

    @cached_property
    def checkpoint(self) -> EndpointModel:
        """The served model, in the place of the files it was loaded from."""
        self.check()
        return self.served_model(ARCHITECTURES)

    # --- text ---

    @cached_property
    def reader(self) -> HFRewardModel | None:
        """What encodes the conversations here, or None where the server does; it loads no weights.

        Raises:
            ModelError: `tokenizer` is no reward model.
        """
        self.check()
        if self.kind == "rewards":
            return None
        name = self._tokenizer or self.root
        if name is None:
            if self._template:
                raise InputError("--template needs the reward model's checkpoint here: give it with --tokenizer")
            return None
        try:
            return HFRewardModel(  # its tokenizer alone: no weight is loaded
                name, template=self._template, device="cpu", allow_unused_weights=True
            )
        except ModelError:
            if self._tokenizer or self._template:
                raise
            return None  # what the server names cannot be read here (pickles, say): its own template has to do

    @property
    def template(self) -> ChatTemplate | None:
        """How conversations are written, or None where the server writes them."""
        return self.reader.template if self.reader else None

    @property
    def context_length(self) -> int | None:
        """Tokens that the server takes, or None where it does not say or counts them itself."""
        if self.reader is None:
            return None
        known = [n for n in (self._max_length, self.context_limit, self.reader.context_length) if n is not None]
        return min(known)

    def settings(self) -> JSONObject:
        """What belongs in a run's spec: what decides the numbers, as far as the server tells."""
        self.check()
        return {
            "name": self.name,
            "base_url": self.endpoint,
            "model": self.model,
            "server": self.server,
            "dtype": None,
            "device": None,
            "context_length": self.context_length,
            "route": self.kind,
        }

    def render(self, conversation: Conversation) -> str:
        """What the model reads; the bare dialogue where the server writes it."""
        return self.reader.render(conversation) if self.reader else dialogue_text(conversation)

    def lengths(self, conversations: Sequence[Conversation]) -> list[int]:
        """Tokens of every conversation; 0 where the server counts them."""
        return self.reader.lengths(conversations) if self.reader else [0] * len(conversations)

    # --- rewards ---

    def stream(
        self,
        conversations: Sequence[Conversation],
        wanted: Collection[int] | None = None,
        sample_of: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, float]]:
        """Yield (index, reward) of each wanted conversation as soon as it is known.

        The reward is NaN for a conversation that the server refuses, which `warnings` then tells.

        Raises:
            InputError: see `check`.
            RunError: the server still fails after the retries.
        """
        self.warnings = []
        owners: dict[Conversation, list[int]] = {}
        for index in sorted(range(len(conversations)) if wanted is None else wanted):
            owners.setdefault(tuple(conversations[index]), []).append(index)
        if not owners:
            return
        self.check()
        reader = self.reader  # made here, not in the threads
        refused: list[str] = []
        for conversation, (reward, reason) in self.ask_all(iter(owners), lambda one: self._ask(one, reader)):
            if reason is not None:
                refused.append(reason)
            yield from ((index, reward) for index in owners[conversation])
        if refused:
            self.warnings.append(f"the server refused {len(refused)} conversations, first: {refused[0]}")
        self.warnings += self.lost

    def _ask(self, conversation: Conversation, reader: HFRewardModel | None) -> tuple[float, str | None]:
        """(reward, None), or (NaN, the server's reason)."""
        import openai

        try:
            if self.kind == "rewards":
                body = self._fields() | {"conversations": [_messages(conversation)]}
                [reward] = post_json(self.client, "rewards", body)["rewards"]
                return float(reward), None
            body = {"input": reader.encode([conversation])[0]} if reader else {"messages": _messages(conversation)}
            body |= self._fields() | {"use_activation": False}
            return _one_number(post_json(self.client, self.address.beside("/classify"), body)), None
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return math.nan, self.words(error)
        except openai.OpenAIError as error:
            self.fail(error, f"/{self.kind}")
        except (AttributeError, LookupError, TypeError, ValueError):
            raise self.unreadable("rewards") from None


def _compare(rewards: dict[str, list[float]]) -> None:
    """Refuse an endpoint whose rewards (of the same conversations, by its address) are not those of the others.

    Raises:
        InputError: one differs; it is named with the conversation that shows it.
    """
    for at, conversation in enumerate(PARITY):
        values = {shown: row[at] for shown, row in rewards.items()}
        if silent := next((shown for shown, value in values.items() if not math.isfinite(value)), None):
            raise InputError(
                f"the endpoint {silent} gives other rewards than the rest: {values[silent]} for "
                f"{conversation[-1].content!r}; leave it out"
            )
        middle = median(values.values())
        furthest = max(values, key=lambda shown: abs(values[shown] - middle))
        spread = max(values.values()) - min(values.values())
        if spread > TOLERANCE + 0.02 * abs(middle):
            said = ", ".join(f"{shown}: {value:.3f}" for shown, value in values.items())
            raise InputError(
                f"the endpoint {furthest} gives other rewards than the rest ({said}, for "
                f"{conversation[-1].content!r}): serve the same reward model in the same number format, or leave it out"
            )


def _messages(conversation: Conversation) -> list[dict[str, str]]:
    return [message.to_dict() for message in conversation]


def _one_number(answer: JSONObject) -> float:
    [data] = answer["data"]
    [value] = data["probs"]
    return float(value)
