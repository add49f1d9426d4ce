"""What a run of the fine-tuning leaves: its record, and its result as a stock checkpoint, pushed if asked to."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from lion_st.checkpoints import atomic_files_in, unheld_by_stock
from lion_st.data.sources import files_checksum, parse_source
from lion_st.exporting import export
from lion_st.files import require_writable
from lion_st.modules import HybridHead
from lion_st.training.evaluation import NANO_BEIR
from lion_st.training.objectives import uncacheable
from lion_st.training.options.released_code import require_files
from lion_st.training.progress.callbacks import require_all_steps
from lion_st.training.progress.checkpoints import decided_by_first_rank
from lion_st.training.progress.record import RunLog
from lion_st.training.query_encoders import save_query_encoder, table_query_encoder
from lion_st.training.sharding import described_by_card

if TYPE_CHECKING:
    from lion_st.training.options.arguments import RetrieverArguments, RetrieverTrainingArguments

logger = logging.getLogger(__name__)
# What the trainer may have pushed of a checkpoint, and the result must not be read with.
REPLACED_BY_RESULT = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_*",
    "lion_st.*",
    "training_args.bin",
)


def run_log(arguments: RetrieverArguments, training_arguments: RetrieverTrainingArguments) -> RunLog:
    """The record of a run, `training.json` in its output folder: a callback of the trainer.

    Raises:
        ValueError: If the folder belongs to a run with other settings or data.
    """
    path = Path(training_arguments.output_dir) / "training.json"
    sources = [*arguments.train_data, arguments.train_queries, arguments.train_documents]
    given = [source for source in sources if source is not None]
    return RunLog(
        path,
        arguments.settings() | training_arguments.settings(),
        decided_by_first_rank(partial(files_checksum, given, path.parent)),
        accumulates=uncacheable(arguments),
    )


def require_places(arguments: RetrieverArguments, training_arguments: RetrieverTrainingArguments) -> None:
    """Refuse, before a model is read, data that are neither here nor could be on the Hub, and a folder to write to that
    nothing can be written to.

    Raises:
        OSError: Naming the source or the folder.
    """
    require_writable(Path(training_arguments.output_dir))
    require_files(arguments.train_data)
    collections = [name for name in training_arguments.eval_data or () if not name.startswith(NANO_BEIR)]
    for source in (*arguments.train_data, arguments.train_queries, arguments.train_documents, *collections):
        if source is not None:
            parse_source(source)


def export_run(trainer: Any, record: RunLog) -> Path:
    """Write a trained model as a stock checkpoint beside the trainer's own checkpoints, and push it if asked to.

    Returns:
        The output folder.

    Raises:
        ValueError: If training stopped before its last step, other than by its budget of time.
        TrainingCollapsed: If the trained weights are of no use.
        OSError: If the result cannot be written, or cannot be pushed; how to publish it.
    """
    output = record.folder
    require_all_steps(trainer, output)
    trainer.guard.require_sound(trainer.state)
    model = trainer.whole_model()
    if trainer.is_world_process_zero():
        with atomic_files_in(output) as folder, described_by_card(model):
            if model.query_table is None:
                export(model, folder, with_limits=True)
            else:
                save_query_encoder(table_query_encoder(model), model, folder)
            files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        problem = unheld_by_stock(model[1], "SentenceTransformer")
        if problem is not None and model.query_table is None:
            stock = f". `lion-st export {output} OUTPUT --all-terms` writes a stock checkpoint without the limits"
            if isinstance(model[1], HybridHead):
                stock = (
                    f". `lion-st export {output} OUTPUT --dev DATA` fits weights of both and writes stock checkpoints"
                )
            has_thresholds = getattr(model[1], "thresholds", None) is not None
            logger.warning("lion_st.load alone reads %s: %s%s.", output, problem, "" if has_thresholds else stock)
        record.finish(trainer.state, **_best(trainer))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub and trainer.is_world_process_zero():
        _push(trainer, output, files)
    return output


def end_program(report: str | Path) -> None:
    """Print what a training has made, from one of its processes, and leave torch's process group, as torch asks for.

    Call it at the end of a program that trains, and use no collectives after it.
    """
    state = PartialState()
    if state.is_main_process:
        print(report)
    state.destroy_process_group()


def _best(trainer: Any) -> dict[str, Any]:
    """Which checkpoint the result is of, if it is that of the best one."""
    if not trainer.args.load_best_model_at_end:
        return {}
    if trainer.state.best_model_checkpoint is None:
        logger.warning("No checkpoint was evaluated: the result is the last state, not the best. Lower --eval_steps.")
        return {}
    metric, value = trainer.args.metric_for_best_model, trainer.state.best_metric
    return {"exported": {"checkpoint": Path(trainer.state.best_model_checkpoint).name, metric: value}}


def _push(trainer: Any, folder: Path, files: list[str]) -> None:
    """Push a finished run's result in one commit, and delete what the trainer pushed that would be read with it."""
    from huggingface_hub import HfApi

    try:
        HfApi(token=trainer.args.hub_token, library_name="lion_st").upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=folder,
            revision=trainer.args.hub_revision,
            commit_message="End of training",
            allow_patterns=files,
            delete_patterns=list(REPLACED_BY_RESULT),
        )
    except Exception as error:
        raise OSError(
            f"The training is finished and its result in {str(folder)!r}, but pushing it to {trainer.hub_model_id!r} "
            f"failed ({error}). Publish it with `lion-st publish {folder} {trainer.hub_model_id}`."
        ) from error
