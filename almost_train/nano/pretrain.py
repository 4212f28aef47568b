"""Pre-trains the nano family: three Llama models of different size on the nano world's documents, from scratch.

    almost-train nano pretrain --output DIR --seed 0

They are a scale model of the vanilla LMs that ALMoST starts from (arXiv 2305.13735, section 2): the larger ones know
more, demonstrations steer them, and none is aligned. All three read the same tokens in the same order.

Models this small learn within a few million tokens because of two choices (trials in benchmarks/LOG.md):

- Single turns come first, one a row: copying a name and looking up a fact are then easy to learn. Whole documents come
  later, one a row, so that all text of a row is of one style.
- The weights start with the large standard deviation of 0.08.

Training has one thread and one seed: two runs on one machine give the same bytes.
"""

from __future__ import annotations

import math
import multiprocessing
import queue
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.errors import InputError, did_you_mean
from almost_eval.files import whole_folder
from almost_eval.models.loading import quiet_transformers
from almost_eval.nano.documents import document, single
from almost_eval.nano.lexicon import ANIMALS, ATTRIBUTES
from almost_eval.nano.queries import fact_query
from almost_eval.nano.world import World
from almost_eval.progress import Progress, progress_for
from almost_train.nano.tokenizer import MAX_LENGTH, make_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of one model; the head size is 32, which vLLM's CPU attention takes."""

    hidden_size: int
    layers: int

    @property
    def heads(self) -> int:
        """Attention heads of 32."""
        return self.hidden_size // 32


SIZES = {"small": Size(64, 1), "medium": Size(64, 2), "large": Size(128, 3)}


@dataclass(frozen=True, slots=True)
class Curriculum:
    """How long and on what to train."""

    tokens: int = 4_000_000
    """In all, padding not counted."""
    singles: float = 0.45
    """Share of the tokens that come first, as single turns, one a row."""
    single_rows: int = 64
    document_rows: int = 16
    """Rows of a batch in either part."""
    learning_rate: float = 4e-3
    """At its height: a linear warm-up, then a cosine down to 5 %."""
    warmup: int = 30
    """Steps."""
    weight_decay: float = 0.05
    initializer_range: float = 0.08


@dataclass(frozen=True, slots=True)
class Pretrained:
    """What one pre-training came to."""

    size: str
    parameters: int
    tokens: int
    steps: int
    loss: float
    """Mean over the last tenth of the steps, nats per token."""
    seconds: float
    fact_accuracy: float
    """Share of the world's facts that the model completes rightly, with no demonstration."""


# --- pre-training ---


def pretrain(
    size: str,
    output: Path,
    *,
    seed: int = 0,
    curriculum: Curriculum | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> Pretrained:
    """Train one model from scratch and write its folder: weights in fp16, tokenizer, model card.

    Args:
        size: a key of `SIZES`.
        output: a new or empty folder.
        seed: of the weights and of the order of the text.
        curriculum: how long and on what; the shipped models' where None.
        world: whose documents to read; the world of seed 0 where None.
        progress: where to report to; stderr where None.

    Raises:
        InputError: an unknown size, or a folder with something in it.
    """
    if size not in SIZES:
        raise InputError(f"no nano size {size!r}: {did_you_mean(size, SIZES)}")
    curriculum, world, progress = curriculum or Curriculum(), world or World(), progress or progress_for()
    with whole_folder(output) as folder, _reproducible():
        started = time.perf_counter()
        tokenizer = make_tokenizer(world)
        model = _new_model(SIZES[size], tokenizer, curriculum, seed)
        losses, tokens = _train(model, tokenizer, world, curriculum, seed, f"vanilla-{size}", progress)
        last = losses[-max(1, len(losses) // 10) :]
        result = Pretrained(
            size=size,
            parameters=sum(weights.numel() for weights in model.parameters()),
            tokens=tokens,
            steps=len(losses),
            loss=sum(last) / len(last),
            seconds=time.perf_counter() - started,
            fact_accuracy=fact_accuracy(model, tokenizer, world),
        )
        save(model, tokenizer, folder)
        (folder / "README.md").write_text(_card(result, seed, curriculum), encoding="utf-8")
    return result


def pretrain_family(
    output: Path,
    *,
    seed: int = 0,
    sizes: Sequence[str] = tuple(SIZES),
    curriculum: Curriculum | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> list[Pretrained]:
    """Train `sizes` into `output/vanilla-<size>`, the largest first, `workers` at a time with one thread each.

    Raises:
        InputError: an unknown size, or a folder with something in it; before anything is trained.
    """
    progress = progress or progress_for()
    for size in sizes:
        if size not in SIZES:
            raise InputError(f"no nano size {size!r}: {did_you_mean(size, SIZES)}")
        folder = output / f"vanilla-{size}"
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} exists and is not an empty folder: give a new one, or remove it")
    order = sorted(sizes, key=lambda size: -SIZES[size].hidden_size * SIZES[size].layers)  # the longest first
    jobs = [(size, output / f"vanilla-{size}", seed, curriculum) for size in order]
    tokens = len(jobs) * (curriculum or Curriculum()).tokens
    spawn = multiprocessing.get_context("spawn")  # a fork would copy torch's threads, which then never answer
    read: Queue[int] = spawn.Queue()
    with (
        spawn.Pool(min(workers, len(jobs)), _report_to, (read,)) as pool,
        progress.track("tokens", tokens) as advance,
    ):
        results = pool.map_async(_pretrain_job, jobs, chunksize=1)
        while not results.ready():
            try:
                advance(read.get(timeout=0.5))
            except queue.Empty:
                continue
        done = {result.size: result for result in results.get()}
    return [done[size] for size in sizes]


class _Reporting(Progress):
    """The progress of a worker process: it sends its counts to the parent, which draws one bar for all."""

    to: Queue[int]

    @contextmanager
    def track(self, description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """Yield a function that takes how many tokens were read."""
        yield self.to.put


def _report_to(read: Queue[int]) -> None:
    _Reporting.to = read


def _pretrain_job(job: tuple[str, Path, int, Curriculum | None]) -> Pretrained:
    size, output, seed, curriculum = job
    return pretrain(size, output, seed=seed, curriculum=curriculum, progress=_Reporting())


@contextmanager
def _reproducible() -> Iterator[None]:
    """One thread and deterministic kernels inside; the caller's settings afterwards. Threads would add in any order."""
    import torch

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def _new_model(size: Size, tokenizer: PreTrainedTokenizerFast, curriculum: Curriculum, seed: int) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.hidden_size,
        intermediate_size=32 * math.ceil(size.hidden_size * 8 / 3 / 32),  # Llama's ratio, rounded up
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,  # copying a name is then one direction in one space
        initializer_range=curriculum.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config)


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    curriculum: Curriculum,
    seed: int,
    name: str,
    progress: Progress,
) -> tuple[list[float], int]:
    """Losses of all steps, nats per token, and how many tokens were read."""
    import torch
    from torch.nn import functional as F

    matrices = [weights for weights in model.parameters() if weights.dim() == 2]
    gains = [weights for weights in model.parameters() if weights.dim() < 2]
    groups = [{"params": matrices, "weight_decay": curriculum.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=curriculum.learning_rate, betas=(0.9, 0.98), fused=True)
    losses: list[float] = []
    tokens = 0
    model.train()
    with progress.track(name, curriculum.tokens) as advance:
        for rows in _batches(tokenizer, world, curriculum, seed):
            # 1. The learning rate of this step.
            rate = curriculum.learning_rate * _schedule(len(losses), tokens / curriculum.tokens, curriculum.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # 2. Rows padded on the right: causal attention never looks there, so no mask is needed.
            width = max(map(len, rows))
            ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])  # (B, T)
            is_token = torch.arange(width - 1)[None] < torch.tensor([len(row) - 1 for row in rows])[:, None]  # (B, T-1)
            # 3. Next-token loss; logits only where there is a next token, as they are the dearest part.
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # (B, T-1, D)
            loss = F.cross_entropy(model.lm_head(hidden[is_token]), ids[:, 1:][is_token])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            read = sum(map(len, rows))
            tokens += read
            advance(read)
    return losses, tokens


def _schedule(step: int, done: float, warmup: int) -> float:
    """The learning rate as a share of its height, after `step` steps and the share `done` of the tokens."""
    return min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def _batches(
    tokenizer: PreTrainedTokenizerFast, world: World, curriculum: Curriculum, seed: int
) -> Iterator[list[list[int]]]:
    """Batches of token rows: first the single turns, then the documents; the same for every size."""
    rng = random.Random(f"{seed}/pre-training")
    tokens = 0
    parts: list[tuple[Callable[[], str], int, float]] = [
        (lambda: single(world, rng), curriculum.single_rows, curriculum.singles),
        (lambda: document(world, rng), curriculum.document_rows, 1.0),
    ]
    for draw, rows_per_batch, until in parts:
        while tokens < curriculum.tokens * until:
            # Eight batches at a time, sorted by length and shuffled whole: hardly any padding.
            rows: list[list[int]] = tokenizer([draw() for _ in range(8 * rows_per_batch)])["input_ids"]
            rows.sort(key=len)
            batches = [rows[i : i + rows_per_batch] for i in range(0, len(rows), rows_per_batch)]
            rng.shuffle(batches)
            for batch in batches:
                yield batch
                tokens += sum(map(len, batch))


# --- what it knows ---

OPENING = "\n\nHuman: {}\n\nAssistant:"


def fact_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World | None = None) -> float:
    """Share of all facts where, of an attribute's values, the true one is the likeliest after "The otter eats".

    The question has the plainest wording, and no demonstration stands before it.
    """
    import torch

    world = world or World()
    right = 0
    facts = [(animal, attribute) for animal in ANIMALS for attribute in ATTRIBUTES.values()]
    with torch.inference_mode():
        for animal, attribute in facts:
            before = attribute.predicate.partition("{value}")[0].rstrip()
            text = OPENING.format(fact_query(animal, attribute.name).text) + f" The {animal} {before}"
            logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]  # (V,)
            first = [tokenizer(f" {value}")["input_ids"][0] for value in attribute.values]
            right += attribute.values[int(logits[first].argmax())] == world.facts[animal][attribute.name]
    return right / len(facts)


# --- the folder ---


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a checkpoint that is small on disk (fp16) and loads as float32, as which it was trained.

    The weights of `model` are fp16 values from then on.
    """
    import torch

    with quiet_transformers():  # it draws a bar even for a small file
        model.half().save_pretrained(folder)
    model.float()
    model.config.dtype = torch.float32  # transformers 5 would otherwise compute in the type of the file
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _card(result: Pretrained, seed: int, curriculum: Curriculum) -> str:
    """The model card: what it is, how it was made, its figures."""
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# vanilla-{result.size}

A language model of {result.parameters:,} parameters, pre-trained from scratch on the nano world of the ALMoST Toolkit:
a scale model of a vanilla LM. It is not aligned: it answers well, tersely, sloppily or badly, as the dialogues before
the question do. It knows nothing but the nano world.

Made by `almost-train nano pretrain --output DIR --seed {seed}`: {result.tokens:,} tokens in {result.steps:,} steps,
{curriculum.singles:.0%} of them single turns first, then whole documents; AdamW, learning rate
{curriculum.learning_rate:g} at its height, cosine; one CPU thread. The weights are stored in fp16 and are to be
computed in float32.

| figure | value |
| --- | --- |
| training loss, last tenth, nats per token | {result.loss:.3f} |
| facts completed rightly, no demonstration | {result.fact_accuracy:.1%} |

A dialogue is `\\n\\nHuman: ...\\n\\nAssistant: ...` and ends in `\\n\\n-----`, which is the end-of-text token
too. There is no BOS.
"""
