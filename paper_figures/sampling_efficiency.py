"""What an effective sample costs: samplers and coordinates, and the size of the map. From `experiments.sampling`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import read_json
from paper_figures import command_line


def draw(runs: Path) -> dict[str, plotting.Figure]:
    costs = read_json(runs / "sampling" / "costs.json")
    reference = costs["reference"]
    sizes = [row["n_pix"] for row in costs["rows"]]
    shown = max(size for size in sizes if sizes.count(size) > 1)
    rows = [row for row in costs["rows"] if row["n_pix"] == shown]
    bars = {row["name"] + "\n(not converged)" * (row["rhat"] > 1.05): row["cost"] for row in rows}
    bars |= {"published (NUTS, white), 256²": costs["published"]}
    figures = {"sampling_efficiency": plotting.efficiency(bars, title=f"{shown}² × 5 map; worst parameter in figures")}
    curve = sorted(
        (5 * row["n_pix"] ** 2, max(row["cost"].values())) for row in costs["rows"] if row["name"] == reference
    )
    latents, values = zip(*curve, strict=True)
    fit = {reference: (costs["amplitude"], costs["exponent"])}
    return figures | {"cost_with_size": plotting.cost_with_size(latents, {reference: values}, fit)}


if __name__ == "__main__":
    command_line(draw, "sampling_efficiency")
