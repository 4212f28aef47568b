"""Comparisons for a reward model: read, split by prompt, turned into token ids. And metrics of the rewards of pairs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.errors import DataError, TemplateError
from almost_eval.files import Row
from almost_eval.models.chat import ChatTemplate, encode_text, special_tokens
from almost_eval.rewards.base import is_framed
from almost_eval.stats import mean_metric
from almost_eval.types import Conversation, JSONObject
from almost_train.common.formats import read_preferences
from almost_train.common.special_text import SpecialText, without_special
from almost_train.common.split import conversation_key, split_by_prompt
from almost_train.common.tables import read_any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALIBRATION_BINS = 10
SKIP_EMPTY = "leave out and count pairs of which an answer or the prompt is empty; otherwise the first one is refused"
"""Help of the setting `skip_empty`, which reward models and DPO share."""


@dataclass(frozen=True, slots=True)
class RewardPair:
    """One comparison, as the reward model reads it."""

    prompt_id: str
    prompt: Conversation
    chosen: Conversation
    """Prompt and better answer."""
    rejected: Conversation
    chosen_ids: tuple[int, ...] = ()
    """(T,) what the model reads; empty until encoded."""
    rejected_ids: tuple[int, ...] = ()
    margin: float | None = None
    """By how much the chosen answer's reward should be higher; None where the file does not say."""
    where: str = "a pair"
    """The file and its row, for an error."""

    def chars(self, conversation: Conversation) -> int:
        """Characters of the answer: what `conversation`, chosen or rejected, has beyond the prompt."""
        return sum(len(message.content) for message in conversation[len(self.prompt) :])


@dataclass(frozen=True, slots=True)
class PairFile:
    """The comparisons of a file or data set."""

    pairs: list[RewardPair]
    """In the order of the file."""
    format: str
    """In which they are written; see `almost_train.common.formats`."""
    input: Path | str
    """As an input of a stage; see `Table.input`."""
    empty: tuple[int, ...] = ()
    """Rows, from 1, that were left out because an answer is empty."""


@dataclass(frozen=True, slots=True)
class Comparisons:
    """What a stage that learns from comparisons reads: those for training, and held-out ones if they have a file."""

    training: PairFile
    held_out: PairFile | None

    @property
    def inputs(self) -> dict[str, Path | str]:
        """As inputs of the stage."""
        own = {"comparisons": self.training.input}
        return own | ({"eval_comparisons": self.held_out.input} if self.held_out else {})

    def split(self, eval_share: float, seed: int) -> tuple[list[RewardPair], list[RewardPair], Counter[str]]:
        """(for training, held out, dropped by reason); see `split_pairs`."""
        held_out = self.held_out.pairs if self.held_out else None
        return split_pairs(self.training.pairs, held_out, eval_share, seed)

    def empty_figures(self) -> JSONObject:
        """Of `result.json`: how many rows were left out because an answer is empty, and the first twenty of them."""
        files = {"": self.training, "eval_": self.held_out}
        return {
            f"{name}empty_answers": {"rows": len(file.empty), "first": list(file.empty[:20])}
            for name, file in files.items()
            if file and file.empty
        }

    def repeat_figures(self) -> JSONObject:
        """Of `result.json`: pairs for training that stand there before, as they are or the other way round.

        A repeated pair counts twice. Two that contradict each other teach nothing but a difference of nothing.
        """
        seen: set[tuple[object, ...]] = set()
        counts: Counter[str] = Counter()
        for pair in self.training.pairs:
            prompt = conversation_key(pair.prompt)
            chosen, rejected = (conversation_key(side[len(pair.prompt) :]) for side in (pair.chosen, pair.rejected))
            counts["repeated_pairs"] += (prompt, chosen, rejected) in seen
            counts["contradicted_pairs"] += (prompt, rejected, chosen) in seen
            seen.add((prompt, chosen, rejected))
        return {name: count for name, count in counts.items() if count}


def read_comparisons(
    comparisons: Path | str, held_out: Path | str | None, *, margin: bool | None, skip_empty: bool
) -> Comparisons:
    """The comparisons of a stage.

    Args:
        comparisons: for training.
        held_out: for measuring; None where a share of the former is.
        margin: whether the loss uses margins; None for one that has none.
        skip_empty: leave out rows of which an answer is empty, and say which.

    Raises:
        InputError: there are none, a row that cannot be read, or margins that do not fit.
    """
    training = read_pairs(comparisons, skip_empty=skip_empty)
    check_margins(comparisons, training.pairs, used=margin)
    if held_out is None:
        return Comparisons(training, None)
    measured = read_pairs(held_out, skip_empty=skip_empty)
    check_margins(held_out, measured.pairs, used=margin)  # their loss, by which the best model is kept, is the same one
    return Comparisons(training, measured)


def read_pairs(source: Path | str, *, skip_empty: bool = False) -> PairFile:
    """The comparisons of a file, or of a data set of the hub; see `read_comparisons`."""
    table = read_any(source)
    preferences = read_preferences(table, skip_empty=skip_empty)
    pairs = [
        RewardPair(
            pair.prompt_id,
            pair.prompt,
            pair.prompt + pair.chosen,
            pair.prompt + pair.rejected,
            margin=pair.margin,
            where=table.where(number),
        )
        for number, pair in zip(preferences.numbers, preferences.records, strict=True)
    ]
    return PairFile(pairs, preferences.format, table.input, preferences.empty)


def check_margins(source: Path | str, pairs: Sequence[RewardPair], *, used: bool | None) -> None:
    """Raise DataError for margins that the loss would ignore, and for a loss with margins where a pair has none."""
    lacking = sum(pair.margin is None for pair in pairs)
    if used and lacking:
        raise DataError(f"{lacking} of {len(pairs)} rows of {source} have no 'margin'; leave --margin out, or add it")
    if not used and lacking < len(pairs):
        raise DataError(
            f"{len(pairs) - lacking} of {len(pairs)} rows of {source} have a 'margin', which the loss would leave out; "
            + ("remove the column" if used is None else "give --margin, or remove the column")
        )


def split_pairs(
    pairs: Sequence[RewardPair], held_out: Sequence[RewardPair] | None, eval_share: float, seed: int
) -> tuple[list[RewardPair], list[RewardPair], Counter[str]]:
    """(for training, held out, dropped by reason): no prompt is on both sides, whatever its id."""
    split = split_by_prompt(pairs, held_out, lambda pair: conversation_key(pair.prompt), eval_share, seed)
    return split.training, split.held_out, Counter({"prompt_in_eval": split.dropped} if split.dropped else {})


def plain_pairs(
    pairs: Sequence[RewardPair], special: SpecialText, *, skip: bool
) -> tuple[list[RewardPair], Counter[str]]:
    """The pairs whose texts hold no special token, and how many others were left out; see `without_special`."""
    plain, others = without_special(
        pairs, special, lambda pair: pair.chosen + pair.rejected, lambda pair: pair.where, skip=skip
    )
    return plain, Counter({"special_token": len(others)} if others else {})


def encode_pairs(
    pairs: Sequence[RewardPair], encode: Callable[[Conversation], list[int]], limit: int, pad: int
) -> tuple[list[RewardPair], Counter[str]]:
    """The pairs with their token ids, and how many could not be used, by reason.

    Raises:
        TemplateError: a dialogue that the template refuses; with its file and row.
    """
    dropped: Counter[str] = Counter()
    usable = []
    for pair in pairs:
        try:
            chosen, rejected = tuple(encode(pair.chosen)), tuple(encode(pair.rejected))
        except TemplateError as error:
            raise TemplateError(f"{pair.where}: {error}") from None
        if chosen == rejected:
            dropped["same_text"] += 1
        elif max(len(chosen), len(rejected)) > limit:
            dropped["too_long"] += 1
        elif pad in (chosen[-1], rejected[-1]):  # transformers would take it for padding
            dropped["ends_in_pad_token"] += 1
        else:
            usable.append(replace(pair, chosen_ids=chosen, rejected_ids=rejected))
    return usable, dropped


def no_pair(comparisons: Path | str, dropped: Counter[str]) -> DataError:
    """The error of comparisons of which none can be trained on."""
    advice = {
        "too_long": "raise --max-length",
        "special_token": "their texts hold special tokens",
        "same_text": "chosen and rejected must differ",
        "prompt_in_eval": "the held-out file has all of their prompts",
    }
    why = advice.get(max(dropped, key=lambda reason: dropped[reason]), "") if dropped else "all are held out"
    told = f"{comparisons} leaves no pair to train on (dropped: {dict(dropped)})"
    return DataError(f"{told}; {why}" if why else told)


# --- tokens ---


def reward_encoder(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> Callable[[Conversation], list[int]]:
    """Conversation -> token ids, as `almost_eval.rewards.hf.HFRewardModel` reads it."""
    if is_framed(tokenizer):  # an encoder's tokenizer adds its own markers, [CLS] ... [SEP]
        return lambda conversation: list(tokenizer.encode(template.render(conversation)))
    tokens = special_tokens(tokenizer)
    return lambda conversation: encode_text(tokenizer, template.render(conversation, special_tokens=tokens))


# --- how good the rewards are ---


def pair_metrics(rows: Sequence[Row]) -> JSONObject:
    """What the rewards of held-out pairs say.

    A pair is right where the chosen answer's reward is the higher; equal rewards are wrong, and counted as `ties`.
    Accuracies have Wilson's interval over pairs; `accuracy_by_prompt` has the one that counts only prompts as
    independent. `longer_wins` is the accuracy of choosing the longer answer (characters; equal lengths count half).
    `calibration_error` is the expected one over ten bins of confidence sigmoid(|margin|), 0.5 to 1.
    """
    margins = [row["chosen_reward"] - row["rejected_reward"] for row in rows]
    longer = [row["chosen_chars"] - row["rejected_chars"] for row in rows]
    right = [float(margin > 0) for margin in margins]
    every = [row[f"{side}_reward"] for row in rows for side in ("chosen", "rejected")]
    chars = [row[f"{side}_chars"] for row in rows for side in ("chosen", "rejected")]
    return {
        "pairs": len(rows),
        "accuracy": mean_metric(right).to_dict(),
        "accuracy_by_prompt": mean_metric(right, [row["prompt_id"] for row in rows]).to_dict(),
        "accuracy_chosen_shorter": mean_metric([r for r, d in zip(right, longer, strict=True) if d < 0]).to_dict(),
        "accuracy_chosen_longer": mean_metric([r for r, d in zip(right, longer, strict=True) if d > 0]).to_dict(),
        "longer_wins": mean_metric([0.5 if d == 0 else float(d > 0) for d in longer]).to_dict(),
        "ties": sum(margin == 0 for margin in margins),
        "calibration_error": calibration_error(margins),
        "length_correlation": _pearson(every, chars),
        "mean_margin": math.fsum(margins) / len(margins) if margins else None,
    }


def calibration_error(margins: Sequence[float], bins: int = CALIBRATION_BINS) -> float | None:
    """Sum over bins of share * |accuracy - mean confidence|, with confidence sigmoid(|margin|); None for no pairs."""
    if not margins:
        return None
    held: dict[int, list[tuple[float, bool]]] = {}
    for margin in margins:
        confidence = 1 / (1 + math.exp(-min(abs(margin), 700.0)))
        held.setdefault(min(int((confidence - 0.5) * 2 * bins), bins - 1), []).append((confidence, margin > 0))
    gaps = (abs(sum(right for _, right in each) - math.fsum(sure for sure, _ in each)) for each in held.values())
    return math.fsum(gaps) / len(margins)


def _pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """None where either is constant."""
    import numpy as np

    if len(x) < 2 or not np.ptp(x) or not np.ptp(y):
        return None
    return float(np.corrcoef(x, y)[0, 1])
