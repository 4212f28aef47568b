"""Shards of a judged run: the answers of the models are divided by question, and the judge comes once they are joined.

Judging is not divided. A judge behind an API works on many reviews at a time already, and it keeps one budget, one
journal and one answer to each question; a reward model reads an answer in a fraction of the time that it took to write.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from almost_eval.engines.partition import Partition, partition_lengths, partition_prompts
from almost_eval.errors import InputError, StoreError
from almost_eval.files import Row, read_rows, write_rows
from almost_eval.judge.answers import answer_files
from almost_eval.judge.model_judge import ModelJudge
from almost_eval.judge.model_system import ModelSystem
from almost_eval.judge.run import JudgeRun
from almost_eval.progress import Progress
from almost_eval.run.shards import (
    Mark,
    Shard,
    begin_shard,
    beginning,
    check_marks,
    file_names,
    whole_folder,
    without_shard,
)
from almost_eval.run.store import RunStore, read_spec, spec_change
from almost_eval.types import JSONObject


def write_shard(run: JudgeRun, whole: Path, shard: Shard, progress: Progress) -> Mark:
    """Have the models answer a shard's questions, in its folder inside `whole`.

    Raises:
        InputError: no system is a model, or there is no question for the shard.
        StoreError: see `RunStore`.
        RunError: out of memory or disk.
    """
    started = time.perf_counter()
    folder = shard.folder(whole)
    mine = shard.part(_partition(run, shard.of).parts, "questions")
    ids = [question.id for question in run.questions]
    own = run.spec()  # digests the weights, which may take minutes: not while other shards wait
    amend = run.judge.amend if isinstance(run.judge, ModelJudge) else None
    with ExitStack() as stack:
        with beginning(whole, shard) as begun:
            if begun:  # a date that a template writes is that of all shards
                run.adopt_dates(read_spec(begun)["settings"])
            spec = run.spec()
            stack.enter_context(RunStore(folder, spec | {"command": without_shard(spec["command"])}, amend))
        if spec != own:  # another date may have more tokens
            mine = shard.part(_partition(run, shard.of).parts, "questions")
        files = answer_files(folder, [system.name for system in run.systems])
        written = [(s, file) for s, file in zip(run.systems, files, strict=True) if isinstance(s, ModelSystem)]
        mark = begin_shard(folder, shard, mine, ids, {"answers": [file.name for _, file in written]})
        if mark.finished is None:
            for system, file in written:
                system.write(file, progress, only=mark.ids)
            mark = mark.write({"seconds": round(time.perf_counter() - started, 3)})
        return mark


def describe_shard(run: JudgeRun, shard: Shard) -> JSONObject:
    """What `--dry-run` adds for a shard."""
    partition = _partition(run, shard.of)
    mine = shard.part(partition.parts, "questions")
    return {
        "shard": f"{shard}: the answers to {len(mine)} of {len(run.questions)} questions",
        "tokens_of_each_shard": ", ".join(f"{tokens:,}" for tokens in partition.tokens),
    }


def _partition(run: JudgeRun, parts: int) -> Partition:
    """Questions for each shard, by what the first model reads."""
    system = next((system for system in run.systems if isinstance(system, ModelSystem)), None)
    if system is None:
        raise InputError("--shard divides the answers that models write, and here all are in files; leave it out")
    encoder, new_tokens = getattr(system.engine, "encoder", None), system.spec()["sampling"]["max_new_tokens"]
    if encoder is None:  # an endpoint: four letters are about a token
        return partition_lengths([len(prompt) // 4 + new_tokens for prompt in system.prompts], parts)
    return partition_prompts(encoder.encode_texts(system.prompts), parts, new_tokens=new_tokens)


def merge_answers(marks: Sequence[Mark], output: Path | None) -> None:
    """Write the answers of all shards into `output`, in the order of the questions: the judge goes on from there.

    Without `output` they go into the folder that all shards are in.

    Raises:
        StoreError: shards that are missing, of another run, not finished or damaged; an output that holds another run.
        RunError: the disk is full, or gone.
    """
    check_marks(marks, lambda one, other: spec_change(read_spec(one.folder), read_spec(other.folder)))
    output = whole_folder(marks, output)
    with RunStore(output, read_spec(marks[0].folder)):
        for name in file_names(marks[0], "answers"):
            rows: dict[int, Row] = {}
            for mark in marks:
                answered = [(str(row.get("question_id")), row) for row in read_rows(mark.folder / "answers" / name)]
                own = dict(answered)
                if sorted(id for id, _ in answered) != sorted(mark.ids):
                    raise StoreError(
                        f"{mark.folder / 'answers' / name} does not answer the {len(mark.ids)} questions of shard "
                        f"{mark.shard} once each; run its command again in a new folder"
                    )
                rows |= {place: own[id] for place, id in zip(mark.places, mark.ids, strict=True)}
            write_rows(output / "answers" / name, [rows[place] for place in sorted(rows)], ascii_only=True)
