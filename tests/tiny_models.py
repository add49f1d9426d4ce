"""Tiny random backbones with their own tokenizer: texts, families, configurations."""

TEXTS = [
    "What is the capital of France?",
    "Paris is the capital and the largest city of France.",
    "Who wrote the novel '1984'?",
    "George Orwell wrote the novel '1984', which was published in June 1949.",
    "Photosynthesis turns light into chemical energy that is stored in sugars.",
    "A sparse retriever expands a query with terms that the query does not contain.",
    "The inverted index keeps, for every term, the documents in which it is active.",
    "Lions live in groups called prides.",
]

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "mistral")


def tiny_tokenizer(bos: bool = True, vocab_size: int = 320):
    """A byte-level BPE tokenizer trained on `TEXTS`, padding left; `bos=False` is Qwen's kind, which has none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"] if bos else ["</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=512,
    )


def stirred(model, seed: int = 3, size: float = 0.05):
    """The model with its trainable weights moved, as training would."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * size).to(parameter.dtype))
    return model


def as_sparse_encoder(model):
    """A `SparseEncoder` (sparse tensors out) on the same modules and weights as a sparse model of rows."""
    from lion_st.model_classes import LionSparseEncoder

    return LionSparseEncoder(modules=list(model), prompts=model.prompts, similarity_fn_name="dot", device="cpu")


def tiny_config(family: str, tied: bool, **overrides):
    """Configuration of a two-layer decoder of hidden size 32 with grouped-query attention."""
    from transformers import AutoConfig

    settings = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
    )
    if family in ("gemma2", "gemma3_text"):
        settings |= dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8, query_pre_attn_scalar=8)
    if family == "gemma4_text":
        settings |= dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8, global_head_dim=8)
        settings |= dict(hidden_size_per_layer_input=0, num_kv_shared_layers=0)
    if family == "mistral":
        settings |= dict(sliding_window=8)
    return AutoConfig.for_model(family, **(settings | overrides))
