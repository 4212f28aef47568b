"""Workers as actors of a Ray cluster. Ray is imported when the first is built.

Each actor holds a servant for as long as the pool lives, so a model is loaded once for each. A task lies in Ray's
object store, from where an actor takes it once; its answers come back one by one. Ray itself restarts and retries
nothing here: the pool does, which knows what is missing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from almost_eval.errors import AlmostError, InputError, MissingDependencyError
from almost_eval.types import JSONObject
from almost_eval.workers.work import Item, Lost, Message, Ready, Refused, Servant, ServantRecipe, Unit, serve

LOCAL = "local"
"""The value of `--ray` that stands for a cluster of this machine alone, made for this command."""
ROOM_SECONDS = 120.0
"""How long an actor waits for room in the cluster before its place counts as lost."""
_QUICK_SECONDS = 5.0


class RayTransport:
    """Workers that a Ray cluster places.

    Args:
        recipe: of what a worker holds.
        size: workers at most; None is one for each GPU or group of them that a copy takes, or for each node without.
        address: of a running cluster (`HOST:PORT`, `auto`), or `LOCAL`.
        gpus: that one worker takes; 0 on CPUs.

    Raises:
        MissingDependencyError: Ray is not installed.
        InputError: no cluster at that address, or one without room for a worker.
    """

    def __init__(self, recipe: ServantRecipe, size: int | None, *, address: str, gpus: int) -> None:
        spec = find_spec("ray")
        if spec is None or spec.origin is None:  # a folder of that name, as Ray makes in /tmp, is no package
            raise MissingDependencyError(
                "--ray needs the package 'ray'; install it with: pip install 'almost-toolkit[ray]'"
            )
        self._ray = _connect(address)
        self._address = address
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        self.has_gpus = any(node.get("GPU") for node in nodes)
        """Whether the cluster has any."""
        if gpus:
            room = sum(int(node.get("GPU", 0)) // gpus for node in nodes)
            if not room:
                raise InputError(f"--ray {address}: no node of the cluster has the {gpus} GPUs that a worker takes")
        else:
            room = len(nodes)
        if gpus and size is not None and size > room:
            raise InputError(
                f"--workers {size}: the cluster's GPUs are enough for {room}; leave it out for all of them"
            )
        self.size = size or room
        self._gpus = gpus
        cores = sum(float(node.get("CPU", 0)) for node in nodes) or 1.0
        share = cores / self.size
        self._cpus = float(int(share)) if share >= 1 else share  # Ray takes parts of a core, whole ones above
        self._recipe = recipe
        self._actors: dict[int, _Actor] = {}
        self._task: tuple[int, Any] = (0, None)

    def describe(self) -> JSONObject:
        """What a result records: no address, which may name a machine."""
        return {"transport": "ray", "cpus": self._cpus, "gpus": self._gpus, "version": self._ray.__version__}

    def start(self, place: int) -> None:
        """Ask Ray for an actor."""
        ray = self._ray
        cls = ray.remote(max_restarts=0, max_task_retries=0)(ActorServant)
        handle = cls.options(num_cpus=self._cpus, num_gpus=self._gpus, scheduling_strategy="SPREAD").remote()
        self._actors[place] = _Actor(handle, handle.open.remote(self._recipe, max(1, int(self._cpus))), handle)

    def give(self, place: int, task: Any, unit: Unit) -> None:
        """Have an actor answer a unit."""
        if self._task[0] != unit.task:
            self._task = (unit.task, self._ray.put(task))
        actor = self._actors[place]
        # In a list, so that Ray hands over the reference: the actor takes the task from the store once.
        actor.waits_for = actor.handle.answer.options(num_returns="streaming").remote([self._task[1]], unit)

    def receive(self, seconds: float) -> Iterator[tuple[int, Message]]:
        """Wait for a message, and yield what has arrived."""
        places = {id(actor.waits_for): place for place, actor in self._actors.items() if actor.waits_for is not None}
        waiting = [actor.waits_for for actor in self._actors.values() if actor.waits_for is not None]
        ready, _ = self._ray.wait(waiting, num_returns=1, timeout=seconds)
        for reference in ready:
            place = places[id(reference)]
            actor = self._actors.get(place)
            if actor is None or actor.waits_for is not reference:
                return
            message = self._take(actor, reference)
            if isinstance(message, Lost):
                self.end(place)
            elif not isinstance(message, Item):
                actor.waits_for = None
            yield place, message
        if not ready:
            yield from self._without_room()

    def _take(self, actor: _Actor, reference: Any) -> Message:
        ray = self._ray
        try:
            message: Message = ray.get(next(reference) if hasattr(reference, "__next__") else reference)
        except StopIteration:  # an actor says `Finished` before this
            message = Lost("its answers stopped")
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            reason = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
            message = Lost(" ".join(reason.split())[:200])
        except ray.exceptions.RayError as error:
            message = Lost(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
        if isinstance(message, Ready):
            actor.is_placed = True
        return message

    def _without_room(self) -> Iterator[tuple[int, Message]]:
        """Give up actors that no node has room for: a node that is gone does not come back."""
        for place, actor in list(self._actors.items()):
            if actor.is_placed or actor.waits_for is None:
                continue
            if not actor.is_placed and self._ray.wait([actor.placed], timeout=0)[0]:
                actor.is_placed = True
            elif time.monotonic() - actor.began > ROOM_SECONDS:
                self.end(place)
                yield place, Lost(f"no node of the cluster had room for it in {ROOM_SECONDS:.0f} s")

    def end(self, place: int) -> None:
        """Have Ray kill an actor."""
        actor = self._actors.pop(place)
        if self._ray.is_initialized():
            self._ray.kill(actor.handle, no_restart=True)

    def close(self) -> None:
        """End all actors; the cluster runs on, unless it was made for this."""
        for place in list(self._actors):
            self.end(place)
        self._task = (0, None)


class _Actor:
    """An actor, as it is seen from here."""

    def __init__(self, handle: Any, opened: Any, placing: Any) -> None:
        self.handle = handle
        self.waits_for: Any = opened
        """Reference or generator of references that something is expected of."""
        self.placed = placing.__ray_ready__.remote()
        """Known once a node has taken the actor."""
        self.is_placed = False
        self.began = time.monotonic()


class ActorServant:
    """What an actor runs."""

    def __init__(self) -> None:
        self._servant: Servant | None = None
        self._task: tuple[int, Any] = (0, None)

    def open(self, recipe: ServantRecipe, threads: int) -> Message:
        """Make the servant; its libraries are not imported before."""
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
        try:
            self._servant = recipe.open()
            return Ready(self._servant.identity())
        except AlmostError as error:
            return Refused(error)

    def answer(self, reference: list[Any], unit: Unit) -> Iterator[Message]:
        """The messages of a unit."""
        import ray

        assert self._servant is not None
        if self._task[0] != unit.task:
            self._task = (unit.task, ray.get(reference[0]))
        yield from serve(self._servant, self._task[1], unit)


def _connect(address: str) -> Any:
    if address == LOCAL:
        # Ray then listens on 127.0.0.1; an address of that kind in `init` it would turn into that of the network.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        connected = ray.get_runtime_context().gcs_address
        if address not in (LOCAL, "auto", connected):
            raise InputError(f"--ray {address}: this process is connected to the cluster at {connected} already")
        return ray
    options: JSONObject = {"address": address, "log_to_driver": False, "logging_level": "error"}
    if address == LOCAL:
        options["include_dashboard"] = False
        options["num_cpus"] = len(os.sched_getaffinity(0))
    else:
        _refuse_silent(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no report to anybody
    # What Ray hears of a lost node it prints on stdout, which carries the result; no setting of it says otherwise. The
    # pool says what was lost.
    ray._private.worker.print_to_stdstream = lambda *args, **kwargs: None
    try:
        ray.init(**options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise InputError(_no_cluster(address, " ".join(str(error).split())[:200])) from None
    return ray


def _refuse_silent(address: str) -> None:
    """Raise InputError where nobody listens at HOST:PORT: Ray would try for five minutes, loudly."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise InputError(f"--ray {address}: give HOST:PORT of the head node, or auto for the cluster of this machine")
    try:
        socket.create_connection((host, int(port)), timeout=_QUICK_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(_no_cluster(address, str(error))) from None


def _no_cluster(address: str, problem: str) -> str:
    return (
        f"--ray {address}: no cluster answers ({problem}); start one with `ray start --head`, or leave the address out "
        "for this machine alone"
    )
