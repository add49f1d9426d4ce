"""sentence-transformers' evaluators for models that give a sparse and a dense vector of each text."""

from __future__ import annotations

from typing import Any

from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, NanoBEIREvaluator
from torch import Tensor

from lion_st.indexes import create_index
from lion_st.indexes.fusion import convex_fusion

DEPTH = 1000  # documents by each score that are fused, as in searches
VALUES_AT_ONCE = 10**8  # of encoded documents, 400 MB
NAMES = ("sparse_dot", "dense_dot", "dot")


class HybridInformationRetrievalEvaluator(InformationRetrievalEvaluator):
    """Measures the sparse scores ("sparse_dot"), the dense ones ("dense_dot"), and both together ("dot").

    The collection is searched as it is once the model is trained: exactly, the best 1,000 documents by either score,
    fused by `lion_st.retrieval.convex_fusion` with the model's weights, or equal ones where it has none yet. Of the
    documents their active terms and dense vectors alone are held, in the host's memory.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **({"main_score_function": "dot"} | options))
        if not self._score_functions_from_model or self.write_predictions:
            raise ValueError(
                f"Hybrid models are measured by {', '.join(NAMES)}: give no score_functions or predictions."
            )

    def _model_score_functions(self, model: Any) -> dict[str, Any]:
        return dict.fromkeys(NAMES)

    def compute_all_metrics(
        self,
        model: Any,
        corpus_model: Any = None,
        corpus_embeddings: Tensor | None = None,
        output_path: str | None = None,
    ) -> dict[str, Any]:
        """The metrics of the three rankings, by their names."""
        head = model[-1]
        width = head.dense.embedding_dimension
        index: Any = create_index("exact", "hybrid")
        step = max(1, VALUES_AT_ONCE // head.get_embedding_dimension())
        for start in range(0, len(self.corpus), step):
            rows = (
                self._encoded(corpus_model or model, self.corpus[start : start + step], "document")
                if corpus_embeddings is None
                else corpus_embeddings[start : start + step]
            )
            index.add(self.corpus_ids[start : start + step], (rows[:, :-width], rows[:, -width:]))
        found: dict[str, list[Any]] = {name: [] for name in NAMES}
        for start in range(0, len(self.queries), step):
            rows = self._encoded(model, self.queries[start : start + step], "query")
            sides = index.search_sides((rows[:, :-width], rows[:, -width:]), DEPTH)
            fused = convex_fusion(sides, head.fusion_weights or (0.5, 0.5), DEPTH)
            for name, rankings in zip(NAMES, (*sides, fused), strict=True):
                found[name] += [[{"corpus_id": key, "score": score} for key, score in hits] for hits in rankings]
        scores: dict[str, Any] = {name: self.compute_metrics(hits) for name, hits in found.items()}
        for one in scores.values():
            self.output_scores(one)
        return scores

    def _encoded(self, model: Any, texts: Any, task: str) -> Tensor:
        """Rows [N, V + D]."""
        name, prompt = (
            (self.query_prompt_name, self.query_prompt)
            if task == "query"
            else (self.corpus_prompt_name, self.corpus_prompt)
        )
        return self.embed_inputs(model, texts, encode_fn_name=task, prompt_name=name, prompt=prompt)  # type: ignore


class HybridNanoBEIREvaluator(NanoBEIREvaluator):
    """NanoBEIR with `HybridInformationRetrievalEvaluator`."""

    information_retrieval_class = HybridInformationRetrievalEvaluator

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **({"main_score_function": "dot"} | options))
