"""C2ST against the full field by gradients of the joint: `experiments.path`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import load_npz, read_json
from paper_figures import command_line, compared, mean_points

TITLES = {"path": "path sampling", "chains": "HMC stopped early"}


def draw(runs: Path) -> dict[str, plotting.Figure]:
    folder = runs / "path"
    found = read_json(folder / "distances.json")
    points = mean_points(found["rows"], TITLES, by="method", against="gradients")
    title, levels = f"gradients ({found['n_pix']}² × 5)", {"power spectrum": found["spectrum"]}
    figure = plotting.curves(points, title, "C2ST against the full field", levels, log_y=False)
    n = max(row["n"] for row in found["rows"] if row["method"] == "path")
    samples = {"full_field": load_npz(folder / "full_field.npz")["theta"]}
    samples["path"] = load_npz(folder / "fits" / f"path_{n}_0.npz")["theta"]
    gradients = next(row["gradients"] for row in found["rows"] if (row["method"], row["n"]) == ("path", n))
    titles = {"full_field": "full field (HMC)", "path": f"path sampling, {gradients} gradients"}
    return {"path": figure, "path_contours": compared(found, samples, titles)}


if __name__ == "__main__":
    command_line(draw, "path")
