"""Tiny real checkpoints, built once per session, and the real data sets where they are at hand."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fake_endpoint import Endpoint
from own_environment import DATA_ROOT  # before what reads the environment as it is imported
from side_by_side import scope_of

VOCABULARY = 300
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_MIXED = ["sliding_attention", "full_attention"]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama-gqa": {"model_type": "llama", **_COMMON},
    "llama-tied": {"model_type": "llama", **_COMMON, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "mistral-window": {"model_type": "mistral", **_COMMON, "sliding_window": 8},
    "gemma3": {"model_type": "gemma3_text", **_COMMON, "head_dim": 8, "sliding_window": 8, "layer_types": _MIXED},
    "gemma2": {
        "model_type": "gemma2",
        **_COMMON,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": _MIXED,
        "attn_logit_softcapping": 1.0,  # low enough to change what the weights say
        "final_logit_softcapping": 5.0,
    },
    "qwen2": {"model_type": "qwen2", **_COMMON, "vocab_size": VOCABULARY + 4},  # its tokenizer's class adds a token
    "gpt-neox": {"model_type": "gpt_neox", **_COMMON},
    "opt": {"model_type": "opt", **_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
    "phi3": {"model_type": "phi3", **_COMMON},
    "phi3-longrope": {
        "model_type": "phi3",
        **_COMMON,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0, 3.0, 5.0, 9.0],
        },
        "original_max_position_embeddings": 40,
    },
    "mixtral": {"model_type": "mixtral", **_COMMON, "hidden_size": 64, "num_local_experts": 8, "sliding_window": None},
    "bloom": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gpt-neo": {
        "model_type": "gpt_neo",
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 64,
        "max_position_embeddings": 256,
    },
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}
"""Settings of the tiny models; the weights are wide (0.3), so that a mix-up between two tokens shows."""

TEXT = (
    "The cat sat on the mat, and the dog sat by the door.",
    "Human: what is the capital of France?\n\nAssistant: The capital of France is Paris.",
    "hello world, hello there; numbers 1 2 3 and 42.",
    "An answer that is true is a true answer; a false answer is false.",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A chromium, for the tests of one file: while it lives, no other test of this thread may run an event loop."""
    program = os.environ.get("ALMOST_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if program is None:
        pytest.skip("no chromium on the path; install Debian's chromium, or set ALMOST_CHROMIUM")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=CHROMIUM_FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The real data sets, laid out like the hub."""
    if not DATA_ROOT.is_dir():
        pytest.skip(f"no data root at {DATA_ROOT}; set ALMOST_DATA_ROOT to a folder laid out like the hub")
    return DATA_ROOT


class _FreezeModules:
    """A callback of the garbage collector: a full collection that finds many new modules passes over them from then on.

    torch, transformers and trl are more than a million objects, all there to stay. Each stage of training and each
    `Trainer` collects in full: 0.3 s of CPU, and 30 to 40 % of the time of a file that trains models which fit a page.
    Nothing is frozen while the modules are the same, so what a test leaves in cycles is freed as ever.
    """

    def __init__(self) -> None:
        self._modules = 0

    def __call__(self, phase: str, about: dict[str, int]) -> None:
        if phase == "stop" and about["generation"] == 2 and len(sys.modules) >= self._modules + 100:
            self._modules = len(sys.modules)
            gc.freeze()


gc.callbacks.append(_FreezeModules())


def pytest_configure(config: pytest.Config) -> None:
    """One more mark; the others are in pyproject.toml, and any change there makes `make` set up .venv anew."""
    config.addinivalue_line("markers", "alone(reason): measures time; `make test` runs it when no other test runs")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, by the scopes of `make test`."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    return Scheduling(config, log)


class RealModels:
    """Where the real checkpoints are; a test that takes one that is not there is skipped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def smollm2(self) -> Path:
        """SmolLM2-135M-Instruct: an instruction-tuned Llama with a ChatML template."""
        return self._checkpoint("smollm2-135m-instruct")

    @property
    def gemma(self) -> Path:
        """Gemma 3 270M, pre-trained only: no template, BOS before every text, sliding windows of 512."""
        return self._checkpoint("gemma-3-270m")

    @staticmethod
    def copy(checkpoint: Path, folder: Path) -> Path:
        """A new folder with its files, to be changed; the weights are a link."""
        folder.mkdir()
        for file in checkpoint.iterdir():
            if file.suffix == ".safetensors":
                (folder / file.name).symlink_to(file)
            elif file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
        return folder

    def _checkpoint(self, name: str) -> Path:
        path = self.folder / name
        if not (path / "config.json").is_file():
            pytest.skip(f"no real model at {path}; run `make test-real`, or set ALMOST_REAL_MODELS")
        return path


@pytest.fixture(scope="session")
def real_models() -> RealModels:
    """`real_models.smollm2` and `real_models.gemma`, for tests with the mark `real`."""
    default = Path(__file__).parents[1] / "runs" / "models"
    return RealModels(Path(os.environ.get("ALMOST_REAL_MODELS") or default).resolve())


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A server whose answers a test writes, and no key in the environment."""
    from almost_eval.models.endpoints import KEYS

    for name in (*KEYS, "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one CPU thread: models this small are faster so, and the same bits come out on any number of cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def bpe_tokenizer() -> Any:
    """Byte-level BPE that puts `<s>` (0) before every text; `</s>` is 1, `<pad>` 2."""
    from almost_eval.nano.seeded import train_tokenizer

    return train_tokenizer(TEXT * 4, vocab_size=VOCABULARY, model_max_length=256)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Any]:
    """`make(add_eos)`: a LlamaTokenizer on a SentencePiece model with byte fallback."""
    import sentencepiece
    from transformers import AutoTokenizer

    trained = tmp_path_factory.mktemp("sentencepiece")
    (trained / "text.txt").write_text("\n".join(TEXT * 4), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(trained / "text.txt"),
        model_prefix=str(trained / "tokenizer"),
        vocab_size=340,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        minloglevel=2,
    )

    @cache
    def make(add_eos: bool) -> Any:
        folder = tmp_path_factory.mktemp("llama-tokenizer")
        (folder / "tokenizer.model").write_bytes((trained / "tokenizer.model").read_bytes())
        settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        settings |= {"add_bos_token": True, "add_eos_token": add_eos}  # type: ignore[dict-item]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return AutoTokenizer.from_pretrained(str(folder))

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, bpe_tokenizer: Any) -> Callable[[str], Path]:
    """`build(name)`: the folder of a random checkpoint of that architecture. Shared by all tests: copy to change."""

    @cache
    def build(name: str) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = {"initializer_range": 0.3, "vocab_size": VOCABULARY, **ARCHITECTURES[name]}
        settings |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        config = AutoConfig.for_model(**settings)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases start at 1 and 0, which hides mistakes
                    parameter.data += 0.1 * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        bpe_tokenizer.save_pretrained(folder)
        return folder

    return build


class Outcome(NamedTuple):
    """What a command line left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def almost_eval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """`almost_eval("hhh", "--limit", 2)`: the command in this process, which has torch imported already."""
    import torch

    from almost_eval.cli.main import main

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["almost-eval", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        return Outcome(int(exit.value.code or 0), out, err)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small for two, which wait for each other on a busy machine
    yield run
    torch.set_num_threads(threads)
