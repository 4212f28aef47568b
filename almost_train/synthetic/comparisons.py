"""`synthesize comparisons`: pairs of answers by rank, filtered, in TRL's preference format.

ALMoST (arXiv 2305.13735, section 2.1). The filters are applied in this order; a dropped pair is kept in a file of its
own, with the reason:

1. `responses`, `length`, `one_win_a_rank`: the heuristic filter, see `ranking`.
2. `identical`: both answers are the same text (ours; the official code keeps such a pair).
3. `as_is`: a reward model trained on another source of preferences must agree (the paper's second filter; the official
   code does not have it).
4. `balance`: a departure of ours, off by default. The length rule drops only pairs whose chosen answer is the shorter:
   labels get better, but longer answers win more often. `balance_length` keeps as many pairs with the longer answer
   chosen as with the shorter, so that length tells nothing about the label.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from almost_eval.errors import DataError, RunError
from almost_eval.files import Row, write_rows
from almost_eval.models.checkpoint import Checkpoint, find_checkpoint
from almost_eval.progress import Progress
from almost_eval.types import JSONObject, Message
from almost_train.common.config import option
from almost_train.common.records import Preference
from almost_train.common.resume import RowLog
from almost_train.common.stage import Stage, model_input
from almost_train.synthetic.ranking import RankedAnswer, RankedPair, Ranking, ranked_pairs, read_ranking
from almost_train.synthetic.responses import read_prompts
from almost_train.synthetic.sampling import derived_rng

_HEURISTIC = {"responses": "bad_response", "length": "length_rule", "one_win_a_rank": "rank_has_pair"}
"""Step of the heuristic filter -> the reason that `ranking` gives."""


@dataclass(frozen=True, slots=True)
class ComparisonSettings:
    """Settings of `synthesize comparisons`; the defaults are the official ones."""

    length_rule: bool = option(True, "Drop pairs whose chosen answer is shorter and far below the mean length.")
    pairs: str = option(
        "official", "Pairs of a prompt: at most one win for each rank, or all.", choices=("official", "all")
    )
    drop_identical: bool = option(True, "Drop pairs of two equal texts.")
    balance_length: bool = option(False, "Keep as many pairs with the longer answer chosen as with the shorter.")
    seed: int = option(0, "Seed of the draw of balance-length.", least=0)
    device: str = option("auto", "Where the as-is reward model runs.")


def synthesize_comparisons(
    settings: ComparisonSettings,
    responses: Path,
    ranking: Path,
    output: Path,
    *,
    as_is_reward_model: str | None = None,
    progress: Progress | None = None,
) -> JSONObject:
    """Write `comparisons.jsonl` and `comparisons.rejected.jsonl` (the same with `reason`) under `output`.

    A row has prompt, chosen and rejected as messages, chosen_source, rejected_source and prompt_id; after the as-is
    filter also chosen_as_is_reward and rejected_as_is_reward (raw logits).

    Args:
        settings: which filters to apply.
        responses: the folder of `synthesize responses`.
        ranking: `ranking.yaml`: see `read_ranking`. Configurations that it does not name are left out
            (metrics.not_ranked).
        output: the stage's folder.
        as_is_reward_model: a reward model's checkpoint for the second filter, or None.
        progress: where to report.

    Returns:
        `result.json`: metrics.filters says of each filter what went in and came out, what it dropped for which reason,
        and the share of its pairs whose chosen answer is the longer.

    Raises:
        InputError: a ranking that is malformed or names a configuration without answers; answers to other prompts; a
            reward model that cannot be loaded; a folder of another run.
        RunError: no pair is left.
    """
    checkpoint: Checkpoint | None = None
    if as_is_reward_model:  # a wrong checkpoint is refused here; the weights are loaded when the first pair needs them
        checkpoint = find_checkpoint(as_is_reward_model, architectures=("SequenceClassification", "RewardModel"))
    groups = read_ranking(ranking)
    files = _files(groups, responses)
    prompts, answers = _read_answers(files)
    inputs: dict[str, Path | str] = {"ranking": str([list(group) for group in groups])}
    inputs |= {f"responses {name}": file for name, file in files.items()}
    if as_is_reward_model:
        inputs["as_is_reward_model"] = model_input(as_is_reward_model)
    with Stage(output, "synthesize-comparisons", settings, inputs) as stage:
        if stage.result is not None:
            return stage.result
        funnel = _Funnel(prompts, _ranked(settings, groups, answers))
        # 1. The heuristic filter.
        for name, reason in _HEURISTIC.items():
            funnel.drop(name, {i: reason for i in funnel.kept if funnel.pairs[i].reason == reason})
        if settings.drop_identical:
            same = [i for i in funnel.kept if funnel.pairs[i].chosen.text == funnel.pairs[i].rejected.text]
            funnel.drop("identical", dict.fromkeys(same, "identical"))
        # 2. The as-is reward model.
        if checkpoint:
            with RowLog(output / ".as_is.jsonl") as log:
                funnel.rewards = _rewards(checkpoint, settings.device, funnel, log, progress or Progress())
            funnel.drop("as_is", _disagreements(funnel))
        # 3. Length balance.
        if settings.balance_length:
            funnel.drop("balance", _surplus(funnel, settings.seed))
        not_ranked = sorted({file.stem for file in responses.glob("*.jsonl")} - files.keys())
        # 4. The outputs.
        result = funnel.finish(stage, {"not_ranked": not_ranked})
        (output / ".as_is.jsonl").unlink(missing_ok=True)
        return result


# --- input ---


def _files(ranking: Ranking, responses: Path) -> dict[str, Path]:
    """Configuration -> its file, for all of the ranking."""
    files = {name: responses / f"{name}.jsonl" for group in ranking for name in group}
    absent = [name for name, file in files.items() if not file.is_file()]
    if absent:
        there = ", ".join(sorted(file.stem for file in responses.glob("*.jsonl"))) or "none"
        raise DataError(f"{responses} has no answers of the ranked configuration {absent[0]!r}; it has: {there}")
    return files


def _read_answers(files: Mapping[str, Path]) -> tuple[dict[str, str], dict[str, dict[str, RankedAnswer]]]:
    """Prompt id -> prompt, and prompt id -> configuration -> answer; ids in the order of the first file."""
    prompts: dict[str, str] = {}
    answers: dict[str, dict[str, RankedAnswer]] = {}
    for name, file in files.items():
        rows = {row["id"]: row for row in read_prompts(file)}
        prompts = prompts or {id: row["prompt"] for id, row in rows.items()}
        if {id: row["prompt"] for id, row in rows.items()} != prompts:
            first = next(iter(files.values()))
            raise DataError(f"{file} does not answer the same prompts as {first}; finish or redo its responses")
        for id, row in rows.items():
            if not isinstance(row.get("response"), str) or "rejected" not in row:
                raise DataError(f"{file}: the row of {id!r} has no 'response' or no 'rejected'; redo its responses")
            answers.setdefault(id, {})[name] = RankedAnswer(name, row["response"], row["rejected"])
    return prompts, answers


# --- the filters ---


def _ranked(
    settings: ComparisonSettings, ranking: Ranking, answers: Mapping[str, Mapping[str, RankedAnswer]]
) -> list[RankedPair]:
    rules = {"length_rule": settings.length_rule, "one_win_a_rank": settings.pairs == "official"}
    return [pair for id, own in answers.items() for pair in ranked_pairs(id, own, ranking, **rules)]


def _rewards(
    checkpoint: Checkpoint, device: str, funnel: _Funnel, log: RowLog, progress: Progress
) -> dict[tuple[str, str], float | None]:
    """(prompt id, configuration) -> raw logit of each answer in a kept pair; None where it is not finite.

    An answer that is longer than the model's context has none.
    """
    known = {(row["prompt_id"], row["configuration"]): row["reward"] for row in log.rows}
    pairs = [funnel.pairs[i] for i in funnel.kept]
    answers = {(p.prompt_id, a.configuration): a.text for p in pairs for a in (p.chosen, p.rejected)}
    if answers.keys() <= known.keys():
        return known
    from almost_eval.rewards.hf import HFRewardModel

    model = HFRewardModel(checkpoint, device=device)
    whole = {
        key: (Message("user", funnel.prompts[key[0]]), Message("assistant", text)) for key, text in answers.items()
    }
    lengths = model.lengths(list(whole.values()))
    fit = [key for key, length in zip(whole, lengths, strict=True) if length <= model.context_length]
    wanted = [i for i, key in enumerate(fit) if key not in known]
    with progress.track("as-is reward model", len(fit), len(fit) - len(wanted)) as advance:
        for index, reward in model.stream([whole[key] for key in fit], wanted):
            (prompt_id, configuration), value = fit[index], reward if math.isfinite(reward) else None
            log.append({"prompt_id": prompt_id, "configuration": configuration, "reward": value})
            known[fit[index]] = value
            advance(1)
    return known


def _disagreements(funnel: _Funnel) -> dict[int, str]:
    """Kept pairs in which the reward model does not prefer the chosen answer, or has no reward for one of the two."""
    reasons: dict[int, str] = {}
    for i in funnel.kept:
        pair = funnel.pairs[i]
        keys = [(pair.prompt_id, answer.configuration) for answer in (pair.chosen, pair.rejected)]
        if not all(key in funnel.rewards for key in keys):
            reasons[i] = "as_is_too_long"
            continue
        chosen, rejected = (funnel.rewards[key] for key in keys)
        if chosen is None or rejected is None:
            reasons[i] = "as_is_not_finite"
        elif chosen <= rejected:
            reasons[i] = "as_is_disagrees" if chosen < rejected else "as_is_tie"
    return reasons


def _surplus(funnel: _Funnel, seed: int) -> dict[int, str]:
    """Kept pairs to drop, so that the chosen answer is as often the longer as the shorter."""
    longer = [i for i in funnel.kept if funnel.longer(i) > 0]
    shorter = [i for i in funnel.kept if funnel.longer(i) < 0]
    more, fewer = (longer, shorter) if len(longer) > len(shorter) else (shorter, longer)
    drawn = derived_rng(seed, "balance-length").sample(more, len(more) - len(fewer))
    return dict.fromkeys(drawn, "length_balance")


class _Funnel:
    """All pairs, and which filter dropped which."""

    def __init__(self, prompts: Mapping[str, str], pairs: Sequence[RankedPair]) -> None:
        self.prompts = prompts
        self.pairs = pairs
        self.rewards: dict[tuple[str, str], float | None] = {}
        self.kept = list(range(len(pairs)))
        self._reasons: dict[int, str] = {}
        self._table: JSONObject = {}

    def longer(self, index: int) -> int:
        """Characters by which the chosen answer is the longer."""
        pair = self.pairs[index]
        return len(pair.chosen.text) - len(pair.rejected.text)

    def drop(self, name: str, reasons: Mapping[int, str]) -> None:
        """Take pairs out, and note in the table what the filter did."""
        before = self.kept
        self.kept = [i for i in before if i not in reasons]
        self._reasons |= reasons
        self._table[name] = {
            "in": len(before),
            "out": len(self.kept),
            "dropped": dict(sorted(Counter(reasons.values()).items())),
            "chosen_longer_in": self._share(before),
            "chosen_longer_out": self._share(self.kept),
        }

    def finish(self, stage: Stage, more: Mapping[str, object]) -> JSONObject:
        """Write the outputs; `more` goes into the metrics.

        Raises:
            RunError: no pair is left.
        """
        files = {name: stage.folder / f"{name}.jsonl" for name in ("comparisons", "comparisons.rejected")}
        dropped = ({**self._row(i), "reason": self._reasons[i]} for i in sorted(self._reasons))
        write_rows(files["comparisons.rejected"], dropped)
        if not self.kept:
            counts = ", ".join(f"{reason} {n}" for reason, n in Counter(self._reasons.values()).most_common())
            raise RunError(f"no pair of {len(self.pairs)} is left ({counts}); see {files['comparisons.rejected']}")
        write_rows(files["comparisons"], map(self._row, self.kept))
        metrics = {
            "prompts": len(self.prompts),
            "prompts_with_pairs": len({self.pairs[i].prompt_id for i in self.kept}),
            "comparisons": len(self.kept),
            "chosen_longer": self._share(self.kept),
            "filters": self._table,
            "sources": dict(sorted(Counter(map(self._source, self.kept)).items())),
            **more,
        }
        return stage.finish(metrics, files)

    def _row(self, index: int) -> Row:
        pair = self.pairs[index]
        row = Preference(
            prompt=(Message("user", self.prompts[pair.prompt_id]),),
            chosen=(Message("assistant", pair.chosen.text),),
            rejected=(Message("assistant", pair.rejected.text),),
            chosen_source=pair.chosen.configuration,
            rejected_source=pair.rejected.configuration,
            prompt_id=pair.prompt_id,
        ).to_row()
        if self.rewards:
            for role, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                row[f"{role}_as_is_reward"] = self.rewards.get((pair.prompt_id, answer.configuration))
        return row

    def _source(self, index: int) -> str:
        return f"{self.pairs[index].chosen.configuration} > {self.pairs[index].rejected.configuration}"

    def _share(self, indices: Sequence[int]) -> float | None:
        """Of these pairs, how many have the longer text chosen, 0 to 1; equal lengths count as no."""
        return round(sum(self.longer(i) > 0 for i in indices) / len(indices), 4) if indices else None
