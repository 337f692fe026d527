"""How det F of information maximising networks grows, on training and on validation. From `experiments.imnn`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import read_json
from paper_figures import command_line

TITLES = {
    "normal": "mean and variance",
    "fixed": "the same, fixed simulations",
    "variance": "variance",
    "field": "Gaussian field, 128²",
}


def draw(runs: Path) -> plotting.Figure:
    rows = read_json(runs / "imnn" / "information.json")["rows"]
    return histories(rows, TITLES, "det F / exact det F")


def histories(rows: list[dict], titles: dict[str, str], label: str) -> plotting.Figure:
    """Training and validation of every seed in units of the exact determinant, a panel for each name of `titles`."""
    by_name = {name: [row for row in rows if row["name"] == name] for name in titles}
    shares = {name: [_share(row) for row in found] for name, found in by_name.items() if found}
    figure = plotting.training_curves(shares, titles, ("gradient steps", label))
    for axis, name in zip(figure.axes, shares, strict=True):
        # A validation set's own noise is common to its whole curve; the dots are many more simulations, all new.
        steps = [row["every"] * row["best_epoch"] for row in by_name[name]]
        measured = [row["det"] / row["exact"] for row in by_name[name]]
        axis.plot(steps, measured, "o", ms=4, color=plotting.CYCLE[1], label="new simulations", zorder=3)
        axis.axhline(1.0, color="0.4", lw=0.8, ls="--")
        axis.set_ylim(top=max(1.05, axis.get_ylim()[1]))
        axis.get_legend().remove()
    figure.axes[0].legend(loc="lower right", frameon=False, fontsize=8)
    return figure


def _share(row: dict) -> dict:
    """A history in units of the exact determinant."""
    scaled = {name: [value / row["exact"] for value in row[name]] for name in ("train", "validation")}
    return scaled | {"best_epoch": row["best_epoch"], "every": row["every"]}


if __name__ == "__main__":
    command_line(draw, "imnn")
