"""Pre-training the nano family: the same bytes twice, checkpoints that load, a tokenizer that keeps its promises."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from almost_eval.errors import InputError
from almost_eval.models.chat import encode_with_completion_mask, load_template
from almost_eval.nano import lexicon
from almost_eval.nano.world import SEPARATOR, World, render
from almost_train.nano.pretrain import SIZES, Curriculum, Pretrained, fact_accuracy, pretrain, pretrain_family
from benchmarks.nano_ladder import Respondent, oracle_ladder, sample

SHIPPED = Path(__file__).parents[3] / "almost_eval/nano/checkpoints"
TINY = Curriculum(tokens=12_000, single_rows=16, document_rows=4, warmup=2)
WORLD = World()


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pretrained]:
    folder = tmp_path_factory.mktemp("nano") / "vanilla-small"
    return folder, pretrain("small", folder, curriculum=TINY)


@pytest.fixture(scope="module")
def loaded(tiny: tuple[Path, Pretrained]) -> tuple[Any, Any]:
    return _load(tiny[0])


# --- training ---------------------------------------------------------------------------------------------------------


def test_two_runs_give_the_same_bytes_and_another_seed_others(tiny: tuple[Path, Pretrained], tmp_path: Path) -> None:
    import torch

    torch.rand(1)  # whatever was drawn before makes no difference
    before = torch.get_rng_state(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    pretrain("small", tmp_path / "again", curriculum=TINY)
    after = torch.get_rng_state(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    pretrain("small", tmp_path / "other", seed=1, curriculum=TINY)
    assert _digests(tiny[0]) == _digests(tmp_path / "again")
    assert _digests(tiny[0])["model.safetensors"] != _digests(tmp_path / "other")["model.safetensors"]


def test_what_it_came_to(tiny: tuple[Path, Pretrained]) -> None:
    folder, result = tiny
    assert result.size == "small"
    assert TINY.tokens <= result.tokens < 1.5 * TINY.tokens
    assert result.steps > 10
    assert 0 <= result.fact_accuracy <= 1
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "almost-train nano pretrain --output DIR --seed 0" in card
    assert f"{result.parameters:,} parameters" in card


@pytest.mark.slow
def test_a_family_is_the_same_models_side_by_side(tiny: tuple[Path, Pretrained], tmp_path: Path) -> None:
    results = pretrain_family(tmp_path / "family", sizes=("small", "medium"), curriculum=TINY, workers=2)
    assert [result.size for result in results] == ["small", "medium"]
    assert _digests(tmp_path / "family/vanilla-small") == _digests(tiny[0])
    tokenizers = {(tmp_path / f"family/vanilla-{size}/tokenizer.json").read_bytes() for size in ("small", "medium")}
    assert len(tokenizers) == 1
    assert len({result.tokens for result in results}) == 1  # equal tokens for all


def test_bad_requests_are_refused_before_anything_is_trained(tiny: tuple[Path, Pretrained], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'small'"):
        pretrain("smal", tmp_path / "x")
    with pytest.raises(InputError, match="did you mean 'large'"):
        pretrain_family(tmp_path / "x", sizes=("small", "larg"))
    with pytest.raises(InputError, match="is not an empty folder"):
        pretrain_family(tiny[0].parent, sizes=("medium", "small"))
    assert not (tmp_path / "x").exists()
    assert not (tiny[0].parent / "vanilla-medium").exists()


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def test_loads_as_float32_with_nothing_to_complain_of(tiny: tuple[Path, Pretrained], loaded: tuple[Any, Any]) -> None:
    import torch
    from safetensors import safe_open

    model, tokenizer = loaded
    assert model.dtype == torch.float32
    with safe_open(tiny[0] / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    assert {file.name for file in tiny[0].iterdir()} >= {"config.json", "generation_config.json", "tokenizer.json"}
    generation = json.loads((tiny[0] / "generation_config.json").read_text())
    assert generation["eos_token_id"] == model.config.eos_token_id == tokenizer.eos_token_id
    assert generation["pad_token_id"] == model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token is None
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 2048
    assert all(size.hidden_size % 32 == 0 and size.heads == size.hidden_size // 32 for size in SIZES.values())


@pytest.mark.parametrize(
    "text",
    [
        "  Straße 🎉 , a\t.\n\nHuman: it 's  ",  # bytes, spaces before stops, runs of spaces: all must survive
        "\n\nHuman: What?\n\nAssistant: That. \n\n\nAssistant:\nHuman:",
        "",
    ],
)
def test_any_text_survives_the_tokenizer(text: str, loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    whole = text + SEPARATOR + text
    assert tokenizer.decode(tokenizer(whole)["input_ids"]) == whole


def test_a_prompts_tokens_begin_its_answers(loaded: tuple[Any, Any]) -> None:
    import random

    tokenizer = loaded[1]
    rng = random.Random(0)
    for _ in range(200):
        text = render(WORLD.dialogue(rng, (0.25, 0.25, 0.25, 0.25)))
        prompt = text[: text.rindex("Assistant:") + len("Assistant:")]
        ids, whole = tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"]
        assert whole[: len(ids)] == ids
        assert whole[-1] == tokenizer.eos_token_id


def test_the_chat_template_closes_with_the_separator(loaded: tuple[Any, Any]) -> None:
    import random

    tokenizer = loaded[1]
    template = load_template("auto", tokenizer)
    assert template is not None
    assert template.name == "almost"
    dialogue = WORLD.demonstrations(random.Random(0), "good", 1)[0]
    tokens = encode_with_completion_mask(tokenizer, template, dialogue)
    assert tokens.input_ids == tokenizer(render(dialogue))["input_ids"]
    assert tokens.completion_mask[-1]
    assert tokens.input_ids[-1] == tokenizer.eos_token_id


def test_the_worlds_words_and_the_labels_are_one_token_each(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    values = [value for attribute in lexicon.ATTRIBUTES.values() for value in attribute.values]
    tools = [advice.tool for advice in lexicon.ADVICE.values()]
    words = [*lexicon.ANIMALS, *values, *tools, *lexicon.THINGS, *lexicon.PEOPLE, *lexicon.HARMS, *lexicon.ADVICE]
    assert [word for word in [*words, *"ABCD", "true", "false"] if len(tokenizer(f" {word}")["input_ids"]) > 1] == []
    for marker in ("\n\nHuman:", "\n\nAssistant:", SEPARATOR):
        assert len(tokenizer(marker)["input_ids"]) == 1


# --- measuring --------------------------------------------------------------------------------------------------------


def test_the_ladder_measures_and_repeats(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    configurations = (Respondent("small", "weak", 1), Respondent("small"))
    rungs = oracle_ladder({"small": model}, tokenizer, configurations, n=20)
    assert [rung.configuration for rung in rungs] == ["small-weak-1shot", "small-0shot"]
    assert all(0 <= rung.overall <= 1 and rung.n == 20 for rung in rungs)
    assert rungs == oracle_ladder({"small": model}, tokenizer, configurations, n=20)


def test_answers_end_at_the_separator_or_the_next_turn(loaded: tuple[Any, Any]) -> None:
    import torch

    model, tokenizer = loaded
    state = torch.get_rng_state()
    answers = sample(model, tokenizer, ["\n\nHuman: What?\n\nAssistant:"] * 8, max_new_tokens=200)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(answers) == 8
    assert not any("Human:" in text or "-----" in text for text, _ in answers)


# --- what is shipped --------------------------------------------------------------------------------------------------


def test_the_shipped_family_is_small_and_whole() -> None:
    folders = [SHIPPED / f"vanilla-{size}" for size in SIZES]
    names = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    for folder in folders:
        assert sorted(file.name for file in folder.iterdir()) == [*names, "tokenizer_config.json"]
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) < 6e6
    assert len({(folder / "tokenizer.json").read_bytes() for folder in folders}) == 1


@pytest.mark.parametrize("size", ["medium", "large"])
def test_the_shipped_models_know_the_facts(size: str) -> None:
    assert fact_accuracy(*_load(SHIPPED / f"vanilla-{size}"), WORLD) >= 0.95


@pytest.mark.slow
def test_the_command_of_the_card_makes_the_shipped_model(tmp_path: Path) -> None:
    pretrain("small", tmp_path / "small")
    new, shipped = tmp_path / "small", SHIPPED / "vanilla-small"
    if _digests(new) == _digests(shipped):
        return
    # Another processor or another version rounds otherwise: then it is the same model only in what it can do.
    scores = []
    for folder in (new, shipped):
        model, tokenizer = _load(folder)
        rungs = oracle_ladder({"small": model}, tokenizer, [Respondent("small", "good", 1)], n=400)
        scores.append(rungs[0].overall)
    assert scores[0] == pytest.approx(scores[1], abs=0.08)  # 400 answers: a standard error of some .02 each
