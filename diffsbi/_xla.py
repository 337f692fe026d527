"""A fault of XLA that is switched off where it is known."""

import os
from importlib.metadata import version

FAULTY = ("0.10.2", "0.11.0")
FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def avoid_faults() -> None:
    """Switch off the fusions by which these releases of jaxlib die of a segmentation fault on CPUs.

    Sums of products of seven and more dimensions are rewritten for a library that reads beyond its arrays
    (github.com/jax-ml/jax/issues/39257). It happens under `vmap` of `jacfwd` of the maps' statistics. A choice of the
    user's in XLA_FLAGS is kept. XLA reads the flags once: of no use where JAX has computed something before.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if version("jaxlib") in FAULTY and FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}=".strip()


avoid_faults()  # on import: some modules of the package compute constants when they are imported
