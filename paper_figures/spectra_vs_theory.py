"""Mean band powers of noiseless maps against the spectra they were drawn from. From `experiments.maps`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import load_npz
from diffsbi.runs import open_run
from paper_figures import command_line


def draw(runs: Path) -> plotting.Figure:
    run = open_run(runs / "maps")
    spectra = load_npz(run.path("power", "spectra.npz"))
    label = f"mean of {run.config['n_maps']} maps"
    return plotting.spectra(**spectra, measured_label=label, theory_label="input spectrum", residuals=True)


if __name__ == "__main__":
    command_line(draw, "spectra_vs_theory")
