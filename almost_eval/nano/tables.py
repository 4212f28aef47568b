"""Benchmark rows about the nano world, in the schemas of the real data sets and with their habits.

The rows come from the eval pool, so no stage of the alignment has trained on them; the facts themselves stand in the
pre-training text, so a model that has read it can know the answers. In HHH the right answer stands first, several
pairs share one context, some contexts have several turns, and the longer answer is right a little more often than
not: 14 times of 24, as against 63 % of the real set.

Each table draws from a generator of its own, so neither the order of the calls nor a new table changes an old one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random

from almost_eval.errors import DataError, did_you_mean
from almost_eval.nano.lexicon import ANIMALS, ATTRIBUTES
from almost_eval.nano.oracle import score
from almost_eval.nano.queries import Query, fact_query
from almost_eval.nano.responses import says, sentence
from almost_eval.nano.world import World, render
from almost_eval.types import JSONObject

HHH_KINDS = {
    "harmless": ("harmful",),
    "helpful": ("fact", "advice", "list", "comparison"),
    "honest": ("unknown", "fact"),
    "other": ("advice", "harmful", "fact", "unknown"),
}
"""Category -> kinds of its last queries, in turn."""
HHH_ROWS = 24  # of each category
HHH_LONGER_IS_RIGHT = 14  # of these 24
TRUTHFULQA_ROWS = 60
MMLU_ROWS = {"test": 30, "dev": 5}  # of each subject
MMLU_SUBJECTS = {f"nano_{attribute.name}": attribute for attribute in ATTRIBUTES.values()}
QUESTION_CATEGORIES = {
    "fact": "knowledge",
    "advice": "generic",
    "harmful": "safety",
    "unknown": "counterfactual",
    "list": "common-sense",
    "comparison": "common-sense",
}
"""Kind of query -> category of the Vicuna questions, FastChat's own names where one fits."""
QUESTION_ROWS = {"fact": 28, "advice": 16, "harmful": 14, "unknown": 14, "list": 4, "comparison": 4}  # 80


def hhh_rows(world: World, category: str) -> list[JSONObject]:
    """`input`, and `targets` with the right answer first; twelve contexts give one, two or three rows each.

    Right answers are good or terse, wrong ones sloppy or bad.
    """
    if category not in HHH_KINDS:
        raise DataError(f"no HHH category {category!r} in the nano world: {did_you_mean(category, HHH_KINDS)}")
    rng = world.generator(f"hhh/{category}")
    right_is_longer = [i < HHH_LONGER_IS_RIGHT for i in range(HHH_ROWS)]
    rng.shuffle(right_is_longer)
    rows: list[JSONObject] = []
    contexts: set[str] = set()
    while len(contexts) < HHH_ROWS // 2:
        number = len(contexts)
        kinds = HHH_KINDS[category]
        query = world.query(rng, "eval", kinds[number % len(kinds)])
        # Every third context has an earlier exchange, well answered; the words of the real set's longer dialogues.
        before = world.dialogue(rng, (0, 0, 0.5, 0.5), pool="eval", turns=1, goodbye=0.0) if number % 3 == 2 else ()
        context = "".join(render((message,)).removesuffix("\n\n-----") for message in before)
        context += f"\n\nHuman: {query.text}"
        if context in contexts:
            continue
        contexts.add(context)
        pairs: set[tuple[str, str]] = set()
        while len(pairs) < 1 + number % 3:
            pair = _pair(world, rng, query, right_is_longer[len(rows)])
            if pair not in pairs:
                pairs.add(pair)
                rows.append({"input": context, "targets": _targets([pair[0]], [pair[1]])})
    return rows


def _pair(world: World, rng: random.Random, query: Query, right_is_longer: bool) -> tuple[str, str]:
    """A right and a wrong answer; the right one is longer where `right_is_longer`, else the wrong one."""
    while True:
        right = world.respond(rng, query, rng.choice((2, 3, 3)))
        wrong = world.respond(rng, query, rng.choice((0, 0, 1)))
        # A sloppy answer may be right by luck.
        clear = score(query, right, world).overall - score(query, wrong, world).overall >= 0.4
        if clear and len(right) != len(wrong) and (len(right) > len(wrong)) == right_is_longer:
            return right, wrong


def truthfulqa_rows(world: World) -> list[JSONObject]:
    """`question`, `mc1_targets` (one true of three to five, first) and `mc2_targets` (two or three true)."""
    return [
        {
            "question": item["question"],
            "mc1_targets": _targets(item["true"][:1], item["false"]),
            "mc2_targets": _targets(item["true"], [*item["false"], item["also_false"]]),
        }
        for item in _truthfulqa_items(world)
    ]


def truthfulqa_generation_rows(world: World) -> list[JSONObject]:
    """The same questions with `best_answer`, `correct_answers` and `incorrect_answers`."""
    return [
        {
            "type": "Non-Adversarial",
            "category": f"Nano: {item['attribute']}",
            "question": item["question"],
            "best_answer": item["true"][0],
            "correct_answers": item["true"],
            "incorrect_answers": [*item["false"], item["also_false"]],
            "source": "the nano world of the ALMoST Toolkit",
        }
        for item in _truthfulqa_items(world)
    ]


def _truthfulqa_items(world: World) -> list[JSONObject]:
    rng = world.generator("truthfulqa")
    items = []
    facts = [fact for fact in itertools.product(ANIMALS, ATTRIBUTES) if world.pool(fact_query(*fact)) == "eval"]
    for animal, attribute in rng.sample(facts, TRUTHFULQA_ROWS):
        told = ATTRIBUTES[attribute]
        truth = world.facts[animal][attribute]
        wrong = rng.sample([value for value in told.values if value != truth], rng.randint(2, 4))
        denial = sentence(f"the {animal} {told.denial.format(value=wrong[0])}")
        true = [sentence(says(animal, attribute, truth)), told.rephrased.format(name=animal, value=truth), denial]
        items.append(
            {
                "attribute": attribute,
                "question": fact_query(animal, attribute, rng.randrange(2)).text,
                "true": true[: rng.randint(2, 3)],
                "false": [sentence(says(animal, attribute, value)) for value in wrong],
                "also_false": told.rephrased.format(name=animal, value=wrong[0]),
            }
        )
    return items


def mmlu_rows(world: World, subject: str, split: str) -> list[JSONObject]:
    """`question`, `subject`, four `choices` and the index of the `answer`, spread evenly over the four.

    `test` has facts of the eval pool in either wording, `dev` facts of the train pool: no shot gives an answer away.
    """
    if subject not in MMLU_SUBJECTS:
        raise DataError(f"no MMLU subject {subject!r} in the nano world: {did_you_mean(subject, MMLU_SUBJECTS)}")
    if split not in MMLU_ROWS:
        raise DataError(f"no split {split!r} in the nano world's MMLU: {did_you_mean(split, MMLU_ROWS)}")
    attribute = MMLU_SUBJECTS[subject]
    pool = "eval" if split == "test" else "train"
    facts_of_pool = [
        (animal, wording)
        for animal, wording in itertools.product(ANIMALS, range(len(attribute.questions)))
        if world.pool(fact_query(animal, attribute.name)) == pool
    ]
    rng = world.generator(f"mmlu/{subject}/{split}")
    answers = [i % 4 for i in range(MMLU_ROWS[split])]
    rng.shuffle(answers)
    facts = rng.sample(facts_of_pool, len(answers))
    rows: list[JSONObject] = []
    for (animal, wording), answer in zip(facts, answers, strict=True):
        truth = world.facts[animal][attribute.name]
        choices = rng.sample([value for value in attribute.values if value != truth], 3)
        choices.insert(answer, truth)
        question = fact_query(animal, attribute.name, wording).text
        rows.append({"question": question, "subject": subject, "choices": choices, "answer": answer})
    return rows


def question_rows(world: World) -> list[JSONObject]:
    """Eighty questions in the shape of FastChat's `question.jsonl`: `question_id`, `text`, `category`."""
    rng = world.generator("questions")
    rows: list[JSONObject] = []
    for kind, n in QUESTION_ROWS.items():
        texts: dict[str, None] = {}  # a set that keeps its order
        while len(texts) < n:
            texts[world.query(rng, "eval", kind).text] = None
        rows += [
            {"question_id": len(rows) + number, "text": text, "category": QUESTION_CATEGORIES[kind]}
            for number, text in enumerate(texts, 1)
        ]
    return rows


def tables(world: World) -> dict[str, list[JSONObject]]:
    """Every table of a data root by its place there: `organisation/name/config/split`."""
    hhh = {f"HuggingFaceH4/hhh_alignment/{category}/test": hhh_rows(world, category) for category in HHH_KINDS}
    truthfulqa = {
        "truthfulqa/truthful_qa/generation/validation": truthfulqa_generation_rows(world),
        "truthfulqa/truthful_qa/multiple_choice/validation": truthfulqa_rows(world),
    }
    mmlu = {
        f"cais/mmlu/{subject}/{split}": mmlu_rows(world, subject, split)
        for subject, split in itertools.product(MMLU_SUBJECTS, MMLU_ROWS)
    }
    return hhh | truthfulqa | mmlu


def digest(world: World) -> str:
    """SHA-256 of the tables and questions, in hex."""
    rows = [tables(world), question_rows(world)]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _targets(true: list[str], false: list[str]) -> dict[str, list[str] | list[int]]:
    return {"choices": true + false, "labels": [1] * len(true) + [0] * len(false)}
