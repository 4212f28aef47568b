"""The command line that vLLM is started with: pure, so nothing is started here."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from almost_eval.engines.vllm_process import CPU_WORKER
from almost_eval.errors import InputError, ModelError, TemplateError
from almost_eval.models import loading
from almost_eval.models.chat import encode_text, load_template, special_tokens
from almost_eval.models.stops import STOP_STRINGS
from almost_eval.nano import shipped
from almost_eval.types import Message
from serving.models import TokenizerFiles, available_memory, find_model
from serving.vllm.command import GIB, VLLMCommand, option_value, set_options, vllm_command

CONVERSATION = (Message("user", "What does the otter eat?"), Message("assistant", "Insects."))


def command(kind: str = "policy", *options: str, cpu: bool = True, **more: Any) -> VLLMCommand:
    settings: dict[str, Any] = {"memory": math.inf, "environment": {}, **more}
    return vllm_command(find_model(kind, f"nano/{'almost' if kind == 'policy' else kind}"), "127.0.0.1", 8000, options,
                        cpu=cpu, **settings)  # fmt: skip


def value(made: VLLMCommand, option: str) -> str | None:
    return option_value(made.arguments, option)


# --- what is chosen ---


def test_a_policy_on_a_cpu() -> None:
    made = command()
    assert made.arguments[1:3] == ("-m", "serving.vllm.main")
    assert Path(made.arguments[3], "config.json").is_file()
    wanted = {"host": "127.0.0.1", "port": "8000", "served-model-name": "nano/almost", "generation-config": "vllm",
              "load-format": "safetensors", "shutdown-timeout": "6", "dtype": "float32", "block-size": "32",
              "kv-cache-memory-bytes": str(GIB), "max-num-batched-tokens": "4096"}  # fmt: skip
    assert {name: value(made, name) for name in wanted} == wanted
    assert {"--enforce-eager", "--no-enable-chunked-prefill"} <= set(made.arguments)
    assert value(made, "worker-cls") == CPU_WORKER  # tests/almost_eval/engines/test_vllm_sampling.py
    assert value(command("reward"), "worker-cls") is None  # nothing is sampled
    assert made.environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert made.environment["OMP_NUM_THREADS"] == "1"  # it is a very small model
    assert all(word in made.note for word in ("float32", "eager", "1 GiB", "blocks of 32", "one thread"))


def test_a_large_policy_on_a_cpu_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    full = command(memory=100 * GIB)
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(loading, "LARGE", 1000)
    made = command(memory=100 * GIB)
    assert value(made, "dtype") == "bfloat16"
    assert "bfloat16" in made.note
    assert "float32" not in made.note
    assert made.needed_bytes < full.needed_bytes  # half the weights
    assert value(command("reward"), "dtype") == "float32"  # rewards are scores
    own = command("policy", "--dtype", "float32", memory=100 * GIB)
    assert own.arguments[-2:] == ("--dtype", "float32")
    assert own.arguments.count("--dtype") == 1
    assert own.needed_bytes == full.needed_bytes
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: False)
    assert value(command(), "dtype") == "float32"


def test_a_gpu_keeps_vllms_own_defaults() -> None:
    made = command(cpu=False)
    chosen = {token for token in made.arguments if token.startswith("--")}
    assert chosen == {"--served-model-name", "--host", "--port", "--generation-config", "--load-format",
                      "--shutdown-timeout", "--middleware"}  # fmt: skip
    assert made.note == ""
    assert not [name for name in made.environment if "CPU" in name or "TORCH" in name]


def test_a_reward_model_gives_raw_logits() -> None:
    made = command("reward", cpu=False)
    assert value(made, "runner") == "pooling"
    assert json.loads(value(made, "pooler-config") or "") == {"use_activation": False}
    assert value(made, "middleware") == "serving.vllm.front.Front"  # alone: no stop strings
    assert made.arguments.count("--middleware") == 1


@pytest.mark.parametrize(
    ("given", "left_out"),
    [
        (("--dtype", "bfloat16"), "--dtype float32"),
        (("--dtype=bfloat16",), "--dtype float32"),
        (("--max_num_batched_tokens", "9000"), "--max-num-batched-tokens 4096"),
        (("--enable-chunked-prefill",), "--no-enable-chunked-prefill"),
        (("--no-enforce-eager",), "--enforce-eager"),
        (("--kv-cache-memory-bytes", "1G"), f"--kv-cache-memory-bytes {GIB}"),
        (("--worker-cls", "auto"), f"--worker-cls {CPU_WORKER}"),
        (("--load-format", "dummy"), "--load-format safetensors"),
        (("--generation-config", "auto"), "--generation-config vllm"),
    ],
)
def test_what_the_user_gives_takes_the_place_of_ours(given: tuple[str, ...], left_out: str) -> None:
    line = " ".join(command().arguments)
    assert left_out in line
    made = command("policy", *given)
    assert left_out not in " ".join(made.arguments)
    assert made.arguments[-len(given) :] == given


def test_an_option_that_is_unknown_here_goes_to_vllm_untouched() -> None:
    given = ("-tp", "2", "--data-parallel-size=4", "--speculative-config", '{"model": "a b"}', "--enable-lora")
    assert command("policy", *given).arguments[-len(given) :] == given


def test_compiling_is_off_only_where_nothing_is_asked_to_be_compiled() -> None:
    assert command().environment["TORCH_COMPILE_DISABLE"] == "1"
    assert "TORCH_COMPILE_DISABLE" not in command("policy", "--no-enforce-eager").environment


def test_what_the_environment_holds_stays() -> None:
    bound = command(environment={"VLLM_CPU_OMP_THREADS_BIND": "0-1"})
    assert "VLLM_CPU_OMP_THREADS_BIND" not in bound.environment
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in bound.environment  # threads are bound in a worker process only
    threads = command(environment={"OMP_NUM_THREADS": "2"})
    assert "OMP_NUM_THREADS" not in threads.environment
    assert "one thread" not in threads.note
    sized = command(environment={"VLLM_CPU_KVCACHE_SPACE": "2"})
    assert value(sized, "kv-cache-memory-bytes") is None


def test_a_model_of_some_size_has_all_threads(tmp_path: Path) -> None:
    larger = tmp_path / "larger"
    shutil.copytree(shipped("nano/almost"), larger)
    config = AutoConfig.from_pretrained(larger, intermediate_size=20_000)
    AutoModelForCausalLM.from_config(config).save_pretrained(larger)
    made = vllm_command(find_model("policy", str(larger)), "127.0.0.1", 8000, cpu=True, memory=math.inf, environment={})
    assert "OMP_NUM_THREADS" not in made.environment
    assert "one thread" not in made.note


def test_the_options_of_a_config_file_count_as_given(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("dtype: bfloat16\nenforce_eager: false\n")
    made = command("policy", "--config", str(file))
    assert value(made, "dtype") is None
    assert "--enforce-eager" not in made.arguments
    file.write_text("port: 9\n")
    with pytest.raises(InputError, match=r"'port' in the --config file would not act: give --port"):
        command("policy", "--config", str(file))
    with pytest.raises(InputError, match=r"--config .* cannot be read"):
        command("policy", "--config", str(tmp_path / "none.yaml"))


def test_names_and_values_of_options() -> None:
    assert {"dtype", "enable-x", "no-enable-x"} <= set_options(["--dtype", "a", "--no_enable_x"])
    assert option_value(["--a", "1", "--a=2"], "a") == "2"
    assert option_value(["--a"], "a") is None
    assert option_value(["--ab", "1"], "a") is None


def test_the_stop_strings_go_to_the_middleware() -> None:
    made = command()
    middlewares = [made.arguments[i + 1] for i, token in enumerate(made.arguments) if token == "--middleware"]
    assert middlewares == ["serving.vllm.middleware.DefaultStop", "serving.vllm.front.Front"]  # the last is outermost
    assert json.loads(made.environment["ALMOST_DEFAULT_STOP"]) == list(STOP_STRINGS["almost"])


def test_every_server_has_the_door() -> None:
    for kind in ("policy", "reward"):
        made = command(kind, allowed_hosts=("Chat.Example.org",), open_metrics=True)
        settings = {"host": "127.0.0.1", "allowed_hosts": ["chat.example.org"], "open_metrics": True}
        assert json.loads(made.environment["ALMOST_FRONT"]) == settings
    with pytest.raises(InputError, match="without scheme"):
        command(allowed_hosts=("http://a.b",))


def test_the_command_is_shown_for_a_shell_and_never_with_a_key() -> None:
    made = command("policy", "--override-generation-config", '{"temperature": 0.5}')
    shown = made.shown('"$ALMOST_API_KEY"')
    assert """--override-generation-config '{"temperature": 0.5}'""" in shown
    assert ' VLLM_API_KEY="$ALMOST_API_KEY" ' in shown
    assert "VLLM_API_KEY" not in made.shown()
    assert "VLLM_NO_USAGE_STATS=1 " in shown


# --- memory and context ---


def test_too_little_memory_is_seen_before_anything_starts() -> None:
    with pytest.raises(InputError, match=r"^too little memory for nano/almost: about 2.5 GiB are needed \(1.0 of them"):
        command(memory=2 * GIB)
    with pytest.raises(InputError, match=r"\(4.0 of them"):
        command(memory=3 * GIB, environment={"VLLM_CPU_KVCACHE_SPACE": "4"})
    assert command(memory=3 * GIB).needed_bytes < 3 * GIB
    assert command(memory=GIB, cpu=False).needed_bytes == 0


def test_the_cache_holds_one_whole_context(tmp_path: Path) -> None:
    model = find_model("policy", "nano/almost")
    assert model.cache_bytes_per_token == 2 * 2 * 2 * 32 * 4  # keys and values, layers, heads, width, float32
    long = shutil.copytree(model.checkpoint.path, tmp_path / "long")
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 3 << 20}))
    made = vllm_command(find_model("policy", str(long)), "127.0.0.1", 1, (), cpu=True, memory=64 * GIB, environment={})
    assert int(value(made, "kv-cache-memory-bytes") or 0) == 1024 * ((3 << 20) + 32)
    assert value(made, "max-num-batched-tokens") == str(3 << 20)


@pytest.mark.parametrize(
    ("length", "message"),
    [("4096", "--max-model-len 4096 is beyond the context of nano/almost, which is 2048 tokens"), ("1", "no room")],
)
def test_a_context_that_cannot_be(length: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        command("policy", "--max-model-len", length)


@pytest.mark.parametrize(("option", "message"), [("--api-key=x", "set ALMOST_API_KEY"), ("--uds", "watched over HTTP")])
def test_options_that_are_refused(option: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        command("policy", option)


def test_memory_is_a_number_of_bytes() -> None:
    assert available_memory() > GIB / 4


# --- the model ---


def test_names() -> None:
    model = find_model("policy", "nano/almost")
    assert (model.name, model.context_length, model.chat_template) == ("nano/almost", 2048, None)
    assert find_model("policy", str(model.checkpoint.path)).name == "almost"
    assert find_model("policy", "nano/almost", served_name="mine").name == "mine"


def test_templates_and_stop_strings(tmp_path: Path) -> None:
    vanilla = find_model("policy", "nano/vanilla-small")  # its tokenizer has no template
    assert vanilla.chat_template is not None
    template = load_template("almost")
    assert template is not None
    assert Path(vanilla.chat_template).read_text() == template.source
    assert vanilla.stop == STOP_STRINGS["almost"]
    assert find_model("policy", "nano/almost").stop == STOP_STRINGS["almost"]  # the same template, word for word
    assert find_model("policy", "nano/almost", template="vicuna").stop == STOP_STRINGS["vicuna"]
    assert find_model("policy", "nano/almost", stop=["###"]).stop == ("###",)
    assert find_model("policy", "nano/almost", stop=[""]).stop == ()
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    own = find_model("policy", "nano/almost", template=str(mine))
    assert (own.chat_template, own.stop) == (str(mine), ())


@pytest.mark.parametrize(
    ("kind", "name", "error", "message"),
    [
        ("policy", "nano/none", ModelError, "no built-in model"),
        ("policy", "nano/reward", ModelError, "holds a LlamaForSequenceClassification"),
        ("reward", "nano/almost", ModelError, "holds a LlamaForCausalLM"),
    ],
)
def test_a_model_of_the_wrong_kind(kind: str, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find_model(kind, name)


def test_a_template_that_cannot_be_had() -> None:
    with pytest.raises(TemplateError, match="unknown chat template"):
        find_model("policy", "nano/almost", template="almots")
    with pytest.raises(InputError, match="a server needs a chat template"):
        find_model("policy", "nano/almost", template="none")


def test_bos_is_written_where_the_tokenizer_would_add_it(
    tiny_checkpoint: Callable[[str], Path], bpe_tokenizer: Any
) -> None:
    """The server encodes a rendered chat without special tokens, as transformers' `apply_chat_template` does."""
    argument = find_model("policy", str(tiny_checkpoint("llama-gqa"))).chat_template
    template = load_template("almost")
    assert template is not None
    assert argument == "{{ bos_token }}" + template.source
    messages = [message.to_dict() for message in CONVERSATION]
    served = bpe_tokenizer.apply_chat_template(messages, chat_template=argument, return_dict=False)
    assert served[0] == bpe_tokenizer.bos_token_id
    text = template.render(CONVERSATION, special_tokens=special_tokens(bpe_tokenizer))
    assert served == encode_text(bpe_tokenizer, text)


@pytest.mark.parametrize("lists_added_tokens", [True, False])
def test_special_tokens_that_contradict_are_those_of_transformers(tmp_path: Path, lists_added_tokens: bool) -> None:
    """A map beside the config counts where the config lists no added tokens."""
    folder = shutil.copytree(shipped("nano/almost"), tmp_path / "model")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "\n\nHuman:"}))
    if lists_added_tokens:
        token = {"content": "\n\n-----", "special": True}
        token |= dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": {"1": token}}))
    eos = AutoTokenizer.from_pretrained(str(folder)).eos_token
    assert eos == ("\n\n-----" if lists_added_tokens else "\n\nHuman:")
    assert TokenizerFiles(folder).special_tokens_map["eos_token"] == eos
