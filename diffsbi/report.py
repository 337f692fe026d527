"""One self-contained HTML page for a run: what was done, the posteriors, and how far to trust them."""

import base64
import html
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from diffsbi import plotting
from diffsbi._files import load_npz, read_json, write_atomically
from diffsbi.comparison import METHODS as TITLES
from diffsbi.runs import Run

__all__ = ["write_report"]


def write_report(run: Run) -> Path:
    """Write `report.html` into the run's folder and return its path; it needs `comparison.json` (`diffsbi compare`)."""
    path = run.folder / "report.html"
    comparison_file = run.folder / "comparison.json"
    if not comparison_file.is_file():
        raise ValueError(f"Expected {comparison_file}; run `diffsbi compare --out {run.folder}` first.")
    comparison = read_json(comparison_file)
    manifest = run.manifest
    methods = [name for name in TITLES if name in comparison["methods"]]
    body = [
        _headline(run, comparison, manifest, methods),
        _posterior_section(run, comparison, methods),
        _quality_section(comparison, methods, run.config),
        _data_section(run),
        _reconstruction_section(run, methods),
        _training_section(run, methods),
        _provenance_section(run, manifest),
    ]
    title = f"diffsbi: {run.config['name']}"
    write_atomically(path, _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(body)))
    return path


def _headline(run, comparison, manifest, methods) -> str:
    survey, observed = run.config["survey"], run.account("observation")
    source = f"read from <code>{html.escape(observed['file'])}</code>" if observed["file"] else "simulated"
    if observed["truth"]:
        source += " at known parameters (marked in the figures)"
    side, pixels = survey["side_deg"], survey["n_pix"]
    seconds = sum(stage["seconds"] for stage in manifest["stages"].values())
    calls = sum(stage["account"].get("simulations", 0) for stage in manifest["stages"].values())
    facts = [
        ("survey", f"{side:g}° × {side:g}°, {pixels} × {pixels} pixels, {survey['n_bins']} redshift bins"),
        ("fields", f"{survey['field']}, σ<sub>e</sub> = {survey['sigma_e']:g}, {survey['density']:g} galaxies/arcmin²"),
        ("observation", source),
        ("posteriors", ", ".join(TITLES[name] for name in methods)),
        ("simulator calls", f"{calls:,}"),
        ("time", _duration(seconds) + f" on {manifest['cpus']} CPU cores, {html.escape(manifest['device']['kind'])}"),
    ]
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
    return f"<h1>{html.escape(run.config['name'])}</h1><dl class=facts>{rows}</dl>{_warnings(manifest, comparison)}"


def _warnings(manifest, comparison) -> str:
    found = [w for stage in manifest["stages"].values() for w in stage["account"].get("warnings", [])]
    found = list(dict.fromkeys([*found, *comparison.get("warnings", [])]))
    if not found:
        return '<p class="note good">No warnings.</p>'
    return (
        '<div class="note bad"><b>Warnings</b><ul>'
        + "".join(f"<li>{html.escape(w)}</li>" for w in found)
        + "</ul></div>"
    )


def _posterior_section(run, comparison, methods) -> str:
    names = comparison["names"]
    truth = run.account("observation")["truth"]
    drawn = sorted(methods, key=lambda m: m != comparison["reference"])  # the reference first: it is filled
    samples = {m: _thin(load_npz(run.path(m, "samples.npz"))["theta"]) for m in drawn}
    figure = plotting.contours(samples, names, truth=truth, titles=TITLES, bounds=comparison.get("bounds"))
    head = "".join(f"<th>{_symbol(name)}</th>" for name in names)
    rows = []
    if truth:
        rows.append("<tr><td>truth</td>" + "".join(f"<td>{truth[name]:.4g}</td>" for name in names) + "</tr>")
    for m in methods:
        row = comparison["methods"][m]
        cells = (f"<td>{_value(mean, std)}</td>" for mean, std in zip(row["mean"], row["std"], strict=True))
        rows.append(f"<tr><td>{_swatch(m)}{TITLES[m]}</td>{''.join(cells)}</tr>")
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    caption = "68 % and 95 % credible regions" + ("; thin lines mark the truth." if truth else ".")
    return f"<h2>Posteriors</h2><p>Mean ± standard deviation.</p>{table}{_image(figure, caption)}"


def _quality_section(comparison, methods, config) -> str:
    pairs = list(next(iter(comparison["methods"].values()))["figure_of_merit"])
    reference = comparison["reference"]
    head = ["", *(f"FoM<br>{'–'.join(_symbol(n) for n in p.split(','))}" for p in pairs)]
    head += ["C2ST", "worst mean shift", "width ratio", "R̂ (worst)", "ESS (worst)", "gradients", "per ESS (worst)"]
    rows = []
    for m in methods:
        row = comparison["methods"][m]
        account, distance = row["account"], row.get("distance", {})
        cells = [_swatch(m) + TITLES[m], *(f"{row['figure_of_merit'][p]:,.0f}" for p in pairs)]
        is_reference = "reference" if m == reference else "–"
        cells.append(f"{distance['c2st']:.3f} ± {distance['c2st_error']:.3f}" if "c2st" in distance else is_reference)
        cells.append(_shift(distance) if "mean_shift" in distance else "–")
        cells.append(_ratio(distance) if "width_ratio" in distance else "–")
        rhat, ess = account.get("rhat"), account.get("ess")
        cells.append(_flag(max(rhat.values()), config["full_field"]["max_rhat"]) if rhat else "–")
        cells.append(f"{min(ess.values()):,.0f}" if ess else "–")
        cells.append(f"{account['gradients']:,}" if "gradients" in account else "–")
        cost = account.get("gradients_per_effective_sample")
        cells.append(f"{max(cost.values()):,.1f}" if cost else "–")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    thead = "".join(f"<th>{cell}</th>" for cell in head)
    legend = (
        "<b>FoM</b>, figure of merit, is 1/√det of the two parameters' covariance: larger is tighter. "
        "<b>C2ST</b> is the accuracy of a classifier that tries to tell a method's draws from the reference's: "
        "0.5 means it cannot, 1 that it always can. <b>Mean shift</b> is in standard deviations of the reference. "
        "<b>R̂</b> compares chains with each other: near 1 they agree."
    )
    if reference is None:
        legend += " There is no full-field reference in this run: <code>diffsbi hmc</code> adds one."
    table = f"<table><thead><tr>{thead}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<h2>How good are they?</h2>{table}<p class=small>{legend}</p>"


def _data_section(run) -> str:
    x = load_npz(run.path("observation", "observation.npz"))["x"]
    spectra = load_npz(run.path("observation", "spectra.npz"))
    at = "the true parameters" if run.account("observation")["truth"] else "the fiducial parameters (not a fit)"
    maps = _image(plotting.maps(x, run.config["survey"]["side_deg"]), "The observed maps, noise included.")
    caption = f"Auto and cross spectra of the maps (points), and theory plus noise at {at} with its Gaussian scatter."
    return f"<h2>The data</h2>{maps}{_image(plotting.spectra(**spectra), caption)}"


def _reconstruction_section(run, methods) -> str:
    path = run.path("full_field", "chains.npz")
    chains = load_npz(path) if "full_field" in methods and path.is_file() else {}
    if "tracked_mean" not in chains:  # full_field.maps = false
        return ""
    x = load_npz(run.path("observation", "observation.npz"))["x"]
    side = run.config["survey"]["side_deg"]
    figure = plotting.reconstruction(x, chains["tracked_mean"], chains["tracked_sd"], side)
    caption = (
        "The map, and the noiseless convergence that it implies: mean and standard deviation of the full-field draws."
    )
    return f"<h2>The reconstructed mass map</h2>{_image(figure, caption)}"


def _training_section(run, methods) -> str:
    histories = {m: read_json(run.path(m, "history.json")) for m in methods if run.path(m, "history.json").is_file()}
    if not histories:
        return ""
    stops = "; ".join(f"{TITLES[m]}: {', '.join(sorted(set(run.account(m)['stop_reasons'])))}" for m in histories)
    caption = f"Loss of the neural posteriors by epoch. The two losses have different terms. Stopped: {stops}."
    return f"<h2>Training</h2>{_image(plotting.training_curves(histories, TITLES), html.escape(caption))}"


def _provenance_section(run, manifest) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{_duration(stage['seconds'])}</td><td>{stage['attempts']}</td>"
        f"<td>{stage['account'].get('simulations', 0):,}</td><td>{stage['status']}</td></tr>"
        for name, stage in manifest["stages"].items()
    )
    head = "<tr><th>stage</th><th>time</th><th>attempts</th><th>simulations</th><th>status</th></tr>"
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items() if version)
    facts = (
        f"{manifest['system']}; {versions}; commit {manifest['git_commit'] or 'unknown'}; started {manifest['started']}"
    )
    config = html.escape(yaml.safe_dump(dict(run.config), sort_keys=False))
    return (
        f"<h2>How it was made</h2><table><thead>{head}</thead><tbody>{rows}</tbody></table>"
        f"<p class=small>{html.escape(facts)}. Command: <code>{html.escape(' '.join(manifest['command']))}</code></p>"
        f"<details><summary>Configuration</summary><pre>{config}</pre></details>"
    )


def _thin(theta: np.ndarray, most: int = 20_000) -> np.ndarray:
    flat = theta.reshape(-1, theta.shape[-1])
    return flat[:: max(1, -(-len(flat) // most))]


def _image(figure, caption: str) -> str:
    encoded = base64.b64encode(plotting.png(figure)).decode()
    alt = html.escape(caption, quote=True)
    return f'<figure><img src="data:image/png;base64,{encoded}" alt="{alt}"><figcaption>{caption}</figcaption></figure>'


def _symbol(name: str) -> str:
    plain = {"omega_c": "Ω<sub>c</sub>", "omega_b": "Ω<sub>b</sub>", "sigma_8": "σ<sub>8</sub>", "h_0": "h"}
    return (plain | {"n_s": "n<sub>s</sub>", "w_0": "w<sub>0</sub>"}).get(name, html.escape(name))


def _value(mean: float, std: float) -> str:
    digits = max(0, 1 - int(np.floor(np.log10(std)))) if std > 0 else 4
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


def _swatch(method: str) -> str:
    return f'<span class=swatch style="background:{plotting.COLORS.get(method, "#999")}"></span>'


def _shift(distance: Mapping) -> str:
    worst = max(distance["mean_shift"], key=lambda name: abs(distance["mean_shift"][name]))
    return f"{distance['mean_shift'][worst]:+.2f} σ ({_symbol(worst)})"


def _ratio(distance: Mapping) -> str:
    values = distance["width_ratio"].values()
    return f"{min(values):.2f} to {max(values):.2f}"


def _flag(rhat: float, limit: float) -> str:
    return f"{rhat:.3f}" if rhat < limit else f'<b class=alarm title="not converged">{rhat:.3f} ✗</b>'


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: #1c1c1c; background: #fff;
       max-width: 72rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .6rem; } h2 { margin: 2.6rem 0 .6rem; font-size: 1.3rem; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0 0 1rem; }
dt { color: #666; } dd { margin: 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums;
        display: block; overflow-x: auto; }
th { text-align: right; font-weight: 600; vertical-align: bottom; border-bottom: 1.5px solid #444; }
td { text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th, td { padding: .32rem .7rem; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; }
figcaption, .small { color: #555; font-size: .88rem; }
.note { padding: .6rem .9rem; border-left: 4px solid; border-radius: 2px; }
.good { border-color: #009E73; background: #eef8f4; } .bad { border-color: #D55E00; background: #fdf2ea; }
.note ul { margin: .3rem 0 0; padding-left: 1.2rem; } .alarm { color: #b03000; }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 50%; margin-right: .5em; }
code, pre { font: .85em ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { background: #f5f5f5; padding: .8rem 1rem; overflow-x: auto; } summary { cursor: pointer; }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
