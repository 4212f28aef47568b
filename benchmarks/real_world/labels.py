"""Is "larger and better prompted" better here? The method's rule of thumb, against two judges of another kind.

1. Hand-written rules on a drawn sample of 100 ranked pairs: how many of the faults below an answer has. Fewer is
   better, equally many is a tie and counts one half.
2. Nearness to a strong model: the same configurations answer held-out prompts of AlpacaEval that are not long, of which
   GPT-4's answers are archived; the answer with the larger ROUGE-L F1 to GPT-4's is better.

Both are weak judges. Each is shown beside "the longer is better" on the same pairs.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from almost_eval.data.sources import find_data
from almost_eval.engines.build import generation_engine
from almost_eval.files import Row, read_rows, write_rows
from almost_eval.progress import Progress
from almost_train.pipeline.plan import engine_options
from almost_train.pipeline.run import Pipeline
from almost_train.synthetic.overlap import tokens
from almost_train.synthetic.ranking import as_ranking
from almost_train.synthetic.responses import ResponseSettings, read_configurations, synthesize_responses
from benchmarks.real_world.data import REFERENCE, archived_answers

SAMPLE = 100
"""Pairs that the rules judge."""
LONGEST = 300
"""Characters of a held-out prompt: five demonstrations leave no room for a longer one in 2,048 tokens."""
_WORD = re.compile(r"[a-z']+")
_SMALL = frozenset(
    "a an and are as at be but by can could do does for from has have how i if in is it its me my no not of on or our "
    "please should so some tell that the their them there these they this to us was we what when where which who why "
    "will with would you your".split()
)


# --- rules ---


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _is_off_topic(prompt: str, answer: str) -> bool:
    """Shares no word of content with the prompt."""
    topic = set(_words(prompt)) - _SMALL
    return bool(topic) and not topic & set(_words(answer))


def _repeats(prompt: str, answer: str) -> bool:
    """Says a run of six words twice."""
    words = _words(answer)
    runs = [tuple(words[i : i + 6]) for i in range(len(words) - 5)]
    return len(set(runs)) < len(runs)


def _echoes(prompt: str, answer: str) -> bool:
    """Says the prompt again, in half of its own words or more."""
    said, asked = _words(answer), set(_words(prompt))
    return len(said) > 3 and sum(word in asked for word in said) * 2 >= len(said)


def _is_poor(prompt: str, answer: str) -> bool:
    """Has few different words for its length: half of them or fewer, of twenty or more."""
    words = _words(answer)
    return len(words) >= 20 and len(set(words)) * 2 <= len(words)


def _is_bare(prompt: str, answer: str) -> bool:
    """Says fewer than eight words."""
    return len(_words(answer)) < 8


def _has_foreign_matter(prompt: str, answer: str) -> bool:
    """Has markup, a link, or a turn of its own."""
    return re.search(r"https?://|</?\w+>|\b(?:Human|Query|Assistant):|[|{}\\]", answer) is not None


RULES: Mapping[str, Callable[[str, str], bool]] = {
    "off topic": _is_off_topic,
    "repeats itself": _repeats,
    "echoes the prompt": _echoes,
    "few different words": _is_poor,
    "too bare": _is_bare,
    "foreign matter": _has_foreign_matter,
}
"""Name of a fault -> whether (prompt, answer) has it."""


def faults(prompt: str, answer: str) -> list[str]:
    """The faults of an answer, by name.

    >>> faults("How do I boil an egg?", "An egg needs eight minutes in boiling water, then cold water.")
    []
    >>> faults("How do I boil an egg?", "I am a cat.")
    ['off topic', 'too bare']
    """
    return [name for name, has in RULES.items() if has(prompt, answer)]


# --- pairs ---


def ranked_answers(folder: Path, ranking: Sequence[Sequence[str]]) -> list[Row]:
    """Every pair of valid answers of different rank: id, prompt, better (by rank), worse, and their configurations."""
    by_name = {name: read_rows(folder / f"{name}.jsonl") for group in ranking for name in group}
    pairs: list[Row] = []
    for above, below in combinations(ranking, 2):
        for higher in above:
            for lower in below:
                for one, other in zip(by_name[higher], by_name[lower], strict=True):
                    if one["rejected"] is None and other["rejected"] is None:
                        own = {"id": one["id"], "prompt": one["prompt"], "pair": f"{higher} > {lower}"}
                        pairs.append({**own, "better": one["response"], "worse": other["response"]})
    return pairs


def judge_by_rules(pairs: Sequence[Row], seed: int) -> list[Row]:
    """A drawn sample with the faults of both, and `agrees`: 1, 0 or, of equally many, 0.5."""
    drawn = random.Random(f"{seed}/labels").sample(list(pairs), min(SAMPLE, len(pairs)))
    return [_judged(pair, *(len(faults(pair["prompt"], pair[side])) for side in ("worse", "better"))) for pair in drawn]


def judge_by_reference(pairs: Sequence[Row], answers: Mapping[str, str]) -> list[Row]:
    """All pairs whose prompt has an archived answer; `agrees` as above."""
    known = [pair for pair in pairs if pair["prompt"] in answers]
    return [
        _judged(pair, *(rouge_l(answers[pair["prompt"]], pair[side]) for side in ("better", "worse"))) for pair in known
    ]


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L F1 of two texts, 0 to 1: twice the longest common subsequence of tokens over the tokens of both."""
    from rapidfuzz.distance import LCSseq

    one, other = tokens(a), tokens(b)
    return 2 * LCSseq.similarity(one, other) / max(1, len(one) + len(other))


def _judged(pair: Row, better: float, worse: float) -> Row:
    longer = _half(len(pair["better"]), len(pair["worse"]))
    return {**pair, "agrees": _half(better, worse), "longer": longer}


def _half(a: float, b: float) -> float:
    return 0.5 if a == b else float(a > b)


def write_labels(pipeline: Pipeline, root: Path, data: Path, folder: Path, seed: int, progress: Progress) -> None:
    """Both judges' rows: rules.jsonl and reference.jsonl; the second needs answers to held-out prompts, made here."""
    recipe = pipeline.recipe
    ranking = as_ranking(recipe.value("comparisons", "ranking"), "the ranking")
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "rules.jsonl", judge_by_rules(ranked_answers(pipeline.folder / "responses", ranking), seed))
    asked = [row for row in read_rows(data / "held-out.jsonl") if row["id"].startswith("alpaca")]
    asked = [row for row in asked if len(row["prompt"]) <= LONGEST]
    write_rows(folder / "prompts.jsonl", asked)
    settings = recipe.settings("responses", ResponseSettings, "configurations", prompt_set=recipe.prompt_set)
    configurations = read_configurations(recipe.value("responses", "configurations"), "the configurations")
    options = engine_options(recipe.engine, "the engine")
    synthesize_responses(
        settings,
        folder / "prompts.jsonl",
        configurations,
        folder / "responses",
        data=find_data(None, pipeline.data_root),
        engine_for=lambda model: generation_engine(model, options),
        progress=progress,
    )
    pairs = ranked_answers(folder / "responses", ranking)
    write_rows(folder / "reference.jsonl", judge_by_reference(pairs, archived_answers(root)[REFERENCE]))
