"""Draws of a Markov chain with the account of how they were obtained, and whether they converged."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import numpy as np

from diffsbi._files import load_npz, read_json, write_json, write_npz
from diffsbi._types import check_finite

VERSION = 1


class Estimate(NamedTuple):
    """Posterior mean and standard deviation of one parameter, with rank-normalised convergence diagnostics."""

    mean: float
    sd: float
    ess_bulk: float
    ess_tail: float
    rhat: float


class Chains(eqx.Module):
    r"""Post-warmup draws of several chains.

    Attributes:
        theta: `(chains, draws, p)`.
        names: The p parameter names.
        log_density: Log-density of the sampler's target at each draw, `(chains, draws)`.
        energy: Hamiltonian of each draw, `(chains, draws)`.
        diverging: Whether the trajectory diverged, `(chains, draws)`.
        num_steps: Gradients that each draw took, `(chains, draws)`.
        step_size: Final step size, `(chains,)`.
        gradients: All gradients of the target, warm-up and starting points included.
        n_warmup: Discarded transitions of each chain.
        settings: How the sampler was set up.
        tracked: Posterior mean and standard deviation of a tracked function of the position, or None.
    """

    theta: np.ndarray
    names: tuple[str, ...]
    log_density: np.ndarray
    energy: np.ndarray
    diverging: np.ndarray
    num_steps: np.ndarray
    step_size: np.ndarray
    gradients: int
    n_warmup: int
    settings: dict[str, Any]
    tracked: tuple[np.ndarray, np.ndarray] | None = None

    def __check_init__(self):
        if self.theta.ndim != 3 or self.theta.shape[-1] != len(self.names):
            raise ValueError(f"Expected theta with shape (chains, draws, {len(self.names)}); got {self.theta.shape}.")
        check_finite("theta", self.theta)
        for name in ("log_density", "energy", "diverging", "num_steps"):
            shape = getattr(self, name).shape
            if shape != self.theta.shape[:2]:
                raise ValueError(f"Expected {name} with shape {self.theta.shape[:2]}; got {shape}.")

    @property
    def n_chains(self) -> int:
        return self.theta.shape[0]

    @property
    def n_draws(self) -> int:
        return self.theta.shape[1]

    @property
    def sampling_gradients(self) -> int:
        """Gradients spent on the kept draws alone."""
        return int(self.num_steps.sum())

    @property
    def tree_depth(self) -> np.ndarray:
        """Doublings of each trajectory, `(chains, draws)`."""
        return np.floor(np.log2(np.maximum(self.num_steps, 1))).astype(int) + 1

    @property
    def n_cut_short(self) -> int:
        """Kept trajectories that ended at the sampler's limit: NUTS's tree depth, HMC's number of steps."""
        return int((self.num_steps >= self.settings.get("max_gradients", np.inf)).sum())

    @property
    def n_diverging(self) -> int:
        return int(self.diverging.sum())

    def flat(self) -> np.ndarray:
        """All draws, `(chains * draws, p)`, chain after chain."""
        return self.theta.reshape(-1, self.theta.shape[-1])

    def summary(self) -> dict[str, Estimate]:
        """Mean, standard deviation, bulk and tail effective sample size and R̂ of every parameter (Vehtari et al. 2021).

        R̂ is NaN for a single chain of fewer than four draws.
        """
        return {name: _estimate(self.theta[..., i].astype(float)) for i, name in enumerate(self.names)}

    def gradients_per_effective_sample(self) -> dict[str, float]:
        """Gradients of the kept draws over the bulk effective sample size, by parameter."""
        return {name: self.sampling_gradients / row.ess_bulk for name, row in self.summary().items()}

    def to_arviz(self):
        """The draws and sampler statistics as `arviz.InferenceData`, one variable for each parameter."""
        statistics = dict(lp=self.log_density, energy=self.energy, diverging=self.diverging)
        statistics |= dict(n_steps=self.num_steps, tree_depth=self.tree_depth)
        posterior = {name: self.theta[..., i] for i, name in enumerate(self.names)}
        return _arviz().from_dict(posterior=posterior, sample_stats=statistics)

    def save(self, folder) -> None:
        """Write `chains.npz` and `chains.json` into `folder`."""
        folder = Path(folder)
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        if self.tracked is not None:
            arrays |= dict(tracked_mean=self.tracked[0], tracked_sd=self.tracked[1])
        write_npz(folder / "chains.npz", arrays)
        account = dict(version=VERSION, names=list(self.names), gradients=self.gradients, n_warmup=self.n_warmup)
        write_json(folder / "chains.json", account | dict(settings=self.settings))


_ARRAYS = ("theta", "log_density", "energy", "diverging", "num_steps", "step_size")


def load_chains(folder) -> Chains:
    """Read what `Chains.save` wrote; `ValueError` names a damaged file, `FileNotFoundError` a missing one."""
    folder = Path(folder)
    account, arrays = read_json(folder / "chains.json"), load_npz(folder / "chains.npz")
    if account.get("version") != VERSION:
        raise ValueError(f"Expected {folder / 'chains.json'} of version {VERSION}; got {account.get('version')}.")
    missing = [name for name in _ARRAYS if name not in arrays]
    if missing:
        raise ValueError(f"Expected {folder / 'chains.npz'} to hold {list(_ARRAYS)}; {missing} are missing.")
    tracked = (arrays["tracked_mean"], arrays["tracked_sd"]) if "tracked_mean" in arrays else None
    fields: dict[str, Any] = {name: arrays[name] for name in _ARRAYS}
    fields |= {name: account[name] for name in ("gradients", "n_warmup", "settings")}
    return Chains(**fields, names=tuple(account["names"]), tracked=tracked)


def ess_bulk(draws: np.ndarray) -> float:
    """Rank-normalised effective sample size of one parameter's `draws (chains, n)`."""
    return float(_arviz().ess(draws, method="bulk"))


def rhat(draws: np.ndarray) -> float:
    """Rank-normalised R̂ of one parameter's `draws (chains, n)`."""
    return float(_arviz().rhat(draws))


def _estimate(draws: np.ndarray) -> Estimate:
    az = _arviz()
    effective = [az.ess(draws, method=method) for method in ("bulk", "tail")]
    return Estimate(*map(float, (draws.mean(), draws.std(ddof=1), *effective, az.rhat(draws))))


def _arviz():
    """ArviZ, imported where it is needed: it is slow to import, and announces its next version when it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz
