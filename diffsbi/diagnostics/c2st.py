r"""Classifier two-sample test: how well can a network tell two sets of draws apart?"""

import equinox as eqx
import numpy as np

from diffsbi.diagnostics._samples import as_draws, check_same_width


class C2ST(eqx.Module):
    """Held-out accuracy: 0.5 when the sets cannot be told apart, 1 when they never overlap.

    Args:
        value: Accuracy over all held-out draws.
        error: Its binomial standard error; the classifiers are taken as given.
        folds: Accuracy of each fold.
        n: Draws used of each set.
        duplicates: Repeated draws that were left out.
    """

    value: float
    error: float
    folds: tuple[float, ...]
    n: int
    duplicates: int


def c2st(
    samples_a,
    samples_b,
    *,
    seed: int = 0,
    folds: int = 5,
    duplicates: str = "refuse",
    max_draws: int = 10_000,
    early_stopping: bool = True,
) -> C2ST:
    r"""Classifier two-sample test with a network of two hidden layers of 10 p units, cross-validated.

    The optimal accuracy is $\frac12 + \frac14 \int |p_a - p_b|$; a trained classifier reaches a little less. Columns
    are standardised by the pooled mean and deviation. The folds are disjoint, of equal classes and, since every
    draw is distinct, share nothing.

    Args:
        samples_a: Draws `(n_a, p)`.
        samples_b: Draws `(n_b, p)`; the larger set is thinned at random to the size of the smaller one.
        seed: Seed of the thinning, the folds and the networks.
        folds: Number of folds.
        duplicates: `"refuse"` raises when a draw occurs twice, in one set or across both; `"drop"` keeps one of each
            and counts the others.
        max_draws: Most draws used of each set.
        early_stopping: Stop each network when its accuracy on a tenth of its training draws stalls. Without it
            (as in the sbibm package) the network overfits, reads too low and takes ten times as long: 0.53 for two
            six-dimensional Gaussians half a deviation apart (2 000 draws each), where 0.599 is optimal.

    Raises:
        ValueError: If draws are not finite, repeat, differ in width, or are too few for the folds.

    Reference: Lopez-Paz & Oquab 2017, arXiv:1610.06545.
    """
    a, b = as_draws("samples_a", samples_a), as_draws("samples_b", samples_b)
    check_same_width(a, b)
    if duplicates not in ("refuse", "drop"):
        raise ValueError(f"Expected duplicates 'refuse' or 'drop'; got {duplicates!r}.")
    if folds < 2:
        raise ValueError(f"Expected folds >= 2; got {folds}.")
    a, b, dropped = _distinct(a, b)
    if dropped and duplicates == "refuse":
        raise ValueError(
            f"Expected distinct draws; got {dropped} repeated ones, which leak across folds. Draw without "
            "replacement, thin the chain, or pass duplicates='drop'."
        )
    n = min(len(a), len(b), max_draws)
    if n < 10 * folds:
        raise ValueError(f"Expected at least {10 * folds} distinct draws of each set for {folds} folds; got {n}.")
    rng = np.random.default_rng(seed)
    pooled = np.concatenate([rng.permutation(a)[:n], rng.permutation(b)[:n]])
    deviation = pooled.std(0)
    pooled = (pooled - pooled.mean(0)) / np.where(deviation > 0, deviation, 1.0)
    correct, number = _held_out(pooled.astype(np.float32), np.repeat([0, 1], n), folds, seed, early_stopping)
    value = float(correct.mean())
    per_fold = tuple(float(correct[number == k].mean()) for k in range(folds))
    return C2ST(value, float(np.sqrt(value * (1 - value) / len(correct))), per_fold, n, dropped)


def _distinct(a, b):
    """Both sets without repeated rows (a row in both stays in the first), and how many went."""
    rows, label = np.concatenate([a, b]), np.repeat([0, 1], [len(a), len(b)])
    _, first = np.unique(rows, axis=0, return_index=True)
    first = np.sort(first)
    return rows[first[label[first] == 0]], rows[first[label[first] == 1]], len(rows) - len(first)


def _held_out(x, label, folds, seed, early_stopping):
    """Whether each draw is classified correctly by a network that never saw it, and its fold."""
    # scikit-learn takes a second to import, and most runs of the package never test.
    from sklearn.model_selection import StratifiedKFold
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    correct, number = np.zeros(len(x), bool), np.zeros(len(x), int)
    width = 10 * x.shape[1]
    stop = {"max_iter": 1000, "early_stopping": early_stopping, "n_iter_no_change": 20 if early_stopping else 10}
    # The matrices are tiny: threads cost more than they give, on a busy machine a hundred times more.
    with threadpool_limits(1):
        for k, (train, test) in enumerate(StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, label)):
            network = MLPClassifier((width, width), random_state=seed, **stop).fit(x[train], label[train])
            correct[test], number[test] = network.predict(x[test]) == label[test], k
    return correct, number
