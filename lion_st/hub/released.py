"""Released checkpoints of others made stock: the paper's adapters, and merged sparse retrievers such as LACONIC."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from sentence_transformers.base.model import BaseModel
from sentence_transformers.util import load_file_path

from lion_st.exporting import export
from lion_st.files import is_hub_name, read_json, require_free
from lion_st.hub.card_data import BaseModelData, Place, described_bases
from lion_st.hub.cards import render_card
from lion_st.model_options import SingleVector
from lion_st.models import LionSentenceTransformer, load
from lion_st.modules import LionTransformer, LlamaPooling, SpladeHead
from lion_st.modules.llama_pooling import PoolingName

ADAPTER_CONFIG = "adapter_config.json"
LIBRARY_OF_THE_PAPER = "scaling_retriever"


@dataclass(frozen=True)
class Contract:
    """How a released model wants its texts, and the factor on its logits.

    Attributes:
        scale: Sparse: factor on the logits; None is `hidden_size ** -0.25`.
        add_bos: Whether texts begin with the beginning-of-sequence token.
        query_prompt: Put in front of queries.
        document_prompt: Put in front of documents.
        query_length: Longest query in tokens, as evaluated by its authors.
        document_length: Longest document in tokens.
        add_eos: Whether texts end with the end-of-sequence token.
        causal: Whether attention is causal.
        pooling: Dense: see `LlamaPooling`.
        normalize: Dense: whether vectors have length 1.
    """

    scale: float | None = None
    add_bos: bool = True
    query_prompt: str = ""
    document_prompt: str = ""
    query_length: int = 64
    document_length: int = 192
    add_eos: bool = False
    causal: bool = False
    pooling: PoolingName = "mean_normalized"
    normalize: bool = False


ContractName: TypeAlias = Literal["lion", "laconic", "repllama"]
CONTRACTS: dict[str, Contract] = {
    # Zeng et al., 2025: https://arxiv.org/abs/2502.15526.
    "lion": Contract(),
    # Xu et al., 2026: https://arxiv.org/abs/2601.01684. With the beginning-of-sequence token all texts get one vector.
    "laconic": Contract(1.0, False, "query: ", "passage: ", 256, 256),
    # Ma et al., 2023: https://arxiv.org/abs/2310.08319, with the lengths that they train with.
    "repllama": Contract(
        query_prompt="query: ",
        document_prompt="passage: ",
        query_length=32,
        document_length=196,
        add_eos=True,
        causal=True,
        pooling="last_token",
        normalize=True,
    ),
}


def import_released(
    repo_or_dir: str | Path,
    base: str | Path | None = None,
    output: str | Path | None = None,
    *,
    paradigm: SingleVector | None = None,
    contract: ContractName | Contract | None = None,
    model_type: Literal["SentenceTransformer", "SparseEncoder"] = "SentenceTransformer",
    dtype: str | torch.dtype = "auto",
    license: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: bool | str | None = None,
) -> Path:
    """Make a stock checkpoint of a released retriever: adapter merged, scale folded in, tokenizer contract restored.

    The paper's adapters (Lion-SP and Lion-DS) are known by the classes that their configuration names. Merged causal
    language models say nothing of their contract, so it must be given: LACONIC's without its prompts or with a
    beginning-of-sequence token encodes nonsense, and nothing would show it.

    Args:
        repo_or_dir: Hub repository or folder: a PEFT adapter (safetensors, or a `.bin` of tensors alone), or a merged
            causal language model.
        base: Where the base model is, if not where the adapter says, such as a path on its authors' machine. For a
            merged model without a tokenizer: where its tokenizer is.
        output: Folder to make; by default one of the checkpoint's name in runs/.
        paradigm: `"sparse"` or `"dense"`, where neither configuration nor contract say.
        contract: `"lion"`, `"laconic"`, `"repllama"`, or your own; by default `"lion"` for the paper's adapters.
        model_type: See `export`.
        dtype: Of the weights: `"auto"` is the base's own. Merging is exact in float32.
        license: Hub identifier of the licence; by default that which the card of its base or its own names.
        overwrite: Replace an earlier checkpoint at `output`.
        revision: Hub revision of the checkpoint.
        token: Hub token; the paper's adapters are gated by the licence of their base models.

    Returns:
        The folder, with a card that names the source and the base model, and their licence.

    Raises:
        FileNotFoundError: If the checkpoint or its base cannot be reached.
        ValueError: If it is an adapter of another kind, its contract is unknown, or its weights do not fit.
        FileExistsError: If `output` exists and `overwrite` is False.

    Example:
        ::

            folder = lion_st.hub.import_released("hzeng/Lion-SP-1B-llama3-marco-mntp", output="lion-sp-1b")
            SentenceTransformer(str(folder)).encode_query("What is the capital of France?")
    """
    if paradigm not in (None, *get_args(SingleVector)):
        raise ValueError(f"paradigm must be one of {get_args(SingleVector)}, got {paradigm!r}.")
    source = str(repo_or_dir)
    target = Path(output) if output is not None else Path("runs") / Path(source).name
    hub: dict[str, Any] = {"revision": revision, "token": token}
    require_free(target, overwrite)
    replaced = None
    if load_file_path(source, "modules.json", **hub) is not None:
        model: BaseModel = load(source, dtype=dtype, **hub)
    else:
        adapter = _adapter_config(source, hub)
        paradigm = paradigm or ("dense" if contract == "repllama" else _paradigm_of(adapter, source))
        settings = _contract(contract, adapter, source)
        model = _build(source, base, paradigm, settings, dtype, hub, is_adapter=adapter is not None)
        replaced = base if adapter is not None else None
    origin = _origin(model, source, replaced, hub)
    export(model, target, model_type, overwrite=overwrite)
    card = render_card(model, target.name, beside=target, base_model=origin, license=license)
    (target / "README.md").write_text(card, encoding="utf-8")
    return target


def _origin(model: BaseModel, source: str, base: str | Path | None, hub: dict[str, Any]) -> BaseModelData | None:
    """What is known of the model that the checkpoint's adapter was merged into, and of the checkpoint."""
    places: list[Place] = [(source, hub["revision"])]
    adapter: Any = getattr(model[0], "adapter_config", None)
    if adapter is not None:  # the licence of merged weights is their base's
        if base is None or not is_hub_name(base):
            places.insert(0, (adapter.base_model_name_or_path, adapter.revision))
        if base is not None:
            places.insert(0, (str(base), None))
    names = tuple(place for place, _ in reversed(places) if is_hub_name(place))
    # A base that is read from the disk alone may have been chosen because the Hub cannot be reached.
    offline = not (is_hub_name(source) or is_hub_name(places[0][0]))
    return described_bases(names, places, offline=offline, token=hub["token"])


def _adapter_config(source: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    file = load_file_path(source, ADAPTER_CONFIG, **hub)
    if file is not None:
        return read_json(file)
    if load_file_path(source, "config.json", **hub) is None:
        raise FileNotFoundError(
            f"There is neither an {ADAPTER_CONFIG} nor a config.json in {source!r}. Check the name or folder, the "
            "revision, the connection, and whether its licence was accepted with this token."
        )
    return None


def _paradigm_of(adapter: dict[str, Any] | None, source: str) -> SingleVector:
    """What the classes named in an adapter's configuration were trained for."""
    if adapter is None:
        return "sparse"
    classes = adapter.get("auto_mapping") or {}
    library, kind = str(classes.get("parent_library")), str(classes.get("base_model_class"))
    if library.startswith(LIBRARY_OF_THE_PAPER):
        return "sparse" if kind.endswith("ForMNTP") else "dense"
    if library.startswith("llm2vec"):
        raise ValueError(
            f"{source!r} is an MNTP adapter of LLM2Vec, a backbone to start from, not a retriever yet. Merge it with "
            "lion_st.hub.merge_backbone and train a retriever on it, or pass paradigm if it was trained for retrieval."
        )
    raise ValueError(
        f"The adapter {source!r} does not say what it was trained for (auto_mapping {adapter.get('auto_mapping')!r}). "
        'Pass paradigm="sparse" or "dense".'
    )


def _contract(contract: str | Contract | None, adapter: dict[str, Any] | None, source: str) -> Contract:
    if isinstance(contract, Contract):
        return contract
    library = str(((adapter or {}).get("auto_mapping") or {}).get("parent_library"))
    if contract is None and library.startswith(LIBRARY_OF_THE_PAPER):
        contract = "lion"
    if contract not in CONTRACTS:
        given = "no contract" if contract is None else f"contract={contract!r}"
        raise ValueError(
            f"How {source!r} wants its texts is not in its files, and {given} was given. Pass contract="
            f"{' or '.join(repr(name) for name in CONTRACTS)}, or a lion_st.hub.Contract with the scale, prompts, "
            "beginning-of-sequence token and lengths that its authors name."
        )
    return CONTRACTS[contract]


def _build(
    source: str,
    base: str | Path | None,
    paradigm: SingleVector,
    contract: Contract,
    dtype: str | torch.dtype,
    hub: dict[str, Any],
    is_adapter: bool,
) -> BaseModel:
    options: dict[str, Any] = {"dtype": dtype} | hub
    further: dict[str, Any] = {}
    if base is not None and is_adapter:
        options["base"] = str(base)
    elif base is not None:
        further["tokenizer_name_or_path"] = str(base)
    try:
        transformer = LionTransformer(
            source,
            transformer_task="text-generation" if paradigm == "sparse" else "feature-extraction",
            query_length=contract.query_length,
            document_length=contract.document_length,
            add_bos=contract.add_bos,
            add_eos=contract.add_eos,
            causal=contract.causal,
            model_kwargs=options,
            config_kwargs=dict(hub),
            processor_kwargs=dict(hub),
            **further,
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"The weights of {source!r} hold more than tensors, and loading them could run any code. Ask its authors "
            "for safetensors."
        ) from error
    if paradigm == "sparse":
        head: Any = SpladeHead(contract.scale)
    else:
        head = LlamaPooling(transformer.get_embedding_dimension(), contract.pooling, contract.normalize)
    prompts = {"query": contract.query_prompt, "document": contract.document_prompt}
    return LionSentenceTransformer(modules=[transformer, head], prompts=prompts, similarity_fn_name="dot")
