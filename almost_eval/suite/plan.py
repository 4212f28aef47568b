"""The plan of `almost-eval all`: which tasks, on one model that is opened once, and what they take.

What can be refused is known before a weight is read, and so are the tokens that each task reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from almost_eval.cli.engine_options import engine_options, reward_model
from almost_eval.cli.run_options import prepare_run
from almost_eval.cli.startup import import_transformers
from almost_eval.errors import AlmostError, InputError, did_you_mean
from almost_eval.run.store import RunStore

if TYPE_CHECKING:
    from almost_eval.data.sources import DataSource
    from almost_eval.engines.build import EngineOptions
    from almost_eval.judge.run import JudgeRun
    from almost_eval.run.runner import Run
    from almost_eval.tasks.base import Task

SHOTS = 5
"""Of MMLU."""


@dataclass(frozen=True, slots=True)
class Part:
    """One task of the whole, with the settings it is known for."""

    task: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    protocol: str = ""

    @property
    def reward(self) -> bool:
        """Whether it asks the reward model, and not the model."""
        return self.protocol == "reward"

    @property
    def own_prompts(self) -> bool:
        """Whether all its prompts are few-shot documents; see `resolve_prompting`."""
        documents = self.task in ("mmlu", "harness")
        return documents or (self.task == "truthfulqa" and "mc1_true_prompt" not in self.settings["metrics"])

    def builder(self, limit: int | None) -> Callable[[Any, Any], Task]:
        """Makes the task of a data source and its prompting."""
        from almost_eval.tasks.build import build_task

        settings = {**self.settings, "limit": limit}
        return lambda data, prompting: build_task(self.task, self.protocol, settings, data, prompting)


PARTS = {
    "hhh-reward": Part("hhh", protocol="reward"),
    "hhh-choice": Part("hhh", protocol="choice"),
    "hhh-likelihood": Part("hhh", protocol="likelihood"),
    "truthfulqa": Part("truthfulqa", {"metrics": ("mc1", "mc2", "mc1_true_prompt")}),
    "mmlu": Part("mmlu", {"subjects": (), "shots": SHOTS}),
}
"""Name, which is also the folder's -> task. `vicuna`, which compares two systems, is planned apart."""
VICUNA = "vicuna"
NAMES = (*PARTS, VICUNA)
"""In the order they run: what costs money comes last."""


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
    notes: dict[str, Any] = field(default_factory=dict)
    """What else is to be known before it starts: the price of a judge."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        names = ("refused", "samples", "done", "read", "write", "notes")
        return {"folder": str(self.folder), **{name: getattr(self, name) for name in names}}


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The model that is meant, and, for a built-in one on its own data, reward model, judge and baseline.

    Raises:
        InputError: a baseline that nobody judges, or a judge with nothing to compare with.
    """
    from almost_eval.judge.build import DEFAULT_BASELINE
    from almost_eval.nano import BUILT_IN, DEFAULT_MODEL, DEFAULT_REWARD_MODEL

    model = given["model"] or DEFAULT_MODEL
    own: dict[str, str] = {}
    if model in BUILT_IN:
        own_data = given["data"] == "nano" or not (given["data"] or given["data_root"])
        if own_data:
            own["reward_model"] = DEFAULT_REWARD_MODEL
        if model != DEFAULT_BASELINE:  # which has nothing to be compared with, unless something is named
            own["baseline"] = DEFAULT_BASELINE
        if own_data and (given["baseline"] or own.get("baseline")):
            own["judge"] = "nano"
    found = {**given, "model": model, **{name: value for name, value in own.items() if given[name] is None}}
    if given["baseline"] and not found["judge"]:
        raise InputError(f"--baseline {given['baseline']}: somebody must compare the two; name one with --judge")
    if found["judge"] and not found["baseline"]:
        raise InputError("--judge: it compares the model with another; give a checkpoint or answer file as --baseline")
    return found


def choose(asked: Sequence[str], given: Mapping[str, Any]) -> list[str]:
    """The names of the tasks to run: those asked for (`hhh` is all its protocols), or all that have what they need.

    Raises:
        InputError: an unknown name, or a task that lacks what it needs.
    """
    lacking = {name for name, need in (("hhh-reward", "reward_model"), (VICUNA, "judge")) if not given[need]}
    chosen = set()
    for name in asked:
        group = {full for full in NAMES if full == name or full.startswith(f"{name}-")}
        if not group:
            raise InputError(f"--tasks: unknown task {name!r}; {did_you_mean(name, ('hhh', *NAMES))}")
        if name in lacking:
            needed = "--judge and --baseline" if name == VICUNA else "--reward-model"
            raise InputError(f"--tasks {name}: it needs {needed}")
        chosen |= group - lacking
    return [name for name in NAMES if (name in chosen if asked else name not in lacking)]


def refuse_unused(names: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raise InputError where a model or judge was named for a task that `--tasks` leaves out."""
    for name, needs in (("hhh-reward", ("reward_model",)), (VICUNA, ("judge", "baseline"))):
        unused = next((need for need in needs if given[need] and name not in names), None)
        if unused:
            raise InputError(f"--{unused.replace('_', '-')} is for {name}, which --tasks leaves out; leave out both")


def plan(names: Sequence[str], given: Mapping[str, Any], output: Path | None) -> tuple[list[Planned], Path]:
    """Open the models, prepare every task, and count what it takes. Loads no weights.

    Args:
        names: see `choose`.
        given: the options of the command, see `with_defaults`.
        output: folder of the run folders; None is `runs/all-<model>-<digest of the runs>`.

    Returns:
        The tasks, those that are refused among them, and the folder.

    Raises:
        InputError: what concerns them all: the model, the data, or that nothing which is asked of the model can run.
    """
    from almost_eval.data.sources import find_data
    from almost_eval.engines.build import loglikelihood_engine
    from almost_eval.nano import BUILT_IN
    from almost_eval.run.validity import parse_allowed

    allowed = parse_allowed(given["allow"])
    options = engine_options(given)
    data = find_data(given["data"], given["data_root"], built_in_model=given["model"] in BUILT_IN)
    import_transformers()
    engine: Any = None
    if any(name == VICUNA or not PARTS[name].reward for name in names):
        engine = loglikelihood_engine(given["model"], options)
    planned = []
    for name in names:
        one = Planned(name, Path(name))
        try:
            if name == VICUNA:
                one.run = _vicuna(given, data, engine, options, allowed)
            else:
                one.run = _benchmark(PARTS[name], given, engine, options, allowed)
        except AlmostError as error:
            one.refused = str(error)
        planned.append(one)
    _refuse_all(planned)
    folder = output or _default_folder(planned, given)
    for one in planned:
        one.folder = folder / one.name
        _count(one)
    _refuse_all(planned)
    return planned, folder


def _benchmark(
    part: Part, given: Mapping[str, Any], engine: Any, options: EngineOptions, allowed: Mapping[str, float]
) -> Run:
    model = engine
    if part.reward:  # its own template and context; an endpoint serves the model alone
        own = type(options)() if options.engine == "openai" else replace(options, max_length=None)
        model = reward_model(given["reward_model"], own)
        given = {**given, "template": "auto", "prompt_set": None}
    return prepare_run(
        part.builder(given["limit"]),
        given,
        reward=part.reward,
        own_prompts=part.own_prompts,
        allowed=allowed,
        model=model,
    )


def _vicuna(
    given: Mapping[str, Any], data: DataSource, engine: Any, options: EngineOptions, allowed: Mapping[str, float]
) -> JudgeRun:
    from almost_eval.judge.answers import ModelSystem, Sampling, open_system
    from almost_eval.judge.build import JudgeOptions, answer_budget, open_judge
    from almost_eval.judge.questions import find_questions
    from almost_eval.judge.run import JudgeRun

    questions, fingerprint = find_questions(None, data, limit=given["limit"])
    local = given["judge"] == "nano" or given["judge"].startswith("reward:")
    # The engine's requests at a time and its patience are not the judge's.
    names = {field.name for field in fields(JudgeOptions)} - {"concurrency", "timeout"}
    names -= {"prompt_set"} if local else set()
    judge = open_judge(JudgeOptions(**{name: given[name] for name in names if name in given}), data)
    sampling = Sampling(
        max_new_tokens=answer_budget(data.name),
        seed=given["seed"],
        template=given["template"],
    )
    subset = given["limit"] is not None
    baseline = open_system(given["baseline"], questions, sampling, options, subset=subset)
    model = ModelSystem(given["model"], questions, sampling, options)
    if isinstance(engine, type(model.engine)):  # an endpoint's scorer is a class of its own, and holds no weights
        model.engine = engine
    return JudgeRun(questions, fingerprint, data.name, [baseline, model], judge, seed=given["seed"], allowed=allowed)


def _refuse_all(planned: Sequence[Planned]) -> None:
    """Raise where nothing could run, or nothing of all that is asked of the model."""
    asked = [one for one in planned if one.name in PARTS and not PARTS[one.name].reward]
    for group in (planned, asked if len(asked) > 1 else []):
        if group and all(one.refused for one in group):
            raise InputError(str(group[0].refused))


def _default_folder(planned: Sequence[Planned], given: Mapping[str, Any]) -> Path:
    from almost_eval.run import provenance

    runs = {one.name: one.run.default_folder().name if one.run else None for one in planned}
    readable = "".join(c if c.isalnum() or c in "+-_." else "_" for c in Path(given["model"]).name)[:60]
    return Path("runs") / f"all-{readable}-{provenance.digest(runs)[:10]}"


# --- what it takes ---


def _count(one: Planned) -> None:
    """Fill in samples and tokens; a folder that holds another run is found here too."""
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
    if one.name == VICUNA:
        _count_judged(one, run)
        return
    one.samples = len(run.samples)  # type: ignore[union-attr]
    one.read = tokens_to_read(run, done)  # type: ignore[arg-type]


def tokens_to_read(run: Run, done: set[str]) -> int:
    """Tokens that the samples which are not `done` take.

    For a model these are the nodes of the token trie: what an engine computes that shares every prefix. One that
    shares fewer, or none, says in its results how many it computed. For a reward model each distinct text counts.
    """
    from almost_eval.engines.prefix import build_trie

    missing = [i for i, sample in enumerate(run.samples) if sample.id not in done]
    if run.prepared is not None:
        requests = [run.prepared.requests[at] for i in missing for at in run.prepared.of_sample[i]]
        if not requests:
            return 0
        trie = build_trie(requests)
        return len(trie) if getattr(run.model, "share_prefixes", True) else trie.tokens_plain
    conversations = [c for i in missing for c in run.task.conversations(run.samples[i])]
    limit = run.model.context_length
    texts = {tuple(ids) for ids in run.model.encode(conversations)}
    return sum(len(ids) for ids in texts if limit is None or len(ids) <= limit)


def _count_judged(one: Planned, run: Any) -> None:
    """Answers that models write, and what the judge takes."""
    from almost_eval.judge.answers import ModelSystem, answer_files

    one.samples = run.n_samples
    files = answer_files(one.folder, [system.name for system in run.systems])
    for system, file in zip(run.systems, files, strict=True):
        if not isinstance(system, ModelSystem):
            continue
        there = file.read_bytes().count(b"\n") if file.exists() else 0
        lacking = system.prompts[there:]
        encoder = getattr(system.engine, "encoder", None)  # an endpoint encodes on its own side
        one.read += sum(len(ids) for ids in encoder.encode_texts(lacking)) if encoder and lacking else 0
        one.write += len(lacking) * system.spec()["sampling"]["max_new_tokens"]
    hidden = ("prompt", "questions", "reviews", "systems")
    one.notes = {key: value for key, value in run.describe(one.folder).items() if key not in hidden}
