"""What a run would do and cost, without loading weights."""

from __future__ import annotations

import json
from dataclasses import replace

from lion_st.training.contract import backbone_config
from lion_st.training.cost import UTILISATION, Lengths
from lion_st.training.options.arguments import RetrieverArguments, RetrieverTrainingArguments
from lion_st.training.options.released_code import released_mntp_folder
from lion_st.training.published import PUBLISHED, output_folder
from lion_st.training.recipes import BACKBONES, BackboneShape, mntp_folder
from lion_st.training.retriever import resolve_batches, step_memory, step_size, training_cost
from lion_st.training.sharding import reads_once, refuse_unsharded, sharding_of

_SHARES = {
    "none": "the whole model on each",
    "FSDP2": "weights sharded (FSDP2)",
    "ZeRO-3": "weights sharded (DeepSpeed ZeRO-3)",
    "ZeRO-2": "gradients and optimizer sharded (DeepSpeed ZeRO-2)",
}


def describe_run(arguments: RetrieverArguments, training_arguments: RetrieverTrainingArguments) -> str:
    """The resolved settings of a run and what it will cost at most, without loading weights.

    Counted are the devices of `dry_run_devices`, else those of this process group, and weights that are sharded if
    `--fsdp`, `--deepspeed` or accelerate's configuration says so. The shape is the recipe's for the recipe's own model,
    else that of the model's configuration.

    Raises:
        OSError: If another model than the recipe's is named and its configuration cannot be reached.
        ValueError: If the batch cannot be divided as asked.
    """
    devices = arguments.dry_run_devices or training_arguments.world_size
    refuse_unsharded(arguments, training_arguments)
    training_arguments = resolve_batches(arguments, training_arguments, devices)
    backbone = BACKBONES[arguments.backbone]
    own = {backbone.model, mntp_folder(arguments.backbone), released_mntp_folder(arguments.backbone)}
    if arguments.recipe and (before := PUBLISHED[arguments.recipe].before):
        own |= {output_folder(before, arguments.backbone)}
    is_own = arguments.model in own
    shape = backbone.shape if is_own else BackboneShape.from_config(backbone_config(arguments.model))
    kept = arguments.num_layers if arguments.layers is None else len(arguments.layers)
    if kept is not None:
        shape = replace(shape, num_hidden_layers=kept)
    cost = training_cost(arguments, training_arguments, shape)
    texts, tokens, squared = step_size(arguments, Lengths.equal(arguments.query_length, arguments.document_length))
    flops = cost.flops(texts, tokens, squared)
    memory = step_memory(arguments, training_arguments, cost, devices)
    each, accumulated = training_arguments.per_device_train_batch_size, training_arguments.gradient_accumulation_steps
    steps = training_arguments.max_steps
    settings = arguments.settings() | training_arguments.settings() | {"mini_batch_size": arguments.mini_batch_size}
    lines = [json.dumps(settings, indent=2), ""]
    lines += [
        f"Parameters: {cost.parameters / 1e9:.3f} B, adapter {cost.adapter_parameters / 1e6:.1f} M",
        f"Tokens, every text at full length: {tokens:,} a step" + (f", {tokens * steps:,} in all" if steps > 0 else ""),
        f"Floating point operations: {flops:.3g} a step" + (f", {flops * steps:.3g} in all" if steps > 0 else ""),
        f"Devices: {devices}, {each} queries on each, {accumulated} accumulation step(s), "
        + _SHARES[sharding_of(training_arguments)],
        f"Memory of each device, about {sum(memory.values()) / 2**30:.1f} GiB: "
        + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items()),
        f"Main memory while the weights are read: about {cost.bytes_read / 2**30:.1f} GiB "
        + _reading_processes(arguments, training_arguments),
        f"Tokens a second at {UTILISATION:.0%} of the peak in bfloat16: "
        + ", ".join(
            f"{pace * devices:,.0f} on {devices} {card}(s)"
            for card, pace in cost.tokens_per_second(flops / tokens).items()
        ),
    ]
    if steps > 0:
        hours = cost.gpu_hours(flops * steps)
        lines.append(
            f"GPU hours at {UTILISATION:.0%} of the peak in bfloat16: "
            + ", ".join(
                f"{spent:.3g} of {card}s ({spent / devices:.3g} h on {devices})" for card, spent in hours.items()
            )
        )
    return "\n".join(lines)


def _reading_processes(arguments: RetrieverArguments, training_arguments: RetrieverTrainingArguments) -> str:
    """Whose main memory it is that the weights are read into."""
    if reads_once(training_arguments):
        return "of one process of each machine"
    if arguments.use_peft:
        return "of each machine, whose processes map the same files"
    return "of each process, until they are on its GPU"
