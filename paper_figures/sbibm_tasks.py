"""C2ST of NPE and NLE on the benchmark's tasks, with and without scores. From `experiments.sbibm_tasks`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import read_json
from paper_figures import command_line, mean_points

TITLES = {
    f"{estimator} {score}": f"{estimator}{title}"
    for estimator in ("NPE", "NLE")
    for score, title in {"none": "", "exact": ", scores", "published": ", published"}.items()
}
TASKS = {
    "gaussian_mixture": "Gaussian\nmixture",
    "two_moons": "two moons",
    "slcp": "SLCP",
    "bernoulli_glm": "Bernoulli\nGLM",
    "sir": "SIR",
}


def draw(runs: Path) -> dict[str, plotting.Figure] | None:
    path = runs / "sbibm_tasks" / "distances.json"
    if not path.is_file():
        print("sbibm_tasks: left out; it needs experiments.sbibm_tasks, which needs the benchmark's files")
        return None
    rows = [row | {"score": f"{row['estimator']} {row['score']}"} for row in read_json(path)["rows"]]
    return {f"sbibm_tasks_{n}": _of_size(rows, n) for n in dict.fromkeys(row["n"] for row in rows)}


def _of_size(rows: list[dict], n: int) -> plotting.Figure:
    """All tasks side by side, the ways of fitting a little apart."""
    tasks, points = [task for task in TASKS if any(row["task"] == task for row in rows)], []
    for i, task in enumerate(tasks):
        chosen = mean_points([row for row in rows if (row["task"], row["n"]) == (task, n)], TITLES)
        places = {title: i + 0.1 * (k - 2.5) for k, title in enumerate(TITLES.values())}
        points += [(title, places[title], value, error) for title, _, value, error in chosen]
    names = [TASKS[task] for task in tasks]
    return plotting.curves(
        points, f"{n} simulations", "C2ST against the reference", {}, log_y=False, log_x=False, ticks=names
    )


if __name__ == "__main__":
    command_line(draw, "sbibm_tasks")
