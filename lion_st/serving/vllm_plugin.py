"""What vLLM needs to know of a stock Lion checkpoint, and how its vectors come of vLLM's hidden states.

vLLM finds `register` and `io_processor` by the entry points of this package and calls them in each of its processes,
whatever it serves: they import nothing and change nothing of its own models. `vllm_models` holds the classes that they
name. Written for vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

    from lion_st.data.fields import Task

BACKBONES = ("Llama", "Qwen2", "Qwen3")  # whose classes in vLLM attend in both directions where is_causal is false
GUARD = "WeightedLayerPooling"  # does nothing, see lion_st.wrong_class
LARGEST_ID = 2**24  # float32, in which vLLM carries what a pooler returns, holds whole numbers up to here


def register() -> None:
    """Name the architectures `LionSparseLlama`, `LionDenseLlama`, ... to vLLM, which imports what is asked for."""
    from vllm import ModelRegistry

    for backbone in BACKBONES:
        for name in (f"LionSparse{backbone}", f"LionDense{backbone}"):
            ModelRegistry.register_model(name, f"lion_st.serving.vllm_models:{name}")


def io_processor() -> str:
    """Name the class that reads requests for `vllm serve ... --io-processor-plugin lion_st`."""
    return "lion_st.serving.vllm_models.LionIOProcessor"


@dataclass(frozen=True)
class Contract:
    """What a checkpoint says beside its weights.

    Attributes:
        pooling: How token states become a vector.
        is_doubled: Sparse: take log1p of the weights once more.
        normalize: Dense: bring vectors to length 1.
        prompts: What stands in front of queries and of documents.
        lengths: Tokens to which they are cut; None for no limit of their own.
    """

    pooling: Literal["splade", "mean_normalized", "mean", "last_token"]
    is_doubled: bool
    normalize: bool
    prompts: Mapping[Task, str]
    lengths: Mapping[Task, int | None]


def read_contract(name: str, read: Callable[[str], Any]) -> Contract:
    """Read what `lion_st.export` wrote for SentenceTransformer.

    Args:
        name: The checkpoint, for errors.
        read: Gives the content of a JSON file of the checkpoint by its name in it, None where it has no such file.
    """
    entries = read("modules.json")
    if not entries:
        raise ValueError(f"{name!r} has no modules.json: serve what lion_st.export or `lion-st export` wrote.")
    if entries[0].get("path"):
        raise ValueError(
            f"{name!r} is in the form for SparseEncoder, whose transformer vLLM does not find: serve the form for "
            "SentenceTransformer, which is `lion-st export` without --sparse-encoder and the main revision on the Hub."
        )
    kinds = [(entry["type"].rsplit(".", 1)[-1], entry["path"]) for entry in entries]
    modules = [(kind, (path and read(f"{path}/config.json")) or {}) for kind, path in kinds if kind != GUARD]
    settings, limits = _required(name, read, "config_sentence_transformers.json", "sentence_bert_config.json")
    if settings.get("truncate_dim") is not None:
        raise ValueError(
            f"{name!r} truncates its vectors to {settings['truncate_dim']} dimensions, which vLLM would not: serve it "
            "with `lion-st serve`."
        )
    prompts = settings.get("prompts") or {}
    default = prompts.get(settings.get("default_prompt_name"), "")
    return Contract(
        *_pooling(name, modules),
        prompts={
            task: next((prompts[one] for one in names if one in prompts), default) for task, names in _names().items()
        },
        lengths={task: limits.get(f"{task}_length") or limits.get("max_seq_length") for task in _names()},
    )


def _required(name: str, read: Callable[[str], Any], *files: str) -> list[dict[str, Any]]:
    """Files that every checkpoint has; vLLM's reader gives None too where the Hub does not answer."""
    found = [read(file) for file in files]
    missing = [file for file, content in zip(files, found, strict=True) if content is None]
    if missing:
        raise ValueError(
            f"{name!r} has no {' and no '.join(missing)}, or it could not be read: without its prompts and lengths "
            "vectors would be others. Try again, or serve a folder with all files that `lion-st export` writes."
        )
    return found


def _pooling(name: str, modules: Sequence[tuple[str, dict[str, Any]]]) -> tuple[Any, bool, bool]:
    of_tokens = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    modes: dict[Any, Any] = {"mean": "mean", "lasttoken": "last_token"}
    *rest, last = modules
    normalizes = last[0] == "Normalize" and last[1].get("module_input_name", "sentence_embedding") != "token_embeddings"
    match rest if normalizes else modules:
        case [
            ("Transformer", _),
            ("SpladePooling", {"pooling_strategy": "max", "activation_function": "relu" | "log1p_relu" as function}),
        ] if not normalizes:
            return "splade", function == "log1p_relu", False
        case [("Transformer", _), ("Normalize", states), ("Pooling", {"pooling_mode": "mean"})] if states == of_tokens:
            return "mean_normalized", False, normalizes
        case [("Transformer", _), ("Pooling", {"pooling_mode": mode})] if mode in modes:
            return modes[mode], False, normalizes
    kinds = " + ".join(kind for kind, _ in modules)
    raise ValueError(
        f"{name!r} is not a stock checkpoint of a sparse or dense Lion model: its modules are {kinds}. Serve what "
        "`lion-st export` writes, and a model with limits of active terms or a table of queries with `lion-st serve`."
    )


def _names() -> Mapping[Task, tuple[str, ...]]:
    from lion_st.encoding.fingerprints import PROMPT_NAMES

    return PROMPT_NAMES


def require_servable(
    name: str, pooling: str, is_sparse: bool, config: Any, ranks: Mapping[str, int], divides: Mapping[str, bool]
) -> None:
    """Refuse what would give other vectors than lion_st, or none.

    Args:
        name: The checkpoint.
        pooling: Of its contract.
        is_sparse: Whether the architecture is a sparse one.
        config: Of transformers, as overridden.
        ranks: Processes that share the model, by the name of their option.
        divides: Ways to compute a text in pieces, by the name of their option, and whether they are switched on.
    """
    if (pooling == "splade") != is_sparse:
        right = "LionSparse" if pooling == "splade" else "LionDense"
        raise ValueError(f"{name!r} pools by {pooling!r}: override its architecture with {right} and its backbone.")
    if getattr(config, "is_causal", True):
        raise ValueError(
            f'{name!r} does not say "is_causal": false in its config.json, and vLLM would attend to earlier tokens '
            "alone. Serve what `lion-st export` wrote."
        )
    for option in (option for option, is_on in divides.items() if is_on):
        raise ValueError(
            f"--{option} computes a text in pieces, and each of its tokens attends to all of the text: leave it out."
        )
    split = {option: count for option, count in ranks.items() if count != 1}
    if is_sparse and split:
        option, count = next(iter(split.items()))
        raise ValueError(
            f"--{option} {count} would spread the LM head over processes, and a sparse vector needs all of it in one: "
            "leave it at 1, and serve more texts with --data-parallel-size."
        )
    if is_sparse and config.vocab_size > LARGEST_ID:
        raise ValueError(f"The vocabulary has {config.vocab_size:,} terms, more than the {LARGEST_ID:,} that fit here.")
    limit = getattr(config, "max_active_dims", None)
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"max_active_dims is a number of terms of at least 1, got {limit!r}.")


class TextsRequest(NamedTuple):
    """What the `data` of a request asks for."""

    texts: list[str]
    task: Task
    truncate: bool


def read_request(data: Any) -> TextsRequest:
    """Read the `data` of a request to `/pooling`: `{"inputs": text or texts, "prompt_name": ..., "truncate": ...}`.

    Args:
        data: Texts are documents unless `prompt_name` says `query`, and cut unless `truncate` is false.
    """
    from lion_st.modules.tokenizing import check_texts

    if not isinstance(data, dict) or "inputs" not in data:
        raise ValueError('`data` looks like {"inputs": ["text", ...], "prompt_name": "query"}.')
    unknown = sorted(data.keys() - {"inputs", "prompt_name", "truncate"})
    if unknown:
        raise ValueError(f"`data` has inputs, prompt_name and truncate, got {unknown}.")
    inputs, prompt_name, truncate = data["inputs"], data.get("prompt_name"), data.get("truncate")
    texts = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(texts, list) or not texts:
        raise ValueError("`inputs` is a text or a list of texts, and not empty.")
    try:
        check_texts(texts)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if truncate is not None and not isinstance(truncate, bool):
        raise ValueError(f"`truncate` is true or false, got {truncate!r}.")
    tasks = {name: task for task, names in _names().items() for name in names}
    if prompt_name is not None and (not isinstance(prompt_name, str) or prompt_name not in tasks):
        raise ValueError(f"`prompt_name` is one of {', '.join(tasks)}, got {prompt_name!r}.")
    return TextsRequest(texts, "document" if prompt_name is None else tasks[prompt_name], truncate is not False)


def sparse_rows(
    states: torch.Tensor, lengths: torch.Tensor, weight: torch.Tensor, is_doubled: bool, limit: int | None
) -> list[torch.Tensor]:
    """Sparse vectors of packed texts, without logits of all tokens at once.

    Args:
        states: Last hidden states of B texts, one after the other [T, D].
        lengths: Tokens of each text [B], on the CPU.
        weight: LM head [V, D], which has the scale folded in.
        is_doubled: Take log1p of the weights once more.
        limit: Keep the heaviest terms of a text, None for all.

    Returns:
        Of each text its terms and weights [n, 2], float32, terms ascending; of one whose states are not finite [1, 2]
        NaN, so that the others of its batch are answered.
    """
    import torch

    from lion_st.kernels import splade_pool

    broken = ~states.isfinite().all(dim=1)
    states = states.masked_fill(broken[:, None], 0)
    bounds = torch.nn.functional.pad(lengths.long().cumsum(0), (1, 0)).to(states.device)
    rows = splade_pool(states, weight, scale=1.0, output="sparse", k=limit, cu_seqlens=bounds)
    weights = rows.values().log1p() if is_doubled else rows.values()
    pairs = torch.stack([rows.col_indices().float(), weights.float()], dim=1)
    vectors = list(pairs.split(rows.crow_indices().diff().tolist()))
    if bool(broken.any()):
        for place, part in enumerate(broken.split(lengths.tolist())):
            if bool(part.any()):
                vectors[place] = pairs.new_full((1, 2), torch.nan)
    return vectors


def dense_rows(states: torch.Tensor, lengths: torch.Tensor, pooling: str, normalize: bool) -> torch.Tensor:
    """Dense vectors of packed texts [B, D], float32, NaN of a text whose states are not finite.

    Args:
        states: Last hidden states of B texts, one after the other [T, D].
        lengths: Tokens of each text [B], on the CPU.
        pooling: Of the contract.
        normalize: Bring each vector to length 1.
    """
    import torch

    states = states.float()
    if pooling == "last_token":
        vectors = states[(lengths.long().cumsum(0) - 1).to(states.device)]
    else:
        if pooling == "mean_normalized":
            states = torch.nn.functional.normalize(states, dim=-1)
        vectors = torch.segment_reduce(states, "mean", lengths=lengths.long().to(states.device), axis=0)
    return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors
