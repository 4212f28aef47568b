"""The training itself of reward models, SFT and DPO: from the last checkpoint to the end, with our log.

The loop is TRL's (transformers' Trainer). Departures from how it is usually driven:

- The order of the data comes from `batches.py` and not from samplers.
- Checkpoints to resume from stand in `.work` and are removed when the stage is done. One that was not written to its
  end, or was damaged since (`sealed.py`), is not used.
- Nothing is printed or sent anywhere, except to the trackers of `--log-to`. They get the rows of `log.jsonl` from this
  file and not through `report_to`, which would log some steps twice after a resume.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from almost_eval.errors import RunError
from almost_eval.files import Row, read_rows
from almost_eval.progress import Progress
from almost_eval.run.trackers import Trackers
from almost_train.common.held_out_loss import BestModel, Evaluation, HeldOutRows
from almost_train.common.interrupts import SaveRequests, ended_at, save_requests, what_is_kept
from almost_train.common.lora import ADAPTER, train_in_float32
from almost_train.common.merge import merge
from almost_train.common.processes import (
    WORK,
    SharedStage,
    check_together,
    forget_deepspeed,
    from_main,
    is_main,
    main_alone,
    wait_for_all,
)
from almost_train.common.resume import RowLog, refuse_gaps
from almost_train.common.schedule import learning_rate_factor
from almost_train.common.sealed import SEAL, seal, undamaged
from almost_train.common.seeding import own_random_state
from almost_train.common.train_settings import TrainSettings
from almost_train.common.trainers import labelled_positions_alone, resume_on_cpu

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

MODEL = "model"
"""The folder, inside the stage's, that holds the trained checkpoint."""
LOGGED = (
    *("grad_norm", "accuracy", "margin", "chosen_logratio", "rejected_logratio"),
    *("reward", "reward_margin", "kl", "length", "ended", "pairs", "ties"),
)
"""What a row of the log has besides loss, rate and speed, where the trainer measures it."""


def fit(
    make_trainer: Callable[[], Trainer],
    stage: SharedStage,
    steps: int,
    progress: Progress,
    settings: TrainSettings,
    held_out: HeldOutRows | None = None,
) -> None:
    """Train to the end, from the last whole checkpoint if there is one, and leave the result in `model/`.

    Does nothing where `model/` exists: it is put there in one move, last. With `merge` the adapter goes to `adapter/`,
    and `model/` is made of it.

    Args:
        make_trainer: builds the TRL trainer on the plan's data set; called with torch's random state seeded apart.
        stage: its folder gets `log.jsonl`, one line a step: step, loss, lr, grad_norm (before clipping) and
            tokens_per_second (over all processes); what else the trainer measures (`LOGGED`); held-out figures.
        steps: optimiser steps.
        progress: the main process's; the others are silent.
        settings: of the stage: `save_minutes` and `merge` are read here.
        held_out: what is measured after some steps; with `every`, `model/` is the one with the lowest loss.

    Raises:
        RunError: the loss or the gradient is not finite, a signal ended it after a checkpoint, or what it would go on
            from is damaged.
    """
    from transformers import PrinterCallback
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # one for each checkpoint that it saves
    # 1. Where to begin: done, or at the last whole checkpoint.
    result = stage.folder / (ADAPTER if settings.merge else MODEL)
    if from_main(result.exists()):
        _merge(result, stage.folder / MODEL)
        return
    work = stage.folder / WORK
    resume = main_alone(lambda: _last_checkpoint(work, progress.notice))
    done = int(resume.rsplit("-", 1)[1]) if resume else 0
    progress = progress if is_main() else Progress()
    with (
        own_random_state(),
        _step_log(stage.folder / "log.jsonl", done) as log,
        save_requests(settings.save_minutes) as saving,
        progress.track("training", steps, done) as advance,
    ):
        # 2. The trainer, with our log in place of its own.
        trainer: Any = make_trainer()
        trainer.rate_factor = lambda step: learning_rate_factor(step, steps, settings.warmup_share, "cosine")
        if settings.is_quantized:
            train_in_float32(trainer.model)
        check_together(trainer.accelerator)
        trainer.remove_callback(PrinterCallback)  # it prints on stdout
        best = None
        if held_out and held_out.every:
            best = BestModel(work, from_main(read_rows(stage.folder / "log.jsonl") if is_main() else []))
        evaluation = Evaluation(trainer, steps, held_out, best, lambda folder: _save(trainer, folder))
        watch = _callback(log, advance, saving, work, evaluation)
        trainer.add_callback(watch)
        resume_on_cpu(trainer)
        # 3. Training, and the model into `.work`.
        with labelled_positions_alone():
            trainer.train(resume_from_checkpoint=resume)
        if trainer.state.global_step < steps:
            raise ended_at(trainer.state.global_step)
        trained = best.folder if best else work / MODEL
        if not best:
            _save(trainer, trained)
        trainer.accelerator.free_memory()
        forget_deepspeed()  # what the stage loads next is whole
    # 4. In one move to its place.
    wait_for_all()
    if is_main():
        (trained / "training_args.bin").unlink(missing_ok=True)  # a pickle
        (trained / "README.md").unlink(missing_ok=True)  # PEFT's, of empty headings
        (trained / SEAL).unlink(missing_ok=True)
        trained.rename(result)
    wait_for_all()
    _merge(result, stage.folder / MODEL)


def _merge(adapter: Path, output: Path) -> None:
    """Whole weights of an adapter, where they are wanted and not there."""
    if adapter != output and is_main() and not output.exists():
        merge(str(adapter), output, just_trained=True)
    wait_for_all()


def _save(trainer: Trainer, folder: Path) -> None:
    """The model as a checkpoint; every process calls this."""
    model: Any = trainer.model
    configs = [c for c in (model.config, model.config.get_text_config()) if hasattr(c, "use_cache")]
    own = [config.use_cache for config in configs]
    for config in configs:
        config.use_cache = True  # the Trainer turned it off
    trainer.save_model(str(folder))
    for config, value in zip(configs, own, strict=True):
        config.use_cache = value


def _last_checkpoint(work: Path, notice: Callable[[str], None]) -> str | None:
    """The last whole checkpoint; what a killed process left half-written is removed."""
    whole = _whole_checkpoints(work)
    for folder in set(work.glob("checkpoint-*")).difference(whole):
        shutil.rmtree(folder)
    shutil.rmtree(work / MODEL, ignore_errors=True)
    whole = undamaged(whole, notice)
    return str(whole[-1]) if whole else None


def _whole_checkpoints(work: Path) -> list[Path]:
    """Those that were written to their end, oldest first."""
    folders = (file.parent for file in work.glob(f"checkpoint-*/{SEAL}"))
    return sorted(folders, key=lambda folder: int(folder.name.rsplit("-", 1)[1]))


@contextmanager
def _step_log(file: Path, done: int) -> Iterator[Callable[[Row], None]]:
    """Adds a row to the log, cut back to the step that training goes on from, and then to the trackers.

    In all but the main process it does nothing.
    """
    if not is_main():
        yield lambda row: None
        return
    with RowLog(file) as log:
        kept = [row for row in log.rows if row["step"] <= done]
        refuse_gaps(file, len(kept), done)
        log.rewrite(kept)
        with Trackers(file.parent, kept) as trackers:

            def add(row: Row) -> None:
                log.append(row)
                trackers.log(row)

            yield add


def _callback(
    log: Callable[[Row], None],
    advance: Callable[[int], None],
    saving: SaveRequests,
    work: Path,
    evaluation: Evaluation,
) -> TrainerCallback:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    class FitWatch(TrainerCallback):
        """Writes the log, shows the progress, marks whole checkpoints."""

        def __init__(self) -> None:
            self.tokens, self.time = 0.0, time.monotonic()

        def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: object) -> None:
            logs = rest["logs"]
            assert isinstance(logs, dict)
            if "loss" not in logs:  # the summary at the end
                return
            for name, value in (("loss", logs["loss"]), ("gradient", logs.get("grad_norm", 0.0))):
                if not math.isfinite(value) and state.global_step == 1 and name == "loss":
                    raise RunError(
                        f"the loss is {value} at step 1, before anything was learned: weights of the model are not "
                        "finite, or overflow; a lower learning rate does not help, other weights (or float32) do"
                    )
                if not math.isfinite(value):  # raised before this step is saved
                    raise RunError(
                        f"the {name} is {value} at step {state.global_step}; {what_is_kept(_whole_checkpoints(work))}; "
                        "use a lower learning rate, in another --output"
                    )
            now, tokens = time.monotonic(), logs["num_tokens"]
            speed = (tokens - self.tokens) / (now - self.time)
            self.time, self.tokens = now, tokens
            row = {"step": state.global_step, "loss": logs["loss"], "lr": logs["learning_rate"]}
            row |= {key: logs[key] for key in LOGGED if key in logs}
            log({**row, "tokens_per_second": round(speed, 1), **evaluation.after(state.global_step)})
            self.time = time.monotonic()

        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
        ) -> None:
            advance(1)
            save, end = saving.now()
            control.should_save = control.should_save or (save and state.global_step < state.max_steps)
            control.should_training_stop = control.should_training_stop or end

        def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
            wait_for_all()  # every process has written its share
            if is_main():
                seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
            if evaluation.best:
                evaluation.best.checkpoint_saved(state.global_step)
            saving.saved()

    return FitWatch()
