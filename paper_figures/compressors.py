"""Information by compressor and number of simulations; contours against the full field: `experiments.compressors`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import load_npz, read_json
from paper_figures import command_line, compared, mean_points

TITLES = {
    "mse": "MSE",
    "mae": "MAE",
    "gnll": "Gaussian\nNLL",
    "vmim": "VMIM",
    "vmim_without_scores": "VMIM, no\nscores",
    "score": "score\nregr.",
    "imnn": "IMNN",
    "statistics": "statis-\ntics",
    "wavelets": "wave-\nlets",
    "hybrid": "VMIM +\nstatistics",
    "latent_scores": "latent\nscores",
    "score_change": "latent scores\nand change",
    "marginal_score": "marginal\nscore",
}
LOSSES = ("mse", "mae", "gnll", "vmim", "score", "imnn")
FREE = ("latent_scores", "score_change", "marginal_score")

DRAWN = {
    "vmim": "network (VMIM)", "hybrid": "network beside statistics", "latent_scores": "latent scores",
    "score_change": "latent scores and change", "marginal_score": "marginal score",
}  # fmt: skip


def draw(runs: Path) -> dict[str, plotting.Figure]:
    folder = runs / "compressors"
    found = read_json(folder / "compressors.json")
    names = [name for name in TITLES if any(row["compressor"] == name for row in found["rows"])]
    figures = {}
    for value, label in (("log_density", "mean log-density, nats"), ("c2st", "C2ST against the full field")):
        points = [point for i, name in enumerate(names) for point in _points(found["rows"], name, i, value)]
        ticks = [TITLES[name] for name in names]
        width = max(6.2, 0.85 * len(names))  # or their titles run into each other
        figures[f"compressors_{value}"] = plotting.curves(points, "", label, {}, False, False, ticks, width=width)
    most = {row["compressor"]: row["n"] for row in reversed(found["rows"]) if row["seed"] == 0}
    drawn = {"contours": DRAWN, "losses": {name: TITLES[name].replace("\n", " ") for name in LOSSES}}
    for figure, titles in drawn.items():
        paths = {name: folder / "fits" / f"{name}_{most[name]}_0.npz" for name in titles if name in most}
        paths = {"full_field": folder / "full_field.npz"} | paths
        samples = {name: load_npz(path)["theta"] for name, path in paths.items()}
        figures[f"compressors_{figure}"] = compared(found, samples, {"full_field": "full field"} | titles)
    return figures


def _points(rows: list[dict], name: str, place: int, value: str) -> list[tuple[str, float, float, float]]:
    """One point for each number of simulations, side by side."""
    chosen = [row for row in rows if row["compressor"] == name]
    sizes = sorted({row["n"] for row in rows})
    titles = {n: f"{n} simulations" for n in sizes}
    found = mean_points(chosen, titles, value, by="n")
    if name in FREE:
        return [("no simulation", place, *point) for _, _, *point in found]
    middle = (len(sizes) - 1) / 2
    return [(title, place + 0.15 * (sizes.index(n) - middle), *point) for title, n, *point in found]


if __name__ == "__main__":
    command_line(draw, "compressors")
