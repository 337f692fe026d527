"""The published map's full-field posterior with the shift as read and as it is. From `experiments.full_field`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import load_npz, read_json
from paper_figures import command_line

CASES = {"published_shift": "published shift (axes swapped)", "correct_shift": "correct shift"}


def draw(runs: Path) -> plotting.Figure | None:
    folders = {case: runs / "full_field" / case for case in CASES}
    if not all((folder / "comparison.json").is_file() for folder in folders.values()):
        print("shift_effect: left out; it needs the published observation (DIFFSBI_DATA) in experiments.full_field")
        return None
    samples = {case: load_npz(folder / "full_field" / "samples.npz")["theta"] for case, folder in folders.items()}
    comparison = read_json(folders["correct_shift"] / "comparison.json")
    flat = {case: theta.reshape(-1, theta.shape[-1]) for case, theta in samples.items()}
    truth = {"omega_c": 0.2664, "omega_b": 0.0492, "sigma_8": 0.831, "h_0": 0.6727, "n_s": 0.9645, "w_0": -1.0}
    return plotting.contours(flat, comparison["names"], truth=truth, titles=CASES, bounds=comparison["bounds"])


if __name__ == "__main__":
    command_line(draw, "shift_effect")
