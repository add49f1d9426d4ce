"""Which options of a fine-tuning only some settings read; given elsewhere they would change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lion_st.errors import UsageError
from lion_st.losses.distillation import WITHOUT_TEMPERATURE

if TYPE_CHECKING:
    from lion_st.training.arguments import RetrieverArguments

# Options of `RetrieverArguments` that only some settings read, and what such a setting is.
_READ_BY = {
    **dict.fromkeys(
        (
            *("scale", "activation", "query_top_k", "document_top_k", "regularizer", "regularizer_warmup_ratio"),
            *("query_regularizer_weight", "document_regularizer_weight"),
        ),
        ("--paradigm sparse", lambda values: values["paradigm"] == "sparse"),
    ),
    **dict.fromkeys(
        ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
        ("--use_peft", lambda values: values["use_peft"]),
    ),
    **dict.fromkeys(("pooling", "normalize"), ("--paradigm dense", lambda values: values["paradigm"] == "dense")),
    "df_alpha": ("--regularizer df_flops", lambda values: values["regularizer"] == "df_flops"),
    "df_beta": ("--regularizer df_flops", lambda values: values["regularizer"] == "df_flops"),
    "query_target_terms": ("--regularizer target", lambda values: values["regularizer"] == "target"),
    "document_target_terms": ("--regularizer target", lambda values: values["regularizer"] == "target"),
    "teachers": ("another --objective than cl", lambda values: values["objective"] != "cl"),
    "combine": ("several --teachers", lambda values: len(values["teachers"] or ()) > 1),
    "weight_by_agreement": ("several --teachers", lambda values: len(values["teachers"] or ()) > 1),
    "teacher_normalization": ("another --objective than cl", lambda values: values["objective"] != "cl"),
    "teacher_temperature": ("--objective kd, kl, margin_mse_kl or cl_kd", lambda values: reads_temperature(values)),
    "distillation": ("--objective cl_kd", lambda values: values["objective"] == "cl_kd"),
    "margin_mse_weight": (
        "--objective margin_mse_kl (or --distillation margin_mse_kl)",
        lambda values: "margin_mse_kl" in (values["objective"], values["distillation"]),
    ),
    "contrastive_weight": ("--objective cl_kd", lambda values: values["objective"] == "cl_kd"),
    "distillation_weight": ("--objective cl_kd", lambda values: values["objective"] == "cl_kd"),
}


def require_read(arguments: RetrieverArguments, given: Iterable[str]) -> None:
    """Refuse options that were given and that the setting would not read.

    Raises:
        UsageError: If there is one.
    """
    values = vars(arguments)
    defaults = arguments.__dataclass_fields__
    for name in given:
        if name not in _READ_BY or values[name] in (None, defaults[name].default):
            continue
        setting, reads = _READ_BY[name]
        if not reads(values):
            raise UsageError(f"--{name} is read with {setting} alone, which this run is without: leave it out.")


def reads_temperature(values: Mapping[str, Any]) -> bool:
    """Whether a temperature of the teacher changes anything of the objective, see `RetrieverArguments`."""
    objective = values["objective"]
    if objective == "cl_kd":
        return values["distillation"] not in WITHOUT_TEMPERATURE
    return objective not in ("cl", "listwise", "rank")
