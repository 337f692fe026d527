"""C2ST against the full field by gradients of the joint: `experiments.path`."""

from pathlib import Path

import numpy as np

from diffsbi import plotting
from diffsbi._files import load_npz, read_json
from paper_figures import command_line

TITLES = {"path": "path sampling", "chains": "HMC stopped early"}


def draw(runs: Path) -> dict[str, plotting.Figure]:
    folder = runs / "path"
    found = read_json(folder / "distances.json")
    points = []
    for method, n in dict.fromkeys((row["method"], row["n"]) for row in found["rows"]):
        rows = [row for row in found["rows"] if (row["method"], row["n"]) == (method, n)]
        c2st = [row["c2st"] for row in rows]
        error = float(np.std(c2st, ddof=1) / np.sqrt(len(c2st))) if len(c2st) > 1 else 0.0
        points.append((TITLES[method], float(np.mean([row["gradients"] for row in rows])), float(np.mean(c2st)), error))
    title, levels = f"gradients ({found['n_pix']}² × 5)", {"power spectrum": found["spectrum"]}
    figure = plotting.curves(points, title, "C2ST against the full field", levels, log_y=False)
    n = max(row["n"] for row in found["rows"] if row["method"] == "path")
    samples = {"full_field": load_npz(folder / "full_field.npz")["theta"]}
    samples["path"] = load_npz(folder / "fits" / f"path_{n}_0.npz")["theta"]
    gradients = next(row["gradients"] for row in found["rows"] if (row["method"], row["n"]) == ("path", n))
    titles = {"full_field": "full field (HMC)", "path": f"path sampling, {gradients} gradients"}
    truth = dict(zip(found["names"], found["truth"], strict=True))
    contours = plotting.contours(samples, found["names"], truth=truth, titles=titles, bounds=found["bounds"])
    return {"path": figure, "path_contours": contours}


if __name__ == "__main__":
    command_line(draw, "path")
