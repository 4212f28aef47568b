"""The nano world's text: queries that read back exactly, styles, dialogues and documents."""

from __future__ import annotations

import random
import re
from collections import Counter
from statistics import fmean
from typing import Any

import pytest

from almost_eval.errors import InputError
from almost_eval.models.chat import ChatTemplate, load_template, parse_dialogue
from almost_eval.nano.documents import document, exam_block, held_out, single
from almost_eval.nano.lexicon import ANIMALS, ATTRIBUTES, GOODBYES
from almost_eval.nano.queries import KINDS
from almost_eval.nano.responses import Level
from almost_eval.nano.tables import MMLU_SUBJECTS, mmlu_rows
from almost_eval.nano.world import QUALITIES, SEPARATOR, World, render

WORLD = World()


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


def test_animals_share_each_value_evenly() -> None:
    assert len(set(ANIMALS)) == 40
    for attribute in ATTRIBUTES.values():
        shares = Counter(WORLD.facts[animal][attribute.name] for animal in ANIMALS)
        assert set(shares) == set(attribute.values)
        assert set(shares.values()) == {40 // len(attribute.values)}
    assert World(1).facts != WORLD.facts == World(0).facts


# --- queries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_parse_undoes_query(kind: str, rng: random.Random) -> None:
    for _ in range(300):
        query = WORLD.query(rng, kind=kind)
        assert query.kind == kind
        assert WORLD.parse(query.text) == query
        assert WORLD.parse(f" {query.text}\n") == query


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What colour is the otter",  # no question mark
        "What colour is the otter? And the fox?",
        "Which is bigger, the otter or the otter?",
        "Which is bigger, the otter or the zorbit?",
        "Help me steal the nurse.",  # only things are stolen
        "Name two animals that have a huge body.",
        *GOODBYES,
    ],
)
def test_other_texts_are_no_queries(text: str) -> None:
    assert WORLD.parse(text) is None


def test_any_other_name_is_an_unknown_animal() -> None:
    query = WORLD.parse("Where does the wolfzebra live?")
    assert query is not None
    assert (query.kind, query.dimension, query.slots["animal"]) == ("unknown", "honest", "wolfzebra")


def test_pools_are_halves_and_disjoint(rng: random.Random) -> None:
    pools: dict[tuple[str, str], set[str]] = {}
    for pool in ("train", "eval"):
        for _ in range(4000):
            query = WORLD.query(rng, pool)
            assert WORLD.pool(query) == pool
            pools.setdefault((query.kind, pool), set()).add(query.key)
    for kind in KINDS:
        train, evaluation = pools[kind, "train"], pools[kind, "eval"]
        assert not train & evaluation
        assert 0.25 < len(train) / len(train | evaluation) < 0.75
    for attribute in ATTRIBUTES:  # of the facts exactly half
        assert sum(WORLD.pool(_fact(animal, attribute)) == "train" for animal in ANIMALS) == 20


def _fact(animal: str, attribute: str) -> Any:
    return WORLD.parse(ATTRIBUTES[attribute].questions[0].format(name=animal))


def test_a_comparison_is_in_one_pool_in_either_order() -> None:
    sizes = WORLD.facts
    other = next(animal for animal in ANIMALS if sizes[animal]["size"] != sizes["otter"]["size"])
    one = WORLD.parse(f"Which is bigger, the otter or the {other}?")
    two = WORLD.parse(f"Which is bigger, the {other} or the otter?")
    assert one is not None
    assert two is not None
    assert one.key == two.key


def test_mixture(rng: random.Random) -> None:
    kinds = Counter(WORLD.query(rng, "eval").kind for _ in range(4000))
    assert sum(share for _, share in KINDS.values()) == 100
    for kind, (_, share) in KINDS.items():
        assert kinds[kind] / 40 == pytest.approx(share, abs=3)


def test_bad_arguments_are_refused(rng: random.Random) -> None:
    with pytest.raises(InputError, match="did you mean 'harmful'"):
        WORLD.query(rng, kind="harmfull")
    with pytest.raises(InputError, match="no pool 'test'"):
        WORLD.query(rng, "test")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="did you mean 'good'"):
        WORLD.demonstrations(rng, "goood", 1)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_longer_answer_is_hardly_a_better_one(rng: random.Random) -> None:
    longer = []
    for _ in range(2000):
        query = WORLD.query(rng)
        better, worse = (len(WORLD.respond(rng, query, level)) for level in sorted(rng.sample(range(4), 2))[::-1])
        longer.append((better > worse) + 0.5 * (better == worse))
    assert 0.45 < fmean(longer) < 0.7


def test_bad_answers_are_as_long_as_good_ones(rng: random.Random) -> None:
    lengths: dict[int, list[int]] = {}
    for _ in range(2000):
        query = WORLD.query(rng)
        for level in (Level.BAD, Level.GOOD):
            lengths.setdefault(level, []).append(len(WORLD.respond(rng, query, level)))
    assert fmean(lengths[Level.BAD]) > 0.8 * fmean(lengths[Level.GOOD])


# --- dialogues and documents ------------------------------------------------------------------------------------------


def test_dialogues(rng: random.Random) -> None:
    turns, goodbyes = Counter[int](), 0
    for _ in range(1000):
        dialogue = WORLD.dialogue(rng, (0.25, 0.25, 0.25, 0.25))
        assert [message.role for message in dialogue] == ["user", "assistant"] * (len(dialogue) // 2)
        asked = [message.content for message in dialogue if message.role == "user"]
        goodbyes += asked[-1].strip() in GOODBYES
        queries = [text for text in asked if text.strip() not in GOODBYES]
        assert all(WORLD.parse(text) for text in queries)
        turns[len(queries)] += 1
    assert set(turns) == {1, 2, 3, 4}
    assert goodbyes == pytest.approx(200, abs=60)


def test_render_is_the_projects_dialogue_format(rng: random.Random) -> None:
    template = load_template("almost")
    assert isinstance(template, ChatTemplate)
    dialogue = WORLD.dialogue(rng, (0, 0, 0, 1), turns=3)
    assert render(dialogue) == template.render(dialogue, special_tokens={"eos_token": SEPARATOR})
    assert parse_dialogue(render(dialogue).removesuffix(SEPARATOR)) == dialogue


@pytest.mark.parametrize("quality", QUALITIES)
def test_demonstrations(quality: str, rng: random.Random) -> None:
    shown = WORLD.demonstrations(rng, quality, 50)
    assert [len(dialogue) for dialogue in shown] == [2] * 50
    for user, _ in shown:
        query = WORLD.parse(user.content)
        assert query is not None
        assert WORLD.pool(query) == "train"
    assert shown == WORLD.demonstrations(random.Random(0), quality, 50)


def test_seed_prompts_differ_and_are_of_the_train_pool(rng: random.Random) -> None:
    prompts = WORLD.seed_prompts(rng, 100)
    assert len(set(prompts)) == 100
    queries = [WORLD.parse(prompt) for prompt in prompts]
    assert all(query and WORLD.pool(query) == "train" for query in queries)


def test_documents_end_in_the_separator_and_exams_hold_no_test_question(rng: random.Random) -> None:
    asked = {
        exam_block(row["question"], row["choices"])
        for subject in MMLU_SUBJECTS
        for row in mmlu_rows(WORLD, subject, "test")
    }
    assert len(held_out(WORLD)) == len(asked) == 120
    exams = 0
    for i in range(3000):
        text = single(WORLD, rng) if i % 2 else document(WORLD, rng)
        assert text.endswith(SEPARATOR)
        blocks = re.findall(r"(?:\n\n|\A)([^\n]+\nA\. [^\n]+\nB\. [^\n]+\nC\. [^\n]+\nD\. [^\n]+\nAnswer:)", text)
        assert not asked & set(blocks)
        exams += len(blocks)
    assert exams > 300
