"""Fine-tune a sparse (Lion-SP) or dense (Lion-DS) retriever: data, model, loss, trainer, training, export.

python training_scripts/train_retriever.py --backbone llama-3.2-1b --paradigm sparse --objective cl_kd
torchrun --nproc_per_node 4 training_scripts/train_retriever.py --config lion_sp_8b

A page to copy and change. `lion-st train` takes the same options and trains the same model; it also mixes several
sources of data. `lion-st recipes` lists the recipes. Options on the command line come before those of the YAML file,
and those before the recipe. `--dry_run` prints the settings and their estimated cost. Repeat the command to resume.
"""

from __future__ import annotations

from transformers import set_seed

from lion_st.data import load_tuples
from lion_st.errors import UsageError, one_line_errors
from lion_st.training import build_loss, build_trainer
from lion_st.training.dry_run import describe_run
from lion_st.training.options.command_line import parse_retriever_arguments
from lion_st.training.progress.checkpoints import checkpoint_to_resume
from lion_st.training.retriever import resolve_batches
from lion_st.training.runs import end_program, export_run, require_places, run_log
from lion_st.training.sharding import build_device, reading_for_shards
from lion_st.training.starting import build_model
from lion_st.training.teacher import teacher_weights


def main() -> None:
    arguments, training_arguments = parse_retriever_arguments()
    if arguments.dry_run:
        print(describe_run(arguments, training_arguments))
        return
    source, *others = arguments.train_data
    if others:
        raise UsageError(f"This script reads one source: train on {source} and {others[0]} with lion-st train.")
    training_arguments = resolve_batches(arguments, training_arguments)
    record = run_log(arguments, training_arguments)
    if record.is_finished:
        print(f"{record.folder} is trained already; nothing to do.")
        return
    checkpoint = checkpoint_to_resume(record.folder, training_arguments.resume_from_checkpoint)
    require_places(arguments, training_arguments)
    set_seed(training_arguments.seed)

    # A backbone with bidirectional attention and a sparse or a dense head (lion_st.build), or a retriever to train on
    # (lion_st.load); an adapter, or all weights in float32.
    with reading_for_shards(training_arguments):
        model = build_model(arguments, build_device(training_arguments), record.folder)

    # Rows of query, positive, negative_1, ..., negative_n and label, the teacher's scores of these documents.
    tuples = load_tuples(
        source,
        subset=arguments.train_subset,
        split=arguments.train_split,
        queries=arguments.train_queries,
        documents=arguments.train_documents,
        negatives=arguments.negatives,
        teacher_scores=arguments.reads_scores,
        teachers=teacher_weights(arguments.teachers) or None,
        combine=arguments.combine,
        teachers_apart=arguments.weight_by_agreement,
        teacher_normalization=arguments.teacher_normalization,
        sampling=arguments.sampling,
        drop_short=arguments.drop_short,
        seed=training_arguments.seed,
    )

    # Contrastive, distilled from the teacher, or both; of a sparse model with the FLOPS of queries and documents.
    loss = build_loss(model, arguments)

    # sentence-transformers' trainer, with the task of each column, batches without a text twice, and new negatives in
    # every epoch.
    trainer = build_trainer(model, arguments, training_arguments, tuples, callbacks=[record], loss=loss)
    trainer.train(resume_from_checkpoint=checkpoint)

    # A checkpoint that SentenceTransformer(folder) loads without lion_st.
    end_program(export_run(trainer, record))


if __name__ == "__main__":
    with one_line_errors("train_retriever.py"):
        main()
