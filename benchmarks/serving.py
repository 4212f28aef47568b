"""The gateway against bare vLLM (and a bare relay of bytes) on the same work, in turn; best-of-N; a soak with kills.

Policy, reward model and gateway are processes of their own, started as users start them; this one makes the load. A
closed loop: each client sends its next request when it has its answer. Answers are of different lengths, the same for
each side: were they all of one, clients would go in lock-step with the batch, and what arrives a little later than the
others would wait for a whole step of its own.

    python benchmarks/serving.py                                (nano models on real vLLM; about 25 minutes on 2 cores)
    python benchmarks/serving.py --parts overhead --pin         (the gateway has a core that no model computes on)
    python benchmarks/serving.py --parts overhead,best_of --model 30m --data-root ../shared/data/hub
    python benchmarks/serving.py --parts overhead --clients 16 --rounds 2
    python benchmarks/serving.py --parts overhead --http-clients ours,httpx,aiohttp    (the gateway on each)
    python benchmarks/serving.py --parts soak --soak 500 --kills 1
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `python benchmarks/serving.py` from anywhere

from serving.launch.process import ServerProcess, free_port  # noqa: E402
from serving.vllm.launch import VLLMServer  # noqa: E402

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What does the otter eat?"}]
GREEDY: dict[str, Any] = {"messages": QUESTION, "max_tokens": 32, "top_k": 1}
"""Greedy decoding by top-k: vLLM refuses n above 1 at temperature 0."""
HANGS_S = 90.0
"""A request without an answer for so long hangs."""


def gateway_process(policy: str, reward: str, reward_model: str, http_client: str | None = None) -> ServerProcess:
    """The gateway, on its own HTTP client or on that of a library (gateway_clients.py)."""
    port = free_port()
    program = [str(ROOT / "benchmarks" / "gateway_clients.py"), http_client] if http_client else ["-m", "serving.cli"]
    command = [sys.executable, *program, "gateway", "--policy-url", policy, "--reward-url", reward]
    command += ["--reward-model", reward_model, "--port", str(port)]
    return ServerProcess(f"gateway on {http_client}" if http_client else "gateway", command, ("127.0.0.1", port))


def relay_process(policy: str) -> ServerProcess:
    """The control: what it adds, any process between client and server adds."""
    port = free_port()
    command = [sys.executable, str(ROOT / "benchmarks" / "tcp_relay.py"), str(port), policy.rsplit(":", 1)[1]]
    return ServerProcess("bare relay", command, ("127.0.0.1", port))


def memory_mib(process: ServerProcess) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def cpu_ms(process: ServerProcess) -> float:
    """Time of the CPU that it has taken, its threads together."""
    fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return 1e3 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def open_files(process: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


# --- overhead ---


@dataclass
class Load:
    """What one closed loop saw."""

    latencies_ms: list[float]
    first_ms: list[float]
    """Until the first event of a stream."""
    per_second: float
    cpu_ms: float = 0.0
    """Of the process in between, for one answer."""

    @property
    def p50(self) -> float:
        """The median latency."""
        return statistics.median(self.latencies_ms)


async def load(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> Load:
    """One request for each body, from `clients` clients."""
    import aiohttp

    latencies: list[float] = []
    first: list[float] = []
    left = iter(bodies)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client() -> None:
            for body in left:
                began = time.perf_counter()
                async with session.post(url + CHAT, json=body) as answer:
                    assert answer.status == 200, await answer.text()
                    end = b""
                    async for part in answer.content.iter_any():
                        if not end:
                            first.append((time.perf_counter() - began) * 1e3)
                        end = part
                latencies.append((time.perf_counter() - began) * 1e3)
                assert end.endswith(b"[DONE]\n\n" if body.get("stream") else b"}"), end

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return Load(latencies, first, len(bodies) / (time.perf_counter() - began))


def in_turn(rounds: int, *sides: Callable[[], Any]) -> list[list[Any]]:
    """What each side gave in each round; every other round goes backwards, so that a drift of the machine cancels."""
    found: list[list[Any]] = [[] for _ in sides]
    for number in range(rounds):
        order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
        for side in order:
            found[side].append(sides[side]())
    return found


def overhead(
    policy: VLLMServer, between: Sequence[ServerProcess], given: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Latency and throughput without anything between client and server, and through each of `between`."""
    for stream in [kind == "stream" for kind in given.answers.split(",")]:
        for clients in given.clients:
            shared = {"messages": QUESTION, "ignore_eos": True, "temperature": 0, "stop": [], "stream": stream}
            lengths = random.Random(given.seed).choices(
                range(given.tokens // 2, given.tokens * 3 // 2 + 1), k=max(20, given.requests_per_client * clients)
            )
            bodies = [{**shared, "max_tokens": length} for length in lengths]

            def side(server: ServerProcess, bodies: list[dict[str, Any]], clients: int) -> Load:
                before = cpu_ms(server)
                result = asyncio.run(load(server.url, bodies, clients))
                result.cpu_ms = (cpu_ms(server) - before) / len(bodies)
                return result

            servers = (policy, *between)
            for server in servers:
                side(server, bodies[:clients], clients)
            bare, *others = in_turn(given.rounds, *(partial(side, server, bodies, clients) for server in servers))
            p50 = statistics.median(one.p50 for one in bare)
            for server, loads in zip(between, others, strict=True):
                added = [b.p50 - a.p50 for a, b in zip(bare, loads, strict=True)]
                shares = [100 * b.per_second / a.per_second for a, b in zip(bare, loads, strict=True)]
                middle, share = statistics.median(added), statistics.median(shares)
                yield {
                    "work": f"{'stream' if stream else 'whole'}, {min(lengths)} to {max(lengths)} tokens",
                    "clients": clients,
                    "bare p50 ms": round(p50, 1),
                    "through": server.name,
                    "added p50 ms": with_interval(added, "+.1f"),
                    "added %": round(100 * middle / p50, 1),
                    "throughput %": with_interval(shares, ".1f"),
                    "CPU ms an answer": with_interval([one.cpu_ms for one in loads], ".2f"),
                    "within bounds": bool((middle <= 5 or middle <= 0.05 * p50) and share >= 95),
                }


def with_interval(rounds: Sequence[float], form: str) -> str:
    """The median over rounds and its 95 % interval, by resampling rounds."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(rounds, k=len(rounds))) for _ in range(2000))
    return f"{statistics.median(rounds):{form}} ({medians[50]:{form}} to {medians[-51]:{form}})"


def best_of(policy: str, gateway: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """best_of 8 through the gateway against a plain request with n 8; the seed makes both draw the same candidates."""
    for name, more in (
        ("answers as they come", {"max_tokens": given.tokens}),
        (f"{given.tokens} tokens each", {"max_tokens": given.tokens, "ignore_eos": True, "stop": []}),
    ):
        plain = {"messages": QUESTION, "n": 8, "seed": 1, **more}
        best = {"messages": QUESTION, "best_of": 8, "seed": 1, **more}
        asyncio.run(load(policy, [plain] * 3, 1))
        asyncio.run(load(gateway, [best] * 3, 1))

        def p50(url: str, body: dict[str, Any]) -> float:
            return asyncio.run(load(url, [body] * 10, 1)).p50

        one, other = in_turn(given.rounds, partial(p50, policy, plain), partial(p50, gateway, best))
        ratio = statistics.median(b / a for a, b in zip(one, other, strict=True))
        yield {
            "work": name,
            "n=8 p50 ms": round(statistics.median(one), 1),
            "best_of=8 p50 ms": round(statistics.median(other), 1),
            "ratio": round(ratio, 3),
            "within bounds": ratio <= 1.35,
        }


# --- soak ---


@dataclass
class Soak:
    """A soak under way."""

    url: str
    total: int
    rng: random.Random
    begun: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """What neither was right nor a well-formed error; the first of them."""
    greedy: str = ""
    """What the policy answers to GREEDY."""
    reward: float = 0.0
    """What the reward model gives for it."""


def soak_request(soak: Soak) -> tuple[str, str, dict[str, Any]]:
    """Kind, path and body of a request."""
    kind = soak.rng.choice(("whole", "stream", "best", "best stream", "fallback", "rewards"))
    if kind == "rewards":
        conversation = [*QUESTION, {"role": "assistant", "content": soak.greedy.strip()}]
        return kind, "/v1/rewards", {"conversations": [conversation] * soak.rng.randint(1, 4)}
    body: dict[str, Any] = {**GREEDY}
    if kind in ("best", "best stream", "fallback"):
        # All candidates are one, and so are their rewards: what is right is known.
        body |= {"best_of": soak.rng.randint(1, 8), "best_of_fallback": kind == "fallback"}
    return kind, CHAT, body | {"stream": kind.endswith("stream")}


def judged(soak: Soak, kind: str, body: dict[str, Any], status: int, text: str) -> str:
    """How a request ended.

    Raises:
        AssertionError, LookupError, ValueError: neither in a right answer nor in a well-formed error.
    """
    if status != 200:
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert status in (502, 503, 504), text
        return f"error {status}"
    if kind == "rewards":
        rewards = json.loads(text)["rewards"]
        assert len(rewards) == len(body["conversations"])
        assert all(abs(reward - soak.reward) < 1e-3 for reward in rewards), rewards
        return "right"
    if body["stream"]:
        *events, done, rest = text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", ""), text[-200:]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        if "error" in chunks[-1]:
            return "error in a stream"
        said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        assert chunks[-1]["choices"][0]["finish_reason"], chunks[-1]
        almost = chunks[-1].get("almost")
    else:
        answer = json.loads(text)
        said, almost = answer["choices"][0]["message"]["content"], answer.get("almost")
    assert said == soak.greedy, said
    if almost and almost["fallback"]:
        assert kind == "fallback"
        return "right, without reward"
    if kind.startswith(("best", "fallback")):
        assert len(almost["rewards"]) == body["best_of"]
        assert all(abs(reward - soak.reward) < 1e-3 for reward in almost["rewards"]), almost
    return "right"


async def soak_client(soak: Soak, session: Any) -> None:
    while soak.begun < soak.total:
        soak.begun += 1
        kind, path, body = soak_request(soak)
        leaves = soak.rng.random() < 0.15
        patience = soak.rng.uniform(0.0, 0.3) if leaves else HANGS_S
        how = "left"
        try:
            async with asyncio.timeout(patience), session.post(soak.url + path, json=body) as answer:
                text = await answer.text()
                how = judged(soak, kind, body, answer.status, text)
        except TimeoutError:
            how = "left" if leaves else "HANGS"
        except Exception as error:  # whatever it is, it is no answer
            how = "WRONG"
            soak.wrong.append(f"{kind}: {type(error).__name__}: {error}"[:300])
        soak.ended[how] += 1
        # While a server is away most requests fail at once: clients wait a little, as Retry-After asks them to.
        await asyncio.sleep(2.0 if how.startswith("error 50") else 0.0)


async def run_soak(gateway: ServerProcess, servers: dict[str, VLLMServer], given: argparse.Namespace) -> dict[str, Any]:
    """Requests of all kinds while clients leave and servers are killed and started again."""
    import aiohttp

    soak = Soak(gateway.url, given.soak, random.Random(given.seed))
    memory: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        body = {**GREEDY, "best_of": 1}
        async with session.post(soak.url + CHAT, json=body) as answer:
            known = await answer.json()
        soak.greedy, soak.reward = known["choices"][0]["message"]["content"], known["almost"]["reward"]

        async def kill_in_turn() -> None:
            moments = [(k + 1) / (given.kills * 2 + 1) for k in range(given.kills * 2)]
            for number, moment in enumerate(moments):
                while soak.begun < moment * soak.total:
                    await asyncio.sleep(0.02)
                server = servers["policy" if number % 2 == 0 else "reward"]
                await asyncio.to_thread(server.kill)
                server.start()
                await asyncio.to_thread(server.wait_ready, None, 300.0)

        async def watch() -> None:
            while True:
                memory.append(memory_mib(gateway))
                await asyncio.sleep(0.5)

        watching = asyncio.create_task(watch())
        began = time.perf_counter()
        await asyncio.gather(kill_in_turn(), *(soak_client(soak, session) for _ in range(given.soak_clients)))
        seconds = time.perf_counter() - began
        watching.cancel()
        # The servers are back: what is asked now is answered.
        async with session.get(soak.url + "/ready") as answer:
            ready = answer.status == 200
        async with session.get(soak.url + "/metrics") as answer:
            idle = "almost_gateway_running 0.0" in await answer.text()
    await asyncio.sleep(3)  # connections kept alive are closed after two
    quarter = max(1, len(memory) // 4)
    growth = statistics.median(memory[-quarter:]) - statistics.median(memory[quarter : 2 * quarter])
    return {
        "requests": sum(soak.ended.values()),
        "kills": given.kills * 2,
        "seconds": round(seconds),
        **dict(sorted(soak.ended.items())),
        "first wrong": soak.wrong[:3],
        "memory MiB": [round(min(memory), 1), round(max(memory), 1)],
        "growth MiB": round(growth, 1),
        "open files at the end": open_files(gateway),
        "ready and idle at the end": ready and idle,
        "within bounds": bool(not soak.wrong and not soak.ended["HANGS"] and growth < 8 and ready and idle),
    }


# --- the whole ---


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n")
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="nano/almost", help="the policy; 30m is the seeded Llama of prefix_scoring.py (--data-root)"
    )
    parser.add_argument("--data-root", type=Path, help="what the tokenizer of 30m is made of")
    parser.add_argument("--reward", default="nano/reward", help="the reward model")
    parser.add_argument("--parts", default="overhead,best_of,soak", help="which to run")
    parser.add_argument("--clients", default="1,16,64", help="how many at a time, for overhead")
    parser.add_argument("--answers", default="whole,stream", help="which kinds, for overhead")
    parser.add_argument("--http-clients", help="of the gateway, side by side, for overhead: ours,httpx,aiohttp")
    parser.add_argument("--rounds", type=int, default=16, help="of each side, in turn")
    parser.add_argument(
        "--tokens", type=int, default=64, help="of one answer (overhead: from half to 1.5 times as many)"
    )
    parser.add_argument("--requests-per-client", type=int, default=4)
    parser.add_argument("--soak", type=int, default=2000, help="requests")
    parser.add_argument("--soak-clients", type=int, default=16)
    parser.add_argument("--kills", type=int, default=2, help="of each server")
    parser.add_argument(
        "--pin", action="store_true", help="the last core is the gateway's and the load's, the others are the servers'"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    given = parser.parse_args()
    given.clients = [int(count) for count in given.clients.split(",")]
    parts = given.parts.split(",")
    found: dict[str, Any] = {"machine": platform.platform(), "cores": os.cpu_count(), "pinned": given.pin}
    cores = sorted(os.sched_getaffinity(0))
    if given.model == "30m":
        if given.data_root is None:
            parser.error("--model 30m needs --data-root, a folder of benchmark data")
        from prefix_scoring import checkpoint

        given.model = str(checkpoint(given.data_root))
    with ExitStack() as stack:
        if given.pin:  # children inherit it
            os.sched_setaffinity(0, cores[:-1])
        servers = {"policy": VLLMServer("policy", given.model), "reward": VLLMServer("reward", given.reward)}
        for server in servers.values():
            stack.enter_context(server)
        for server in servers.values():
            server.wait_ready()
        policy = servers["policy"].url
        if given.pin:
            os.sched_setaffinity(0, cores[-1:])
        gateway = stack.enter_context(gateway_process(policy, servers["reward"].url, given.reward))
        gateway.wait_ready()
        if "overhead" in parts:
            names = given.http_clients.split(",") if given.http_clients else []
            between = [gateway_process(policy, servers["reward"].url, given.reward, name) for name in names]
            between.append(relay_process(policy))
            with ExitStack() as processes:
                for process in between:
                    processes.enter_context(process).wait_ready(None, 60.0)
                sides = between if names else [gateway, *between]
                found["overhead"] = list(overhead(servers["policy"], sides, given))
            show("Overhead (bounds: 5 ms or 5 % on p50; throughput 95 %)", found["overhead"])
        if "best_of" in parts:
            found["best_of"] = list(best_of(policy, gateway.url, given))
            show("best_of=8 against n=8 (bound: 1.35)", found["best_of"])
        if "soak" in parts:
            found["soak"] = asyncio.run(run_soak(gateway, servers, given))
            show("Soak", [{"": name, "found": value} for name, value in found["soak"].items()])
    if given.json:
        given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
