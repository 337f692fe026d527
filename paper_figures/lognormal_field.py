"""How det F of networks grows towards the full field's on a noisy log-normal field: `experiments.lognormal_field`."""

import math
from pathlib import Path

from diffsbi import plotting
from diffsbi._files import read_json
from paper_figures import command_line
from paper_figures.imnn import histories


def draw(runs: Path) -> plotting.Figure:
    found = read_json(runs / "lognormal_field" / "information.json")
    exact = math.exp(found["full_field"]["log_det"])
    titles = {row["name"]: _title(row["name"]) for row in found["rows"]}
    rows = [row | dict(exact=exact) for row in found["rows"]]
    return histories(rows, titles, "det F / full field's det F")


def _title(name: str) -> str:
    return "powers in bands" if name == "powers" else f"with {name.replace('-', ' + ')} learned maps"


if __name__ == "__main__":
    command_line(draw, "lognormal_field")
