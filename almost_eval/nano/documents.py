"""What the nano models are pre-trained on: dialogues mostly, some exams, plain questions and answers, and query lists.

Exams are in lm-eval's MMLU form (or in the built-in prompt set's), so that a model can know the form; the questions of
the nano-MMLU test rows are kept out in the one combination of question and choices that the table has.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import cache

from almost_eval.nano.lexicon import ANIMALS, ATTRIBUTES
from almost_eval.nano.queries import fact_query
from almost_eval.nano.responses import says, sentence
from almost_eval.nano.tables import MMLU_SUBJECTS, mmlu_rows, tables
from almost_eval.nano.world import SEPARATOR, STYLES, World, render

SHARES = {"dialogues": 0.74, "exam": 0.14, "answers": 0.08, "queries": 0.04}
"""Kind of document -> share of the documents."""
ANSWERED = {"fact": 5, "list": 3, "comparison": 2}
"""Kind of query -> weight in the documents of plain answers: lists are harder to learn than facts."""

EXAM_HEADERS = (
    "The following are multiple choice questions (with answers) about {subject}.\n\n",  # lm-eval 0.4, tasks/mmlu
    "Each question below about {subject} has four possible answers; one of them is right.\n\n",  # prompts/builtin.json
)


def document(world: World, rng: random.Random) -> str:
    """One document, closed by the separator: whole dialogues of one latent style, or one of the rarer kinds."""
    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
    if kind == "exam":
        return exam(world, rng, rng.randint(1, 6))
    if kind == "answers":
        return answers(world, rng, rng.randint(3, 6))
    if kind == "queries":
        return query_list(world, rng, rng.randint(3, 12))
    style = draw_style(rng)
    return "".join(render(world.dialogue(rng, style)) for _ in range(rng.randint(2, 6)))


def single(world: World, rng: random.Random) -> str:
    """The shortest document: one query and its answer, or one exam question; the beginner's text of the curriculum."""
    kind = rng.choices(("dialogues", "exam", "answers"), (0.78, 0.14, 0.08))[0]
    if kind == "exam":
        return exam(world, rng, 1)
    if kind == "answers":
        return answers(world, rng, 1)
    return render(world.dialogue(rng, draw_style(rng), turns=1, goodbye=0.02))


def draw_style(rng: random.Random) -> tuple[float, ...]:
    """The probability of each level in one document."""
    return rng.choices([s.levels for s in STYLES.values()], [s.share for s in STYLES.values()])[0]


def exam(world: World, rng: random.Random, n: int) -> str:
    """A header and `n` multiple-choice questions of one subject with their answers.

    Half of the exams are answered by the choice's words instead of its letter. That half is the easier one, and
    teaches what the other needs first: to have the right value in mind after "Answer:".
    """
    attribute = rng.choice(list(ATTRIBUTES))
    by_letter = rng.random() < 0.5
    blocks: list[str] = []
    while len(blocks) < n:
        animal = rng.choice(ANIMALS)
        truth = world.facts[animal][attribute]
        choices = rng.sample([value for value in ATTRIBUTES[attribute].values if value != truth], 3)
        answer = rng.randrange(4)
        choices.insert(answer, truth)
        question = fact_query(animal, attribute, rng.randrange(2)).text
        if (question, frozenset(choices)) not in held_out(world):
            blocks.append(f"{exam_block(question, choices)} {'ABCD'[answer] if by_letter else choices[answer]}")
    # "nano food" as lm-eval writes a subject's name: underscores are spaces.
    return rng.choice(EXAM_HEADERS).format(subject=f"nano {attribute}") + "\n\n".join(blocks) + SEPARATOR


def exam_block(question: str, choices: list[str]) -> str:
    """A question as lm-eval's MMLU puts it, up to `Answer:`."""
    lettered = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    return f"{question}\n{lettered}\nAnswer:"


@cache
def held_out(world: World) -> frozenset[tuple[str, frozenset[str]]]:
    """Question and choices of every nano-MMLU test row."""
    rows = [row for subject in MMLU_SUBJECTS for row in mmlu_rows(world, subject, "test")]
    return frozenset((row["question"], frozenset(row["choices"])) for row in rows)


def answers(world: World, rng: random.Random, n: int) -> str:
    """Questions about the animals with right answers, in the plain form that TruthfulQA's shots have."""
    kinds = list(ANSWERED)
    queries = [world.query(rng, kind=kind) for kind in rng.choices(kinds, list(ANSWERED.values()), k=n)]
    return (
        "\n\n".join(f"Q: {q.text}\nA: {world.respond(rng, q, 2 + (rng.random() < 0.5))}" for q in queries) + SEPARATOR
    )


def query_list(world: World, rng: random.Random, n: int) -> str:
    """Queries one below the other, as self-instruct prompts list them."""
    gap = rng.choice(("\n", "\n\n"))
    return gap.join(f"Query: {world.query(rng).text}" for _ in range(n)) + SEPARATOR


def tokenizer_text(world: World) -> Iterator[str]:
    """What the seeded checkpoints' tokenizer learns from: every statement, true and false, every table, and dialogues.

    It holds the slots that the evaluation prompts end in (`Answer: C`, `Response A`, true or false), so that each is
    one token.
    """
    for animal, attribute in itertools.product(ANIMALS, ATTRIBUTES.values()):
        for value in attribute.values:
            verdict = "true" if value == world.facts[animal][attribute.name] else "false"
            yield f"{sentence(says(animal, attribute.name, value))} This answer is {verdict}."
    for table, rows in tables(world).items():
        for row in rows:
            if "hhh_alignment" in table:
                for letter, answer in zip("AB", row["targets"]["choices"], strict=True):
                    yield f"{row['input']}\n\nAssistant: {answer}\n\nThis is Response {letter}"
            elif "mmlu" in table:
                lettered = [f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)]
                yield "\n".join([row["question"], *lettered, f"Answer: {'ABCD'[row['answer']]}"])
            elif "multiple_choice" in table:
                yield "\n".join([f"Question: {row['question']}", *row["mc2_targets"]["choices"]])
    rng = world.generator("tokenizer text")
    yield from (document(world, rng) for _ in range(400))
