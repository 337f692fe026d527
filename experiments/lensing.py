"""What experiments on lensing maps share: chains of one map, the score compression, summaries, distances."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import digamma, polygamma

import diffsbi as ds
from diffsbi import summaries
from diffsbi._files import load_npz, write_npz
from diffsbi.comparison import prior_bounds
from diffsbi.diagnostics import (
    c2st,
    compare_moments,
    figure_of_merit,
    local_c2st,
    predictive_check,
    sbc_ranks,
    sbc_test,
    tarp,
)
from diffsbi.inference import LocalFrame
from diffsbi.inference.nle import LikelihoodPosterior
from diffsbi.inference.proposals import GaussianProposal, gaussian_proposal
from diffsbi.inference.reweighted import ReweightedPosterior
from diffsbi.observation import read_map
from diffsbi.runs import Run, start_run
from diffsbi.sampling import full_field_posterior, load_chains, power_spectrum_posterior

PAIRS = (("omega_c", "sigma_8"), ("omega_c", "w_0"), ("sigma_8", "w_0"))
MERITS = {f"merit_{a}_{b}": f"Figure of merit {a}, {b}: share of the full field's" for a, b in PAIRS}
LOCAL_TESTS = 50  # the fewest
TABLE, MAP, AXES = "lognormal_shifts_LSSTY10.npy", "lsst_y10_observation_256.npy", "row,column,bin"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapConfig:
    """One map of side `n_pix`, and the lengths of its full-field chains and of those (`n_spectrum`) of its spectra.

    `observation`: "simulated", or "published", the map of arXiv:2409.17975 (package sbi_lens), from the folder that
    `DIFFSBI_DATA` names, with the shift table that it was made with.
    """

    n_pix: int = 64
    observation: str = "simulated"
    widen: float = 1.25
    ess: float = 2000.0
    n_warmup: int = 200
    n_draws: int = 10_000
    n_chains: int = 4
    n_spectrum: int = 500
    seed: int = 0


def begin(cfg: MapConfig, name: str, out: Path, stages: tuple[str, ...]):
    """The simulator, the run in `out`, a map made at the fiducial, and draws of its full-field posterior."""
    sim, run, x = observe(cfg, name, out, stages)
    return sim, run, x, full_field_draws(cfg, sim, x, run)


def observe(cfg: MapConfig, name: str, out: Path, stages: tuple[str, ...]):
    """The simulator, the run in `out`, and a map made at the fiducial."""
    if cfg.observation not in ("simulated", "published"):
        raise ValueError(f"Expected observation 'simulated' or 'published'; got {cfg.observation!r}.")
    published = published_files() if cfg.observation == "published" else None
    options = {} if published is None else {"shift": "published", "shift_table": str(published[1])}
    sim = ds.lsst_y10(n_pix=cfg.n_pix, side_deg=cfg.n_pix * 10 / 256, **options)
    x = None if published is None else jnp.asarray(read_map(published[0], AXES, sim.n_bins, sim.n_pix))
    complete = lambda old: {"observation": "simulated"} | dict(old)  # noqa: E731  (runs of older versions)
    run = start_run(out, {"name": name} | dataclasses.asdict(cfg), stages, complete=complete)
    if x is None:
        x = sim.draw(run.key("observed"), 1, sim.fiducial, with_score=False).x[0]
    return sim, run, x


def published_files(folder: str | None = os.environ.get("DIFFSBI_DATA")) -> tuple[Path, Path]:
    """The published observation and its shift table, files of the package sbi_lens.

    Raises:
        FileNotFoundError: If `folder` is None or does not hold both.
    """
    paths = Path(folder or "", MAP), Path(folder or "", TABLE)
    if not folder or not all(path.is_file() for path in paths):
        raise FileNotFoundError(
            f"Expected {MAP} and {TABLE} (package sbi_lens) in the folder that DIFFSBI_DATA names; got {folder!r}."
        )
    return paths


def full_field_draws(cfg: MapConfig, sim, x, run: Run) -> np.ndarray:
    """Draws of the full-field posterior of one map, from chains of the lengths in `cfg`: stage "reference"."""
    settings = dict(until_ess=cfg.ess, n_samples=cfg.n_draws, n_warmup=cfg.n_warmup, n_chains=cfg.n_chains)

    def work(folder: Path) -> dict:
        key = run.key("reference")
        chains = full_field_posterior(sim, x, key, folder=folder / "blocks", progress=True, **settings)
        chains.save(folder)
        return {"gradients": chains.gradients}

    run.once("reference", work)
    draws = load_chains(run.path("reference")).flat()
    write_npz(run.folder / "full_field.npz", {"theta": draws})  # for the figures, which know nothing of chains
    return draws


def spectrum_draws(cfg: MapConfig, sim, x, run: Run) -> np.ndarray:
    """Draws of the power-spectrum posterior of the map, `cfg.n_spectrum` a chain: stage "spectrum"."""

    def work(folder: Path) -> dict:
        lengths = dict(n_samples=cfg.n_spectrum, n_warmup=min(300, cfg.n_spectrum))
        power_spectrum_posterior(sim, x, run.key("spectrum"), progress=True, **lengths).save(folder)
        return {}

    run.once("spectrum", work)
    return load_chains(run.path("spectrum")).flat()


def spectrum_proposal(cfg: MapConfig, sim, x, run: Run) -> GaussianProposal:
    """The power-spectrum posterior of the map, widened by `cfg.widen`."""
    return gaussian_proposal(sim, spectrum_draws(cfg, sim, x, run), cfg.widen)


def path_draws(sim, x, key, n_points: int, n: int, folder: Path) -> dict[str, np.ndarray]:
    """`n` draws of the posterior that a path of so many points gives, and the gradients that it took."""
    found = ds.path_posterior(sim, x, key, n_points=n_points, until_error=None, folder=folder, progress=True)
    theta = found.sample(jax.random.fold_in(key, 1), n)
    return {"theta": np.asarray(theta), "gradients": np.asarray(found.gradients)}


def compress(sim, statistics, key, folder: Path, n_covariance: int, n_derivative: int) -> dict:
    """Write the score compression of `statistics` at the fiducial to `folder`; return its account."""
    compression = summaries.score_compression(
        statistics, lambda theta, key: sim.draw_one(key, theta)[2], sim.fiducial, key,
        n_covariance=n_covariance, n_derivative=n_derivative, progress=True,
    )  # fmt: skip
    compression.save(folder / "compression.npz")
    return {"simulations": compression.n_simulations}


def in_blocks(
    what: str, n: int, size: int, make: Callable[[int, int], dict], folder: Path | None = None, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Named arrays of n rows, of which `make(start, count)` makes up to `size` at a time.

    Blocks are kept in `folder`, if there is one, so that an interrupted run goes on.
    """
    parts = []
    for start in range(0, n, size):
        path = folder / f"{prefix}{start:06d}.npz" if folder else None
        if path and path.exists():
            parts.append(load_npz(path))
            continue
        print(f"{what}: {start} of {n}", flush=True)
        parts.append({name: np.asarray(a) for name, a in make(start, min(size, n - start)).items()})
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_npz(path, parts[-1])
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def summarised(sim, summary, key, n: int, theta=None, *, of=None, folder: Path | None = None) -> np.ndarray:
    """Summaries `(n, d)` of simulations without scores; theta is None, one vector, or one for each row.

    `summary` takes rows of maps, and with `of` each row's entry of that too; blocks are kept in `folder`.
    """

    def make(start: int, count: int) -> dict:
        which = slice(start, start + count)
        x = sim.draw(key, count, theta[which] if np.ndim(theta) == 2 else theta, with_score=False, start=start).x
        return {"t": summary(x) if of is None else summary(x, of[which])}

    return in_blocks("simulations without scores", n, 100, make, folder)["t"]


def frame_draws(sim, numbers, key, n: int) -> np.ndarray:
    """`n` draws of the normal that `numbers` begin with (`inference.pack_frame`), as parameters."""
    mean, root = LocalFrame(sim.prior.dim).unpack(jnp.asarray(numbers))
    normal = jax.random.normal(key, (n, sim.prior.dim))
    return np.asarray(sim.prior.from_unconstrained(mean[None] + normal @ root.T))


def distances(theta, references: dict[str, np.ndarray], names, seed: int) -> dict:
    """C2ST from each of the references; shift and width against the one named "c2st"."""
    moments = compare_moments(theta, references["c2st"], names)
    found = {name: c2st(theta, to, seed=seed, duplicates="drop").value for name, to in references.items()}
    shift, width = (np.asarray(a).tolist() for a in (moments.shift, moments.width_ratio))
    return found | dict(shift=shift, width_ratio=width)


def calibration(samples, theta) -> dict:
    """TARP and ranks of draws `(n, m, p)` at n observations whose parameters were `theta`."""
    ball = tarp(samples, theta)
    p_values = sbc_test(sbc_ranks(samples, theta), samples.shape[1]).tolist()
    return dict(
        observations=len(theta), rank_p_values=p_values,
        tarp_p_value=ball.p_value, levels=ball.levels.tolist(), shares=ball.coverage.tolist(),
    )  # fmt: skip


def calibration_of(files: Iterable[Path]) -> dict:
    """`calibration` of the "samples" and "theta" of all files together."""
    found = [load_npz(path) for path in files]
    return calibration(*(np.concatenate([f[part] for f in found]) for part in ("samples", "theta")))


def local_check(files: Iterable[Path], t, t_observed) -> dict:
    """L-C2ST at the observation of all files together, whose tests were of `t (n, d)`.

    Of the mixture of the fits, as `calibration_of`: where every one is right, so are all of them together, but errors
    that cancel are not seen. Empty for files of older versions, and for too few tests.
    """
    found = [load_npz(path) for path in files]
    if any("observed" not in f for f in found) or len(t) < LOCAL_TESTS:
        return {}
    theta, samples, observed = (np.concatenate([f[part] for f in found]) for part in ("theta", "samples", "observed"))
    test = local_c2st(theta, t, samples[:, 0], t_observed, observed)
    return dict(local=test.statistic, local_null=float(test.null.mean()), local_p_value=test.p_value)


def predicted(sim, x, theta, key, n: int = 200) -> dict:
    """Spectra, moments and peaks of the map x among those of `n` simulations at draws of a posterior."""
    statistics = summaries.map_statistics(sim.n_pix, sim.side_deg, sim.noise)
    rows = np.random.default_rng(0).permutation(len(theta))[:n]
    made = summarised(sim, jax.jit(lambda x: jax.lax.map(statistics, x)), key, len(rows), jnp.asarray(theta[rows]))
    found = predictive_check(made, np.asarray(statistics(x)), statistics.names)
    return dict(
        p_value=found.p_value, simulations=found.n, worst=list(found.worst), least=float(min(found.tail_probability))
    )


def draws_under(posterior, proposal, t, key, n: int = 200) -> np.ndarray:
    """`n` draws `(m, n, p)` of the posteriors of m rows of numbers, with `proposal` for the prior unless it is None."""
    key_draw, key_choose = jax.random.split(key)
    settings = {"sampler": "hmc"} if isinstance(posterior, LikelihoodPosterior) and len(t) > 1 else {}
    if isinstance(posterior, ReweightedPosterior):
        samples = posterior.under_proposal().sample(key_draw, n, t)
    elif proposal is None:
        samples = posterior.sample(key_draw, n, t, **settings)
    else:  # draws under the prior, those under the proposal chosen among them
        theta = posterior.sample(key_draw, 5 * n, t, **settings)
        log_weight = proposal.log_prob(theta) - posterior.prior.log_prob(theta)
        # With replacement: without, the last ones are where the weight is small.
        chosen = jax.random.categorical(key_choose, log_weight, axis=0, shape=(n, log_weight.shape[1]))
        samples = jnp.take_along_axis(theta, chosen[..., None], axis=0)
    return np.asarray(samples).swapaxes(0, 1)


def print_calibration(cases: list[dict], names) -> None:
    """A line for each case: `calibration` with its estimator, score and n."""
    for case in cases:
        if case is cases[0]:
            print(f"\nCalibration on {case['observations']} observations: p-values of TARP and of the ranks of {names}")
        ranks = " ".join(f"{p:.3f}" for p in case["rank_p_values"])
        here = f"; L-C2ST at the map {case['local_p_value']:.3f}" if "local_p_value" in case else ""
        print(f"{case['estimator']} {case['score']:12} {case['n']:6}: {case['tarp_p_value']:.3f}; {ranks}{here}")


def merits(theta, chain, names) -> dict[str, float]:
    """Figures of merit of draws, over those of the chain."""
    own, full = (figure_of_merit(samples, names, PAIRS) for samples in (theta, chain))
    return {name: own[pair] / full[pair] for name, pair in zip(MERITS, PAIRS, strict=True)}


def lost(theta, t, chain, proposal: GaussianProposal) -> dict[str, float]:
    r"""What numbers t lose, were all posteriors normal: the residuals of a linear regression against the full field's.

    All is in the prior's unconstrained space, where the proposal that `theta` comes from is normal; the chain's draws
    are weighted to its posterior under that proposal. The chain is of one map: others differ.

    Returns:
        "widths", the mean over the parameters of log(residual's / full field's standard deviation); "volume", half the
        log of the ratio of the generalised variances; and the standard errors of both, of a Wishart matrix.
    """
    prior, dim = proposal.prior, proposal.prior.dim
    u, full = (np.asarray(prior.to_unconstrained(jnp.asarray(a)), float) for a in (theta, chain))
    log_weight = np.asarray(proposal.log_prob(jnp.asarray(chain)) - prior.log_prob(jnp.asarray(chain)), float)
    covariance = np.cov(full.T, aweights=np.exp(log_weight - log_weight.max()))
    t = np.asarray(t, float)[:, np.ptp(t, 0) > 0]  # in frames some numbers are the same for all
    design = np.c_[np.ones(len(t)), (t - t.mean(0)) / t.std(0)]
    residual = u - design @ np.linalg.lstsq(design, u)[0]
    freedom = len(u) - design.shape[1]
    if freedom < dim:
        least = design.shape[1] + dim
        raise ValueError(f"Expected at least {least} simulations for {t.shape[1]} numbers; got {len(u)}.")
    half = (freedom - np.arange(dim)) / 2
    bias = digamma(half) - np.log(freedom / 2)  # of the log of a Wishart matrix's generalised variance
    own = residual.T @ residual / freedom
    widths = np.log(np.diag(own) / np.diag(covariance)) - bias[0]
    volume = np.linalg.slogdet(own)[1] - np.linalg.slogdet(covariance)[1] - bias.sum()
    return dict(
        widths=float(widths.mean() / 2), widths_error=float(np.sqrt(polygamma(1, half[0])) / 2),
        volume=float(volume / 2), volume_error=float(np.sqrt(polygamma(1, half).sum()) / 2),
    )  # fmt: skip


def about(sim) -> dict:
    """What a figure of posteriors says besides them."""
    return dict(names=sim.names, truth=np.asarray(sim.fiducial).tolist(), bounds=prior_bounds(sim.prior))
