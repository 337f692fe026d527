"""The whole path as stages of a run folder: observe, compress, simulate, infer, sample, compare."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi import inference, sampling, summaries
from diffsbi._files import digest, load_npz, write_json, write_npz
from diffsbi._types import check_names
from diffsbi.comparison import METHODS, compare_posteriors, dropped, outside_training, prior_bounds, unconverged
from diffsbi.config import Config, parse_config, with_table
from diffsbi.flows import FLOWS
from diffsbi.observation import band_spectra, describe_units, parse_axis_order, read_map
from diffsbi.runs import Run, start_run
from diffsbi.simulators.lensing import LensingMaps, lsst_y10
from diffsbi.store import TRAINING, Block, SimulationStore, bad_rows, create_store, open_store, training_rows

STREAMS = (
    "observation", "compression", "simulations", "npe", "npe_score", "power_spectrum", "full_field", "compare",
    "gaussian_field", "path",
)  # fmt: skip
FREE = ("simulations.max_nonfinite", "compare", "path.n_points", "path.until_error", "path.n_draws") + tuple(
    f"full_field.{name}" for name in ("enabled", "max_rhat", "until_ess", "n_draws")
)
"""Settings that may change in a run without changing what its stages have made."""

__all__ = ["METHODS", "STAGES", "Analysis", "begin", "load_samples"]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """One run and what its stages share. Every method does its stage once and loads its result afterwards."""

    run: Run
    config: Config
    sim: LensingMaps
    progress: bool = True

    @functools.cached_property
    def statistics(self):
        survey = self.config.survey
        return summaries.map_statistics(survey.n_pix, survey.side_deg, self.sim.noise, self.config.summaries.n_bands)

    def observe(self) -> np.ndarray:
        """The observed map `(n_bins, n_pix, n_pix)`, read from its file or simulated."""
        self.run.once("observation", self._observe)
        return load_npz(self.run.path("observation", "observation.npz"))["x"]

    def compress(self):
        """The score compression at the fiducial parameters."""
        self.run.once("compression", self._compress)
        return summaries.ScoreCompression.load(self.run.path("compression", "compression.npz"))

    def simulate(self) -> SimulationStore:
        """The training simulations: theta, statistics, score, and the maps if they are kept.

        Raises:
            ValueError: If a block is damaged, or more simulations than allowed are not finite.
        """
        self.run.once("simulations", self._simulate)
        store = open_store(self.run.path("simulations", "store.zarr"))
        self._fill(store)  # a block whose damaged file was deleted
        self._check_finite(store)
        return store

    def infer(self, method: str):
        """The neural posterior, `"npe"` without scores or `"npe_score"` with them."""
        check_names([method], ["npe", "npe_score"], "method")
        x, compress, store = self.observe(), self.compress(), self.simulate()
        self.run.once(method, functools.partial(self._infer, method, x, compress, store))
        return inference.load_posterior(self.run.path(method, "posterior"))

    def power_spectrum(self) -> None:
        """NUTS on the likelihood of the binned spectra."""
        self.run.once("power_spectrum", functools.partial(self._power_spectrum, self.observe()))

    def gaussian_field(self) -> None:
        """NUTS on the exact likelihood of a Gaussian field with the same spectra."""
        work = functools.partial(self._baseline, "gaussian_field", sampling.gaussian_field_posterior, {})
        self.run.once("gaussian_field", functools.partial(work, self.observe()))

    def path(self) -> None:
        """The full-field posterior from some thousand gradients; goes on where more points are wanted."""
        done, settings = self.run.finished("path") and self.run.account("path"), self.config.path
        more = done and done["n_points"] < settings.n_points and done["error"] > (settings.until_error or 0)
        self.run.once("path", functools.partial(self._path, self.observe()), more=bool(more))

    def full_field(self) -> None:
        """Markov chains on the joint of parameters and latents; goes on where more draws are wanted than there are."""
        more = self.run.finished("full_field") and self._wants_more(self.run.account("full_field"))
        self.run.once("full_field", functools.partial(self._full_field, self.observe()), more=more)

    def _wants_more(self, account: Mapping) -> bool:
        settings = self.config.full_field
        if settings.n_draws <= account["draws"]:
            return False
        if settings.until_ess is None:
            return True
        return min(account["ess"].values()) < settings.until_ess or max(account["rhat"].values()) >= settings.max_rhat

    def compare(self) -> dict:
        """Means, widths, figures of merit and distances of the posteriors that are there."""
        done = [name for name in METHODS if self.run.finished(name)]
        if not done:
            raise ValueError(f"Expected at least one posterior in {self.run.folder}; run `diffsbi infer` first.")
        samples = {name: load_samples(self.run, name) for name in done}
        accounts = {name: self.run.account(name) for name in done}
        settings = self.config.compare
        result = compare_posteriors(
            samples, accounts, self.sim.names, settings.pairs, n_samples=settings.n_samples, seed=self.config.seed
        )
        result["bounds"] = prior_bounds(self.sim.prior)
        result["warnings"] += unconverged(accounts, self.config.full_field.max_rhat)
        write_json(self.run.path("comparison.json"), result)
        return result

    def _observe(self, folder: Path) -> Mapping:
        survey, settings = self.config.survey, self.config.observation
        truth = None
        if settings.file is not None:
            x = read_map(settings.file, settings.axis_order, survey.n_bins, survey.n_pix)
        else:
            truth = _truth(self.sim, self.config)
            theta = jnp.array([truth[name] for name in self.sim.names])
            draws = self.sim.draw(self.run.key("observation"), 1, theta, with_score=False)
            x = np.asarray(draws.x[0])
        np.savez(folder / "observation.npz", x=x)
        theta = self.sim.fiducial if truth is None else jnp.array([truth[name] for name in self.sim.names])
        spectra = band_spectra(self.sim, x, theta, self.config.summaries.n_bands)
        np.savez(folder / "spectra.npz", **spectra)
        account = {"file": settings.file, "sha256": settings.sha256, "truth": truth, "names": list(self.sim.names)}
        return account | {"warnings": describe_units(x, self.sim.noise), "simulations": 0 if settings.file else 1}

    def _compress(self, folder: Path) -> Mapping:
        settings = self.config.summaries

        def simulate(theta, key):
            return self.sim.draw_one(key, theta)[2]

        compression = summaries.score_compression(
            self.statistics,
            simulate,
            self.sim.fiducial,
            self.run.key("compression"),
            n_covariance=settings.n_covariance,
            n_derivative=settings.n_derivative,
            progress=self.progress,
            keep=functools.partial(_keep_batch, folder / "batches"),
        )
        compression.save(folder / "compression.npz")
        return {"simulations": compression.n_simulations, "statistics": len(self.statistics.names)}

    def _simulate(self, folder: Path) -> Mapping:
        settings, survey = self.config.simulations, self.config.survey
        arrays: dict[str, tuple[int, ...]] = {"theta": (self.sim.prior.dim,), "score": (self.sim.prior.dim,)}
        arrays |= {"statistics": (len(self.statistics.names),)}
        if settings.keep_maps:
            arrays["x"] = (survey.n_bins, survey.n_pix, survey.n_pix)
        store = create_store(
            folder / "store.zarr",
            config={
                "survey": survey.model_dump(mode="json"),
                "latents": settings.latents,
                "n_average": settings.n_average,
                "n_bands": self.config.summaries.n_bands,
            },
            seed=self.config.seed,
            names=self.sim.names,
            n=settings.n,
            arrays=arrays,
            block_size=settings.block_size,
        )
        self._fill(store)
        return {"simulations": settings.n}

    def _fill(self, store: SimulationStore) -> None:
        for block in store.each_missing(self.progress):
            store.write(block, self._simulate_block(block))

    @functools.cached_property
    def _averaging_steps(self) -> int | None:
        settings = self.config.simulations
        if settings.n_average == 1:
            return None
        return self.sim.averaging_steps(self.run.key("simulations"), settings.latents)

    def _simulate_block(self, block: Block) -> dict[str, np.ndarray]:
        settings = self.config.simulations
        options: dict[str, Any] = {"latents": settings.latents, "n_average": settings.n_average}
        key, options["n_steps"] = self.run.key("simulations"), self._averaging_steps
        draws = self.sim.draw(key, len(block), start=block.start, **options)
        rows = {"theta": draws.theta, "score": draws.score, "statistics": _over_rows(self.statistics, draws.x)}
        if settings.keep_maps:
            rows["x"] = draws.x
        return {name: np.asarray(value) for name, value in rows.items()}

    def _infer(self, method: str, x, compress, store, folder: Path) -> Mapping:
        settings = self.config.flow
        rows = training_rows(store, compress)
        left_out = store.n - len(rows["theta"])
        with_score = method == "npe_score"
        key_fit, key_sample = jax.random.split(self.run.key(method))
        observed = compress(self.statistics(jnp.asarray(x)))
        npe = inference.NPE(self.sim.prior, settings.density, score_weight=settings.score_weight)
        npe.append(rows["theta"], rows["t"], rows["score"] if with_score else None)
        posterior = npe.fit(
            key_fit,
            members=settings.members,
            max_epochs=settings.max_epochs,
            patience=settings.patience,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            progress=self.progress,
        )
        posterior = posterior.condition(observed)
        posterior.save(folder / "posterior")
        theta = np.asarray(posterior.sample(key_sample, settings.n_samples))
        np.savez(folder / "samples.npz", theta=theta[None])
        histories = [_curve(history) for history in posterior.histories]
        write_json(folder / "history.json", histories)
        return {
            "rows": len(rows["theta"]),  # reused, not simulated for this stage
            "dropped": left_out,
            "scores_left_out": posterior.config["scores_left_out"],
            "steps": sum(history.steps for history in posterior.histories),
            "stop_reasons": [history.stop_reason for history in posterior.histories],
            "warnings": dropped(left_out) + outside_training(self.sim.names, np.asarray(observed), rows["t"]),
        }

    def _check_finite(self, store: SimulationStore) -> None:
        blocks = zip(store.blocks, store.iterate(TRAINING), strict=True)
        bad = np.concatenate([block.start + bad_rows(rows) for block, rows in blocks])
        allowed = self.config.simulations.max_nonfinite
        if len(bad) > allowed:
            first = int(bad[0])
            where = dict(zip(store.names, map(float, store["theta"][first : first + 1][0]), strict=True))
            raise ValueError(
                f"Expected at most {allowed} non-finite simulations (simulations.max_nonfinite); got {len(bad)} of "
                f"{store.n}, the first at row {first}, {where}. Dropping them biases the posterior."
            )

    def _power_spectrum(self, x, folder: Path) -> Mapping:
        n = self.config.power_spectrum.n_covariance
        options: dict[str, Any] = {"n_bands": self.config.summaries.n_bands}
        key_covariance, _ = jax.random.split(self.run.key("power_spectrum"))
        if n:
            settings = options | {"progress": self.progress}
            covariance = functools.partial(sampling.band_power_covariance, self.sim, key_covariance, n, **settings)
            options |= {"covariance": _keep_batch(folder, "covariance", lambda: np.asarray(covariance()))}
        account = self._baseline("power_spectrum", sampling.power_spectrum_posterior, options, x, folder)
        return dict(account, simulations=n)

    def _baseline(self, name: str, posterior: Callable, options: Mapping, x, folder: Path) -> Mapping:
        settings = getattr(self.config, name)
        chains = posterior(
            self.sim,
            jnp.asarray(x),
            self.run.key(name),
            n_chains=settings.n_chains,
            n_warmup=settings.n_warmup,
            n_samples=settings.n_draws,
            folder=folder / "blocks",
            progress=self.progress,
            **options,
        )
        return _save_chains(chains, folder)

    def _path(self, x, folder: Path) -> Mapping:
        settings, (key, key_sample) = self.config.path, jax.random.split(self.run.key("path"))
        options = dict(folder=folder / "blocks", progress=self.progress) | settings.model_dump(exclude={"n_draws"})
        found = sampling.path_posterior(self.sim, jnp.asarray(x), key, **options)
        np.savez(folder / "samples.npz", theta=np.asarray(found.sample(key_sample, settings.n_draws))[None])
        account = dict(gradients=found.gradients, error=found.error, n_points=settings.n_points)
        advice = f"path sampling leaves errors of {account['error']:.2f} standard deviations; raise path.n_points"
        return account | {"warnings": [advice] * (account["error"] > (settings.until_error or np.inf))}

    def _full_field(self, x, folder: Path) -> Mapping:
        settings = self.config.full_field
        chains = sampling.full_field_posterior(
            self.sim,
            jnp.asarray(x),
            self.run.key("full_field"),
            n_chains=settings.n_chains,
            n_warmup=settings.n_warmup,
            n_samples=settings.n_draws,
            sampler=settings.sampler,
            latents=settings.latents,
            until_ess=settings.until_ess,
            max_rhat=settings.max_rhat,
            maps=settings.maps,
            folder=folder / "blocks",
            progress=self.progress,
        )
        return _save_chains(chains, folder)


def begin(config: Config, folder: str | Path, *, progress: bool = True) -> Analysis:
    """Open (or go on with) the run of `config` in `folder`.

    The observation's file is checked, and its SHA-256 becomes part of the configuration, before anything is written.

    Raises:
        FileNotFoundError, ValueError: If the observation, the survey or the folder is not as it must be.
    """
    settings = config.observation
    config = config.model_copy(update={"survey": with_table(config.survey, settings.file)})
    sim = lsst_y10(**config.survey.model_dump())
    check_names(list(settings.truth), sim.names)
    check_names([name for pair in config.compare.pairs for name in pair], sim.names)
    check_names([config.flow.density], list(FLOWS), "density")
    for section in (config.simulations, config.full_field):
        sim.transport(section.latents)
    check_names([config.full_field.sampler], ["best", *sampling.EXACT], "sampler")
    sim.prior.check([_truth(sim, config)[name] for name in sim.names])
    if settings.file is not None:
        read_map(settings.file, settings.axis_order, config.survey.n_bins, config.survey.n_pix)
        path = Path(settings.file).resolve()
        observation = settings.model_copy(update={"file": str(path), "sha256": digest(path)})
        config = config.model_copy(update={"observation": observation})
    elif settings.axis_order is not None:
        parse_axis_order(settings.axis_order, ())
    return Analysis(start_run(folder, config.resolved(), STREAMS, FREE, _complete), config, sim, progress)


def _complete(config: Mapping) -> Mapping:
    return parse_config(dict(config)).resolved()


def _truth(sim, config: Config) -> dict[str, float]:
    """The parameters of a simulated observation."""
    fiducial = dict(zip(sim.names, map(float, sim.fiducial), strict=True))
    return fiducial | config.observation.truth


def load_samples(run: Run, method: str) -> np.ndarray:
    """Posterior draws of one method, `(chains, draws, p)`."""
    run.check(method)
    return load_npz(run.path(method, "samples.npz"))["theta"]


@eqx.filter_jit
def _over_rows(function: Callable, x):
    """`function` of each row, one after the other: bounded memory."""
    return jax.lax.map(function, x)


def _curve(history) -> dict:
    return {
        "train": history.train.tolist(),
        "validation": history.validation.tolist(),
        "best_epoch": int(history.best_epoch),
    }


def _keep_batch(folder: Path, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Rows of a batch: from its file if an interrupted attempt left it, else computed and written, whole or not."""
    path = folder / f"{name}.npz"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        write_npz(path, {"rows": compute()})
    return load_npz(path)["rows"]


def _save_chains(chains, folder: Path) -> Mapping:
    """Write the draws; return their convergence and cost as the account."""
    chains.save(folder)
    np.savez(folder / "samples.npz", theta=chains.theta)
    summary = chains.summary()
    return {
        "gradients": chains.gradients,
        "rhat": {name: row.rhat for name, row in summary.items()},
        "ess": {name: row.ess_bulk for name, row in summary.items()},
        "gradients_per_effective_sample": chains.gradients_per_effective_sample(),
        "divergences": chains.n_diverging,
        "chains": chains.n_chains,
        "draws": chains.n_draws,
        "sampler": chains.settings["sampler"],
        "cut_short": chains.n_cut_short,
    }


STAGES: dict[str, tuple[str, str, Callable[[Analysis], object]]] = {
    "observe": ("observation", "observation", Analysis.observe),
    "compress": ("score compression of the map statistics", "compression", Analysis.compress),
    "simulate": ("training simulations with scores", "simulations", Analysis.simulate),
    "npe": ("neural posterior", "npe", lambda analysis: analysis.infer("npe")),
    "npe_score": ("neural posterior trained with scores", "npe_score", lambda analysis: analysis.infer("npe_score")),
    "power_spectrum": ("power-spectrum posterior (NUTS)", "power_spectrum", Analysis.power_spectrum),
    "gaussian_field": ("Gaussian-field posterior (NUTS)", "gaussian_field", Analysis.gaussian_field),
    "path": ("full-field posterior by path sampling", "path", Analysis.path),
    "full_field": ("full-field posterior", "full_field", Analysis.full_field),
}
"""What the command line shows of each stage: its title, its folder in the run, and how it is done."""
