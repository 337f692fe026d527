"""Information by compressor and number of simulations; contours against the full field: `experiments.compressors`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import load_npz, read_json
from paper_figures import command_line, mean_points

TITLES = {
    "mse": "MSE",
    "mae": "MAE",
    "gnll": "Gaussian NLL",
    "vmim": "VMIM",
    "score": "score regression",
    "imnn": "IMNN",
    "hybrid": "VMIM beside statistics",
    "statistics": "statistics",
    "latent_scores": "latent scores",
}
DRAWN = ("imnn", "vmim", "hybrid", "latent_scores")


def draw(runs: Path) -> dict[str, plotting.Figure]:
    folder = runs / "compressors"
    found = read_json(folder / "compressors.json")
    rows = [row | {"score": row["compressor"]} for row in found["rows"]]
    trained = [row for row in rows if row["compressor"] != "latent_scores"]
    free = [row["log_density"] for row in rows if row["compressor"] == "latent_scores"]
    levels = {"latent scores, no simulation": sum(free) / len(free)} if free else {}
    figure = plotting.curves(
        mean_points(trained, TITLES, "log_density"), "simulations that the compressor is trained on",
        "mean log-density of the parameters, nats", levels, log_y=False,
    )  # fmt: skip
    most = {row["compressor"]: row["n"] for row in rows if row["seed"] == 0}
    samples = {"full_field": load_npz(folder / "full_field.npz")["theta"]}
    for name in DRAWN:
        if name in most:
            samples[name] = load_npz(folder / "fits" / f"{name}_{most[name]}_0.npz")["theta"]
    truth = dict(zip(found["names"], found["truth"], strict=True))
    titles = {"full_field": "full field"} | TITLES
    contours = plotting.contours(samples, found["names"], truth=truth, titles=titles)
    return {"compressors_information": figure, "compressors_contours": contours}


if __name__ == "__main__":
    command_line(draw, "compressors")
