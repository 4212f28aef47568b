"""RMSP, reward-model-guided self-play: two vanilla models talk, and of N answers the reward model's best is kept.

The second step of ALMoST (arXiv 2305.13735); the authors did not release its code. User and assistant are pre-trained
models with demonstrations in front of the dialogue: `header`, then conversations separated by lines of `-----`, then
the dialogue so far and the marker of the next turn. At every assistant turn N candidates are sampled. Those that break
a rule of `rules` are rejected, and of the others the one with the highest reward of the whole conversation is kept. The
dialogues become the demonstrations of supervised fine-tuning.

All dialogues take a turn together, so an engine gets all live dialogues at once. Every completion and every reward is
in `turns.jsonl` as soon as it is known; the outputs are made from it at the end.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from almost_eval.engines.partition import partition_lengths
from almost_eval.errors import DataError, InputError, StoreError, did_you_mean
from almost_eval.files import Row, write_rows
from almost_eval.models.chat import dialogue_text
from almost_eval.progress import Progress
from almost_eval.rewards.base import RewardModel
from almost_eval.run.shards import Mark, Shard, begin_shard
from almost_eval.types import JSONObject, Message
from almost_train.common.formats import read_prompt_rows
from almost_train.common.held_out import HeldOut, is_held_out, read_held_out
from almost_train.common.resume import RowLog
from almost_train.common.shards import folder_of, joined_rows, shard_result, whole_stage
from almost_train.common.stage import Stage, model_input
from almost_train.common.tables import Table, read_any
from almost_train.self_play.turns import CHUNK, Dialogue, Play, SelfPlaySettings
from almost_train.synthetic.prompt_sets import SEPARATOR, DemonstrationSet
from almost_train.synthetic.sampling import EngineFactory, pin_dtype

STAGE = "self_play"
OUTPUTS = ("demonstrations", "demonstrations.rejected", "candidates", "user_turns")
"""Names of the files that a finished stage holds."""


def self_play(
    settings: SelfPlaySettings,
    prompts: Path | str,
    reward_model: str | None,
    output: Path,
    *,
    engine_for: EngineFactory,
    demonstrations: Mapping[str, DemonstrationSet],
    reward_for: Callable[[str], RewardModel] | None = None,
    held_out: Path | None = None,
    progress: Progress | None = None,
    shard: Shard | None = None,
) -> JSONObject:
    """Play one dialogue for each prompt and write `demonstrations.jsonl`; go on where an earlier process was killed.

    Outputs, in the order of the prompts: `demonstrations.jsonl` ({"id", "messages", "rewards", "ended"}; a dialogue
    ends with an answer, and `rewards` holds one for each), `demonstrations.rejected.jsonl` (the same with "reason"),
    `candidates.jsonl` ({"id", "turn", "candidates", "chosen"}) and `user_turns.jsonl` ({"id", "turn", "text",
    "finish_reason", "ended"}).

    With `unguided`, the same N candidates are sampled and the first valid one is kept, whatever its reward. Up to the
    first choice that differs, guided and unguided dialogues are the same, so the two can be compared in pairs.

    Args:
        settings: see `SelfPlaySettings`.
        prompts: the first user turns, in a format of `almost_train.common.formats`;
            one that repeats an earlier one is left out and counted.
        reward_model: its checkpoint; None plays without rewards, which only `unguided` can.
        output: the stage's folder.
        engine_for: model name -> engine; called once for each model, before anything is generated.
        demonstrations: name -> demonstration set.
        reward_for: checkpoint -> reward model; `HFRewardModel` by default.
        held_out: a `prompts.jsonl` that an evaluation asks: a dialogue ends where the user says one of them.
        progress: where to report to.
        shard: play a part of the dialogues, in a folder inside `output`; `merge_self_play` joins all.

    Raises:
        InputError: settings that cannot work together, unknown demonstrations, or no room in the model's context.
        DataError: prompts that are missing, empty or malformed.
    """
    progress = progress or Progress()
    names = {"assistant": settings.assistant_demonstrations, "user": settings.user_demonstrations}
    roles = {role: _few_shot(name, settings.shots, demonstrations) for role, name in names.items()}
    if reward_model is None and (not settings.unguided or settings.min_reward is not None):
        raise InputError("self-play needs a reward model to choose by; give one, or play with unguided and no floor")
    kept_out = read_held_out(held_out)
    table = read_any(prompts)
    dialogues, duplicates = _first_turns(table, kept_out)
    inputs: dict[str, Path | str] = {
        "prompts": table.input,
        "assistant_model": model_input(settings.assistant_model),
        "user_model": model_input(settings.user_model),
        "reward_model": model_input(reward_model) if reward_model else "none",
        **{f"{role}_demonstrations": hashlib.sha256(text.encode()).hexdigest() for role, text in roles.items()},
    }
    if held_out is not None:
        inputs["held_out"] = held_out
    ids = [dialogue.id for dialogue in dialogues]
    if shard:
        dialogues = [dialogues[place] for place in _places(len(dialogues), shard)]
    output = folder_of(output, shard)
    with Stage(output, STAGE, settings, inputs, is_shard=shard is not None) as stage:
        turns = output / "turns.jsonl"
        mark = None
        if shard:
            mark = begin_shard(output, shard, [d.place for d in dialogues], ids, {"duplicate_prompts": duplicates})
            if mark.finished is not None:
                turns.unlink(missing_ok=True)
                return shard_result(mark, STAGE)
        if stage.result is not None:
            turns.unlink(missing_ok=True)
            return stage.result
        # 1. Every model is checked, none is loaded.
        models = {"assistant": settings.assistant_model, "user": settings.user_model}
        by_name = {model: engine_for(model) for model in dict.fromkeys(models.values())}
        engines = {role: by_name[model] for role, model in models.items()}
        for role, engine in engines.items():
            pin_dtype(stage, f"{role}_model", engine)
        judge = (reward_for or _hf_reward)(reward_model) if reward_model else None
        # 2. Turn by turn, all dialogues at once.
        with RowLog(turns) as log:
            play = Play(settings, roles, engines, judge, log, progress, kept_out)
            for turn in range(1, settings.max_turns + 1):
                play.assistant_turn(turn, dialogues)
                if turn < settings.max_turns:
                    play.user_turn(turn, dialogues)
        # 3. The outputs.
        kept, rejected = _outcome(dialogues, settings.min_reward)
        files = dict(zip(OUTPUTS, (kept, rejected, play.candidates, play.user_turns), strict=True))
        for name, rows in files.items():
            write_rows(output / f"{name}.jsonl", rows)
        if mark:
            mark = mark.write({"dialogues": len(dialogues)})
            turns.unlink()
            return shard_result(mark, STAGE)
        metrics = {"dialogues": len(dialogues), "duplicate_prompts": duplicates}
        metrics |= _metrics(dialogues, kept, rejected, play.candidates, play.user_turns)
        result = stage.finish(metrics, {name: output / f"{name}.jsonl" for name in files})
        turns.unlink()  # all of it is in the outputs
        return result


def merge_self_play(marks: Sequence[Mark], output: Path) -> JSONObject:
    """Write the stage of all shards into `output`, as one process would have written it; returns `result.json`.

    Raises:
        StoreError: shards that lack a dialogue, or an output that holds something else.
    """
    # Dialogues in the order of the prompts; turns as they were played, one turn of all dialogues after the other.
    rows = joined_rows(marks, OUTPUTS, lambda row, place: (row.get("turn", 0), place))
    kept, rejected, candidates, user_turns = (rows[name] for name in OUTPUTS)
    dialogues = [Dialogue(row["id"], [], row["rewards"], row["ended"]) for row in [*kept, *rejected]]
    if len({dialogue.id for dialogue in dialogues}) != marks[0].total:
        raise StoreError(f"the shards hold {len(dialogues)} of {marks[0].total} dialogues; run theirs again")
    with whole_stage(marks, output, rows) as stage:
        metrics = {"dialogues": marks[0].total, **marks[0].whole}
        metrics |= _metrics(dialogues, kept, rejected, candidates, user_turns)
        return stage.finish(metrics, {name: output / f"{name}.jsonl" for name in OUTPUTS})


def _places(total: int, shard: Shard) -> list[int]:
    """A shard's dialogues: whole chunks, whose candidates are scored together."""
    chunks = [list(range(at, min(at + CHUNK, total))) for at in range(0, total, CHUNK)]
    parts = partition_lengths([len(chunk) for chunk in chunks], shard.of).parts
    own = shard.part(parts, f"chunks of {CHUNK} dialogues")
    return [place for at in own for place in chunks[at]]


def _outcome(dialogues: Sequence[Dialogue], floor: float | None) -> tuple[list[Row], list[Row]]:
    """(demonstrations, rejected dialogues)."""
    kept, rejected = [], []
    for dialogue in dialogues:
        messages = list(dialogue.messages)
        if len(messages) > 1 and messages[-1].role == "user":
            messages.pop()  # a user turn without a valid answer
        row = {
            "id": dialogue.id,
            "messages": [message.to_dict() for message in messages],
            "rewards": dialogue.rewards,
            "ended": dialogue.ended,
        }
        if not dialogue.rewards:
            rejected.append({**row, "reason": dialogue.ended})
        elif floor is not None and (dialogue.rewards[-1] is None or dialogue.rewards[-1] < floor):
            rejected.append({**row, "reason": "low_reward"})
        else:
            kept.append(row)
    return kept, rejected


def _metrics(
    dialogues: Sequence[Dialogue],
    kept: Sequence[Row],
    rejected: Sequence[Row],
    turns: Sequence[Row],
    user_turns: Sequence[Row],
) -> JSONObject:
    candidates = [candidate for row in turns for candidate in row["candidates"]]
    valid = [[c for c in row["candidates"] if c["rejected"] is None] for row in turns]
    by_turn: dict[str, list[float | None]] = {}
    for row in turns:
        if row["chosen"] is not None:
            by_turn.setdefault(str(row["turn"]), []).append(row["candidates"][row["chosen"]]["reward"])
    return {
        "demonstrations": len(kept),
        "rejected": _counts(row["reason"] for row in rejected),
        "ended": _counts(dialogue.ended for dialogue in dialogues if dialogue.ended),
        "answers": _counts(str(len(dialogue.rewards)) for dialogue in dialogues),
        "candidates": len(candidates),
        "cut_by_budget": {
            "candidates": sum(candidate["finish_reason"] == "length" for candidate in candidates),
            "user_turns": sum(row["finish_reason"] == "length" for row in user_turns),
        },
        "rejected_candidates": _counts(c["rejected"] for c in candidates if c["rejected"]),
        "reward": {
            "chosen": _mean([reward for rewards in by_turn.values() for reward in rewards]),
            "first_valid": _mean([row[0]["reward"] for row in valid if row]),
            "all_valid": _mean([c["reward"] for row in valid for c in row]),
            "chosen_by_turn": {turn: _mean(rewards) for turn, rewards in by_turn.items()},
        },
    }


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _few_shot(name: str, shots: int, sets: Mapping[str, DemonstrationSet]) -> str:
    """The document in front of a dialogue."""
    if name not in sets:
        raise InputError(f"no demonstrations {name!r}; {did_you_mean(name, sets)}")
    chosen = sets[name].conversations[:shots]
    if len(chosen) < shots:
        raise InputError(f"demonstrations {name!r} hold {len(chosen)} conversations, fewer than {shots} shots")
    parts = [sets[name].header.strip(), *map(dialogue_text, chosen)]
    return "".join(part + SEPARATOR for part in parts if part)


def _first_turns(prompts: Table, held_out: HeldOut) -> tuple[list[Dialogue], int]:
    """(dialogues with their first turn, prompts that repeat an earlier one)."""
    dialogues: dict[str, Dialogue] = {}
    rows = read_prompt_rows(prompts).records
    for number, (id, messages) in enumerate(rows, 1):
        if len(messages) > 1:
            raise DataError(
                f"{prompts.name}, prompt {number} has {len(messages)} messages; self-play begins with one user turn"
            )
        text = messages[0].content.strip()
        if is_held_out(text, held_out):
            raise DataError(
                f"{prompts.name}, prompt {number} is held out ({text[:60]!r}); mine prompts with --held-out too"
            )
        # The same prompt would get the same draws, and so the same dialogue.
        dialogues.setdefault(text, Dialogue(id, [Message("user", text)], place=len(dialogues)))
    return list(dialogues.values()), len(rows) - len(dialogues)


def _hf_reward(name: str) -> RewardModel:
    from almost_eval.rewards.hf import HFRewardModel

    return HFRewardModel(name)
