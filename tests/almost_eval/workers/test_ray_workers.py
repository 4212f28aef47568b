"""Workers on a Ray cluster of two nodes on this machine, one of which is killed. Ray is an extra: not in CI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from almost_eval.engines.build import EngineOptions
from almost_eval.errors import InputError, MissingDependencyError
from almost_eval.files import read_json
from almost_eval.progress import Progress
from almost_eval.run.runner import RunRequest, open_run
from almost_eval.workers import ray as transport

NOTHING: Any = None
"""A recipe that nobody opens."""
NO_RAY = "Ray is not installed: pip install 'almost-toolkit[ray]'"


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError, match=r"^--ray needs the package 'ray'; install it with: pip install 'a"
    ):
        transport.RayTransport(NOTHING, None, address="local", gpus=0)


@pytest.mark.slow
def test_no_cluster_at_an_address_is_one_line() -> None:
    pytest.importorskip("ray", reason=NO_RAY)
    with pytest.raises(InputError, match=r"^--ray 127\.0\.0\.1:1: no cluster answers"):
        transport.RayTransport(NOTHING, None, address="127.0.0.1:1", gpus=0)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """A head node without cores, where the driver is, and two nodes with two cores each."""
    pytest.importorskip("ray", reason=NO_RAY)
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = str(Path(__file__).parents[3])
    quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "health_check_initial_delay_ms": 500}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": quick})
    cluster.nodes_with_cores = [cluster.add_node(num_cpus=2) for _ in range(2)]
    cluster.wait_for_nodes()
    yield cluster
    import ray

    ray.shutdown()
    cluster.shutdown()


class Midway(Progress):
    """Calls a function as the so many-th sample is done."""

    def __init__(self, samples: int, call: Any) -> None:
        self._left = samples
        self._call = call

    @contextmanager
    def track(self, description: str, total: int, done: int = 0) -> Iterator[Any]:
        """Counts."""

        def advance(count: int = 1) -> None:
            self._left -= count
            if self._left == 0:
                self._call()

        yield advance


def execute(request: RunRequest, folder: Path, progress: Progress) -> tuple[dict[str, Any], list[str]]:
    """results.json without times, and the sorted lines of samples.jsonl."""
    run = open_run(request)
    run.execute(folder, progress)
    results = read_json(folder / "results.json")
    return results, sorted((folder / "samples.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_a_node_is_killed_and_the_results_are_those_of_one_process(two_nodes: Any, tmp_path: Path) -> None:
    def kill() -> None:
        two_nodes.remove_node(two_nodes.nodes_with_cores.pop(), allow_graceful=False)

    base = RunRequest(task="hhh", model="nano/almost", engine=EngineOptions(device="cpu"))
    alone, lines = execute(base, tmp_path / "alone", Progress())
    options = EngineOptions(device="cpu", ray=two_nodes.address, workers=4)
    shared, shared_lines = execute(
        RunRequest(task="hhh", model="nano/almost", engine=options), tmp_path / "ray", Midway(5, kill)
    )
    assert shared_lines == lines
    workers = shared.pop("timing")["workers"]
    assert (workers["transport"], workers["workers"], workers["cpus"]) == ("ray", 4, 1.0)
    assert workers["lost"]
    *others, warning = shared["engine"].pop("warnings")
    assert others == alone["engine"].pop("warnings")
    assert "ended early, and the others took over" in warning
    del alone["timing"]
    assert shared == alone


@pytest.mark.slow
def test_a_cluster_is_not_left_for_another(two_nodes: Any) -> None:
    transport.RayTransport(NOTHING, None, address=two_nodes.address, gpus=0)
    with pytest.raises(InputError, match="is connected to the cluster at"):
        transport.RayTransport(NOTHING, None, address="127.0.0.1:1", gpus=0)
    with pytest.raises(InputError, match="no node of the cluster has the 2 GPUs that a worker takes"):
        transport.RayTransport(NOTHING, None, address="auto", gpus=2)
