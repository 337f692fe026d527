"""How many simulations do scores save on lensing maps? NPE and NLE, without scores and with scores of less noise.

One LSST-Y10 map, simulated or the published one; every posterior is compared with the converged full-field chain of
that map by C2ST. Maps are compressed to a number for each parameter, which loses information: no posterior given these
numbers comes nearer to the full field's than that allows. The numbers are spectra, moments and peaks by score
compression at the fiducial (`summary="statistics"`), or, without any simulation, the marginal score at the proposal's
centre, the mean over a short chain on the map's latents (`"marginal_score"`), or the score at the latents that two
gradients find, almost as good on small maps (`"latent_scores"`). Or each map comes with its own normal approximation,
in whose coordinates NPE then works: the posterior of a Gaussian field (`"field_mode"`), that of a short path of
marginal scores (`"path_mode"`, with momenta of each seed's own), or that of the observed map's path, moved by each
map's marginal score (`"score_frame"`). Draws of that normal are compared by themselves. Every posterior is also
compared with what the numbers themselves say, as NLE (NPE for frames) learns it from `n_reference` simulations without
scores. Parameters are drawn from the prior, from the power-spectrum posterior of the map, or from that of its path
(`gaussian_proposal`). Each seed has its own simulations; those of a smaller N are the first ones of a larger.

Calibration (SBC ranks, TARP) is tested on `n_coverage` simulated observations from where the parameters were drawn,
shared out among the seeds: of the way of fitting, not of one fit. The prior there is that proposal. L-C2ST asks the
same at the map itself, and posterior predictive checks whether simulations at the posterior look like the map.
"""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import numpy as np

import diffsbi as ds
from diffsbi import summaries
from diffsbi._files import load_npz, read_json, write_json, write_npz
from diffsbi.compression import GaussianFieldMode, LatentScores, MarginalScore, PathMode, ScoreChange, ScoreFrame
from diffsbi.diagnostics import misspecification
from experiments import command_line
from experiments.curves import print_saved, print_table
from experiments.lensing import (
    MERITS,
    MapConfig,
    about,
    begin,
    calibration_of,
    compress,
    distances,
    draws_under,
    frame_draws,
    in_blocks,
    local_check,
    lost,
    merits,
    path_draws,
    predicted,
    print_calibration,
    spectrum_proposal,
    summarised,
)

ESTIMATORS = {"NPE": ds.NPE, "NLE": ds.NLE}
FRAMES = ("field_mode", "path_mode", "score_frame")
PROPOSALS = ("prior", "spectrum", "path")
SUMMARIES = ("statistics", "latent_scores", "marginal_score", *FRAMES)
STAGES = (
    "observed", "reference", "spectrum", "compression", "simulations", "summaries", "fits", "given_summaries", "paths",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MapConfig):
    """`summary`: one of `SUMMARIES`; `turns` of "marginal_score", "score_frame", and "path_mode" at up to `n_points`.
    `steps` of a turn of the former two, by default by the number of pixels.

    `change`: of the score along w_0 as well, behind the numbers of "score_frame".

    `proposal`: one of `PROPOSALS`; a "path" has `n_points` points. `scores`: latents, averaged draws.

    The first `n_scored` simulations of each seed have scores; all `n_reference` of the summaries' own fit have none.
    """

    summary: str = "statistics"
    turns: int = 12
    steps: int | None = None
    change: bool = False
    n_points: int = 72
    proposal: str = "spectrum"
    n: tuple[int, ...] = (25, 50, 100, 200, 400, 600, 1000, 2000)
    n_scored: int = 2000
    seeds: int = 5
    estimators: tuple[str, ...] = tuple(ESTIMATORS)
    scores: tuple[tuple[str, int], ...] = (("white", 1), ("whitened", 8))
    n_covariance: int = 400
    n_derivative: int = 50
    n_reference: int = 20_000
    coverage_n: tuple[int, ...] = (100, 400)
    n_coverage: int = 500
    n_samples: int = 2000
    members: int = 4


# NPE in each map's own frame.
_frames = functools.partial(Config, estimators=("NPE",), coverage_n=(100,), members=2)

PRESETS = {
    "smoke": Config(
        n_pix=16, summary="marginal_score", turns=4, n=(20,), n_scored=20, seeds=1, estimators=("NPE",),
        scores=(("whitened", 2),), n_reference=60, coverage_n=(20,), n_coverage=50, n_samples=200, members=1, ess=20,
        n_warmup=20, n_draws=40, n_chains=2, n_spectrum=10,
    ),
    "paper": Config(),
    "prior": Config(proposal="prior", seeds=3),
    # 64² with the quiet scores alone, up to 400 simulations.
    "short": Config(n=(50, 100, 200, 400), n_scored=400, scores=(("whitened", 8),), n_reference=8000),
    # 64², compressed by gradients alone: no simulation but those of the fits.
    "latent_scores": Config(summary="latent_scores", n_reference=4000, coverage_n=(100,)),
    # Parameters from the whole prior.
    "prior_frames": _frames(
        summary="field_mode", proposal="prior", n=(25, 50, 100, 200, 400), n_scored=200, n_reference=1500,
    ),
    # The same in the frames of short paths.
    "prior_paths": _frames(
        summary="path_mode", turns=2, proposal="prior", n=(25, 50, 100), n_scored=100, scores=(("whitened", 8),),
        n_reference=500,
    ),
    # Few, and few to test them on: two hours on one core.
    "large_prior_paths": _frames(
        n_pix=256, summary="path_mode", turns=2, proposal="prior", n=(25,), n_scored=25, seeds=4,
        scores=(("whitened", 8),), n_reference=40, coverage_n=(25,), n_coverage=40, ess=1000.0,
    ),
    # The full configuration, by gradients alone.
    "large": Config(
        n_pix=256, summary="marginal_score", steps=4, n_scored=1000, n_reference=5000, coverage_n=(100,),
        n_coverage=505, ess=1000.0, members=2,
    ),
    # The published observation with the shift that it was made with.
    "published": Config(
        n_pix=256, observation="published", summary="marginal_score", steps=4, n=(25, 50, 100, 200, 400, 600, 1000),
        n_scored=600, n_reference=2000, coverage_n=(100,), n_coverage=505, ess=500.0, members=2,
    ),
    # From where the map's path is, in frames of that path's posterior.
    "path_frames": _frames(
        proposal="path", n_points=48, widen=1.5, summary="score_frame", turns=24, n=(25, 50, 100, 400), n_scored=100,
        n_reference=1500,
    ),
}  # fmt: skip
PRESETS |= {
    "large_prior_frames": dataclasses.replace(PRESETS["prior_frames"], n_pix=256, ess=1000.0),
    "large_path_frames": dataclasses.replace(
        PRESETS["path_frames"], n_pix=256, n=(25, 50, 100), n_reference=505, n_coverage=505, ess=1000.0
    ),
}
PRESETS["published_path"] = dataclasses.replace(
    PRESETS["large_path_frames"], observation="published", n=(25, 50), n_scored=50, coverage_n=(50,), ess=500.0
)


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `distances.json`, print the table."""
    if cfg.proposal not in PROPOSALS:
        raise ValueError(f"Expected a proposal among {PROPOSALS}; got {cfg.proposal!r}.")
    if cfg.summary == "score_frame" and cfg.proposal != "path":
        raise ValueError(f"Expected proposal 'path' with summary 'score_frame'; got {cfg.proposal!r}.")
    if cfg.change and cfg.summary != "score_frame":
        raise ValueError(f"Expected summary 'score_frame' with change=True; got {cfg.summary!r}.")
    if cfg.summary not in SUMMARIES:
        raise ValueError(f"Expected a summary among {SUMMARIES}; got {cfg.summary!r}.")
    if cfg.summary in FRAMES and cfg.estimators != ("NPE",):
        raise ValueError(f"Expected estimators ('NPE',) with summary {cfg.summary!r}; got {cfg.estimators}.")
    _check_sizes(cfg)
    sim, run, x, chain = begin(cfg, "scores_lensing", out, STAGES)
    proposal, summary, pool, many = simulated(cfg, sim, run, x)
    observed = [summary(x[None], [seed])[0] for seed in range(cfg.seeds if cfg.summary == "path_mode" else 1)]
    run.once("given_summaries", functools.partial(_given_summaries, cfg, sim, proposal, many, observed, chain, run))
    given_numbers = load_npz(run.path("given_summaries", "samples.npz"))["theta"]
    references = [{"c2st": chain, "c2st_summaries": theta} for theta in given_numbers]
    rows = []
    for seed, n, kind, name in itertools.product(range(cfg.seeds), cfg.n, [None, *cfg.scores], cfg.estimators):
        if kind is not None and n > cfg.n_scored:
            continue
        path = out / "fits" / f"{name}_{score_name(kind)}_{n}_{seed}.json"
        if not path.exists():
            print(path.stem, flush=True)
            key, arrays = jax.random.fold_in(run.key("fits"), 1000 * seed + n), rows_of(cfg, pool, many, seed, n, kind)
            posterior = _posterior(cfg, sim, ESTIMATORS[name], proposal, arrays, key)
            if n in cfg.coverage_n:
                at = (many, observed[seed % len(observed)], seed, key)
                write_npz(path.with_suffix(".npz"), _at_observations(cfg, posterior, proposal, *at))
            theta = _draws(posterior, key, cfg.n_samples, observed[seed % len(observed)])
            write_npz(path.with_suffix(".draws.npz"), {"theta": theta})
            found = distances(theta, references[seed % len(observed)], sim.names, seed)
            write_json(path, found | merits(theta, chain, sim.names))
        rows.append(read_json(path) | dict(estimator=name, score=score_name(kind), n=n, seed=seed))
    frames = _frames_alone(cfg, sim, observed, references, run.key("fits"))
    limit = run.account("given_summaries")
    fitted = dict.fromkeys((r["n"], r["score"], r["estimator"]) for r in rows if r["n"] in cfg.coverage_n)
    coverage = []
    for n, score, name in fitted:
        files = [out / "fits" / f"{name}_{score}_{n}_{seed}.npz" for seed in range(cfg.seeds)]
        tested = np.concatenate([many["t"][_tested(cfg, many, seed)] for seed in range(cfg.seeds)])
        here = local_check(files, tested, observed[0]) if len(observed) == 1 else {}
        coverage.append(dict(estimator=name, score=score, n=n) | calibration_of(files) | here)
    predictions = _predictions(sim, x, chain, fitted, out, jax.random.fold_in(run.key("summaries"), 1))
    found = dict(rows=rows, limit=limit["c2st"], frames=frames, coverage=coverage, predictions=predictions)
    write_json(out / "distances.json", found | about(sim))
    tables = {"c2st": "C2ST against the full field", "c2st_summaries": "C2ST against what the summaries hold"} | MERITS
    for value, title in tables.items():
        print(f"\n{title}, mean and standard error over {cfg.seeds} seeds")
        print_table(rows, ("estimator", "score"), value)
        for name, kind in itertools.product(cfg.estimators, cfg.scores if value not in MERITS else ()):
            print_saved(rows, {"estimator": name}, score_name(kind), value)
    if frames:
        print("\nC2ST of the frames by themselves against the full field")
        print_table(frames, ("estimator",))
    print(f"What the summaries hold against the full field: {limit}")
    print_calibration(coverage, sim.names)
    for case in predictions:
        least = f"{case['least']:.3f} the least by itself ({case['worst'][0]})"
        print(f"The map among predictions of {case['of']}: p = {case['p_value']:.2f} of all statistics, {least}")


def simulated(cfg: Config, sim, run, x):
    """Where parameters are from (None: the prior), the summary, and simulations with and without scores."""
    proposal = _proposal(cfg, sim, x, run)
    summary = _summary(cfg, sim, proposal, run, x)
    run.once("simulations", lambda folder: _simulate(cfg, sim, summary, proposal, run, folder))
    run.once("summaries", lambda folder: _many(cfg, sim, summary, proposal, run, folder))
    pools = (load_npz(run.path(stage, "pool.npz")) for stage in ("simulations", "summaries"))
    return proposal, summary, *pools


def _check_sizes(cfg: Config) -> None:
    """Fits past the scored simulations take rows from the front of the reference ones, test observations the last.

    None of the fits that are tested (`coverage_n`) may train on these.
    """
    if cfg.summary == "path_mode" and max(cfg.n) > cfg.n_scored:
        raise ValueError(f"Expected n <= n_scored with summary 'path_mode'; got {max(cfg.n)} and {cfg.n_scored}.")
    trained = cfg.seeds * max(0, max(cfg.n) - cfg.n_scored)
    tested = trained if max(cfg.coverage_n, default=0) > cfg.n_scored else 0
    least = max(trained, tested + cfg.n_coverage)
    if cfg.n_coverage < cfg.seeds or cfg.n_reference < least:
        raise ValueError(
            f"Expected n_coverage >= seeds ({cfg.seeds}) and n_reference >= {least}, of which the seeds train on "
            f"{trained}; got n_reference={cfg.n_reference}, n_coverage={cfg.n_coverage}."
        )


def score_name(kind: tuple[str, int] | None) -> str:
    return "none" if kind is None else f"{kind[0]}_{kind[1]}"


def _proposal(cfg: Config, sim, x, run):
    """Where parameters are drawn from; None for the prior."""
    if cfg.proposal == "prior":
        return None
    if cfg.proposal == "spectrum":
        return spectrum_proposal(cfg, sim, x, run)
    run.once("paths", lambda folder: _path(cfg, sim, x, run, folder))
    return ds.gaussian_proposal(sim, load_npz(run.path("paths", "draws.npz"))["theta"], cfg.widen)


def _path(cfg: Config, sim, x, run, folder: Path) -> dict:
    """Draws of the posterior that a path of gradients gives."""
    found = path_draws(sim, x, run.key("paths"), cfg.n_points, 4000, folder / "blocks")
    write_npz(folder / "draws.npz", {"theta": found["theta"]})
    return {"gradients": int(found["gradients"])}


def _summary(cfg: Config, sim, proposal, run, x):
    """The function of rows of maps, and of the seed that each is for, that all posteriors are given."""
    if cfg.summary == "path_mode":
        modes = [PathMode(sim, n_points=cfg.n_points, n_turns=cfg.turns, seed=seed) for seed in range(cfg.seeds)]
        return lambda x, seeds: np.concatenate([modes[s].many(row[None]) for row, s in zip(x, seeds, strict=True)])
    same_for_all = _summary_of_maps(cfg, sim, proposal, run, x)
    return lambda x, seeds: same_for_all(x)


def _summary_of_maps(cfg: Config, sim, proposal, run, x):
    centre = sim.fiducial if proposal is None else sim.prior.from_unconstrained(proposal.loc)
    if cfg.summary == "marginal_score":
        return MarginalScore(sim, centre, n_turns=cfg.turns, n_steps=cfg.steps).many
    if cfg.summary == "score_frame":
        at = functools.partial(MarginalScore, sim, n_turns=cfg.turns, n_steps=cfg.steps)
        if cfg.change:
            at = functools.partial(ScoreChange, at, sim, step=proposal.along("w_0"))
        return ScoreFrame(at, sim, centre, x, load_npz(run.path("paths", "draws.npz"))["theta"]).many
    if cfg.summary == "field_mode":
        return GaussianFieldMode(sim).many
    if cfg.summary == "latent_scores":
        return LatentScores(sim, centre, rates=(0.1,), last=True).many
    statistics = summaries.map_statistics(sim.n_pix, sim.side_deg, sim.noise)
    sizes = (cfg.n_covariance, cfg.n_derivative)
    run.once("compression", lambda folder: compress(sim, statistics, run.key("compression"), folder, *sizes))
    compression = summaries.ScoreCompression.load(run.path("compression", "compression.npz"))
    return jax.jit(lambda x: jax.lax.map(lambda row: compression(statistics(row)), x))


def _simulate(cfg: Config, sim, summary, proposal, run, folder: Path) -> dict:
    """Scored simulations, in blocks that an interrupted run keeps."""
    n = cfg.seeds * cfg.n_scored
    key_theta, key_draw = jax.random.split(run.key("simulations"))
    theta = (sim.prior if proposal is None else proposal).sample(key_theta, (n,))
    steps = {kind: sim.averaging_steps(key_draw, kind[0]) for kind in cfg.scores if kind[1] > 1}

    def make(start: int, count: int) -> dict:
        part = {}
        for kind in cfg.scores:
            options = dict(latents=kind[0], n_average=kind[1], n_steps=steps.get(kind), start=start)
            draws = sim.draw(key_draw, count, theta[start : start + count], **options)
            part[score_name(kind)] = draws.score
        seeds = np.arange(start, start + count) // cfg.n_scored
        return part | {"theta": draws.theta, "t": summary(draws.x, seeds)}

    write_npz(folder / "pool.npz", in_blocks("scored simulations", n, 50, make, folder / "blocks"))
    return {"simulations": n}


def _many(cfg: Config, sim, summary, proposal, run, folder: Path) -> dict:
    """Summaries of many simulations without scores."""
    key_theta, key_draw = jax.random.split(run.key("summaries"))
    theta = (sim.prior if proposal is None else proposal).sample(key_theta, (cfg.n_reference,))
    seeds = (cfg.n_reference - 1 - np.arange(cfg.n_reference)) // (cfg.n_coverage // cfg.seeds) % cfg.seeds
    t = summarised(sim, summary, key_draw, cfg.n_reference, theta, of=seeds, folder=folder / "blocks")
    write_npz(folder / "pool.npz", {"theta": np.asarray(theta), "t": t})
    return {"simulations": cfg.n_reference}


def rows_of(cfg: Config, pool, many, seed: int, n: int, kind):
    """Parameters, summaries and scores of one seed's first n simulations; past the scored ones, those without."""
    first = slice(seed * cfg.n_scored, seed * cfg.n_scored + min(n, cfg.n_scored))
    theta, t = pool["theta"][first], pool["t"][first]
    if n > cfg.n_scored:
        width = max(cfg.n) - cfg.n_scored
        more = slice(seed * width, seed * width + n - cfg.n_scored)
        theta, t = np.concatenate([theta, many["theta"][more]]), np.concatenate([t, many["t"][more]])
    return theta, t, None if kind is None else pool[score_name(kind)][first]


def _posterior(cfg: Config, sim, estimator, proposal, arrays, key):
    options = {"framed": True} if cfg.summary in FRAMES else {}
    rows = estimator(sim.prior, **options).append(*arrays, proposal=proposal)
    return rows.fit(jax.random.split(key)[0], members=cfg.members)


def _draws(posterior, key, n: int, x) -> np.ndarray:
    return np.asarray(posterior.sample(jax.random.split(key)[1], n, x))


def _frames_alone(cfg: Config, sim, observed, references, key) -> list[dict]:
    """How far draws of each observed frame's own normal are from the references; none for other summaries."""
    rows = []
    for seed, x in enumerate(observed if cfg.summary in FRAMES else ()):
        theta = frame_draws(sim, x, jax.random.fold_in(key, seed), cfg.n_samples)
        rows.append(distances(theta, references[seed], sim.names, seed) | dict(estimator=cfg.summary, n=0, seed=seed))
    return rows


def _tested(cfg: Config, many, seed: int) -> slice:
    """This seed's share of the test observations, none of which was trained on."""
    share = cfg.n_coverage // cfg.seeds
    return slice(len(many["theta"]) - (seed + 1) * share, len(many["theta"]) - seed * share)


def _at_observations(cfg: Config, posterior, proposal, many, observed, seed: int, key) -> dict[str, np.ndarray]:
    """Parameters of this seed's test observations, draws for each, and draws for the map itself."""
    rows = _tested(cfg, many, seed)
    samples = draws_under(posterior, proposal, many["t"][rows], jax.random.fold_in(key, 1))
    here = draws_under(posterior, proposal, observed[None], jax.random.fold_in(key, 2), 400)[0]
    return dict(theta=many["theta"][rows], samples=samples, observed=here)


def _predictions(sim, x, chain, fitted, out: Path, key) -> list[dict]:
    """Posterior predictive checks of the full field and of the first seed's tested fits."""
    cases = [(f"{name} {score} {n}", out / "fits" / f"{name}_{score}_{n}_0") for n, score, name in fitted]
    rows = []
    for of, fit in [("the full field", out / "full_field"), *cases]:
        path = out / "predictions" / f"{fit.name}.json"
        if not path.exists():
            theta = chain if fit.name == "full_field" else load_npz(fit.with_suffix(".draws.npz"))["theta"]
            write_json(path, predicted(sim, x, theta, key))
        rows.append({"of": of} | read_json(path))
    return rows


def _given_summaries(cfg: Config, sim, proposal, many, observed, chain, run, folder: Path) -> dict:
    """What the summaries say, from all simulations without scores; "alike": p of the map's distance among theirs."""
    arrays, n = (many["theta"], many["t"], None), 2 * cfg.n_samples
    key = run.key("given_summaries")
    estimators = (ds.NLE, ds.NPE) if cfg.summary not in FRAMES else (ds.NPE,)
    fitted = [_posterior(cfg, sim, e, proposal, arrays, key) for e in estimators]
    theta, *others = (_draws(posterior, key, n, observed[0]) for posterior in fitted)
    more = [_draws(fitted[0], key, n, x) for x in observed[1:]]
    write_npz(folder / "samples.npz", {"theta": np.stack([theta, *more])})
    account = distances(theta, dict(zip(("c2st", "c2st_npe"), (chain, *others), strict=False)), sim.names, 0)
    by_regression = {} if proposal is None else {"lost": lost(many["theta"], many["t"], chain, proposal)}
    alike = misspecification(many["t"], observed[0], level=0.05).p_value
    return account | by_regression | {"alike": alike, "simulations": cfg.n_reference}


if __name__ == "__main__":
    command_line(main, PRESETS, "scores_lensing")
