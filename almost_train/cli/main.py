"""`almost-train`: the command line of the recipe. Imports what a command needs when it runs, so `--help` is instant."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import click

from almost_eval import __version__
from almost_eval.cli.command_line import Commands, open_console, run_command_line
from almost_eval.errors import InputError, RunError, did_you_mean
from almost_eval.run.trackers import LOG_TO, logging_to

Command = Callable[..., Any]
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class SettingsCommand(click.Command):
    """A command whose settings flags are made from a dataclass when they are first asked for: importing it is dear."""

    def __init__(self, *args: Any, settings: str, engine: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._engine = engine
        self._own = list(self.params)
        self._made = False

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """click's, with the settings' flags."""
        if not self._made:
            self.params = [*self._own, *self._flags()]
            self._made = True
        return super().get_params(ctx)

    def settings_class(self) -> Any:
        """The dataclass."""
        import importlib

        module, _, name = self._settings.partition(":")
        return getattr(importlib.import_module(module), name)

    def _flags(self) -> list[click.Parameter]:
        from almost_train.common.config import with_options

        def made(**_: Any) -> None: ...

        found = list(getattr(with_options(self.settings_class())(made), "__click_params__", []))[::-1]
        taken = {param.name for param in self._own}
        if self._engine:
            found += [param for param in _engine_flags() if param.name not in {f.name for f in found}]
        return [param for param in found if param.name not in taken]

    def invoke(self, ctx: click.Context) -> Any:
        """click's, with the flags gathered into `settings` and `engine_for`."""
        from almost_eval.cli.startup import import_transformers
        from almost_eval.progress import progress_for
        from almost_train.common.config import settings_from

        cls = self.settings_class()
        names = {field.name for field in fields(cls)}
        given = {name: ctx.params.pop(name) for name in list(ctx.params) if name in names}
        ctx.params["settings"] = settings_from(cls, given, str(self.name))
        if self._engine:
            ctx.params["engine_for"] = _engine_for(
                {name: ctx.params.pop(name) for name in _ENGINE_HELP if name in ctx.params}
            )
        ctx.params["progress"] = progress_for()
        import_transformers()
        with logging_to(ctx.params.pop("log_to", ())):
            return super().invoke(ctx)


_ENGINE_HELP = {
    "engine": "hf, vllm or openai (any OpenAI-compatible endpoint).",
    "base_url": "openai: the endpoint, up to and with /v1.",
    "concurrency": "openai: requests on their way at a time.",
    "timeout": "openai: seconds that one answer may take.",
    "dtype": "hf, vllm: auto, float32, bfloat16 or float16.",
    "device": "hf: auto, cpu, cuda, cuda:1, ...",
    "batch_tokens": "hf, vllm: token positions in a forward pass.",
    "max_length": "hf, vllm: context length, below the model's own.",
    "tensor_parallel_size": "vllm: devices that share each layer.",
    "pipeline_parallel_size": "vllm: devices that share the layers out.",
    "data_parallel_size": "vllm: copies of the model.",
    "gpu_memory": "vllm: share of the GPU's memory.",
}
"""Engine option -> help: the flags of every command that generates."""


def _engine_flags() -> list[click.Parameter]:
    from almost_eval.engines.build import EngineOptions

    kinds = {"concurrency": int, "timeout": float, "gpu_memory": float}
    flags: list[click.Parameter] = []
    for field in fields(EngineOptions):
        if field.name in _ENGINE_HELP:
            kind = kinds.get(field.name) or (int if field.name.endswith(("size", "tokens", "length")) else str)
            flag = f"--{field.name.replace('_', '-')}"
            flags.append(
                click.Option([flag], type=kind, default=field.default, show_default=True, help=_ENGINE_HELP[field.name])
            )
    return flags


def _engine_for(given: Mapping[str, Any]) -> Callable[[str], Any]:
    from almost_eval.engines.build import EngineOptions, generation_engine

    options = EngineOptions(**given)
    return lambda model: generation_engine(model, options)


def _path(name: str, help: str, **more: Any) -> Any:
    return click.option(name, required=True, type=click.Path(path_type=Path), help=help, **more)


OUTPUT = _path("--output", "The stage's folder; made if absent, and gone on with if it holds the same stage.")
HELD_OUT = click.option(
    "--held-out", type=click.Path(path_type=Path), help="prompts.jsonl of an evaluation: kept out, word for word."
)
DATA_ROOT = click.option("--data-root", help="Folder with the official prompt files. [env: ALMOST_DATA_ROOT]")
JSON = click.option("--json", "as_json", is_flag=True, help="Print result.json instead of the table.")


@click.group(cls=Commands, invoke_without_command=True, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="almost-train")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train with synthetic feedback (ALMoST): comparisons, reward model, self-play, SFT, RLSF.

    \b
    Example:
      almost-train run nano --output runs/nano        the whole recipe on the built-in world
      almost-train reward --comparisons comparisons.jsonl --model ./my-model --output runs/reward
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.group(cls=Commands, context_settings=CONTEXT)
def synthesize() -> None:
    """Synthetic feedback: prompts, responses, comparisons."""


def _settings_command(group: Any, settings: str, *, engine: bool = False, name: str | None = None) -> Any:
    return group.command(name, cls=SettingsCommand, settings=settings, engine=engine)


@_settings_command(synthesize, "almost_train.synthetic.prompts:PromptSettings", engine=True)
@click.option("--model", required=True, help="A vanilla language model: folder, hub id or built-in name.")
@HELD_OUT
@OUTPUT
@DATA_ROOT
@JSON
def prompts(model: str, output: Path, data_root: str | None, as_json: bool, **given: Any) -> int:
    """Mine prompts, self-instruct style.

    \b
    Example:
      almost-train synthesize prompts --model nano/vanilla-large --prompt-set nano --count 50 --output runs/prompts
    """
    from almost_train.synthetic.prompts import synthesize_prompts

    data = _data(given["settings"].prompt_set, data_root)
    return _show(synthesize_prompts(model=model, output=output, data=data, **given), as_json)


@_settings_command(synthesize, "almost_train.synthetic.responses:ResponseSettings", engine=True)
@_path("--prompts", "prompts.jsonl.")
@_path("--configurations", "YAML: a list of {name, model, demonstrations, shots}.")
@OUTPUT
@DATA_ROOT
@JSON
def responses(
    prompts: Path, configurations: Path, output: Path, data_root: str | None, as_json: bool, **given: Any
) -> int:
    """Answer every prompt in every configuration.

    \b
    Example:
      almost-train synthesize responses --prompts runs/prompts/prompts.jsonl --configurations configurations.yaml \\
        --output runs/responses
    """
    from almost_train.synthetic.responses import read_configurations, synthesize_responses

    data = _data(given["settings"].prompt_set, data_root)
    listed = read_configurations(_yaml(configurations), str(configurations))
    found = synthesize_responses(prompts=prompts, configurations=listed, output=output, data=data, **given)
    return _show(found, as_json)


@_settings_command(synthesize, "almost_train.synthetic.comparisons:ComparisonSettings")
@_path("--responses", "The folder of synthesize responses.")
@_path("--ranking", "YAML: a list of configurations, or of lists of equal rank, best first.")
@click.option("--as-is-reward-model", help="Keep only pairs with which this reward model agrees.")
@OUTPUT
@JSON
def comparisons(as_json: bool, **given: Any) -> int:
    """Make preference pairs of ranked configurations, and filter them.

    \b
    Example:
      almost-train synthesize comparisons --responses runs/responses --ranking ranking.yaml --output runs/comparisons
    """
    from almost_train.synthetic.comparisons import synthesize_comparisons

    return _show(synthesize_comparisons(**given), as_json)


@_settings_command(cli, "almost_train.reward.run:RewardSettings")
@_path("--comparisons", "Preference pairs: prompt, chosen, rejected.")
@click.option("--eval-comparisons", type=click.Path(path_type=Path), help="Held-out pairs, in place of a share.")
@click.option("--model", required=True, help="What to start from: a language model, encoder or classifier.")
@OUTPUT
@LOG_TO
@JSON
def reward(as_json: bool, **given: Any) -> int:
    """Train a reward model on preference pairs (Bradley-Terry).

    \b
    Example:
      almost-train reward --comparisons runs/comparisons/comparisons.jsonl --model nano/vanilla-medium \\
        --output runs/reward
    """
    from almost_train.reward.run import train_reward

    return _show(train_reward(**given), as_json)


@_settings_command(cli, "almost_train.self_play.run:SelfPlaySettings", engine=True, name="self-play")
@_path("--prompts", "prompts.jsonl: the first user turns.")
@click.option("--reward-model", help="Its checkpoint; may be left out with --unguided.")
@click.option("--prompt-set", default="official", show_default=True, help="official, builtin or nano.")
@HELD_OUT
@OUTPUT
@DATA_ROOT
@JSON
def self_play(prompt_set: str, data_root: str | None, as_json: bool, **given: Any) -> int:
    """Simulate dialogues, each answer the best of N by the reward model (RMSP).

    \b
    Example:
      almost-train self-play --prompts runs/prompts/prompts.jsonl --reward-model runs/reward/model --prompt-set nano \\
        --assistant-demonstrations good --user-demonstrations good --output runs/self-play
    """
    from almost_train.self_play.run import self_play as play
    from almost_train.synthetic.prompt_sets import load_seed_set

    seeds = load_seed_set(prompt_set, _data(prompt_set, data_root))
    return _show(play(demonstrations=seeds.demonstrations, **given), as_json)


@_settings_command(cli, "almost_train.sft.run:SFTSettings")
@_path("--demonstrations", "Rows with messages.")
@click.option("--model", required=True, help="The language model to fine-tune.")
@OUTPUT
@LOG_TO
@JSON
def sft(as_json: bool, **given: Any) -> int:
    """Fine-tune on demonstrations, loss on the answers alone.

    \b
    Example:
      almost-train sft --demonstrations runs/play/demonstrations.jsonl --model nano/vanilla-medium --output runs/sft
    """
    from almost_train.sft.run import train_sft

    return _show(train_sft(**given), as_json)


@_settings_command(cli, "almost_train.rlsf.job:RLSFSettings")
@_path("--prompts", "prompts.jsonl.")
@click.option("--policy", required=True, help="The SFT checkpoint.")
@click.option("--reward-model", required=True, help="The reward model's checkpoint.")
@OUTPUT
@LOG_TO
@JSON
def rlsf(as_json: bool, **given: Any) -> int:
    """Reinforcement learning from synthetic feedback: PPO, RLOO or GRPO.

    \b
    Example:
      almost-train rlsf --algorithm ppo --prompts runs/prompts/prompts.jsonl --policy runs/sft/model \\
        --reward-model runs/reward/model --output runs/rlsf
    """
    from almost_train.rlsf.run import rlsf as train

    result = train(**given)
    _show(result, as_json)
    if stopped := result["metrics"]["stopped"]:
        step = result["metrics"]["policy_step"]
        raise RunError(
            f"training was stopped by a guard ({stopped}); the policy is that of step {step}, the last within bounds: "
            "lower --learning-rate or raise --kl-coefficient"
        )
    return 0


@cli.command()
@click.argument("recipe")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the pipeline.  [runs/<recipe>]")
@click.option("--seed", type=click.IntRange(min=0), help="In place of the recipe's.")
@click.option("--until", help="Stop after this stage.")
@click.option("--data-root", help="Folder laid out like the hub, looked in first. [env: ALMOST_DATA_ROOT]")
@click.option("--dry-run", is_flag=True, help="Check the recipe and list its stages; run nothing.")
@LOG_TO
@click.option("--json", "as_json", is_flag=True, help="Print the results of all stages instead of the tables.")
def run(
    recipe: str,
    output: Path | None,
    seed: int | None,
    until: str | None,
    data_root: str | None,
    dry_run: bool,
    log_to: tuple[str, ...],
    as_json: bool,
) -> int:
    """Run a recipe, whole: nano, smollm, llama-7b or a YAML file. Goes on where it was killed.

    \b
    Example:
      almost-train run nano --output runs/nano
    """
    from almost_eval.cli.startup import import_transformers
    from almost_eval.progress import progress_for
    from almost_train.pipeline.recipe import load_recipe
    from almost_train.pipeline.run import Pipeline

    loaded = load_recipe(recipe, seed=seed)
    import_transformers()
    folder = output or Path("runs") / loaded.name
    pipeline = Pipeline(loaded, folder, data_root, progress_for())
    console = open_console()
    if dry_run:
        for name, state in pipeline.states().items():
            console.print(f"{name:14} {state}")
        return 0
    with logging_to(log_to):
        reports = pipeline.run(until)
    if as_json:
        click.echo(json.dumps({report.name: report.result for report in reports}, indent=1, ensure_ascii=False))
        return 0
    from almost_train.pipeline.summary import draw, policy_table, stage_table

    console.print(stage_table(reports))
    if reports[-1].name == "evaluation":
        console.print(policy_table(reports[-1].result["metrics"]))
    if picture := draw(folder, reports):
        console.print(f"picture: {picture}", soft_wrap=True)
    return 0


@cli.group(cls=Commands, context_settings=CONTEXT)
def nano() -> None:
    """The built-in scale model: pre-train its language models from scratch."""


@nano.command()
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder of the family.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of weights and order.")
@click.option("--sizes", default="small,medium,large", show_default=True, help="Which, by commas.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(min=1), help="Models at a time.")
def pretrain(output: Path, seed: int, sizes: str, workers: int) -> int:
    """Pre-train the vanilla models on the nano world, from scratch.

    \b
    Example:
      almost-train nano pretrain --output runs/family --seed 0
    """
    from rich.table import Table

    from almost_eval.cli.startup import import_transformers
    from almost_train.nano.pretrain import SIZES, pretrain_family

    names = [name.strip() for name in sizes.split(",") if name.strip()]
    for name in names:
        if name not in SIZES:
            raise InputError(f"unknown size {name!r}; {did_you_mean(name, SIZES)}")
    import_transformers()
    table = Table("model", "parameters", "tokens", "seconds", "loss, nats", "facts known")
    for found in pretrain_family(output, seed=seed, sizes=names, workers=workers):
        table.add_row(
            f"vanilla-{found.size}",
            f"{found.parameters:,}",
            f"{found.tokens:,}",
            f"{found.seconds:.0f}",
            f"{found.loss:.3f}",
            f"{found.fact_accuracy:.0%}",
        )
    open_console().print(table)
    return 0


@nano.command()
@_path("--pipeline", "The folder of a finished `almost-train run nano`.")
@_path("--output", "Where to write reward, sft and almost.")
def collect(pipeline: Path, output: Path) -> int:
    """Make the shipped models of a finished nano pipeline: fp16, each with a card.

    \b
    Example:
      almost-train nano collect --pipeline runs/nano --output runs/family
    """
    from almost_eval.cli.startup import import_transformers
    from almost_train.nano.family import collect as collect_family

    import_transformers()
    for folder in collect_family(pipeline, output):
        click.echo(str(folder))
    return 0


def _data(prompt_set: str, data_root: str | None) -> Any:
    from almost_eval.data.sources import find_data

    return find_data("nano" if prompt_set == "nano" else None, None if prompt_set == "nano" else data_root)


def _yaml(file: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file} cannot be read as YAML ({' '.join(str(error).split())[:160]})") from None


def _show(result: Mapping[str, Any], as_json: bool) -> int:
    from almost_train.common.processes import is_main

    if not is_main():  # under `accelerate launch` the result is said once
        return 0
    if as_json:
        click.echo(json.dumps(result, indent=1, ensure_ascii=False))
        return 0
    from rich.table import Table

    table = Table("metric", "value", title=result["stage"], title_justify="left")
    for name, value in _flat(result["metrics"]):
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console = open_console()
    console.print(table)
    for name, output in result["outputs"].items():
        console.print(f"{name}: {output['path']}", soft_wrap=True)
    return 0


def _flat(value: Any, at: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(at, value)]
    return [leaf for key, item in value.items() for leaf in _flat(item, f"{at}/{key}" if at else str(key))]


def main() -> NoReturn:
    """Run the command line."""
    run_command_line(cli, "almost-train")


if __name__ == "__main__":
    main()
