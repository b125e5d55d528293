"""Frechet distance between two sets of features, as normal distributions."""

import numpy as np
from jaxtyping import Float


def frechet_distance(ours: Float[np.ndarray, "n d"], theirs: Float[np.ndarray, "m d"]) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) of the sets' covariances A and B.

    Compare only sets of equal sizes: it falls with the number of samples (Heusel et al. 2017).
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    a, b = np.cov(ours, rowvar=False), np.cov(theirs, rowvar=False)
    # The eigenvalues of A B are those of the symmetric A^(1/2) B A^(1/2).
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum()
    shift = ours.mean(0) - theirs.mean(0)
    return float(shift @ shift + np.trace(a) + np.trace(b) - 2 * cross)
