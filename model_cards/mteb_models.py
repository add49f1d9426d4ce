"""The released Lion and LACONIC checkpoints for mteb's list of models.

The file needs mteb, transformers and peft alone, so that it can be proposed to mteb as it is
(mteb/models/model_implementations/lion_models.py). Two things are left to whoever proposes it: the commits in
`REVISIONS`, without which mteb's tests refuse the models, and a look at the training data. Lion was trained on MS MARCO
alone. LACONIC's authors name rlhn/rlhn-680K for the second phase, whose seven parts stand here under mteb's names for
them (`v_splade_models.py`), and for the first utahnlp/nomic-embed-pretrain-lite, web pairs of many sources, of which
none stands here: look whether mteb knows some of them by a task's name.

Example:
    ::

        from mteb_models import laconic_1b

        mteb.evaluate(laconic_1b.load_model(device="cuda"), mteb.get_task("SciFact"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import OutputDType, PromptType

if TYPE_CHECKING:
    import torch

# TO FILL IN: the commit of each repository that was evaluated, `huggingface_hub.model_info(name).sha`.
REVISIONS: dict[str, str | None] = {
    "hzeng/Lion-SP-1B-llama3-marco-mntp": None,
    "hzeng/Lion-SP-8B-llama3-marco-mntp": None,
    "hzeng/Lion-DS-1B-llama3-marco-mntp": None,
    "hzeng/Lion-DS-8B-llama3-marco-mntp": None,
    "utahnlp/laconic-1b": None,
    "utahnlp/laconic-3b": None,
    "utahnlp/laconic-8b": None,
}
RLHN_680K = {"ArguAna", "FEVER", "FiQA2018", "HotpotQA", "MSMARCO", "NQ", "SciDocsRR"}

LION_CITATION = r"""
@inproceedings{zeng2025scaling,
  author = {Zeng, Hansi and Killingback, Julian and Zamani, Hamed},
  booktitle = {Proceedings of SIGIR},
  title = {Scaling Sparse and Dense Retrieval in Decoder-Only LLMs},
  url = {https://arxiv.org/abs/2502.15526},
  year = {2025},
}
"""
LACONIC_CITATION = r"""
@misc{xu2026laconic,
  archiveprefix = {arXiv},
  author = {Zhichao Xu and Shengyao Zhuang and Crystina Zhang and Xueguang Ma and Yijun Tian and Maitrey Mehta and Jimmy Lin and Vivek Srikumar},
  eprint = {2601.01684},
  title = {LACONIC: Dense-Level Effectiveness for Scalable Sparse Retrieval via a Two-Phase Training Curriculum},
  url = {https://arxiv.org/abs/2601.01684},
  year = {2026},
}
"""  # noqa: E501


class BidirectionalLlamaWrapper(AbsEncoder):
    """A Llama with attention in both directions as a sparse or dense retriever.

    Sparse: log(1 + relu(max over tokens of logits * scale)). Dense: the mean of the tokens' normalised hidden states.

    Args:
        model_name: Repository of a PEFT adapter, or of a merged model.
        revision: Its revision.
        device: Where it runs.
        sparse: Whether vectors are weights of the vocabulary's terms, or hidden states.
        scale: Factor on the logits; None is `hidden_size ** -0.25`.
        add_bos: Whether texts begin with the beginning-of-sequence token.
        model_prompts: Put in front of queries and documents.
        max_tokens: Longest text in tokens, special ones included.
        base: Base model and tokenizer, if not where the adapter or the repository says.
        torch_dtype: Of the weights.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        device: str | None = None,
        *,
        sparse: bool = True,
        scale: float | None = None,
        add_bos: bool = True,
        model_prompts: dict[str, str] | None = None,
        max_tokens: int = 512,
        base: str | None = None,
        torch_dtype: torch.dtype | str = "bfloat16",
        **kwargs: Any,
    ) -> None:
        import torch
        from peft import PeftConfig, PeftModel
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.peft_utils import find_adapter_config_file

        loader: Any = AutoModelForCausalLM if sparse else AutoModel
        adapter = find_adapter_config_file(model_name, revision=revision)
        if adapter is None:
            model: Any = loader.from_pretrained(model_name, revision=revision, dtype=torch_dtype)
        else:
            base = base or PeftConfig.from_pretrained(model_name, revision=revision).base_model_name_or_path
            model = loader.from_pretrained(base, dtype=torch_dtype)
            model = PeftModel.from_pretrained(model, model_name, revision=revision).merge_and_unload()
        model.config.is_causal = False
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base or model_name)
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.sparse = sparse
        self.scale = model.config.hidden_size**-0.25 if scale is None else scale
        self.add_bos = add_bos
        self.max_tokens = max_tokens
        self.model_prompts = model_prompts

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Encode batches of texts: sparse COO [N, V] or dense [N, D], float32 on the CPU."""
        import torch

        prompt = (self.model_prompts or {}).get(prompt_type.value if prompt_type else "", "")
        with torch.inference_mode():
            rows = [self._vectors([prompt + text for text in batch["text"]]).cpu() for batch in inputs]
            return torch.cat(rows)

    def _vectors(self, texts: list[str]) -> torch.Tensor:
        import torch

        batch = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_tokens, add_special_tokens=self.add_bos,
            return_tensors="pt",
        ).to(self.device)  # fmt: skip
        mask = batch["attention_mask"][:, :, None].bool()
        if not self.sparse:
            hidden = self.model(**batch).last_hidden_state.float()
            unit = torch.nn.functional.normalize(hidden, dim=-1).masked_fill(~mask, 0.0)
            return unit.sum(1) / mask.sum(1)
        logits = self.model(**batch).logits.masked_fill(~mask, -torch.inf).amax(1).float()
        return torch.log1p(torch.relu(logits * self.scale)).to_sparse()

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Inner products [N, M]."""
        import torch

        product = torch.as_tensor(embeddings1) @ torch.as_tensor(embeddings2).T
        return product.to_dense() if product.layout != torch.strided else product


def _meta(name: str, base: str, embed_dim: int, n_parameters: int, sparse: bool, **fields: Any) -> ModelMeta:
    """What the checkpoints have in common: weights in bfloat16, English, inner product."""
    loader: Any = BidirectionalLlamaWrapper
    return ModelMeta(
        loader=loader,
        name=name,
        revision=REVISIONS[name],
        release_date=None,  # mteb reads it from the repository's first commit
        model_type=["sparse" if sparse else "dense"],
        languages=["eng-Latn"],
        open_weights=True,
        n_parameters=n_parameters,
        memory_usage_mb=round(2 * n_parameters / 2**20),
        embed_dim=embed_dim,
        license=f"https://huggingface.co/{base}/blob/main/LICENSE",
        reference=f"https://huggingface.co/{name}",
        similarity_fn_name=ScoringFunction.DOT_PRODUCT,
        framework=["PyTorch", "Transformers"],
        adapted_from=base,
        output_dtypes=OutputDType.BF16,
        extra_requirements_groups=["peft"],
        **fields,
    )


def _lion(name: str, base: str, dimensions: int, n_parameters: int, embedding: int, sparse: bool) -> ModelMeta:
    return _meta(
        name, base, dimensions, n_parameters, sparse,
        n_embedding_parameters=embedding,
        loader_kwargs={"sparse": sparse, "max_tokens": 512},
        max_tokens=512,
        use_instructions=False,
        training_datasets={"MSMARCO"},
        public_training_code="https://github.com/HansiZeng/scaling-retriever",
        public_training_data=True,
        citation=LION_CITATION,
    )  # fmt: skip


def _laconic(name: str, base: str, n_parameters: int, embedding: int) -> ModelMeta:
    return _meta(
        name, base, 128_256, n_parameters, True,
        n_embedding_parameters=embedding,
        loader_kwargs={
            "scale": 1.0,
            "add_bos": False,  # with it, all texts get one vector
            "model_prompts": {"query": "query: ", "document": "passage: "},
            "max_tokens": 256,
            "base": base,  # the repositories hold no tokenizer
        },
        max_tokens=256,
        use_instructions=True,
        training_datasets=RLHN_680K,
        public_training_code="https://github.com/zhichaoxu-shufe/laconic-sparse-retrieval",
        public_training_data="https://huggingface.co/datasets/rlhn/rlhn-680K",
        citation=LACONIC_CITATION,
    )  # fmt: skip


LLAMA_1B, LLAMA_3B = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B"
LLAMA_8B, LLAMA_31_8B = "meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.1-8B"
lion_sp_1b = _lion(
    "hzeng/Lion-SP-1B-llama3-marco-mntp", LLAMA_1B, 128_256, 1_235_814_400, 262_668_288, sparse=True
)  # fmt: skip
lion_sp_8b = _lion(
    "hzeng/Lion-SP-8B-llama3-marco-mntp", LLAMA_8B, 128_256, 8_030_261_248, 525_336_576, sparse=True
)  # fmt: skip
lion_ds_1b = _lion(
    "hzeng/Lion-DS-1B-llama3-marco-mntp", LLAMA_1B, 2048, 1_235_814_400, 262_668_288, sparse=False
)  # fmt: skip
lion_ds_8b = _lion(
    "hzeng/Lion-DS-8B-llama3-marco-mntp", LLAMA_8B, 4096, 7_504_924_672, 525_336_576, sparse=False
)  # fmt: skip
laconic_1b = _laconic("utahnlp/laconic-1b", LLAMA_1B, 1_235_814_400, 262_668_288)
laconic_3b = _laconic("utahnlp/laconic-3b", LLAMA_3B, 3_212_749_824, 394_002_432)
laconic_8b = _laconic("utahnlp/laconic-8b", LLAMA_31_8B, 8_030_261_248, 525_336_576)
