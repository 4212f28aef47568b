"""`almost-train synthesize`: prompts, responses, comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from almost_eval.cli.command_line import Commands
from almost_eval.cli.options import SHARD
from almost_train.cli.options import CONTEXT, DATA_ROOT, HELD_OUT, OUTPUT, data_for, path_option
from almost_train.cli.settings import settings_command

if TYPE_CHECKING:
    from almost_eval.progress import Progress
    from almost_eval.run.shards import Shard
    from almost_eval.types import JSONObject
    from almost_train.synthetic.comparisons import ComparisonSettings
    from almost_train.synthetic.prompts import PromptSettings
    from almost_train.synthetic.responses import ResponseSettings
    from almost_train.synthetic.sampling import EngineFactory


@click.group(cls=Commands, context_settings=CONTEXT)
def synthesize() -> None:
    """Synthetic feedback: prompts, responses, comparisons."""


@settings_command("almost_train.synthetic.prompts:PromptSettings", engine=True)
@click.option("--model", required=True, help="A vanilla language model: folder, hub id or built-in name.")
@HELD_OUT
@OUTPUT
@DATA_ROOT
def prompts(
    settings: PromptSettings,
    model: str,
    output: Path,
    data_root: str | None,
    held_out: Path | None,
    engine_for: EngineFactory,
    progress: Progress,
) -> JSONObject:
    """Mine prompts, self-instruct style.

    \b
    Example:
      almost-train synthesize prompts --model nano/vanilla-large --prompt-set nano --count 50 --output runs/prompts
    """
    from almost_train.synthetic.prompts import synthesize_prompts

    data = data_for(settings.prompt_set, data_root)
    return synthesize_prompts(
        settings, model, output, data=data, engine_for=engine_for, held_out=held_out, progress=progress
    )


@settings_command("almost_train.synthetic.responses:ResponseSettings", engine=True)
@path_option("--prompts", "prompts.jsonl.")
@path_option("--configurations", "YAML: a list of {name, model, demonstrations, shots}.")
@OUTPUT
@SHARD
@DATA_ROOT
def responses(
    settings: ResponseSettings,
    prompts: Path,
    configurations: Path,
    output: Path,
    shard: Shard | None,
    data_root: str | None,
    engine_for: EngineFactory,
    progress: Progress,
) -> JSONObject:
    """Answer every prompt in every configuration.

    \b
    Example:
      almost-train synthesize responses --prompts runs/prompts/prompts.jsonl --configurations configurations.yaml \\
        --output runs/responses
    """
    from almost_train.common.yaml_file import read_yaml
    from almost_train.synthetic.responses import read_configurations, synthesize_responses

    data = data_for(settings.prompt_set, data_root)
    listed = read_configurations(read_yaml(configurations, "it lists who answers"), str(configurations))
    return synthesize_responses(
        settings, prompts, listed, output, data=data, engine_for=engine_for, progress=progress, shard=shard
    )


@settings_command("almost_train.synthetic.comparisons:ComparisonSettings")
@path_option("--responses", "The folder of synthesize responses.")
@path_option("--ranking", "YAML: a list of configurations, or of lists of equal rank, best first.")
@click.option("--as-is-reward-model", help="Keep only pairs with which this reward model agrees.")
@OUTPUT
def comparisons(
    settings: ComparisonSettings,
    responses: Path,
    ranking: Path,
    as_is_reward_model: str | None,
    output: Path,
    progress: Progress,
) -> JSONObject:
    """Make preference pairs of ranked configurations, and filter them.

    \b
    Example:
      almost-train synthesize comparisons --responses runs/responses --ranking ranking.yaml --output runs/comparisons
    """
    from almost_train.synthetic.comparisons import synthesize_comparisons

    return synthesize_comparisons(
        settings, responses, ranking, output, as_is_reward_model=as_is_reward_model, progress=progress
    )


for command in (prompts, responses, comparisons):
    synthesize.add_command(command)
