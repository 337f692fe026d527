"""A fault of XLA that is switched off where it is known; little optimisation where that is asked for."""

import os
from importlib.metadata import version

import jax

FAULTY = ("0.10.2", "0.11.0")
FLAG = "--xla_cpu_experimental_ynn_fusion_type"
QUICK = ("--xla_cpu_use_fusion_emitters=false", "--xla_backend_optimization_level=1")
QUICK_RELEASES = "0.10."  # XLA aborts on a flag that it does not know


def avoid_faults() -> None:
    """Switch off the fusions by which these releases of jaxlib die of a segmentation fault on CPUs.

    Sums of products of seven and more dimensions are rewritten for a library that reads beyond its arrays
    (github.com/jax-ml/jax/issues/39257). It happens under `vmap` of `jacfwd` of the maps' statistics. A choice of the
    user's in XLA_FLAGS is kept. XLA reads the flags once: of no use where JAX has computed something before.
    """
    if version("jaxlib") in FAULTY:
        _add_flags(f"{FLAG}=")


def compile_quickly() -> None:
    """With DIFFSBI_COMPILE=quick in the environment, compile large programs in less than a third of the time.

    What is compiled then runs some four times slower: for tests and quick looks. A choice of the user's in XLA_FLAGS or
    JAX_DISABLE_MOST_OPTIMIZATIONS is kept.
    """
    choice = os.environ.get("DIFFSBI_COMPILE", "")
    if choice not in ("", "quick"):
        raise ValueError(f"Expected DIFFSBI_COMPILE to be 'quick' or empty; got {choice!r}.")
    if choice != "quick":
        return
    if version("jaxlib").startswith(QUICK_RELEASES):
        _add_flags(*QUICK)
    if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
        jax.config.update("jax_disable_most_optimizations", True)


def _add_flags(*flags: str) -> None:
    """To XLA_FLAGS, but for those that it has with any value."""
    there = os.environ.get("XLA_FLAGS", "")
    if missing := [flag for flag in flags if flag.partition("=")[0] not in there]:
        os.environ["XLA_FLAGS"] = " ".join([there, *missing]).strip()


compile_quickly()
avoid_faults()  # on import: some modules of the package compute constants when they are imported
