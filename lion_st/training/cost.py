"""What training costs: floating point operations and memory, from a backbone's shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from lion_st.training.recipes import BackboneShape, Objective

# What several devices divide of a model: nothing (DDP), all of it, or all but the weights that they compute with.
Sharding = Literal["none", "FSDP2", "ZeRO-3", "ZeRO-2"]
LOW_PRECISION_BYTES = 2
FLOAT_BYTES = 4
# Of a weight of NormalFloat4: 4 bits, a constant of 8 bits for each 64 weights, one of float32 for each 256 of those.
FOUR_BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
OPTIMIZER_BYTES = 8  # two Adam moments in float32
# Of each text and term at the peak of a step, without and with gradient caching, measured: float32 values, int32
# positions, the gradient, and copies that the losses make of them.
HEAD_BYTES: dict[Objective, tuple[int, int]] = {"cl": (20, 24), "cl_kd": (16, 20), "kd": (16, 17)}
JOINT_BYTES = 2 * FLOAT_BYTES  # more of each text and number of a hybrid model
GATHERED_BYTES = 2 * FLOAT_BYTES  # of the other devices' documents, which the objective cl gathers, and their gradients
MOST_GATHERED = 10**9  # weights that ZeRO-3 keeps gathered, if they are used again soon
# Operations a second of dense products in bfloat16 by the maker's data sheets, and the share of them that is reached.
CARDS = {"H100": 989e12, "A100": 312e12}
UTILISATION = 0.4


class Lengths(NamedTuple):
    """Mean tokens of a text, and the mean of their squares, to which attention is proportional."""

    query: float
    query_squared: float
    document: float
    document_squared: float

    @classmethod
    def equal(cls, query: float, document: float) -> Lengths:
        """Of texts that are all as long."""
        return cls(query, query**2, document, document**2)


@dataclass(frozen=True)
class TrainingCost:
    """Counts the floating point operations of training steps; a multiply-add is two.

    Matrix products of the backbone, the adapter, attention and the LM head are counted. Scores, the projection of token
    vectors, regularizers and the optimizer, together below 1 %, are not.

    Args:
        shape: The backbone's.
        has_head: Whether the LM head runs over every token (sparse models).
        lora_r: Rank of an adapter on all linear layers; None if all weights are trained.
        cached: Gradient caching: every text is embedded once more, without gradients.
        gradient_checkpointing: The backbone runs once more in the backward pass.
        load_in_4bit: The linear layers below an adapter are held in 4 bits.
        vector_width: Numbers that a text becomes, if neither one per term nor the hidden size: of all tokens' vectors.
        loads_head: Whether the LM head is in memory; by default where it runs over every token. MNTP reads some alone.
        table_parameters: Weights of a table that learns queries, beside the model.
        averages_weights: Whether a moving average of the trained weights embeds every text too (self-distillation).
        has_dense: Whether a text has a dense vector beside the sparse one.
    """

    shape: BackboneShape
    has_head: bool
    lora_r: int | None
    cached: bool = False
    gradient_checkpointing: bool = False
    load_in_4bit: bool = False
    vector_width: int | None = None
    loads_head: bool | None = None
    table_parameters: int = 0
    averages_weights: bool = False
    has_dense: bool = False

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all blocks."""
        return self.shape.num_hidden_layers * sum(rows * columns for rows, columns in self._linear_shapes())

    @property
    def head_parameters(self) -> int:
        """Weights of the LM head."""
        return self.shape.hidden_size * self.shape.vocab_size

    @property
    def parameters(self) -> int:
        """All weights but the norms': blocks, embeddings, and the LM head where it is loaded and not tied to them."""
        loads_head = self.has_head if self.loads_head is None else self.loads_head
        is_apart = loads_head and not self.shape.tie_word_embeddings
        return self.linear_parameters + self.head_parameters * (2 if is_apart else 1)

    @property
    def adapter_parameters(self) -> int:
        """Weights of the adapter."""
        if self.lora_r is None:
            return 0
        return self.shape.num_hidden_layers * self.lora_r * sum(sum(pair) for pair in self._linear_shapes())

    @property
    def bytes_read(self) -> int:
        """Bytes of main memory that weights take as they are read: frozen ones as they lie in their files, which are
        mapped, those that are trained in float32."""
        return self.parameters * (FLOAT_BYTES if self.lora_r is None else LOW_PRECISION_BYTES)

    def flops(self, texts: int, tokens: float, squared_lengths: float) -> float:
        """Operations of forward and backward passes over texts.

        Args:
            texts: How many.
            tokens: Their tokens altogether.
            squared_lengths: Sum over the texts of their squared lengths, to which attention is proportional.
        """
        shape = self.shape
        linear = 2 * self.linear_parameters * tokens
        adapter = 2 * self.adapter_parameters * tokens
        width = shape.num_attention_heads * shape.head_dim
        attention = 4 * shape.num_hidden_layers * width * squared_lengths
        head = 2 * self.head_parameters * tokens if self.has_head else 0.0
        backbone = linear + adapter + attention
        forward = backbone + head
        frozen = self.lora_r is not None
        # Frozen weights have no gradient of their own, only pass that of their input on.
        backward = (1 if frozen else 2) * linear + 2 * adapter + 2 * attention
        if self.has_head:
            # Of a text, one position a term at most has a gradient.
            backward += (1 if frozen else 2) * 2 * self.head_parameters * texts
        again = forward * (self.cached + self.averages_weights)
        return forward + backward + again + (backbone if self.gradient_checkpointing else 0)

    def masked_flops(self, blocks: int, length: int, masked: int) -> float:
        """Operations of MNTP over blocks of a length, with an LM head over the masked tokens alone."""
        passes = 2 if self.lora_r is not None else 3  # a frozen head has no gradient of its own
        return self.flops(blocks, blocks * length, blocks * length**2) + 2 * passes * self.head_parameters * masked

    def memory(
        self,
        tokens_at_once: int,
        embedded_texts: int,
        objective: Objective = "cl_kd",
        gathered_texts: int = 0,
        half_precision: bool = True,
        devices: int = 1,
        sharding: Sharding = "none",
    ) -> dict[str, float]:
        """Bytes on each device at the peak of a step, by what they hold.

        Trained weights are float32, with gradients and AdamW's two moments; the frozen ones of an adapter are half
        precision, or linear layers of 4 bits, each of which is half precision while it is computed. Where all are
        sharded (FSDP2) each device holds its share, and what is gathered: the LM head from the beginning of a step to
        its end, embeddings that are apart from it or two layers at a time, and the unsharded gradient of one of them,
        which is added up in float32. Where they are not, several devices hold every gradient twice, the second time to
        be sent. DeepSpeed (ZeRO) holds all weights in the precision of the activations, and those that are trained in
        float32 beside them.

        Args:
            tokens_at_once: Tokens whose activations are held for the backward pass.
            embedded_texts: Texts of the device's batch, whose embeddings and their gradients are held.
            objective: Whose loss it is.
            gathered_texts: Documents of the other devices; only the objective "cl" holds their embeddings.
            half_precision: Whether activations are bfloat16 or float16, and not float32.
            devices: How many there are.
            sharding: What of weights, gradients and optimizer is divided over them.
        """
        shape = self.shape
        trained, frozen_bytes = self.parameters, 0.0
        if self.lora_r is not None:
            trained, frozen_bytes = self.adapter_parameters, LOW_PRECISION_BYTES * float(self.parameters)
        trained += self.table_parameters
        if self.load_in_4bit:
            frozen_bytes -= (LOW_PRECISION_BYTES - FOUR_BIT_BYTES) * self.linear_parameters
        largest = max(rows * columns for rows, columns in self._linear_shapes())
        shards = 1 if sharding == "none" else devices
        query, keys = shape.num_attention_heads * shape.head_dim, 2 * shape.num_key_value_heads * shape.head_dim
        # Inputs and outputs that the backward pass of a block reads: norms, projections, gated MLP, residuals.
        block = 5 * shape.hidden_size + 2 * query + keys + 4 * shape.intermediate_size
        if self.lora_r is not None:
            # Each adapter keeps its own dropped-out copy of its layer's input.
            block += 5 * shape.hidden_size + query + shape.intermediate_size
        blocks = shape.num_hidden_layers * (shape.hidden_size if self.gradient_checkpointing else block)
        size = LOW_PRECISION_BYTES if half_precision else FLOAT_BYTES
        activations = size * tokens_at_once * (blocks + (block if self.gradient_checkpointing else 0))
        embeddings = embedded_texts * HEAD_BYTES.get(objective, HEAD_BYTES["cl_kd"])[self.cached]
        if objective == "cl":
            embeddings += GATHERED_BYTES * gathered_texts
        width = shape.vocab_size if self.has_head else self.vector_width or shape.hidden_size
        if self.has_dense:  # both in one row, and so the sparse one a second time, with its gradient
            width += shape.hidden_size
            embeddings += embedded_texts * JOINT_BYTES
        weights = (FLOAT_BYTES * trained + frozen_bytes) / shards
        if sharding in ("ZeRO-2", "ZeRO-3"):
            computed_with = size * self.parameters / (1 if sharding == "ZeRO-2" else shards)
            weights = FLOAT_BYTES * trained / shards + computed_with
        gathered = {"FSDP2": self._gathered(size), "ZeRO-3": size * float(min(self.parameters, MOST_GATHERED))}
        parts = {
            "weights": weights,
            "layer of 4 bits at work": LOW_PRECISION_BYTES * largest if self.load_in_4bit else 0.0,
            "gradients": FLOAT_BYTES * trained * (2 if sharding == "none" and devices > 1 else 1) / shards,
            "optimizer": OPTIMIZER_BYTES * trained / shards,
            "moving average": FLOAT_BYTES * trained * self.averages_weights,
            "gathered head and layers": gathered.get(sharding, 0.0),
            "activations": activations,
            "embeddings and gradients": width * embeddings,
        }
        return {name: held for name, held in parts.items() if held}

    def _gathered(self, size: int) -> float:
        """Bytes of unsharded weights, and of the gradients of the largest unit of them."""
        layer = (self.linear_parameters + self.adapter_parameters) // self.shape.num_hidden_layers
        head = self.head_parameters if self.has_head else 0
        embeddings = 0 if self.has_head and self.shape.tie_word_embeddings else self.head_parameters
        gathered = size * (head + max(2 * layer, embeddings))
        if self.lora_r is None:
            gathered += (size + FLOAT_BYTES) * max(layer, self.head_parameters)
        return gathered

    @staticmethod
    def tokens_per_second(operations_per_token: float) -> dict[str, float]:
        """Tokens a second that one card of each of `CARDS` trains on at `UTILISATION`."""
        return {card: UTILISATION * peak / operations_per_token for card, peak in CARDS.items()}

    @staticmethod
    def gpu_hours(operations: float) -> dict[str, float]:
        """Hours that one card of each of `CARDS` takes for so many operations at `UTILISATION`."""
        return {card: operations / (UTILISATION * peak) / 3600 for card, peak in CARDS.items()}

    def _linear_shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of the linear layers of one block."""
        shape = self.shape
        query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        hidden, intermediate = shape.hidden_size, shape.intermediate_size
        attention = [(query, hidden), (key, hidden), (key, hidden), (hidden, query)]
        return [*attention, (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
