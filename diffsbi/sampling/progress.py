"""How far the chains are: effective sample sizes, R̂, and the progress line."""

import time
import warnings
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from diffsbi.sampling.chains import ess_bulk, rhat

STUCK = 20  # transitions without a move that are no accident
STORM = 50  # divergent transitions in a row that are no accident


def kept(groups, n_warmup: int) -> np.ndarray:
    """Draws after warm-up of all chains, `(chains, draws, p)`."""
    chains = [np.concatenate([r["theta"] for r in rows], 1) for rows in groups]
    return np.concatenate(chains)[:, n_warmup:].astype(float)


def smallest_ess(theta: np.ndarray) -> float:
    """Bulk effective sample size of the worst parameter of `theta (chains, draws, p)`."""
    return min(ess_bulk(theta[..., i]) for i in range(theta.shape[-1]))


def largest_rhat(theta: np.ndarray) -> float:
    """Rank-normalised R̂ of the worst parameter of `theta (chains, draws, p)`."""
    return max(rhat(theta[..., i]) for i in range(theta.shape[-1]))


class Report:
    """The progress bar, and the account that `on_block` gets."""

    def __init__(self, total: int, n_chains: int, n_warmup: int, gradients: int, progress: bool, on_block, until_ess):
        self.bar = tqdm(total=total, disable=not progress, desc="sample", unit="draw")
        self.on_block, self.n_warmup, self.until_ess = on_block, n_warmup, until_ess
        self.draws: list[list[np.ndarray]] = [[] for _ in range(n_chains)]
        self.account = dict(gradients=gradients, divergences=0)
        self.spent = 0
        self.began = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def __call__(self, group, record, resumed=False):
        for c, chain in enumerate(group):
            self.draws[chain].append(record["theta"][c])
        gradients = int(record["num_steps"].sum())
        self.spent += 0 if resumed else gradients
        self.account["gradients"] += gradients
        self.account["step_size"] = float(record["step_size"][:, -1].mean())
        self.account["divergences"] += int(record["diverging"].sum())
        self.bar.update(record["theta"][..., 0].size)
        done = [sum(map(len, chain)) for chain in self.draws]
        if not self.bar.disable and not resumed and min(done) == max(done):
            self.bar.set_postfix(self.account | self._convergence(min(done)))
        if self.on_block is not None and not resumed:
            self.on_block(dict(self.account, chains=list(group), done=done, effective=lambda: self._effective(done)))

    def _kept(self, done: int) -> np.ndarray | None:
        if done < self.n_warmup + 10:
            return None
        return np.stack([np.concatenate(chain)[self.n_warmup : done] for chain in self.draws]).astype(float)

    def _effective(self, done) -> float | None:
        """Smallest bulk effective sample size over the parameters so far, None before there are ten draws."""
        theta = self._kept(min(done))
        return None if theta is None else smallest_ess(theta)

    def _convergence(self, done: int) -> dict[str, Any]:
        theta = self._kept(done)
        if theta is None:
            return {}
        effective = smallest_ess(theta)
        shown = dict(ess=round(effective), rhat=f"{largest_rhat(theta):.3f}")
        if self.until_ess is None or not self.spent:
            return shown
        # Gradients per effective sample so far, times what is missing, at the pace of this process.
        pace = (time.monotonic() - self.began) / self.spent
        missing = max(self.until_ess / effective - 1, 0) * self.account["gradients"] * theta.shape[1] / done
        return shown | dict(left=tqdm.format_interval(missing * pace))


def check_record(record, group: list[int], before: int, n_warmup: int, own_data: bool) -> None:
    """Raise where a chain's block is not finite, or does not move; where chains have targets of their own, warn."""
    for c, chain in enumerate(group):
        theta, diverging = record["theta"][c], record["diverging"][c]
        bad = ~(np.isfinite(record["energy"][c]) & np.isfinite(theta).all(-1) & np.isfinite(record["log_density"][c]))
        where = f"transition {before + int(np.argmax(bad))}"
        if bad.any():
            raise RuntimeError(f"Chain {chain} has a non-finite energy at {where}; is the log-density bounded?")
        state = f"step size {record['step_size'][c, -1]:.3g}, {int(diverging.sum())} divergences"
        advice = "a longer warm-up, a smaller first step or a higher target_accept may help"
        problem = None
        if before >= n_warmup and len(theta) >= STUCK and np.all(theta == theta[0]):
            problem = f"Chain {chain} did not move in {len(theta)} transitions ({state}): {advice}."
        elif len(theta) >= STORM and diverging.all():
            problem = f"Chain {chain} diverged in all of {len(theta)} transitions ({state}): {advice}."
        if problem and own_data:
            warnings.warn(problem, stacklevel=2)
        elif problem:
            raise RuntimeError(problem)
