"""The plan of `almost-eval all`: which tasks, on one model that is opened once, and what they take.

What can be refused is known before a weight is read, and so are the tokens that each task reads and writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from almost_eval.errors import AlmostError, InputError, did_you_mean
from almost_eval.judge.build import DEFAULT_BASELINE, NANO_JUDGE, JudgeOptions, answer_budget, open_judge
from almost_eval.nano import BUILT_IN, DEFAULT_MODEL, DEFAULT_REWARD_MODEL
from almost_eval.run.runner import RunRequest, open_run
from almost_eval.run.store import RunStore, default_folder
from almost_eval.tasks.facts import Preset
from almost_eval.tasks.registry import task_classes

if TYPE_CHECKING:
    from almost_eval.judge.run import JudgeRun
    from almost_eval.run.runner import Run

JUDGED = "vicuna"
"""The task that compares two systems by a judge. It costs money, so it comes last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteRequest:
    """All benchmarks of one model."""

    base: RunRequest
    """Model, engine, data and limits of every task."""
    tasks: Sequence[str] = ()
    """Names of presets, or what several begin with (`hhh`); empty is all that have what they need."""
    reward_model: str | None = None
    judge: JudgeOptions = field(default_factory=JudgeOptions)
    """Without a name, nobody judges."""
    baseline: str | None = None
    """Checkpoint or answer file that the judge compares the model with."""


@dataclass(frozen=True, slots=True)
class SuiteTask:
    """A preset and the task that it is of."""

    task: str
    preset: Preset

    @property
    def asks_reward_model(self) -> bool:
        """Whether it is put to the reward model, and not to the model."""
        return self.preset.protocol == "reward"

    def request(self, base: RunRequest) -> RunRequest:
        """What `all` runs."""
        preset = self.preset
        return replace(base, task=self.task, protocol=preset.protocol, settings=preset.settings, output=None)


def suite_tasks() -> dict[str, SuiteTask]:
    """Name, which is also the folder's -> the task; `JUDGED` is planned apart."""
    return {preset.name: SuiteTask(cls.name, preset) for cls in task_classes() for preset in cls.presets}


def suite_names() -> tuple[str, ...]:
    """In the order they run."""
    return (*suite_tasks(), JUDGED)


@dataclass(slots=True)
class Planned:
    """A task before it runs."""

    name: str
    folder: Path
    run: Run | JudgeRun | None = None
    """Checked and ready, without weights; None where it is refused."""
    refused: str | None = None
    """Why it cannot run."""
    samples: int = 0
    done: int = 0
    """Of the samples, those that an earlier process has scored."""
    read: int = 0
    """Tokens that a model reads for what is missing: prefixes that requests share count once."""
    write: int = 0
    """Tokens that models write, at most."""
    answers: int = 0
    """That models write."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What else is to be known before it starts: the price of a judge."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        names = ("refused", "samples", "done", "read", "write", "notes")
        return {"folder": str(self.folder), **{name: getattr(self, name) for name in names}}


def with_defaults(request: SuiteRequest) -> SuiteRequest:
    """The model that is meant, and, for a built-in one on its own data, reward model, judge and baseline.

    Raises:
        InputError: a baseline that nobody judges, or a judge with nothing to compare with.
    """
    base = replace(request.base, model=request.base.model or DEFAULT_MODEL)
    reward_model, judge, baseline = request.reward_model, request.judge.judge, request.baseline
    if base.model in BUILT_IN:
        own_data = base.data == "nano" or not (base.data or base.data_root)
        if own_data:
            reward_model = reward_model or DEFAULT_REWARD_MODEL
        if base.model != DEFAULT_BASELINE:  # which has nothing to be compared with, unless something is named
            baseline = baseline or DEFAULT_BASELINE
        if own_data and baseline:
            judge = judge or NANO_JUDGE
    if request.baseline and not judge:
        raise InputError(f"--baseline {request.baseline}: somebody must compare the two; name one with --judge")
    if judge and not baseline:
        raise InputError("--judge: it compares the model with another; give a checkpoint or answer file as --baseline")
    options = replace(request.judge, judge=judge)
    if judge == NANO_JUDGE or options.is_reward_model:  # these read no prompts: the prompt set is the tasks'
        options = replace(options, prompt_set=None)
    return replace(request, base=base, reward_model=reward_model, judge=options, baseline=baseline)


def choose(request: SuiteRequest) -> list[str]:
    """The names of the tasks to run: those named (`hhh` is all its protocols), or all that have what they need.

    Raises:
        InputError: an unknown name, or a task that lacks what it needs.
    """
    names, tasks = suite_names(), suite_tasks()
    lacking = {name for name, task in tasks.items() if task.asks_reward_model and not request.reward_model}
    if not request.judge.judge:
        lacking.add(JUDGED)
    chosen = set()
    for name in request.tasks:
        group = {full for full in names if full == name or full.startswith(f"{name}-")}
        if not group:
            known = dict.fromkeys([task.task for task in tasks.values()] + list(names))
            raise InputError(f"--tasks: unknown task {name!r}; {did_you_mean(name, known)}")
        if name in lacking:
            needed = "--judge and --baseline" if name == JUDGED else "--reward-model"
            raise InputError(f"--tasks {name}: it needs {needed}")
        chosen |= group - lacking
    return [name for name in names if (name in chosen if request.tasks else name not in lacking)]


def refuse_unused(names: Sequence[str], request: SuiteRequest) -> None:
    """Raise InputError where a model or judge was named for a task that `--tasks` leaves out."""
    needs: dict[str, list[str | None]] = {JUDGED: [request.judge.judge and "judge", request.baseline and "baseline"]}
    for name, task in suite_tasks().items():
        if task.asks_reward_model:
            needs[name] = [request.reward_model and "reward-model"]
    for name, flags in needs.items():
        unused = next((flag for flag in flags if flag and name not in names), None)
        if unused:
            raise InputError(f"--{unused} is for {name}, which --tasks leaves out; leave out both")


def plan(names: Sequence[str], request: SuiteRequest) -> tuple[list[Planned], Path]:
    """Open the models, prepare every task that was chosen, and count what it takes. Loads no weights.

    Returns:
        The tasks, those that are refused among them, and the folder of their run folders: where the request has no
        output, `runs/all-<model>-<digest of the runs>`.

    Raises:
        InputError: what concerns them all: the model, the data, or that nothing which is put to the model can run.
    """
    from almost_eval.engines.build import loglikelihood_engine

    base, tasks = request.base, suite_tasks()
    base.source()  # refused for all at once
    engine: Any = None
    if any(name == JUDGED or not tasks[name].asks_reward_model for name in names):
        assert base.model is not None
        engine = loglikelihood_engine(base.model, base.engine)
    planned = []
    for name in names:
        one = Planned(name, Path(name))
        try:
            one.run = _judged(request, engine) if name == JUDGED else _benchmark(tasks[name], request, engine)
        except AlmostError as error:
            one.refused = str(error)
        planned.append(one)
    _refuse_all(planned)
    runs = {one.name: one.run.default_folder().name if one.run else None for one in planned}
    folder = base.output or default_folder(runs, "all", Path(str(base.model)).name)
    for one in planned:
        one.folder = folder / one.name
        _count(one)
    _refuse_all(planned)
    return planned, folder


def _benchmark(task: SuiteTask, request: SuiteRequest, engine: Any) -> Run:
    base = request.base
    if not task.asks_reward_model:
        return open_run(task.request(base), engine)
    # The reward model has its own template and context; an endpoint serves the model alone.
    options = type(base.engine)() if base.engine.engine == "openai" else replace(base.engine, max_length=None)
    data = base.source().name  # that of the model's own runs, whatever the reward model is
    own = replace(base, model=request.reward_model, engine=options, template="auto", prompt_set=None, data=data)
    return open_run(task.request(own))


def _judged(request: SuiteRequest, engine: Any) -> JudgeRun:
    from almost_eval.judge.answers import open_system
    from almost_eval.judge.model_system import ModelSystem, Sampling
    from almost_eval.judge.questions import find_questions
    from almost_eval.judge.run import JudgeRun

    base, data = request.base, request.base.source()
    assert base.model is not None
    questions, fingerprint = find_questions(None, data, limit=base.limit)
    judge = open_judge(request.judge, data)
    sampling = Sampling(max_new_tokens=answer_budget(data.name), seed=base.seed, template=base.template)
    subset = base.limit is not None
    assert request.baseline is not None
    baseline = open_system(request.baseline, questions, sampling, base.engine, subset=subset)
    model = ModelSystem(base.model, questions, sampling, base.engine)
    if isinstance(engine, type(model.engine)):  # an endpoint's scorer is a class of its own, and holds no weights
        model.engine = engine
    systems = [baseline, model]
    return JudgeRun(questions, fingerprint, data.name, systems, judge, seed=base.seed, allowed=base.allowed)


def _refuse_all(planned: Sequence[Planned]) -> None:
    """Raise where nothing could run, or nothing of all that is put to the model."""
    tasks = suite_tasks()
    own = [one for one in planned if one.name in tasks and not tasks[one.name].asks_reward_model]
    for group in (planned, own if len(own) > 1 else []):
        if group and all(one.refused for one in group):
            raise InputError(str(group[0].refused))


# --- what it takes ---


def _count(one: Planned) -> None:
    """Fill in samples and tokens; a folder that holds another run is refused here too."""
    run = one.run
    if run is None:
        return
    done: set[str] = set()
    if (one.folder / "spec.json").exists():
        try:
            with RunStore(one.folder, run.spec()) as store:
                done = set(store.done)
        except AlmostError as error:
            one.run, one.refused = None, str(error)
            return
    one.done = len(done)
    if one.name == JUDGED:
        _count_judged(one, run)
        return
    one.samples = len(run.samples)  # type: ignore[union-attr]
    one.read = tokens_to_read(run, done)  # type: ignore[arg-type]


def tokens_to_read(run: Run, done: set[str]) -> int:
    """Tokens that the samples which are not `done` take.

    For a model these are the nodes of the token trie, and what its batches repeat of them: what an engine computes that
    shares every prefix. One that shares fewer, or none, says in its results how many it computed. For a reward model
    each distinct text counts.
    """
    missing = [i for i, sample in enumerate(run.samples) if sample.id not in done]
    if run.prepared is not None:
        requests = [run.prepared.requests[at] for i in missing for at in run.prepared.of_sample[i]]
        return trie_tokens(run.model, requests) if requests else 0
    conversations = [c for i in missing for c in run.task.conversations(run.samples[i])]
    limit = run.model.context_length
    texts = {tuple(ids) for ids in run.model.encode(conversations)}
    return sum(len(ids) for ids in texts if limit is None or len(ids) <= limit)


def trie_tokens(model: Any, requests: Sequence[Any]) -> int:
    """Tokens that an engine computes for some encoded requests, at least one."""
    from almost_eval.engines.cuts import cut_trie
    from almost_eval.engines.prefix import build_trie

    trie = build_trie(requests)
    if not getattr(model, "share_prefixes", True):
        return trie.tokens_plain
    return len(cut_trie(trie, **model.pass_limits()) if hasattr(model, "pass_limits") else trie)


def _count_judged(one: Planned, run: Any) -> None:
    """Answers that models write, and what the judge takes."""
    from almost_eval.judge.answers import answer_files
    from almost_eval.judge.model_system import ModelSystem

    one.samples = run.n_samples
    files = answer_files(one.folder, [system.name for system in run.systems])
    for system, file in zip(run.systems, files, strict=True):
        if not isinstance(system, ModelSystem):
            continue
        there = file.read_bytes().count(b"\n") if file.exists() else 0
        lacking = system.prompts[there:]
        encoder = getattr(system.engine, "encoder", None)  # an endpoint encodes on its own side
        one.read += sum(len(ids) for ids in encoder.encode_texts(lacking)) if encoder and lacking else 0
        one.answers += len(lacking)
        one.write += len(lacking) * system.spec()["sampling"]["max_new_tokens"]
    hidden = ("prompt", "questions", "reviews", "systems")
    one.notes = {key: value for key, value in run.describe(one.folder).items() if key not in hidden}
