"""Child processes: real ones, small HTTP servers that do as a test says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from almost_eval.errors import InputError, RunError
from serving.launch.process import ServerProcess, check_port, free_port
from serving.launch.supervisor import run_servers

SERVER = """
import http.server, os, signal, subprocess, sys, threading, time
from serving.launch.process import watch_parent
port, behaviour = int(sys.argv[1]), sys.argv[2:]
watch_parent(grace_s=1.0)
if "stubborn" in behaviour:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "fails" in behaviour:
    print("loading"); raise ValueError("the weights are upside down")
print("loading", flush=True)
print("grandchild", subprocess.Popen(["sleep", "600"]).pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if "sick" in behaviour else 200); self.end_headers()
    def log_message(self, *_): ...
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
print("\\x1b[32mserving\\x1b[0m", flush=True)
if "dies" in behaviour:
    threading.Timer(0.7, lambda: (print("out of paper", flush=True), os._exit(3))).start()
server.serve_forever()
"""


def server(name: str = "one", *behaviour: str, grace_s: float = 5.0) -> ServerProcess:
    port = free_port()
    command = [sys.executable, "-c", SERVER, str(port), *behaviour]
    phases = ("loading", "serving")
    return ServerProcess(name, command, ("127.0.0.1", port), phases=phases, grace_s=grace_s)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def soon(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def grandchild(child: ServerProcess) -> int:
    return int(next(line.split()[1] for line in child.last_lines() if line.startswith("grandchild")))


def signal_in(seconds: float, number: int = signal.SIGTERM) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


# --- one server ---


def test_it_starts_answers_and_ends_with_all_its_children() -> None:
    with server() as child:
        child.wait_ready(timeout_s=20)
        assert child.is_healthy()
        assert child.exit_code is None
        assert child.phase == 2
        assert child.last_lines(1) == ["serving"]  # without colours
        assert child.pid is not None
        pids = (child.pid, grandchild(child))
        assert all(map(is_alive, pids))
    assert child.exit_code == -signal.SIGTERM
    assert soon(lambda: not any(map(is_alive, pids)))
    child.stop()  # again


def test_one_that_will_not_end_is_killed() -> None:
    with server("one", "stubborn", grace_s=0.3) as child:
        child.wait_ready(timeout_s=20)
        other = grandchild(child)
        child.stop()
        assert child.exit_code == -signal.SIGKILL
        assert soon(lambda: not is_alive(other))


def test_one_that_fails_at_the_start() -> None:
    with (
        server("one", "fails") as child,
        pytest.raises(RunError, match=r"^one ended with exit code 1: ValueError: the weights are upside down$"),
    ):
        child.wait_ready(timeout_s=20)


def test_one_that_is_never_ready() -> None:
    with server("one", "sick") as child, pytest.raises(RunError, match="one was not ready after 1 s"):
        child.wait_ready(timeout_s=1.0)


def test_the_log_takes_every_line(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log:
        child = server()
        child._log = log
        with child:
            child.wait_ready(timeout_s=20)
        log.seek(0)
        assert log.read().startswith("loading\ngrandchild ")


def test_a_child_ends_when_its_parent_is_killed_outright() -> None:
    code = (
        "import sys, time; from serving.launch.process import ServerProcess\n"
        f"child = ServerProcess('c', [sys.executable, '-c', {SERVER!r}, '{free_port()}'], ('127.0.0.1', 1))\n"
        "child.start()\n"
        "while not any('grandchild' in line for line in child.last_lines()): time.sleep(0.02)\n"
        "print(child.pid, child.last_lines(5)[1].split()[1], flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline().split()[0])
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert soon(lambda: not is_alive(pid))
    os.killpg(pid, signal.SIGKILL)  # its own `sleep`, which vLLM's children, unlike it, would not outlive


def test_ports() -> None:
    check_port("127.0.0.1", free_port())
    check_port("127.0.0.1", 0)
    with pytest.raises(InputError, match="port 70000 does not exist"):
        check_port("127.0.0.1", 70000)


# --- several ---


def test_a_signal_ends_all_of_them() -> None:
    servers = [server("one"), server("two")]
    run_servers(servers, lambda: signal_in(0.1), timeout_s=20)
    assert [one.exit_code for one in servers] == [-signal.SIGTERM] * 2


def test_the_same_signal_twice_at_once_is_one_wish() -> None:
    one = server("one", "stubborn", grace_s=0.6)
    began: list[float] = []

    def twice() -> None:
        began.append(time.monotonic())
        signal_in(0.1)
        signal_in(0.2)

    run_servers([one], twice, timeout_s=20)
    assert one.exit_code == -signal.SIGKILL
    assert time.monotonic() - began[0] >= 0.7  # it had its grace


def test_a_later_signal_ends_them_at_once() -> None:
    one = server("one", "stubborn", grace_s=60)

    def patient_then_not() -> None:
        signal_in(0.1)
        signal_in(1.4)

    began = time.monotonic()
    run_servers([one], patient_then_not, timeout_s=20)
    assert one.exit_code == -signal.SIGKILL
    assert time.monotonic() - began < 20


def test_an_interrupt_does_too_and_the_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    one = server()
    run_servers([one], lambda: signal_in(0.1, signal.SIGINT), timeout_s=20)
    assert one.exit_code == -signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_before_they_are_ready() -> None:
    one = server("one", "sick")
    signal_in(0.5)
    with pytest.raises(RunError, match="stopped before the server was ready"):
        run_servers([one], lambda: pytest.fail("it was never ready"), timeout_s=20)
    assert one.exit_code is not None


def test_if_one_ends_the_others_do_and_its_last_lines_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    ready: list[bool] = []
    servers = [server("healthy"), server("ailing", "dies")]
    with pytest.raises(RunError, match=r"^ailing ended with exit code 3; its last lines say why$"):
        run_servers(servers, lambda: ready.append(True), timeout_s=20)
    assert ready == [True]
    assert [one.exit_code for one in servers] == [-signal.SIGTERM, 3]
    err = capsys.readouterr().err
    assert "--- the last lines of ailing" in err
    assert err.rstrip().endswith("out of paper")
    assert "healthy" not in err


def test_in_turn() -> None:
    first, second = server("first", "fails"), server("second")
    with pytest.raises(RunError, match=r"^first ended"):
        run_servers([first, second], lambda: None, in_turn=True, timeout_s=20)
    assert second.pid is None
