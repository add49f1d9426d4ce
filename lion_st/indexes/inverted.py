"""Numba kernels of the exact inverted index.

Documents are held in windows of at most 65,536, so that a posting is a 16-bit document number and a value, and one
window's accumulators stay in the processor's cache. Inside a window the search is term-at-a-time MaxScore (Turtle and
Flood, 1995): terms are taken by falling upper bound, and once the remaining terms together cannot lift a new document
above the k-th best score so far, only documents already seen are completed. These are looked through for those that
can still reach it as often as the postings read since then pay for it: an LLM's query has hundreds of terms, and a pass
before each would cost more than all postings. A window whose bound is too low is skipped.

Scores are summed in float64 and rounded once to float32, so that the order of the terms, and with it the pruning,
leaves no trace in the result.
"""

import numpy as np

from lion_st.kernels.compiling import compiled


@compiled(nogil=True)
def count_postings(terms, indptr):
    """Fill indptr [V + 1] with where each term's postings start."""
    for position in range(terms.size):
        indptr[terms[position] + 1] += 1
    for term in range(indptr.size - 1):
        indptr[term + 1] += indptr[term]


@compiled(nogil=True)
def invert(row_starts, terms, weights, indptr, documents, values, upper):
    """Turn CSR rows into postings: documents and values by term, and each term's largest value."""
    fill = indptr[:-1].copy()
    for row in range(row_starts.size - 1):
        for position in range(row_starts[row], row_starts[row + 1]):
            term = terms[position]
            documents[fill[term]] = row
            values[fill[term]] = weights[position]
            fill[term] += 1
            upper[term] = max(upper[term], weights[position])


@compiled(nogil=True)
def quantize(indptr, weights, upper, levels, values):
    """Fill values with round(weight / upper * levels), at least 1 so that no posting is lost."""
    for term in range(indptr.size - 1):
        for position in range(indptr[term], indptr[term + 1]):
            values[position] = max(1, int(weights[position] / upper[term] * levels + 0.5))


@compiled(nogil=True)
def document_terms(indptr, documents, values, upper, levels, document):
    """Gather one document's terms and weights from the postings, by binary search in every list."""
    terms = np.empty(indptr.size - 1, dtype=np.int32)
    weights = np.empty(indptr.size - 1, dtype=np.float32)
    count = 0
    for term in range(indptr.size - 1):
        low, high = indptr[term], indptr[term + 1]
        position = low + np.searchsorted(documents[low:high], np.uint16(document))
        if position < high and documents[position] == document:
            terms[count] = term
            weights[count] = values[position] * upper[term] / levels if levels else values[position]
            count += 1
    return terms[:count], weights[:count]


@compiled(nogil=True)
def keep(indptr, documents, values, kept):
    """The postings of the documents of a mask [rows], numbered anew: their indptr, documents and values.

    Upper bounds stay valid, and quantised weights, which are parts of them, stay as they are.
    """
    numbers = np.cumsum(kept) - 1
    starts = np.zeros_like(indptr)
    for term in range(indptr.size - 1):
        count = 0
        for position in range(indptr[term], indptr[term + 1]):
            count += kept[documents[position]]
        starts[term + 1] = starts[term] + count
    left = np.empty(starts[-1], dtype=documents.dtype)
    weights = np.empty(starts[-1], dtype=values.dtype)
    place = 0
    for position in range(documents.size):
        if kept[documents[position]]:
            left[place] = numbers[documents[position]]
            weights[place] = values[position]
            place += 1
    return starts, left, weights


@compiled(nogil=True)
def join(indptr, documents, values, rows, other_indptr, other_documents, other_values):
    """The postings of the documents of two windows, those of the other numbered from `rows` on."""
    starts = indptr + other_indptr
    joined = np.empty(starts[-1], dtype=documents.dtype)
    weights = np.empty(starts[-1], dtype=values.dtype)
    place = 0
    for term in range(indptr.size - 1):
        for position in range(indptr[term], indptr[term + 1]):
            joined[place] = documents[position]
            weights[place] = values[position]
            place += 1
        for position in range(other_indptr[term], other_indptr[term + 1]):
            joined[place] = other_documents[position] + rows
            weights[place] = other_values[position]
            place += 1
    return starts, joined, weights


@compiled(nogil=True)
def rank_terms(query_terms, query_weights, upper, levels):
    """A query's terms by falling bound of what each can add to a score.

    Returns:
        Terms; their factors on stored values, float64; their bounds, float64; and remaining, float64 [terms + 1], where
        remaining[i] is what the terms i, i + 1, ... can add together at most.
    """
    count = query_terms.size
    bounds = np.empty(count, dtype=np.float64)
    factors = np.empty(count, dtype=np.float64)
    for position in range(count):
        largest = np.float64(upper[query_terms[position]])
        factors[position] = np.float64(query_weights[position])
        bounds[position] = factors[position] * largest
        if levels:
            factors[position] *= largest / levels
    order = np.argsort(-bounds, kind="mergesort")
    remaining = np.zeros(count + 1, dtype=np.float64)
    for rank in range(count - 1, -1, -1):
        remaining[rank] = remaining[rank + 1] + bounds[order[rank]]
    return query_terms[order], factors[order], bounds[order], remaining


@compiled(nogil=True)
def score_all(indptr, documents, values, terms, factors, floor, accumulators, touched):
    """Add the postings of terms, and list the documents whose sum is above a floor; returns how many these are."""
    for rank in range(terms.size):
        factor = factors[rank]
        for position in range(indptr[terms[rank]], indptr[terms[rank] + 1]):
            accumulators[documents[position]] += factor * np.float64(values[position])
    seen = 0
    for document in range(accumulators.size):
        if accumulators[document] > floor:
            touched[seen] = document
            seen += 1
    return seen


@compiled(nogil=True)
def score_few(indptr, documents, values, terms, factors, accumulators, touched):
    """Add the postings of terms, and list the documents that have one as they are met; returns how many these are."""
    seen = 0
    for rank in range(terms.size):
        factor = factors[rank]
        for position in range(indptr[terms[rank]], indptr[terms[rank] + 1]):
            document = documents[position]
            if accumulators[document] == 0.0:
                touched[seen] = document
                seen += 1
            accumulators[document] += factor * np.float64(values[position])
    return seen


@compiled(nogil=True)
def still_able(remaining, threshold, accumulators, touched, alive):
    """Move the documents that can still reach the threshold to the front of a list; returns how many these are."""
    kept = 0
    for candidate in range(alive):
        document = touched[candidate]
        if accumulators[document] + remaining > threshold:
            touched[candidate] = touched[kept]
            touched[kept] = document
            kept += 1
    return kept


@compiled(nogil=True)
def complete(
    indptr, documents, values, terms, factors, bounds, remaining, essential, threshold, accumulators, touched, seen
):  # fmt: skip
    """Add the postings of the terms from `essential` on to documents seen alone; returns how many of them are left.

    Those that are left, which can reach the threshold, stand at the front of `touched`.
    """
    alive = seen
    work = seen  # since the candidates were last looked through, which costs as much as there are
    for rank in range(essential, terms.size):
        if bounds[rank] <= 0.0:
            break
        if work >= alive:
            work = 0
            alive = still_able(remaining[rank], threshold, accumulators, touched, alive)
            if alive == 0:
                break
        factor, low, high = factors[rank], indptr[terms[rank]], indptr[terms[rank] + 1]
        work += min(alive * 16, high - low)
        if alive * 16 > high - low:
            for position in range(low, high):
                if accumulators[documents[position]] != 0.0:
                    accumulators[documents[position]] += factor * np.float64(values[position])
        else:
            for candidate in range(alive):
                position = low + np.searchsorted(documents[low:high], np.uint16(touched[candidate]))
                if position < high and documents[position] == touched[candidate]:
                    accumulators[touched[candidate]] += factor * np.float64(values[position])
    return alive


@compiled(nogil=True, inline="always")
def sift_down(heap, place, key):
    """Put a key into a min-heap from `place` downwards."""
    while True:
        child = 2 * place + 1
        if child >= heap.size:
            break
        if child + 1 < heap.size and heap[child + 1] < heap[child]:
            child += 1
        if key <= heap[child]:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = key


@compiled(nogil=True, inline="always")
def put(heap, size, key):
    """Add a key, in place of the smallest once there is no room, from when on it is a heap; returns how many it has."""
    if size < heap.size:
        heap[size] = key
        size += 1
        if size == heap.size:
            for place in range(size // 2 - 1, -1, -1):
                sift_down(heap, place, heap[place])
    else:
        sift_down(heap, 0, key)
    return size


@compiled(nogil=True)
def search_window(
    indptr, documents, values, upper, levels, first_row, query_starts, query_terms, query_weights, allowed,
    best, sizes, accumulators, touched,
):  # fmt: skip
    """Search one window for a block of queries and merge into their best documents.

    A found document is a 64-bit key: the bits of its float32 score, which for positive numbers are in the order of the
    scores, above the complement of its row. The larger of two keys is the better hit, the earlier of two equal ones.

    Args:
        indptr: int32 [V + 1], start of each term's postings.
        documents: uint16 [P], document number within the window, rising inside a term.
        values: float32 [P], or whole numbers up to `levels` if the weights are quantised.
        upper: float32 [V], largest weight of each term; a quantised weight is value * upper[term] / levels.
        levels: 0 for weights stored as they are.
        first_row: Row of the window's first document in the index.
        query_starts, query_terms, query_weights: CSR of the queries; query_starts [Q + 1] may begin within the others.
        allowed: bool, which of the window's documents may be found; empty if all may.
        best: uint64 [Q, k], keys of the best documents so far: a min-heap once there are k.
        sizes: int64 [Q], how many keys there are.
        accumulators: float64 zeros, one for each of the window's documents; left as zeros.
        touched: int32, as long.
    """
    score_of = np.empty(1, dtype=np.float32)
    bits_of = score_of.view(np.uint32)
    for query in range(query_starts.size - 1):
        heap = best[query]
        start, end = query_starts[query], query_starts[query + 1]
        terms, factors, bounds, remaining = rank_terms(query_terms[start:end], query_weights[start:end], upper, levels)
        threshold = 0.0
        if sizes[query] == heap.size:
            bits_of[0] = np.uint32(heap[0] >> np.uint64(32))
            threshold = np.float64(score_of[0]) * (1.0 - 1e-6)
        if remaining[0] <= threshold:
            continue

        essential = 0  # terms that can lift a new document above the threshold
        postings = 0
        while essential < terms.size and remaining[essential] > threshold:
            postings += indptr[terms[essential] + 1] - indptr[terms[essential]]
            essential += 1
        first, weights = terms[:essential], factors[:essential]
        dense = postings * 4 > accumulators.size  # then a pass over all documents is cheaper than a list of those seen
        if dense:
            floor = max(threshold - remaining[essential], 0.0)
            seen = score_all(indptr, documents, values, first, weights, floor, accumulators, touched)
        else:
            seen = score_few(indptr, documents, values, first, weights, accumulators, touched)
        alive = complete(
            indptr, documents, values, terms, factors, bounds, remaining, essential, threshold, accumulators, touched,
            seen,
        )  # fmt: skip

        size = sizes[query]
        for candidate in range(alive):
            document = touched[candidate]
            if allowed.size and not allowed[document]:
                continue
            score_of[0] = accumulators[document]
            row = np.uint64(first_row + document)
            key = (np.uint64(bits_of[0]) << np.uint64(32)) | (np.uint64(0xFFFFFFFF) - row)
            if size < heap.size or key > heap[0]:
                size = put(heap, size, key)
        sizes[query] = size
        if dense:
            accumulators[:] = 0.0
        else:
            for candidate in range(seen):
                accumulators[touched[candidate]] = 0.0
