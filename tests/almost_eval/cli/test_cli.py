"""The command line: what it refuses and how, and what goes to which stream."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from machine_time import seconds_to_end

from almost_eval.cli.command_line import run_program
from almost_eval.files import whole_file
from almost_eval.nano.data import data_root as nano_root
from almost_eval.nano.seeded import checkpoint

Command = Callable[..., Any]
BINARY = Path(sys.executable).with_name("almost-eval")


@pytest.fixture(scope="module")
def empty_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds what the nano world builds, and no prompt set."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    """No network, no data root, no cached prompt set."""
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Network is unreachable")

    monkeypatch.delenv("ALMOST_DATA_ROOT", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setenv("ALMOST_CACHE", str(empty_cache))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    # In this order: importing `rewards` once the other is replaced would keep the replacement for good.
    monkeypatch.setattr("almost_eval.rewards.hf.load_weights", loaded)
    monkeypatch.setattr("almost_eval.engines.hf.load_weights", loaded)


def pickled(folder: Path) -> Path:
    shutil.copytree(checkpoint("nano/seeded"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    return folder


def broken_row(root: Path) -> Path:
    """The nano data with one bad question in row 3."""
    shutil.copytree(nano_root(), root)
    folder = root / "truthfulqa/truthful_qa/multiple_choice"
    (file,) = folder.glob("validation-*")
    file.unlink()
    good = {
        "question": "What is it?",
        "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
        "mc2_targets": {"choices": ["a", "b"], "labels": [1, 0]},
    }
    rows = [good, good, good | {"mc1_targets": {"choices": ["a", "b"], "labels": [1, 1]}}]
    (folder / "validation-00000-of-00001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def letterless(folder: Path) -> Path:
    """A checkpoint whose tokenizer knows no " A": bytes alone, and a space of its own."""
    from transformers import AutoTokenizer

    shutil.copytree(checkpoint("nano/seeded"), folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    content["model"]["vocab"] = {t: i for t, i in content["model"]["vocab"].items() if len(t) == 1 or t[0] == "<"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert len(AutoTokenizer.from_pretrained(str(folder)).encode(" A", add_special_tokens=False)) == 2
    return folder


REFUSED: dict[str, tuple[list[str], str]] = {
    "task": (["hhhh"], "unknown command or task 'hhhh'; did you mean 'hhh'?"),
    "option": (["hhh", "--protokol", "choice"], "No such option '--protokol'"),
    "limit": (["hhh", "--limit", "0"], "'--limit': 0 is not in the range x>=1"),
    "shots": (["mmlu", "--shots", "9"], "'--shots': 9 is not in the range 0<=x<=5"),
    "batch size": (["hhh", "--batch-size", "0"], "'0' is neither auto nor a number"),
    "batch size in another script": (["hhh", "--batch-size", "²"], "'²' is neither auto nor a number"),
    "batch tokens": (["hhh", "--batch-tokens", "-5"], "'-5' is neither auto nor a number"),
    "protocol": (["hhh", "--protocol", "chioce"], "unknown protocol 'chioce'; did you mean 'choice'?"),
    "metric": (["truthfulqa", "--metrics", "mc3"], "unknown metric 'mc3'; did you mean 'mc2'?"),
    "no metric": (["truthfulqa", "--metrics", ","], "no metric chosen"),
    "subject": (["mmlu", "--subjects", "nano_foot"], "unknown subject 'nano_foot'; did you mean 'nano_food'?"),
    "template": (["hhh", "--template", "vicunna"], "unknown chat template 'vicunna': did you mean 'vicuna'?"),
    "data": (["hhh", "--data", "nan"], "unknown data 'nan'; did you mean 'nano'?"),
    "prompt set": (["hhh", "--prompt-set", "offical"], "unknown prompt set 'offical'; did you mean 'official'?"),
    "dtype": (["hhh", "--dtype", "float3"], "unknown dtype 'float3'; did you mean 'float32'?"),
    "device": (["hhh", "--device", "gpu"], "device 'gpu' is not usable here"),
    "attention": (["hhh", "--attention", "flash"], "unknown attention 'flash'"),
    "short context": (["hhh", "--max-length", "8"], "no sample fits"),
    "short context for rewards": (["hhh", "--protocol", "reward", "--max-length", "8"], "no sample fits"),
    "long context": (["hhh", "--max-length", "4096"], "beyond the model's own context of 2048"),
    "check": (["hhh", "--allow", "nonsense"], "--allow nonsense: unknown check 'nonsense'"),
    "share": (["hhh", "--allow", "missing=2"], "give a share from 0 to 1, as in missing=0.05"),
    "normalise": (["hhh", "--normalise"], "--normalise belongs to --protocol likelihood, not choice"),
    "no template": (["hhh", "--protocol", "reward", "--template", "none"], "a reward model reads a conversation"),
    "prompts": (["hhh", "--protocol", "reward", "--prompt-set", "builtin"], "so it takes no prompts"),
    "causal rewards": (["hhh", "--protocol", "reward", "--model", "nano/seeded"], "holds a LlamaForCausalLM"),
    "choosing rewards": (["hhh", "--model", "nano/seeded-reward"], "holds a LlamaForSequenceClassification"),
    "no model": (["hhh", "--model", "./nope"], "no model at './nope'"),
    "unreachable model": (["hhh", "--model", "org/name"], "no directory org/name, and the hub could not give it"),
    "built-in model": (["hhh", "--model", "nano/seedd"], "no built-in model 'nano/seedd'; did you mean 'nano/seeded'?"),
    "not a model": (["hhh", "--model", "folder"], "is not a model: it has no config.json"),
    "a file as model": (["hhh", "--model", "file.json"], "is a file; give the checkpoint directory"),
    "pickle": (["hhh", "--model", "pickled"], "if you trust their source (--allow-pickle)"),
    "labels": (["hhh", "--model", "letterless", "--data", "nano"], "no single token for each of the labels ' A', ' B'"),
    "no data root": (["hhh", "--data-root", "nope"], "is not a folder; give one laid out like the hub"),
    "no data": (["hhh", "--data", "hub", "--prompt-set", "builtin"], "pass --data-root DIR with DIR/Hug"),
    "no prompts": (["hhh", "--data", "nano", "--prompt-set", "official"], "pass --data-root DIR with DIR/github"),
    "no questions": (["truthfulqa", "--data", "hub"], "pass --data-root DIR with DIR/truthfulqa"),
    "row": (["truthfulqa", "--data-root", "broken"], "truthfulqa/truthful_qa, multiple_choice, row 3: `mc1_targets`"),
    "file as output": (["hhh", "--limit", "1", "--output", "file.json"], "file.json is a file; --output names the"),
    "output": (["hhh", "--limit", "1", "--output", "file.json/run"], "cannot write to file.json/run (Not a directory)"),
    "empty output": (["hhh", "--limit", "1", "--output", ""], "--output is empty; name a path"),
    "empty model": (
        ["hhh", "--limit", "1", "--model", ""],
        "--model is empty; give a value, or leave it out (is a var",
    ),
    "empty model=": (["hhh", "--limit", "1", "--model="], "--model is empty"),
    "empty root": (["hhh", "--limit", "1", "--data-root", ""], "--data-root is empty"),
    "empty subjects": (["mmlu", "--subjects", "", "--limit", "1"], "--subjects is empty"),
    "empty stop": (["vicuna", "--stop", "", "--limit", "1"], "--stop is empty"),
    "long output": (["hhh", "--limit", "1", "--output", "x" * 300], "File name too long; give a shorter one"),
    "seed": (["hhh", "--seed", "-1"], "'--seed': -1 is not in the range x>=0"),
    "no number": (["vicuna", "--temperature", "nan"], "'--temperature': nan is no finite number"),
    "infinity": (["vicuna", "--max-cost", "inf"], "'--max-cost': inf is no finite number"),
    "another run": (["hhh", "--limit", "1", "--output", "taken"], "taken/spec.json is not a run's: it lacks"),
    "a nameless run": (["hhh", "--limit", "1", "--output", "nameless"], "has a samples.jsonl but no spec.json"),
    "verify": (["verify", "nope"], "nope/spec.json is not there; give the folder of a run"),
    "report": (["report", "nope"], "nope/results.json is not there; give the folder of a run"),
    "compare": (["compare", "nope", "nope"], "nope is no run folder"),
    "another file": (["report", "other"], "results.json is not a run's: it lacks task"),
}


@pytest.mark.usefixtures("offline", "no_weights")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, almost_eval: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, expected = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "other", "taken", "nameless"):
        Path(folder).mkdir()
        Path(folder, ".lock").write_text("")
    Path("other/results.json").write_text("{}")
    Path("taken/spec.json").write_text('{"task": "mmlu"}')
    Path("nameless/samples.jsonl").write_text("")
    Path("file.json").write_text("{}")
    for argument, make in (("pickled", pickled), ("letterless", letterless), ("broken", broken_row)):
        if argument in arguments:
            make(Path(argument))
    before = sorted(tmp_path.rglob("*"))
    runs = arguments[0] in ("hhh", "truthfulqa", "mmlu") and "--output" not in arguments
    code, out, err = almost_eval(*arguments, *(["--output", "run"] if runs else []))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert expected in err
    assert not Path("run").exists()
    assert sorted(tmp_path.rglob("*")) == before


def run(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    given.pop("ALMOST_DATA_ROOT", None)
    return subprocess.run([BINARY, *map(str, arguments)], cwd=cwd, env=given, capture_output=True, text=True)


def test_refused_as_a_process(tmp_path: Path) -> None:
    done = run("hhh", "--data", "hub", "--prompt-set", "builtin", "--output", "run", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: data set HuggingFaceH4/hhh_alignment .* pass --data-root DIR .*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_the_first_run_ever_as_a_process(tmp_path: Path) -> None:
    """An empty cache: data and checkpoint are built, and nothing but the result is said."""
    done = run("hhh", "--limit", 1, "--json", "--output", "run", cwd=tmp_path, ALMOST_CACHE=str(tmp_path / "cache"))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json.loads((tmp_path / "run/results.json").read_text())


def test_interrupted_while_it_imports(tmp_path: Path) -> None:
    process = subprocess.Popen([BINARY, "hhh"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():  # the import has begun
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert seconds_to_end(process.pid) < 2
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert err == "error: interrupted; what was done is kept, and the same command goes on from there\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_first_sample_within_eight_seconds(tmp_path: Path) -> None:
    def seconds(i: int) -> float:
        done = run("hhh", "--limit", 2, "--json", "--output", f"run{i}", cwd=tmp_path)
        return float(json.loads(done.stdout)["timing"]["seconds_to_first_sample"])

    assert min(map(seconds, range(3))) <= 8


def test_lean_imports_leave_no_trace() -> None:
    code = (
        "import gc, sys\nfrom almost_eval.cli.command_line import import_transformers\nimport_transformers()\n"
        "from transformers.utils import is_scipy_available, is_sklearn_available\n"
        "assert not {'sklearn', 'pandas', 'scipy.stats', 'scipy.optimize'} & sys.modules.keys()\n"
        "assert gc.isenabled() and is_scipy_available() and is_sklearn_available()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_interrupted_deep_in_a_library() -> None:
    """The main thread is in one long call that lets no signal handler run: the watcher ends the process."""
    code = (
        "import hashlib, threading\nfrom almost_eval.cli.command_line import prompt_interrupt\n"
        # Said from another thread while the main one is in the call: before it, the interrupt would be an ordinary one.
        "with prompt_interrupt():\n    threading.Timer(0.5, lambda: print('on', flush=True)).start()\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 200_000_000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    assert seconds_to_end(process.pid) < 2
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("error: interrupted; ")
    assert err.count("\n") == 1


# --- what is shown where


TASKS = ["all", "hhh", "truthfulqa", "mmlu", "harness", "vicuna"]
COMMANDS = [
    *("all", "plan", *(task for task in TASKS if task != "all")),
    *("judge", "merge", "compare", "parity", "verify", "report", "tax", "arena", "list", "completion"),
]


def test_what_a_disk_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        with whole_file(tmp_path / "stage.json"):
            raise OSError(errno.ENOSPC, "No space left on device")  # as a write says it: of no file

    with pytest.raises(SystemExit) as end:
        run_program(write)
    assert end.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith(f"error: {tmp_path}/stage.json: No space left on device; what was done is kept")
    with pytest.raises(FileNotFoundError):  # this one is a fault of the program
        run_program(lambda: len((tmp_path / "never-written").read_text()))


def test_bare_command_is_help(almost_eval: Command) -> None:
    code, out, err = almost_eval()
    assert (code, err) == (0, "")
    assert out == almost_eval("--help").out
    commands = re.findall(r"^  (\w+) ", out[out.index("Commands:") :], re.MULTILINE)
    assert commands == COMMANDS


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("judge", "arena")])
def test_every_command_has_help_with_an_example(command: str, almost_eval: Command) -> None:
    code, out, err = almost_eval(command, "-h")
    assert (code, err) == (0, "")
    assert f"Example:\n    almost-eval {command}" in out


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("asked", ["hhh", "hhh --protocol reward", "hhh --protocol likelihood", "truthfulqa", "mmlu"])
def test_dry_run(asked: str, almost_eval: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*asked.split(), "--limit", 2, "--dry-run", "--output", "run"]
    code, out, err = almost_eval(*arguments, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert 0 < facts["longest_prompt"] <= facts["context_length"] == 2048
    assert facts["do_not_fit"] == 0
    assert facts["prompt"]
    code, out, err = almost_eval(*arguments)
    assert (code, err) == (0, "")
    assert facts["prompt"].split() == out[out.index("\n") : out.rindex("\n──")].split()  # but for line breaks
    assert f"longest prompt: {facts['longest_prompt']}\n" in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_shows_labels_and_bos(almost_eval: Command) -> None:
    facts = json.loads(almost_eval("hhh", "--model", "nano/seeded", "--data", "nano", "--dry-run", "--json").out)
    assert [[text for _, text in label] for label in facts["labels"]] == [[" A"], [" B"]]
    assert facts["bos"] == 1
    assert facts["first_tokens"][0] == [0, "<s>"]


def test_table_and_json_are_of_one_run(almost_eval: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, out, err = almost_eval("hhh", "--limit", 2, "--output", folder)
    assert (code, err) == (0, "")
    assert "hhh · choice · nano/almost" in out
    assert out.rstrip().endswith(f"run: {folder}")
    stored = json.loads((folder / "results.json").read_text())
    assert f"{stored['metrics']['accuracy']['value']:.1%}" in out
    assert almost_eval("report", folder).out == out
    assert json.loads(almost_eval("report", folder, "--json").out) == stored


@pytest.mark.usefixtures("no_weights")
def test_default_folder_is_named_by_the_run(
    almost_eval: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from almost_eval.errors import InputError

    monkeypatch.chdir(tmp_path)
    folders = []

    class Kept(Exception):
        pass

    def execute(self: Any, folder: Path, *_: object, **__: object) -> None:
        folders.append(folder)
        raise InputError("kept")

    monkeypatch.setattr("almost_eval.run.runner.Run.execute", execute)
    for arguments in (["--limit", 1], ["--limit", 1, "--json"], ["--limit", 2], ["--limit", 1, "--seed", 1]):
        almost_eval("hhh", *arguments)
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3
    assert re.fullmatch(r"runs/hhh-choice-almost-[0-9a-f]{10}", str(folders[0]))


def test_pickled_weights_where_they_are_allowed(almost_eval: Command, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = pickled(tmp_path / "pickled")
    import torch

    model = AutoModelForCausalLM.from_pretrained(str(checkpoint("nano/seeded")))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    given = ["hhh", "--limit", 1, "--data", "nano", "--json"]
    same = json.loads(almost_eval(*given, "--output", tmp_path / "a", "--model", "nano/seeded").out)
    done = almost_eval(*given, "--output", tmp_path / "b", "--model", folder, "--allow-pickle")
    assert done.code == 0
    assert json.loads(done.out)["metrics"] == same["metrics"]


@pytest.mark.usefixtures("offline")
def test_folders_whose_names_are_no_text(almost_eval: Command, tmp_path: Path) -> None:
    """An old file system has names in Latin-1: results may go there; the packages read no model from there."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    shutil.copytree(checkpoint("nano/seeded"), folder)
    command = ("hhh", "--protocol", "likelihood", "--data", "nano", "--limit", 1)
    code, out, err = almost_eval(*command, "--model", folder)
    assert (code, out) == (2, "")
    assert "is no UTF-8, and tokenizers reads no such file; rename it" in err
    run = f"{folder}/run"
    assert almost_eval(*command, "--model", "nano/seeded", "--output", run).code in (0, 3)
    assert run in json.loads(Path(run, "spec.json").read_text())["command"]
    assert almost_eval("verify", run).code == 0
