"""Speed of the simulator, its scores and its joint, beside the Fourier transforms that it needs at least.

And time and memory of a gradient that trains a network on maps, beside those of its convolutions alone; and draws from
each conditional density beside the passes of its network that they need at least.

Run by `make bench`. Times are medians of single calls, warm, float32, in one process; compilation is timed in
processes of their own, with an empty and with a filled persistent cache.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import equinox as eqx
import jax
import jax.numpy as jnp

import diffsbi as ds
from diffsbi.compression import MapNetwork, fit_compressor, torus_symmetry
from diffsbi.compression.learned import Objective
from diffsbi.compression.losses import LOSSES
from diffsbi.compression.networks import folded, halved, padded_convolution
from diffsbi.flows import FLOWS

_STEPS = 4  # of training, in one loop
SIZES = {"64² × 5, 5°": (64, 5.0), "256² × 5, 10°": (256, 10.0)}

# sbi_lens (arXiv:2409.17975) with jax 0.4.30 on two busy CPU cores: wall seconds, and seconds to trace and compile.
PEER = {
    ("64² × 5, 5°", "simulate"): (0.38, 59),
    ("256² × 5, 10°", "simulate"): (1.55, 56),
    ("256² × 5, 10°", "simulate + score, white"): (2.05, 275),
    ("256² × 5, 10°", "joint and gradient, white"): (2.45, 303),
}


def median_time(function, *arguments, budget: float = 4.0) -> float:
    """Median seconds of one call, over as many calls as fit the budget (at least 5)."""
    jax.block_until_ready(function(*arguments))
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - start < budget:
        before = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def simulate(sim, key):
    return sim.draw_one(key)


def simulate_and_score(sim, key, latents):
    theta, z, x = sim.draw_one(key)
    return x, sim.score(theta, z, x, latents=latents)


def joint_and_gradient(sim, theta, z, x, latents):
    return jax.value_and_grad(sim.log_joint, (0, 1))(theta, z, x, latents=latents)


def measure(size: str) -> dict[str, float]:
    """Median seconds by operation at one size, with the FFT floor."""
    n_pix, side = SIZES[size]
    sim, key = ds.lsst_y10(n_pix=n_pix, side_deg=side), jax.random.key(0)
    theta, z, x = eqx.filter_jit(simulate)(sim, key)
    fourier = jax.jit(lambda a: jnp.fft.irfft2(jnp.fft.rfft2(a)))
    result = {"ten real 2-d FFTs": median_time(fourier, x), "simulate": median_time(eqx.filter_jit(simulate), sim, key)}
    for latents in ("white", "whitened"):
        score, gradient = eqx.filter_jit(simulate_and_score), eqx.filter_jit(joint_and_gradient)
        result[f"simulate + score, {latents}"] = median_time(score, sim, key, latents)
        result[f"joint and gradient, {latents}"] = median_time(gradient, sim, theta, z, x, latents)
    return result


def compile_gradient(n_pix: int, side: float) -> float:
    """Seconds from a built simulator to the first gradient of the joint: trace, compile (or load), run once."""
    sim = ds.lsst_y10(n_pix=n_pix, side_deg=side)
    theta, z = sim.fiducial, jnp.zeros((sim.n_bins, n_pix, n_pix))
    start = time.perf_counter()
    jax.block_until_ready(eqx.filter_jit(joint_and_gradient)(sim, theta, z, z, "white"))
    return time.perf_counter() - start


def compile_times(size: str) -> tuple[float, float]:
    """(cold, from the persistent cache) in seconds, each in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        return _compile_in_process(size, cache), _compile_in_process(size, cache)


def _compile_in_process(size: str, cache: str) -> float:

    command = [sys.executable, "-m", "experiments.benchmarks", "--compile", size]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"DIFFSBI_CACHE": cache}
    )
    return json.loads(done.stdout.splitlines()[-1])


def convolutions(network: MapNetwork, x):
    """The network's convolutions, each of the halved result of the one before: what its training needs at least.

    XLA's own, which are at their best here, outside a loop.
    """
    x = folded(x, network.fold)
    for level, convolution in enumerate(network.convolutions):
        x = padded_convolution(convolution.weight, halved(x) if level else x)
    return jnp.sum(x)


def measure_training(n_pix: int, batch: int = 16) -> dict[str, tuple[float, int]]:
    """Median seconds of a gradient in the weights for a batch of maps, and the bytes that it needs besides the maps.

    A step of training is taken as in a fit, in a loop, where XLA's convolutions would take ten times longer.
    """
    sim, keys = ds.lsst_y10(), jax.random.split(jax.random.key(0), 4)
    x = 0.03 * jax.random.normal(keys[0], (2 * batch, sim.n_bins, n_pix, n_pix))
    theta, network = sim.prior.sample(keys[1], (len(x),)), MapNetwork(keys[2], sim.n_bins, (16, 32, 32), fold=2)
    compressor = fit_compressor(keys[3], network, theta, x, prior=sim, loss="mse", max_epochs=1, batch_size=batch)
    rows = {"x": x[:batch], "v": jnp.zeros((batch, sim.prior.dim))}

    objective = Objective(LOSSES["mse"], torus_symmetry)

    def alone(params, static, rows):
        return jnp.mean(jax.vmap(lambda row: convolutions(eqx.combine(params, static)[0].network, row))(rows["x"]))

    def steps(params, static, rows):
        def one(params, _):
            gradient = jax.grad(objective)(params, static, rows, keys[0])
            return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient), None

        return jax.lax.scan(one, params, length=_STEPS)[0]

    params, static = eqx.partition((compressor, None), eqx.is_inexact_array)
    found = {}
    for name, function, count in (("its convolutions", jax.grad(alone), 1), ("a step of training", steps, _STEPS)):
        compiled = jax.jit(lambda p, rows, f=function: f(p, static, rows)).lower(params, rows).compile()
        seconds = median_time(compiled, params, rows) / count
        found[name] = (seconds, compiled.memory_analysis().temp_size_in_bytes)
    return found


def measure_densities(n: int = 10_000, dim: int = 6) -> dict[str, tuple[float, float]]:
    """Median seconds of n log-densities and of n draws, under one condition, of each density in six dimensions."""
    key, condition = jax.random.key(0), jnp.zeros(dim)
    theta = jax.random.normal(key, (n, dim))
    density = eqx.filter_jit(lambda flow, theta: flow.log_prob(theta, condition))
    draws = eqx.filter_jit(lambda flow, key: flow.sample(key, (n,), condition))
    flows = {name: build(key, dim, dim) for name, build in FLOWS.items()}
    return {name: (median_time(density, f, theta), median_time(draws, f, key)) for name, f in flows.items()}


def main() -> None:
    if sys.argv[1:2] == ["--compile"]:
        print(json.dumps(compile_gradient(*SIZES[sys.argv[2]])))
        return
    print(f"device: {jax.devices()[0]}, jax {jax.__version__}, float32\n")
    for size in SIZES:
        floor = None
        print(f"{size:34}{'ms':>9}{'× FFTs':>9}{'peer / ours':>13}")
        for name, seconds in measure(size).items():
            floor = floor or seconds
            peer = PEER.get((size, name))
            ratio = "" if peer is None else f"{peer[0] / seconds:.0f}"
            print(f"  {name:32}{1e3 * seconds:9.2f}{seconds / floor:9.1f}{ratio:>13}", flush=True)
        cold, cached = compile_times(size)
        peer = PEER.get((size, "joint and gradient, white"))
        beside = "" if peer is None else f"; the peer's: {peer[1]} s"
        print(f"  first gradient: {cold:.1f} s cold, {cached:.1f} s from the persistent cache{beside}\n", flush=True)
    print(f"{'MapNetwork, 16 maps of 256² × 5':34}{'ms':>9}{'MiB':>9}")
    for name, (seconds, size) in measure_training(256).items():
        print(f"  {name:32}{1e3 * seconds:9.1f}{size / 2**20:9.0f}", flush=True)
    print(f"\n{'10 000 rows of a density, 6-d':34}{'log q, ms':>12}{'draws, ms':>12}{'ratio':>9}")
    for name, (density, draws) in measure_densities().items():
        print(f"  {name:32}{1e3 * density:12.1f}{1e3 * draws:12.1f}{draws / density:9.1f}", flush=True)


if __name__ == "__main__":
    main()
