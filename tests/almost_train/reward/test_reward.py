import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping import StopAfter, Stopped

from almost_eval.errors import DataError, InputError, ModelError, StoreError
from almost_eval.files import digest_path, read_rows, write_rows
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import Message
from almost_train.common.templates import keep_template
from almost_train.reward.pairs import calibration_error, encode_pairs, pair_metrics, read_pairs, reward_encoder
from almost_train.reward.run import RewardSettings, load_classifier, set_pad_token, train_reward

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "batch_size": 8,
    "micro_batch_size": 2,
    "max_length": 64,
    "device": "cpu",
    "eval_share": 0.25,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def row(prompt: str, chosen: str, rejected: str, prompt_id: str) -> dict[str, Any]:
    answers = {"chosen": [turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]}
    return {"prompt": [turn("user", prompt)], **answers, "prompt_id": prompt_id}


@pytest.fixture
def comparisons(tmp_path: Path) -> Path:
    """20 pairs on 10 prompts: an answer about the cat is better than one about the dog."""
    rng = random.Random(0)
    rows = [
        row(f"what is {i // 2}?", "The cat sat. " * rng.randint(1, 3), "a dog " * rng.randint(1, 3), f"p{i // 2}")
        for i in range(20)
    ]
    write_rows(tmp_path / "comparisons.jsonl", rows)
    return tmp_path / "comparisons.jsonl"


@pytest.fixture
def base(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """`make(pad)`: a causal LM whose tokenizer has its own pad token, pads with EOS, or has none (nor room for one)."""

    def make(pad: str, architecture: str = "llama-gqa") -> Path:
        from transformers import AutoConfig, AutoTokenizer

        source, folder = tiny_checkpoint(architecture), tmp_path / f"base-{pad}"
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        if pad == "own":
            return folder
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        config = AutoConfig.from_pretrained(str(folder))
        if pad == "eos":
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)
        if pad == "none":
            for name in ("tokenizer.json", "tokenizer_config.json"):
                text = (folder / name).read_text().replace("<pad>", "<kept>").replace('"pad_token"', '"was_pad"')
                (folder / name).write_text(text)
        config.pad_token_id = 1 if pad == "eos" else None
        config.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("pad", ["own", "eos", "none"])
def test_the_checkpoint_gives_the_same_logits_to_everybody(
    base: Callable[[str], Path], comparisons: Path, tmp_path: Path, pad: str
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    result = train_reward(RewardSettings(**SETTINGS), comparisons, str(base(pad)), tmp_path / "reward")
    assert result["metrics"]["eval"]["accuracy"]["n"] == result["metrics"]["eval"]["pairs"] >= 4
    folder = tmp_path / "reward" / "model"
    scorer = HFRewardModel(str(folder), device="cpu")
    conversations = [
        pair_side for pair in read_pairs(comparisons).pairs[:6] for pair_side in (pair.chosen, pair.rejected)
    ]  # of several lengths
    expected = torch.tensor([scorer.score([conversation])[0] for conversation in conversations])  # each alone
    assert expected.std() > 0.01

    model: Any = AutoModelForSequenceClassification.from_pretrained(str(folder))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")  # vLLM: no sigmoid
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.use_cache
    messages = [[message.to_dict() for message in conversation] for conversation in conversations]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer.apply_chat_template(messages, padding=True, return_tensors="pt", return_dict=True)
        assert (batch["attention_mask"] == 0).any()
        with torch.inference_mode():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
        assert torch.allclose(logits, expected, atol=1e-5), side
    stored = read_rows(tmp_path / "reward" / "eval.jsonl")[0]
    pair = next(p for p in read_pairs(comparisons).pairs if p.prompt_id == stored["prompt_id"])
    assert stored["chosen_reward"] == pytest.approx(scorer.score([pair.chosen])[0], abs=1e-5)


def test_absolute_positions_too_are_read_at_the_last_real_token(
    base: Callable[..., Path], comparisons: Path, tmp_path: Path
) -> None:
    train_reward(RewardSettings(**SETTINGS), comparisons, str(base("eos", "gpt2")), tmp_path / "reward")
    scorer = HFRewardModel(str(tmp_path / "reward" / "model"), device="cpu")
    conversations = [pair.chosen for pair in read_pairs(comparisons).pairs[:6]]
    alone = [scorer.score([conversation])[0] for conversation in conversations]
    assert scorer.score(conversations) == pytest.approx(alone, abs=1e-5)


IN_VLLM = """
import json, sys
from vllm import LLM

if __name__ == "__main__":
    llm = LLM(sys.argv[1], runner="pooling", dtype="float32", enforce_eager=True, max_model_len=128)
    outputs = llm.classify([{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])])
    print("REWARDS", json.dumps([output.outputs.probs[0] for output in outputs]))
"""


@pytest.mark.slow
def test_vllm_gives_the_raw_logits_without_being_told(comparisons: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from almost_eval.nano.seeded import build_checkpoint

    build_checkpoint(tmp_path / "base", hidden_size=64, heads=2, kv_heads=1, layers=2)  # vLLM's heads are 32 or more
    train_reward(RewardSettings(**SETTINGS), comparisons, str(tmp_path / "base"), tmp_path / "reward")
    folder = tmp_path / "reward" / "model"
    scorer = HFRewardModel(str(folder), device="cpu")
    conversations = [side for pair in read_pairs(comparisons).pairs[:4] for side in (pair.chosen, pair.rejected)]
    (tmp_path / "classify.py").write_text(IN_VLLM)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "classify.py"), str(folder), json.dumps(scorer.encode(conversations))],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("REWARDS")]
    assert found, done.stderr[-2000:]
    rewards = json.loads(found[0].removeprefix("REWARDS"))
    assert rewards == pytest.approx(scorer.score(conversations), abs=1e-5)
    assert max(rewards) > 1 or min(rewards) < 0  # no sigmoid's


def test_training_reads_the_tokens_that_scoring_reads(
    base: Callable[[str], Path], comparisons: Path, tmp_path: Path
) -> None:
    from almost_eval.models.loading import load_tokenizer

    folder = base("eos")
    train_reward(RewardSettings(**SETTINGS), comparisons, str(folder), tmp_path / "reward")
    tokenizer = load_tokenizer(find_checkpoint(str(folder)))
    encode = reward_encoder(tokenizer, keep_template(tokenizer))
    set_pad_token(tokenizer)
    scorer = HFRewardModel(str(tmp_path / "reward" / "model"), device="cpu")
    pairs, dropped = encode_pairs(read_pairs(comparisons).pairs, encode, 64, tokenizer.pad_token_id)
    assert not dropped
    for pair in pairs:
        assert [list(pair.chosen_ids), list(pair.rejected_ids)] == scorer.encode([pair.chosen, pair.rejected])
        assert pair.chosen_ids.count(0) == 1  # BOS
        assert pair.chosen_ids[-1] == 1  # EOS


def test_the_loss_is_bradley_terry_over_the_real_pairs(
    base: Callable[[str], Path], comparisons: Path, tmp_path: Path
) -> None:
    # The learning rate is small enough that the second step meets the first one's weights.
    folder = base("own")
    settings = RewardSettings(**SETTINGS | {"learning_rate": 1e-12})
    metrics = train_reward(settings, comparisons, str(folder), tmp_path / "reward")["metrics"]
    log = read_rows(tmp_path / "reward" / "log.jsonl")
    held_out = {r["prompt_id"] for r in read_rows(tmp_path / "reward" / "eval.jsonl")}
    pairs = [pair for pair in read_pairs(comparisons).pairs if pair.prompt_id not in held_out]
    assert metrics["train_pairs"] == len(pairs) == 16
    model = load_classifier(find_checkpoint(str(folder)), RewardSettings(seed=0))
    from almost_eval.models.loading import load_tokenizer

    tokenizer = load_tokenizer(find_checkpoint(str(folder)))
    encode = reward_encoder(tokenizer, keep_template(tokenizer))
    margins = []
    with torch.inference_mode():
        for pair in pairs:
            good, bad = (model(torch.tensor([encode(side)])).logits.item() for side in (pair.chosen, pair.rejected))
            margins.append(good - bad)
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    assert sum(line["loss"] for line in log) / 2 == pytest.approx(sum(losses) / 16, abs=1e-5)
    assert sum(line["margin"] for line in log) / 2 == pytest.approx(sum(margins) / 16, abs=1e-5)
    assert sum(line["accuracy"] for line in log) / 2 == pytest.approx(sum(m > 0 for m in margins) / 16, abs=1e-6)

    # A batch larger than the data: fillers take the rest of it, and change nothing.
    settings = RewardSettings(**SETTINGS | {"learning_rate": 1e-12, "batch_size": 44})
    train_reward(settings, comparisons, str(folder), tmp_path / "one-batch")
    (line,) = read_rows(tmp_path / "one-batch" / "log.jsonl")
    assert line["loss"] == pytest.approx(sum(losses) / 16, abs=1e-5)


def test_what_cannot_be_used_is_counted(base: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [row(f"q{i}?", "The cat sat.", "a dog", f"p{i}") for i in range(9)]
    rows += [row("long", "The cat sat. " * 40, "a dog", "l"), row("same", "a cat", "a cat", "s")]
    rows += [row("q0?", "The mat.", "a door", "another id of q0")]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "eval.jsonl", [row("q0?", "The cat.", "dog", "e"), row("new?", "The " * 99, "dog", "f")])
    result = train_reward(
        RewardSettings(**SETTINGS),
        tmp_path / "train.jsonl",
        str(base("own")),
        tmp_path / "reward",
        eval_comparisons=tmp_path / "eval.jsonl",
    )
    metrics = result["metrics"]
    assert metrics["train_pairs"] == 8
    assert metrics["dropped"] == {"prompt_in_eval": 2, "same_text": 1, "too_long": 1}
    assert metrics["eval_dropped"] == {"too_long": 1}
    assert metrics["eval"]["pairs"] == 1


def test_held_out_prompts_are_not_trained_on(comparisons: Path) -> None:
    from almost_train.reward.pairs import split_pairs

    pairs = read_pairs(comparisons).pairs
    train, held_out, dropped = split_pairs(pairs, None, 0.3, seed=1)
    assert len({p.prompt for p in held_out}) == 3
    assert not dropped
    assert {p.prompt for p in train} & {p.prompt for p in held_out} == set()
    assert len(train) + len(held_out) == 20
    assert split_pairs(pairs, None, 0.3, seed=1)[1] == held_out
    assert split_pairs(pairs, None, 0.3, seed=2)[1] != held_out
    assert split_pairs(pairs, None, 0.0, seed=1)[1] == []


KILLED = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
import torch
torch.set_num_threads(1)
from almost_eval.progress import Progress
from almost_train.reward.run import RewardSettings, train_reward

class Killer(Progress):
    @contextmanager
    def track(self, description, total, done=0):
        steps = iter(range(done + 1, 10**6))
        yield lambda count=1: os.kill(os.getpid(), signal.SIGKILL) if next(steps) == 5 else None

train_reward(RewardSettings(**eval(sys.argv[1])), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), progress=Killer())
"""


@pytest.mark.parametrize("how", ["exception", pytest.param("SIGKILL", marks=pytest.mark.slow)])
def test_stopped_and_run_again_ends_in_the_same_bits(
    base: Callable[[str], Path], comparisons: Path, tmp_path: Path, how: str
) -> None:
    folder = base("own")
    settings = SETTINGS | {"batch_size": 4, "epochs": 2, "save_every": 2}
    killed = tmp_path / "killed"
    if how == "SIGKILL":
        command = [sys.executable, "-c", KILLED, repr(settings), str(comparisons), str(folder), str(killed)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (-signal.SIGKILL, ""), done.stderr
    else:
        with pytest.raises(Stopped):
            train_reward(RewardSettings(**settings), comparisons, str(folder), killed, progress=StopAfter(5))
    assert sorted(p.name for p in (killed / ".work").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    # A checkpoint that the kill left half-written has no `whole` in it, and does not count.
    (killed / ".work" / "checkpoint-6").mkdir()
    (killed / ".work" / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    with (killed / "log.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')

    again = train_reward(RewardSettings(**settings), comparisons, str(folder), killed)
    # `save_every` is free to differ.
    whole = train_reward(RewardSettings(**settings | {"save_every": 0}), comparisons, str(folder), tmp_path / "whole")
    assert again["metrics"] == whole["metrics"]
    assert again["outputs"] == whole["outputs"]
    assert digest_path(killed / "model") == digest_path(tmp_path / "whole" / "model")
    timeless = [
        [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in read_rows(file)]
        for file in (killed / "log.jsonl", tmp_path / "whole" / "log.jsonl")
    ]
    assert timeless[0] == timeless[1]
    assert [line["step"] for line in timeless[0]] == list(range(1, 9))
    assert {p.name for p in killed.iterdir()} - {".lock"} == {
        "stage.json",
        "result.json",
        "log.jsonl",
        "eval.jsonl",
        "model",
    }
    assert not list(killed.rglob("*.bin")) + list(killed.rglob("*.pt"))
    assert train_reward(RewardSettings(**settings), comparisons, str(folder), killed) == again  # nothing left to do
    with pytest.raises(StoreError, match="seed"):
        train_reward(RewardSettings(**settings | {"seed": 1}), comparisons, str(folder), killed)


def test_nothing_global_is_touched_or_printed(
    base: Callable[[str], Path], comparisons: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = base("own")
    random.seed(3)
    torch.manual_seed(3)
    before = (random.getstate(), torch.get_rng_state().tolist())
    settings = RewardSettings(**SETTINGS | {"bf16": True, "gradient_checkpointing": True, "eval_share": 0.0})
    result = train_reward(settings, comparisons, str(folder), tmp_path / "reward")
    assert (random.getstate(), torch.get_rng_state().tolist()) == before
    assert capfd.readouterr().out == ""
    assert result["metrics"]["eval"]["pairs"] == 0
    assert result["metrics"]["eval"]["accuracy"]["value"] is None
    assert (
        find_checkpoint(str(tmp_path / "reward" / "model"), architectures=["SequenceClassification"]).config["dtype"]
        == "float32"
    )


def test_an_encoder_and_a_trained_reward_model_can_be_trained(comparisons: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    words = sorted({"what", "is", "?", "the", "cat", "sat", ".", "a", "dog", "human", "assistant", ":", *"0123456789"})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*special, *words]))
    tokenizer = BertTokenizer(vocab=str(tmp_path / "vocab.txt"), model_max_length=64)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    first = train_reward(RewardSettings(**SETTINGS), comparisons, str(tmp_path / "bert"), tmp_path / "one")
    model = tmp_path / "one" / "model"
    conversation = (Message("user", "what is 1?"), Message("assistant", "the cat sat."))
    ids = HFRewardModel(str(model), device="cpu").encode([conversation])[0]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    second = train_reward(RewardSettings(**SETTINGS), comparisons, str(model), tmp_path / "two")
    losses = [result["metrics"]["loss_last_step"] for result in (first, second)]
    assert losses[1] < losses[0]


def test_figures_of_pairs_by_hand() -> None:
    def scored(chosen: float, rejected: float, longer: int, prompt: str) -> dict[str, Any]:
        chars = {"chosen_chars": 10 + longer, "rejected_chars": 10}
        return {"prompt_id": prompt, "chosen_reward": chosen, "rejected_reward": rejected, **chars}

    figures = pair_metrics(
        [scored(2, 1, 5, "a"), scored(1, 3, -5, "a"), scored(1, 0, -1, "b"), scored(4, 4, 0, "b"), scored(9, 1, 9, "c")]
    )
    assert figures["accuracy"]["value"] == 0.6  # the tie is not right
    assert figures["ties"] == 1
    assert figures["accuracy_chosen_shorter"]["value"] == 0.5
    assert figures["accuracy_chosen_longer"]["value"] == 1.0
    assert figures["longer_wins"]["value"] == 0.5  # (1 + 0 + 0 + 1/2 + 1) / 5
    assert figures["mean_margin"] == pytest.approx((1 - 2 + 1 + 0 + 8) / 5)
    assert 0 < figures["length_correlation"] < 1
    assert figures["accuracy"]["ci95"] is not None
    json.dumps(figures, allow_nan=False)

    # sigmoid(ln 3) = 0.75, twice right: |2 - 1.5|; sigmoid(ln 9) = 0.9, wrong: |0 - 0.9|; over three pairs.
    assert calibration_error([math.log(3), math.log(3), -math.log(9)]) == pytest.approx((0.5 + 0.9) / 3)
    assert calibration_error([1e9]) == 0.0
    assert calibration_error([]) is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"prompt": []}, "row 2: needs a prompt"),
        ({"chosen": [turn("user", "x")]}, "assistant"),
        ({"chosen": ["x"]}, "row 2: a message must be"),
        ({"rejected": "text"}, "row 2: not conversational preferences"),
    ],
)
def test_malformed_rows_are_refused_with_their_place(
    base: Callable[[str], Path], tmp_path: Path, broken: dict[str, Any], message: str
) -> None:
    write_rows(tmp_path / "c.jsonl", [row("a", "b", "c", "p"), row("a", "b", "c", "p") | broken])
    with pytest.raises(DataError, match=message):
        train_reward(RewardSettings(**SETTINGS), tmp_path / "c.jsonl", str(base("own")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_and_models_that_cannot_work_are_refused(
    base: Callable[[str], Path], comparisons: Path, tmp_path: Path
) -> None:
    folder = str(base("own"))
    with pytest.raises(InputError, match=r"batch_size 9 is not a multiple of 2 \(micro_batch_size\)"):
        train_reward(RewardSettings(**SETTINGS | {"batch_size": 9}), comparisons, folder, tmp_path / "out")
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(
        json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]})
    )
    with pytest.raises(ModelError, match="classifier with 2 labels"):
        train_reward(RewardSettings(**SETTINGS), comparisons, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
