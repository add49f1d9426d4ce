"""Term weights whose terms follow a power law, as vocabularies do."""

import numpy as np
from scipy import sparse

from lion_st.encoding import to_csr


def power_law_vectors(count: int, terms: int, seed: int, vocabulary: int) -> sparse.csr_array:
    """`count` rows of at most `terms` of the terms in a vocabulary."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(3, vocabulary + 3)
    columns = rng.choice(vocabulary, size=count * terms, p=share / share.sum())
    weights = rng.lognormal(-0.5, 0.7, count * terms).astype(np.float32)
    return to_csr(sparse.coo_array((weights, (np.repeat(np.arange(count), terms), columns)), (count, vocabulary)))
