"""What stands in front of queries and documents in training, where sources of data have prompts of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from lion_st.data.fields import TASKS
from lion_st.errors import UsageError
from lion_st.modules.tokenizing import require_room

if TYPE_CHECKING:
    from lion_st.training.options.arguments import RetrieverArguments

TaskPrompts: TypeAlias = dict[str, str]  # "query" and "document" -> what stands in front, perhaps nothing


@dataclass
class PromptArguments:
    """sentence-transformers' `prompts`, by source of training data and task."""

    prompts: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Prompts of single sources of --train_data, in place of --query_prompt and --document_prompt, with "
            'which the model is saved: {"SOURCE": {"query": "Question: ", "document": ""}}.'
        },
    )

    def require_prompts(self, sources: Iterable[str] | None = None) -> None:
        """Refuse prompts of another form.

        Args:
            sources: Names of the training data, if they are known.
        """
        if not isinstance(self.prompts or {}, dict):
            raise UsageError(
                f"--prompts is {self.prompts!r}: give a mapping of sources, or one for all as --query_prompt and "
                "--document_prompt."
            )
        for source, prompts in (self.prompts or {}).items():  # type: ignore[union-attr]
            if sources is not None and source not in (names := list(sources)):
                raise UsageError(f"--prompts names {source!r}, which is not one of --train_data: {', '.join(names)}.")
            if not isinstance(prompts, Mapping) or not set(prompts) <= set(TASKS):
                raise UsageError(
                    f"--prompts gives {source!r} {prompts!r}: give a mapping of 'query' and 'document' to texts, or "
                    "prompts for all sources as --query_prompt and --document_prompt."
                )
            for task, prompt in prompts.items():
                if not isinstance(prompt, str):
                    raise UsageError(f"--prompts gives {source!r} the {task} prompt {prompt!r}, which is not a text.")


def source_prompts(arguments: RetrieverArguments, own: Any, sources: Iterable[str]) -> dict[str, TaskPrompts]:
    """The prompts of each source: its own, else those of the run."""
    common: TaskPrompts = {task: getattr(arguments, f"{task}_prompt") or "" for task in TASKS}
    return {source: common | dict((own or {}).get(source, {})) for source in sources}


def column_prompts(
    prompts: Mapping[str, TaskPrompts], tasks: Mapping[str, str], several: bool, transformer: Any
) -> dict[str, Any]:
    """Prompts as sentence-transformers' trainer takes them: by source, where there are several, and column.

    Args:
        prompts: As `source_prompts` makes them.
        tasks: Task of each column.
        several: Whether the data are a `DatasetDict`.
        transformer: Of the model, whose lengths the prompts have to leave room in.

    Raises:
        ValueError: If a prompt leaves nothing of a text.
    """
    for source, texts in prompts.items():
        for task, name in zip(TASKS, ("Queries", "Documents"), strict=True):
            if texts[task] and (limit := transformer.token_limit(task)) is not None:
                require_room(transformer.tokenizer, texts[task], limit, f"{name} of {source}")
    columns = {
        source: {column: texts[task] for column, task in tasks.items() if texts[task]}
        for source, texts in prompts.items()
    }
    return columns if several else next(iter(columns.values()))
