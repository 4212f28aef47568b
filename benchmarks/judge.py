"""The judge client against the official serial loop and FastChat's thread pool; memory at 10,000 reviews; the parser.

All talk to one replay server of real HTTP (a process of its own) that answers a review in `--latency` seconds and
allows `--at-once` at a time (429 beyond); then come the parsers, over all archived reviews. The peers are written here
after what the official script and FastChat's `llm_judge` do: the loop asks, sleeps, and writes nothing until the end;
the pool has a fixed number of threads, and any error sleeps ten seconds before it is tried again. Every side runs in a
process of its own.

    python benchmarks/judge.py --data ../shared/data                 (about five minutes; --serial 20 for one)
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

ROOT = Path(__file__).parents[1]
SERVER = ROOT / "tests" / "almost_eval" / "judge" / "replay_server.py"
sys.path[:0] = [str(ROOT), str(SERVER.parent)]

from almost_eval.judge.records import JudgeRequest, Reply  # noqa: E402
from almost_eval.types import Message  # noqa: E402

REVIEWS = 160
OFFICIAL_SLEEP = 10.0
POOL_SLEEP = 10.0


# ------------------------------------------------------------------------------------------------------------ the sides


class Reviews(Sequence[JudgeRequest]):
    """As many different requests as wanted from the archived prompts, each made when it is looked at."""

    def __init__(self, data: Path, count: int) -> None:
        from replay_server import read_archive

        self._prompts = [one.prompt for one in read_archive(data)]
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, i: int) -> JudgeRequest: ...

    @overload
    def __getitem__(self, i: slice) -> list[JudgeRequest]: ...

    def __getitem__(self, i: int | slice) -> JudgeRequest | list[JudgeRequest]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(self._count))]
        prompt = self._prompts[i % len(self._prompts)]
        return JudgeRequest("gpt-4", (Message("user", prompt),), 0.2, 1024, attempt=i // len(self._prompts))


def ours(given: argparse.Namespace, requests: Reviews) -> dict[str, Any]:
    """The client with its defaults and a journal."""
    from almost_eval.judge.api.client import JudgeClient
    from almost_eval.judge.api.journal import Journal

    early = 0.0
    with tempfile.TemporaryDirectory() as scratch, Journal(Path(scratch) / "journal.sqlite") as journal:
        client = JudgeClient("gpt-4", journal, base_url=given.url)
        for count, (_, outcome) in enumerate(client.stream(requests), start=1):
            assert isinstance(outcome, Reply), outcome
            if count == 1000:
                early = peak_mib()
        assert len(journal) == len(requests)
    return {"refused": client.stats.retried.total(), "peak_at_1000": early}


def serial(given: argparse.Namespace, requests: Reviews) -> dict[str, Any]:
    """One request at a time, and a sleep after each."""
    client = _client(given.url)
    replies = []
    for i in range(len(requests)):
        replies.append(_ask(client, requests[i]))
        time.sleep(given.sleep)
    return {"refused": 0}


def pool(given: argparse.Namespace, requests: Reviews) -> dict[str, Any]:
    """A fixed number of threads; an error waits and tries again."""
    import openai

    client = _client(given.url)
    refused = []

    def ask(i: int) -> str:
        for _ in range(16):
            try:
                return _ask(client, requests[i])
            except openai.OpenAIError:
                refused.append(i)
                time.sleep(POOL_SLEEP)
        raise RuntimeError("given up")

    with ThreadPoolExecutor(given.parallel) as executor:
        replies = list(executor.map(ask, range(len(requests))))
    assert len(replies) == len(requests)
    return {"refused": len(refused)}


def _client(url: str) -> Any:
    import openai

    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def _ask(client: Any, request: JudgeRequest) -> str:
    messages = [message.to_dict() for message in request.messages]
    answer = client.chat.completions.create(
        model=request.judge, messages=messages, temperature=request.temperature, max_tokens=request.max_tokens
    )
    return str(answer.choices[0].message.content)


def peak_mib() -> float:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def worker(given: argparse.Namespace) -> None:
    """One side in this process; what it found, as JSON."""
    requests = Reviews(given.data, given.reviews)
    import openai  # noqa: F401  # not what is compared

    began = time.perf_counter()
    found = {"ours": ours, "serial": serial, "pool": pool}[given.side](given, requests)
    print(json.dumps(found | {"seconds": time.perf_counter() - began, "peak": peak_mib()}))


# ------------------------------------------------------------------------------------------------------- the comparison


@contextmanager
def replay(data: Path, *options: str) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, str(SERVER), "--data", str(data), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdout is not None
    try:
        yield server.stdout.readline().strip()
    finally:
        server.kill()
        server.wait()


def measure(given: argparse.Namespace, url: str, side: str, reviews: int, *options: str) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--worker", "--side", side, "--url", url, "--data", str(given.data)]
    done = subprocess.run(
        [*command, "--reviews", str(reviews), *options], check=True, stdout=subprocess.PIPE, text=True
    )
    return dict(json.loads(done.stdout))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds vicuna/ and hub/")
    parser.add_argument("--latency", type=float, default=1.0)
    parser.add_argument("--at-once", type=int, default=20)
    parser.add_argument("--serial", type=int, default=REVIEWS, help="reviews that the serial loop is measured on")
    parser.add_argument("--pools", default="4,16,20,32", help="threads of the pool, each measured")
    parser.add_argument("--memory", type=int, default=10_000, help="reviews of the memory measurement")
    for hidden in ("--side", "--url"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--reviews", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--parallel", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--sleep", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given)
        return
    throughput(given)
    memory(given)
    from judge_parsing import compare

    print()
    compare(
        given.data / "vicuna" / "review",
        given.data / "hub" / "github" / "lm-sys" / "FastChat" / "fastchat" / "eval" / "table" / "question.jsonl",
    )


def throughput(given: argparse.Namespace) -> None:
    """160 reviews by each side."""
    ideal = REVIEWS * given.latency / given.at_once
    print(f"{REVIEWS} reviews, {given.latency:g} s each, {given.at_once} at a time; {ideal:g} s would be ideal\n")
    print(f"{'side':42} {'seconds':>8} {'refused':>8}")
    limits = ("--latency", str(given.latency), "--at-once", str(given.at_once))
    for label, extra in (("ours, 429 alone", ()), ("ours, 429 with Retry-After: 1", ("--retry-after", "1"))):
        with replay(given.data, *limits, *extra) as url:
            row(label, measure(given, url, "ours", REVIEWS))
    with replay(given.data, *limits) as url:
        for threads in given.pools.split(","):
            found = measure(given, url, "pool", REVIEWS, "--parallel", threads)
            row(f"thread pool, {threads} threads", found)
        found = measure(given, url, "serial", given.serial)
        row(f"serial loop, no sleep, {given.serial} reviews", found)
        each = found["seconds"] / given.serial
        print(
            f"{'serial loop as published':42} {REVIEWS * (each + OFFICIAL_SLEEP):8.0f}          "
            f"computed: {REVIEWS} x ({each:.2f} s measured + {OFFICIAL_SLEEP:g} s of sleep)"
        )


def memory(given: argparse.Namespace) -> None:
    """Many reviews from a server that answers at once."""
    with replay(given.data, "--latency", "0", "--at-once", "1000000") as url:
        found = measure(given, url, "ours", given.memory)
    print(
        f"\n{given.memory:,} reviews, no latency: {found['seconds']:.1f} s, peak memory "
        f"{found['peak_at_1000']:.1f} MiB after 1,000 and {found['peak']:.1f} MiB at the end"
    )


def row(label: str, found: dict[str, Any]) -> None:
    """A line of the table."""
    print(f"{label:42} {found['seconds']:8.1f} {found['refused']:8}", flush=True)


if __name__ == "__main__":
    main()
