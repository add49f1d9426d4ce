"""One form for sparse vectors, one for dense ones, both and several of each text, whatever library made them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
from scipy import sparse

from lion_st.data.fields import Paradigm

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class TokenVectors:
    """The vectors of the tokens of N texts, those of one text after those of the other.

    Args:
        values: [T, D] for T tokens.
        offsets: int64 [N + 1]: text i has the rows offsets[i] to offsets[i + 1], one at least.
    """

    values: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        fits = self.values.ndim == 2 and self.offsets.ndim == 1 and len(self.offsets) > 0
        if not fits or self.offsets[0] != 0 or self.offsets[-1] != len(self.values):
            raise ValueError(
                f"Token vectors are a matrix [T, D] with offsets from 0 to T, got the shape {self.values.shape} and "
                f"{len(self.offsets)} offsets."
            )
        if (np.diff(self.offsets) < 1).any():
            empty = int(np.flatnonzero(np.diff(self.offsets) < 1)[0])
            raise ValueError(f"Text {empty} has no token that counts: check the text and the model's mask.")

    @property
    def shape(self) -> tuple[int, int]:
        """Texts N and dimensions D."""
        return len(self.offsets) - 1, self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of values and offsets."""
        return self.values.nbytes + self.offsets.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, texts: slice | Sequence[int] | np.ndarray) -> TokenVectors:
        """Some texts, in the order given: a slice, places, or a mask [N]."""
        places = np.arange(len(self))[texts]
        counts = np.diff(self.offsets)[places]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[places] - offsets[:-1], counts)
        return TokenVectors(self.values[rows], offsets)

    def astype(self, dtype: str) -> TokenVectors:
        """The same vectors in another type; these themselves if they have it."""
        return TokenVectors(self.values.astype(dtype, copy=False), self.offsets)


@dataclass(frozen=True, eq=False)
class HybridVectors:
    """The sparse and the dense vector of each of N texts.

    Args:
        sparse: CSR [N, V].
        dense: [N, D].
        weights: Of the sparse and of the dense score in searches with these as queries; None fuses by reciprocal ranks.
    """

    sparse: sparse.csr_array
    dense: np.ndarray
    weights: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.sparse.shape[0] != self.dense.shape[0]:
            raise ValueError(
                f"A text has one sparse and one dense vector, got {self.sparse.shape[0]} and {self.dense.shape[0]}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Texts N, and V + D."""
        return self.sparse.shape[0], self.sparse.shape[1] + self.dense.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, texts: slice | Sequence[int] | np.ndarray) -> HybridVectors:
        """Some texts, in the order given: a slice, places, or a mask [N]."""
        return HybridVectors(self.sparse[texts], self.dense[texts], self.weights)


# scipy CSR float32 [N, V] for a sparse model, numpy float32 or float16 [N, D] for a dense one, both for a hybrid one,
# several of each text for a multi-vector one.
Vectors: TypeAlias = sparse.csr_array | np.ndarray | TokenVectors | HybridVectors


def kind_of(vectors: Vectors) -> Paradigm:
    """The paradigm whose vectors these are."""
    if isinstance(vectors, HybridVectors):
        return "hybrid"
    if isinstance(vectors, TokenVectors):
        return "multi_vector"
    return "dense" if isinstance(vectors, np.ndarray) else "sparse"


def stack(parts: Sequence[Any]) -> Any:
    """The rows of several `Vectors` of one kind, one after the other."""
    if isinstance(parts[0], HybridVectors):
        matrices = stack([part.sparse for part in parts]), stack([part.dense for part in parts])
        return HybridVectors(*matrices, parts[0].weights)
    if isinstance(parts[0], TokenVectors):
        starts = np.cumsum([0, *(len(part.values) for part in parts)])
        offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=False)]
        return TokenVectors(np.concatenate([part.values for part in parts]), np.concatenate([*offsets, starts[-1:]]))
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else sparse.vstack(parts, format="csr")


def to_token_vectors(vectors: Any) -> TokenVectors:
    """Convert the vectors of texts' tokens to `TokenVectors` of float32.

    Args:
        vectors: `TokenVectors`; [N, L, D] as a tensor or array, in which a token of zeros does not count; or a list of
            [L, D], as `MultiVectorEncoder.encode` gives them.
    """
    if not isinstance(vectors, TokenVectors):
        if isinstance(vectors, list | tuple):
            texts = [_float32(text) for text in vectors]
        else:
            padded = _float32(vectors) if not sparse.issparse(vectors) else vectors
            texts = [text[(text != 0).any(axis=1)] for text in padded] if padded.ndim == 3 else [padded]
        widths = {text.shape[-1] for text in texts if text.ndim == 2}
        if len(widths) != 1 or any(text.ndim != 2 for text in texts) or getattr(vectors, "ndim", 3) != 3:
            raise TypeError(
                "This index holds several vectors of each text, [N, L, D] or a list of [L, D]: create it with "
                "paradigm='sparse' or 'dense' for vectors of another kind."
            )
        offsets = np.cumsum([0, *(len(text) for text in texts)], dtype=np.int64)
        vectors = TokenVectors(np.concatenate(texts), offsets)
    vectors = vectors.astype("float32")
    if not np.isfinite(vectors.values).all():
        raise ValueError("Token vectors hold NaN or infinity: check the model's dtype and the encoded texts.")
    return vectors


def to_hybrid(vectors: Any) -> HybridVectors:
    """Convert a pair of vectors, or `HybridVectors`, by `to_csr` and `to_dense`."""
    if not isinstance(vectors, HybridVectors) and not (isinstance(vectors, tuple) and len(vectors) == 2):
        raise TypeError(
            "This index holds a sparse and a dense vector of each text, (sparse [N, V], dense [N, D]): create it with "
            "paradigm='sparse' or 'dense' for vectors of one kind."
        )
    if isinstance(vectors, HybridVectors):
        return HybridVectors(to_csr(vectors.sparse), to_dense(vectors.dense), vectors.weights)
    return HybridVectors(to_csr(vectors[0]), to_dense(vectors[1]))


def max_sim(queries: TokenVectors, documents: TokenVectors) -> np.ndarray:
    """MaxSim of each query and document, the sum over the query's tokens of their best inner product: [Q, N]."""
    products = queries.values @ documents.values.astype(np.float32, copy=False).T  # [query tokens, document tokens]
    best = np.maximum.reduceat(products, documents.offsets[:-1], axis=1)  # [query tokens, N]
    return np.add.reduceat(best, queries.offsets[:-1], axis=0)


def to_csr(vectors: Any) -> sparse.csr_array:
    """Convert vectors to a canonical CSR matrix: float32 values, sorted terms, no stored zeros.

    Args:
        vectors: [N, V] as a scipy sparse matrix, a torch tensor (dense, COO or CSR), a numpy array, or a list of rows.

    Raises:
        TypeError: If the vectors are several of each text, or nothing that numbers can be read from.
        ValueError: If the matrix is not two-dimensional, its parts do not fit each other (a term is not in 0..V-1), or
            a value is negative or not finite: the vectors of a sparse retriever are term weights.
    """
    vectors = _one_matrix(vectors)
    if sparse.issparse(vectors):
        _require_sound(vectors)
    if _is_tensor(vectors):
        matrix = _tensor_to_csr(vectors.detach())
    elif isinstance(vectors, sparse.csr_array):
        matrix = vectors
    elif sparse.issparse(vectors):
        matrix = sparse.csr_array(vectors, dtype=np.float32)
    else:
        matrix = sparse.csr_array(_two_dimensional(_numbers(vectors)))
    if matrix is not vectors:
        _require_sound(matrix)
    matrix = matrix.astype(np.float32, copy=False)
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    if not matrix.nnz:
        return matrix
    smallest = matrix.data.min()
    if not (smallest >= 0 and matrix.data.max() < np.inf):
        bad = matrix.data[~(np.isfinite(matrix.data) & (matrix.data >= 0))][0]
        raise ValueError(f"Sparse vectors hold term weights >= 0, got {bad}: is this the output of a dense model?")
    if smallest == 0:
        matrix = matrix.copy()
        matrix.eliminate_zeros()
    return matrix


def to_dense(vectors: Any) -> np.ndarray:
    """Convert vectors to a C-contiguous float32 matrix [N, D].

    Args:
        vectors: [N, D] as a torch tensor, a numpy array or a list of rows.

    Raises:
        TypeError: If the vectors are sparse, several of each text, or nothing that numbers can be read from.
        ValueError: If the matrix is not two-dimensional or a value is not finite.
    """
    vectors = _one_matrix(vectors)
    is_tensor = _is_tensor(vectors)
    if sparse.issparse(vectors) or (is_tensor and str(vectors.layout) != "torch.strided"):
        raise TypeError("This index holds dense vectors and got sparse ones: create it with paradigm='sparse'.")
    if is_tensor:
        vectors = vectors.detach().float().cpu().numpy()
    matrix = np.ascontiguousarray(_two_dimensional(_numbers(vectors)))
    if not np.isfinite(matrix).all():
        raise ValueError("Dense vectors hold NaN or infinity: check the model's dtype and the encoded texts.")
    return matrix


def stored(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """A copy of vectors in the type that a shard or an index keeps them in.

    Raises:
        ValueError: If a number is beyond the type's range: infinity times zero would hide the document.
    """
    with np.errstate(over="ignore"):
        found = vectors.astype(dtype)
    if found.dtype != vectors.dtype and not np.isfinite(found).all():
        raise ValueError(
            f"float16 ends at 65,504, and a vector has {np.abs(vectors).max():g}: use dtype='float32' (of "
            "`lion-st encode` --vector-dtype float32)."
        )
    return found


def active_dims(vectors: Vectors) -> float | None:
    """Mean number of non-zero terms per row (0 for an empty matrix), of a hybrid's sparse side; None without terms."""
    matrix = vectors.sparse if isinstance(vectors, HybridVectors) else vectors
    if not isinstance(matrix, sparse.csr_array):
        return None
    return float(matrix.nnz / matrix.shape[0]) if matrix.shape[0] else 0.0


def _require_sound(matrix: Any) -> None:
    """Raise a ValueError if indices of a compressed matrix lead outside of its arrays; compiled code trusts them."""
    if matrix.ndim != 2 or not hasattr(matrix, "check_format"):
        return
    try:
        matrix.check_format(full_check=True)
    except ValueError as error:
        rows, terms = matrix.shape
        raise ValueError(f"Sparse vectors of {rows} texts over {terms} terms are damaged: {error}.") from error


def _one_matrix(vectors: Any) -> Any:
    """Rows that were encoded one by one, in a list, as one matrix; all else as it is."""
    if isinstance(vectors, TokenVectors | HybridVectors):
        needed = kind_of(vectors)
        raise TypeError(f"This index holds one vector of each text and got several: use paradigm={needed!r}.")
    if isinstance(vectors, list | tuple) and len(vectors):
        if all(_is_tensor(row) and row.ndim == 1 for row in vectors):
            import torch

            return torch.stack([row.detach() for row in vectors])
        if all(sparse.issparse(row) for row in vectors):
            return sparse.vstack(vectors, format="csr")
    return vectors


def _numbers(vectors: Any) -> np.ndarray:
    try:
        return np.asarray(vectors, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"Vectors are one matrix of numbers [N, dimensions], not this {type(vectors).__name__} ({error}): pass an "
            "array, a tensor, a scipy matrix or a list of rows of one length."
        ) from error


def _float32(vectors: Any) -> np.ndarray:
    if _is_tensor(vectors):
        vectors = vectors.detach().float().cpu().numpy()
    return np.asarray(vectors, dtype=np.float32)


def _is_tensor(vectors: Any) -> TypeGuard[torch.Tensor]:
    """Whether these are a torch tensor; torch itself is not imported for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(vectors, torch.Tensor)


def _tensor_to_csr(vectors: torch.Tensor) -> sparse.csr_array:
    import torch

    if vectors.layout == torch.sparse_csr:
        parts = (vectors.values().float(), vectors.col_indices(), vectors.crow_indices())
        return sparse.csr_array(tuple(part.cpu().numpy() for part in parts), shape=tuple(vectors.shape))
    if vectors.layout == torch.sparse_coo:
        coalesced = vectors.coalesce()
        terms = tuple(coalesced.indices().cpu().numpy())
        values = coalesced.values().float().cpu().numpy()
        return sparse.coo_array((values, terms), shape=tuple(vectors.shape)).tocsr()
    return sparse.csr_array(_two_dimensional(vectors.float().cpu().numpy()))


def _two_dimensional(matrix: np.ndarray) -> np.ndarray:
    if matrix.ndim != 2:
        remedy = ": encode a list of texts, or pass the vector of one as [vector]" if matrix.ndim == 1 else ""
        raise ValueError(f"Vectors are a matrix [N, dimensions], got the shape {tuple(matrix.shape)}{remedy}.")
    return matrix


def keep_top_terms(vectors: sparse.csr_array, count: int) -> sparse.csr_array:
    """Keep each row's `count` heaviest terms, of equal weights the lower term ids."""
    rows = rows_of(vectors)
    order = np.lexsort((vectors.indices, -vectors.data, rows))
    rank = np.arange(vectors.nnz) - vectors.indptr[rows]
    keep = np.zeros(vectors.nnz, dtype=bool)
    keep[order] = rank < count  # order and rows agree on where each row lies
    return select_entries(vectors, keep)


def rows_of(vectors: sparse.csr_array) -> np.ndarray:
    """Row of each stored entry [nnz]."""
    return np.repeat(np.arange(vectors.shape[0]), np.diff(vectors.indptr))


def select_entries(vectors: sparse.csr_array, keep: np.ndarray) -> sparse.csr_array:
    """The entries that a mask [nnz] keeps."""
    counts = np.bincount(rows_of(vectors)[keep], minlength=vectors.shape[0])
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(vectors.indptr.dtype)
    return sparse.csr_array((vectors.data[keep], vectors.indices[keep], indptr), shape=vectors.shape)
