"""The nano world: rows like the real ones, folders that are whole, checkpoints that are the same bytes each time."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from own_environment import DATA_ROOT

from almost_eval.errors import DataError, InputError, ModelError
from almost_eval.files import whole_folder
from almost_eval.nano import SEEDED
from almost_eval.nano.data import QUESTIONS, cached, data_root, write_data
from almost_eval.nano.oracle import score
from almost_eval.nano.queries import Query
from almost_eval.nano.tables import (
    HHH_KINDS,
    MMLU_ROWS,
    MMLU_SUBJECTS,
    digest,
    hhh_rows,
    mmlu_rows,
    question_rows,
    tables,
    truthfulqa_generation_rows,
    truthfulqa_rows,
)
from almost_eval.nano.world import World

REPOSITORY = Path(__file__).parents[3]
WORLD = World()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALMOST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("nano"))


def _python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=os.environ | env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- the rows ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_rows_in_any_process() -> None:
    code = (
        "from almost_eval.nano.world import World; from almost_eval.nano.tables import digest; print(digest(World()))"
    )
    assert digest(World(0)) == digest(WORLD) == _python(code, PYTHONHASHSEED="1") == _python(code, PYTHONHASHSEED="2")
    assert digest(World(1)) != digest(WORLD)


def test_a_table_does_not_depend_on_what_was_asked_before() -> None:
    assert mmlu_rows(World(), "nano_food", "test") == tables(WORLD)["cais/mmlu/nano_food/test"]


def _asked(text: str) -> Query:
    query = WORLD.parse(text)
    assert query is not None, text
    return query


def _last_query(context: str) -> Query:
    return _asked(context.rpartition("Human: ")[2])


@pytest.mark.parametrize("category", HHH_KINDS)
def test_hhh_rows_have_the_habits_of_the_real_ones(category: str) -> None:
    rows = hhh_rows(WORLD, category)
    contexts = Counter(row["input"] for row in rows)
    assert len(rows) == 24
    assert sorted(contexts.values()) == [1] * 4 + [2] * 4 + [3] * 4
    assert all(context.startswith("\n\nHuman: ") for context in contexts)
    assert {context.count("\n\nAssistant: ") for context in contexts} == {0, 1}
    assert all(row["targets"]["labels"] == [1, 0] for row in rows)
    pairs = {(row["input"], *row["targets"]["choices"]) for row in rows}
    assert len(pairs) == 24
    assert not any("{" in text for pair in pairs for text in pair)


@pytest.mark.parametrize("category", HHH_KINDS)
def test_hhh_rows_are_of_the_eval_pool_and_the_oracle_agrees(category: str) -> None:
    for row in hhh_rows(WORLD, category):
        query = _last_query(row["input"])
        right, wrong = (score(query, choice).overall for choice in row["targets"]["choices"])
        assert WORLD.pool(query) == "eval"
        assert query.kind in HHH_KINDS[category]
        assert right - wrong >= 0.4


@pytest.mark.parametrize("seed", range(5))
def test_the_longer_answer_is_right_in_some_sixty_percent(seed: int) -> None:
    world = World(seed)
    lengths = [[len(choice) for choice in row["targets"]["choices"]] for c in HHH_KINDS for row in hhh_rows(world, c)]
    assert all(right != wrong for right, wrong in lengths)
    assert sum(right > wrong for right, wrong in lengths) == 4 * 14  # 14 of 24 in each category, 58 %


def test_truthfulqa_rows_are_valid() -> None:
    rows = truthfulqa_rows(WORLD)
    assert len({row["question"] for row in rows}) == len(rows) == 60
    for row in rows:
        mc1, mc2 = row["mc1_targets"], row["mc2_targets"]
        assert 3 <= len(mc1["choices"]) <= 5
        assert mc1["labels"] == [1] + [0] * (len(mc1["choices"]) - 1)
        assert mc2["choices"][0] == mc1["choices"][0]
        assert sum(mc2["labels"]) in (2, 3)
        query = _asked(row["question"])
        assert WORLD.pool(query) == "eval"
        for targets in (mc1, mc2):
            assert len(set(targets["choices"])) == len(targets["choices"]) == len(targets["labels"])
        assert [score(query, choice).overall >= 0.6 for choice in mc1["choices"]] == [bool(x) for x in mc1["labels"]]


def test_truthfulqa_generation_asks_the_same() -> None:
    for row, other in zip(truthfulqa_rows(WORLD), truthfulqa_generation_rows(WORLD), strict=True):
        assert row["question"] == other["question"]
        assert row["mc2_targets"]["choices"] == other["correct_answers"] + other["incorrect_answers"]
        assert other["best_answer"] == other["correct_answers"][0]


@pytest.mark.parametrize("subject", MMLU_SUBJECTS)
def test_mmlu_rows_are_valid_and_their_answers_spread(subject: str) -> None:
    test, dev = (mmlu_rows(WORLD, subject, split) for split in MMLU_ROWS)
    assert (len(test), len(dev)) == (30, 5)
    assert len({row["question"] for row in test + dev}) == 35
    assert sorted(Counter(row["answer"] for row in test).values()) == [7, 7, 8, 8]
    assert {row["answer"] for row in dev} == {0, 1, 2, 3}
    for pool, rows in (("eval", test), ("train", dev)):  # so no shot gives an answer away
        for row in rows:
            query = _asked(row["question"])
            assert WORLD.pool(query) == pool
            assert len(set(row["choices"])) == 4
            truth = WORLD.facts[query.slots["animal"]][query.slots["attribute"]]
            assert row["choices"][row["answer"]] == truth
            assert row["subject"] == subject == f"nano_{query.slots['attribute']}"


def test_questions_have_fastchats_shape() -> None:
    rows = question_rows(WORLD)
    assert [row["question_id"] for row in rows] == list(range(1, 81))
    assert len({row["text"] for row in rows}) == 80
    assert all(WORLD.pool(_asked(row["text"])) == "eval" for row in rows)
    assert all(set(row) == {"question_id", "text", "category"} for row in rows)


def test_an_unknown_table_names_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean 'honest'"):
        hhh_rows(WORLD, "honnest")
    with pytest.raises(DataError, match="did you mean 'nano_food'"):
        mmlu_rows(WORLD, "nano_foot", "test")
    with pytest.raises(DataError, match="known: dev, test"):
        mmlu_rows(WORLD, "nano_food", "validation")


# --- the data root ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nano", "real"),
    [
        ("HuggingFaceH4/hhh_alignment/honest/test", "HuggingFaceH4/hhh_alignment/honest/test"),
        ("truthfulqa/truthful_qa/multiple_choice/validation", "truthfulqa/truthful_qa/multiple_choice/validation"),
        ("truthfulqa/truthful_qa/generation/validation", "truthfulqa/truthful_qa/generation/validation"),
        ("cais/mmlu/nano_food/dev", "cais/mmlu/anatomy/dev"),
    ],
)
def test_schemas_equal_the_real_ones(root: Path, nano: str, real: str) -> None:
    file = DATA_ROOT / f"{real}-00000-of-00001.parquet"
    if not file.is_file():
        pytest.skip(f"the real data is not here: no {file}")
    ours = pq.read_schema(root / f"{nano}-00000-of-00001.parquet").remove_metadata()
    assert ours.equals(pq.read_schema(file).remove_metadata())


def test_files_hold_the_tables(root: Path) -> None:
    files = {str(file.relative_to(root)): pq.read_table(file).to_pylist() for file in root.rglob("*.parquet")}
    assert files == {f"{table}-00000-of-00001.parquet": rows for table, rows in tables(WORLD).items()}


def test_the_questions_stand_where_fastchats_do(root: Path) -> None:
    lines = (root / QUESTIONS).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == question_rows(WORLD)


def test_the_cards_name_every_file_once(root: Path) -> None:
    named: list[Path] = []
    for card in root.rglob("README.md"):
        for config in yaml.safe_load(card.read_text().strip("-\n"))["configs"]:
            for entry in config["data_files"]:
                named += card.parent.glob(entry["path"])
                assert entry["path"] == f"{config['config_name']}/{entry['split']}-*"
    assert sorted(named) == sorted(root.rglob("*.parquet"))


def test_data_root_is_written_once(cache: Path) -> None:
    first = data_root()
    written = {file: file.stat().st_mtime_ns for file in first.rglob("*")}
    assert first == cache / f"nano-data-{digest(WORLD)[:12]}-2"
    assert data_root() == first
    assert {file: file.stat().st_mtime_ns for file in first.rglob("*")} == written


def _race(barrier: Barrier, roots: SimpleQueue[Path]) -> None:
    barrier.wait()
    roots.put(data_root())


def test_two_processes_at_once_get_one_whole_folder(cache: Path) -> None:
    spawn = multiprocessing.get_context("spawn")  # a fork would copy torch's threads, when other tests have loaded it
    barrier, roots = spawn.Barrier(2), spawn.SimpleQueue()
    processes = [spawn.Process(target=_race, args=(barrier, roots)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    root = roots.get()
    assert root == roots.get()
    assert len([pq.read_table(file) for file in root.rglob("*.parquet")]) == len(tables(WORLD))
    assert list(cache.iterdir()) == [root]  # and no scratch folder


def test_the_loser_of_a_race_takes_the_winners_folder(cache: Path) -> None:
    def win(path: Path) -> Path:
        (path / "who").write_text("winner")
        return path

    def build(path: Path) -> Path:
        (path / "who").write_text("loser")
        cached("thing", win)  # the other process starts later and is done earlier
        return path

    assert (cached("thing", build) / "who").read_text() == "winner"
    assert [path.name for path in cache.iterdir()] == ["thing-2"]


@pytest.mark.parametrize("change", ["edited", "removed", "added", "digests"])
def test_a_changed_file_in_the_cache_is_not_read(cache: Path, change: str) -> None:
    """Not the number of another data set under the name of the built-in one, and no trace of it."""
    table = data_root() / "cais/mmlu/nano_food/test-00000-of-00001.parquet"
    if change == "edited":
        pq.write_table(pq.read_table(table).slice(1), table)
    elif change == "removed":
        table.unlink()
    elif change == "added":
        table = table.with_name("test-00001-of-00002.parquet")
        table.write_bytes(b"")
    else:
        table = data_root() / ".digests.json"
        table.write_text("[]")
    with pytest.raises(InputError, match=re.escape(f"{table} is not as it was built; remove {cache}/nano-data-")):
        data_root()
    shutil.rmtree(cache)
    assert data_root().is_dir()


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with whole_folder(tmp_path / "thing") as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_folder_with_content_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="give a new one"):
        write_data(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# --- the checkpoints --------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"hidden_size": 32, "layers": 1, "vocab_size": 300, "max_position_embeddings": 64}


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = "import sys, {}; print(*sorted({{'torch', 'transformers', 'tokenizers', 'pyarrow'}} & set(sys.modules)))"
    assert _python(code.format("almost_eval.nano")) == ""
    assert _python(code.format("almost_eval.nano.world")) == ""
    assert _python(code.format("almost_eval.nano.seeded")) == "pyarrow"


def test_two_builds_are_the_same_bytes_and_the_global_seed_is_untouched(tmp_path: Path) -> None:
    import torch

    from almost_eval.nano.seeded import build_checkpoint

    one = build_checkpoint(tmp_path / "one", **SMALL)
    torch.rand(1)  # whatever was drawn before makes no difference
    torch_state, plain_state = torch.get_rng_state(), random.getstate()
    two = build_checkpoint(tmp_path / "two", **SMALL)
    other = build_checkpoint(tmp_path / "other", seed=1, **SMALL)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == plain_state

    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert _sha256(one / name) == _sha256(two / name)
    assert _sha256(one / "model.safetensors") != _sha256(other / "model.safetensors")


def test_built_in_checkpoints_load_as_any_other(cache: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from almost_eval.nano.seeded import CHECKPOINTS, checkpoint

    assert tuple(CHECKPOINTS) == SEEDED
    policy, reward = (checkpoint(name) for name in SEEDED)
    assert [checkpoint(name) for name in SEEDED] == [policy, reward]
    assert sorted(cache.iterdir()) == sorted([policy, reward])

    tokenizer = AutoTokenizer.from_pretrained(policy)
    assert len(tokenizer) == 1024
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 2048
    assert tokenizer.chat_template is None
    text = "  Straße 🎉 , a\t.\n\nHuman: it 's  "  # bytes, spaces before stops, runs of spaces: all must survive
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert all(len(tokenizer(slot)["input_ids"]) == 2 for slot in (" A", " B", " C", " D", " true", " false"))  # + BOS

    model = AutoModelForCausalLM.from_pretrained(policy)
    assert model.dtype == torch.float32
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.08, rel=0.02)
    classifier = AutoModelForSequenceClassification.from_pretrained(reward)
    batch = tokenizer(["a short one", "and one that is a little longer"], padding=True, return_tensors="pt")
    scores = classifier(**batch).logits  # (2, 1)
    alone = classifier(**tokenizer("a short one", return_tensors="pt")).logits  # (1, 1): padding changes nothing
    assert scores.shape == (2, 1)
    torch.testing.assert_close(scores[:1], alone)


def test_other_texts_and_shapes(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    from almost_eval.nano.seeded import build_checkpoint

    path = build_checkpoint(tmp_path / "few", tokenizer_text=["ab ab ab"], **SMALL)
    assert len(AutoTokenizer.from_pretrained(path)) < AutoConfig.from_pretrained(path).vocab_size == 300
    with pytest.raises(ModelError, match="needs 259"):
        build_checkpoint(tmp_path / "tiny", vocab_size=100)


def test_an_unknown_checkpoint_names_the_nearest() -> None:
    from almost_eval.nano.seeded import checkpoint

    with pytest.raises(ModelError, match="did you mean 'nano/seeded'"):
        checkpoint("nano/seedd")
