"""Every figure of the project, from arrays: the only importer of matplotlib and getdist besides the report."""

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

LABELS = {
    "omega_c": r"\Omega_c", "omega_b": r"\Omega_b", "sigma_8": r"\sigma_8", "h_0": "h", "n_s": "n_s", "w_0": "w_0",
    "alpha": r"\alpha", "beta": r"\beta", "gamma": r"\gamma", "delta": r"\delta",
}  # fmt: skip
# Okabe and Ito's colours: told apart by colour-blind readers and in print.
COLORS = {
    "full_field": "#666666",
    "npe_score": "#D55E00",
    "npe": "#0072B2",
    "power_spectrum": "#009E73",
    "gaussian_field": "#CC79A7",
    "path": "#E69F00",
}
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_BAND = "#CCE3F0"
Rows = Sequence[tuple[str, float, float, float]]
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "lines.linewidth": 1.3,
    "savefig.dpi": 150, "figure.dpi": 110,
}  # fmt: skip

__all__ = [
    "COLORS", "LABELS", "contours", "cost_with_size", "efficiency", "maps", "png", "reconstruction", "save", "spectra",
    "training_curves", "two_moons",
]  # fmt: skip


def label(name: str) -> str:
    """A parameter's name as mathematics."""
    plain = name.replace("_", r"\_")
    return f"${LABELS.get(name, plain)}$"


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure, its folder too; the format follows the suffix."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(figure, path, path.suffix[1:])
    return path


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    _write(figure, buffer, "png")
    return buffer.getvalue()


def _write(figure: Figure, target, kind: str) -> None:
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=matplotlib.MatplotlibDeprecationWarning)  # GetDist's formatter
        figure.savefig(target, format=kind, bbox_inches="tight", facecolor="white")


def maps(x, side_deg: float, *, rows: Sequence[str] = ("observed",)) -> Figure:
    """Convergence maps, one column for each bin and one row for each set of maps.

    Args:
        x: `(n_bins, n, n)`, or `(n_rows, n_bins, n, n)`; dimensionless.
        side_deg: Side of a map, in degrees.
        rows: A title for each row.
    """
    x = np.asarray(x)
    x = x[None] if x.ndim == 3 else x
    limits = [(-3 * row.std(), 3 * row.std()) for row in x]
    return _map_rows(x, side_deg, rows, limits, ["RdBu_r"] * len(x), [r"convergence $\kappa$"] * len(x))


def reconstruction(x, mean, sd, side_deg: float, bins: Sequence[int] | None = None) -> Figure:
    r"""Observed maps, and posterior mean and standard deviation of the noiseless convergence, a column for each bin.

    Args:
        x, mean, sd: `(n_bins, n, n)`, dimensionless.
        side_deg: Side of a map, in degrees.
        bins: The bins to show, counted from 0; all of them by default.
    """
    chosen = list(range(len(x)) if bins is None else bins)
    rows = np.stack([np.asarray(a)[chosen] for a in (x, mean, sd)])
    limits = [(-3 * row.std(), 3 * row.std()) for row in rows[:2]] + [tuple(np.percentile(rows[2], [0.5, 99.5]))]
    titles, colors = ("observed", "posterior mean", "posterior s.d."), ["RdBu_r", "RdBu_r", "viridis"]
    labels = [r"$\kappa$ + noise", r"$\langle\kappa\rangle$", r"$\sigma(\kappa)$"]
    return _map_rows(rows, side_deg, titles, limits, colors, labels, [f"bin {i + 1}" for i in chosen])


def _map_rows(x, side_deg, rows, limits, cmaps, labels, columns=None) -> Figure:
    n_rows, n_bins = x.shape[:2]
    columns = columns or [f"bin {i + 1}" for i in range(n_bins)]
    with matplotlib.rc_context(STYLE):
        figure = _figure(1.9 * n_bins + 0.9, 1.8 * n_rows + 0.5)
        axes = figure.subplots(n_rows, n_bins, squeeze=False)
        for r, row in enumerate(axes):
            for i, axis in enumerate(row):
                image = axis.imshow(x[r, i], origin="lower", extent=(0, side_deg, 0, side_deg), cmap=cmaps[r],
                                    vmin=limits[r][0], vmax=limits[r][1])  # fmt: skip
                axis.set(xticks=[0, side_deg / 2, side_deg], yticks=[0, side_deg / 2, side_deg])
                axis.tick_params(labelleft=i == 0, labelbottom=r == n_rows - 1)
                if r == 0:
                    axis.set_title(columns[i])
            row[0].set_ylabel(f"{rows[r]}\ndeg")
            bar = figure.colorbar(image, ax=list(row), shrink=0.85, pad=0.01, aspect=18, extend="both")
            bar.set_label(labels[r])
        for axis in axes[-1]:
            axis.set_xlabel("deg")
    return figure


def efficiency(rows: Mapping[str, Mapping[str, float]], target: float | None = None, title: str = "") -> Figure:
    """Gradients per effective sample of several samplers: from the best to the worst parameter, a dot for each.

    Args:
        rows: Sampler → parameter → gradients per effective sample.
        target: A value to mark.
        title: Over the panel.
    """
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    with matplotlib.rc_context(STYLE):
        figure = _figure(6.2, 0.34 * len(rows) + 1.4)
        axis = figure.subplots()
        for y, row in enumerate(rows.values()):
            axis.plot([min(row.values()), max(row.values())], [y, y], color="#BBBBBB", lw=2.5, zorder=1)
            for i, name in enumerate(names):
                if name in row:
                    text = label(name) if y == 0 else None
                    axis.plot(row[name], y, "o", ms=4.5, color=CYCLE[i % len(CYCLE)], label=text)
            axis.annotate(f"{max(row.values()):.0f}", (max(row.values()), y), (6, -3), textcoords="offset points")
        if target is not None:
            axis.axvline(target, color="#888888", lw=0.8, ls=":")
        axis.set(xscale="log", yticks=range(len(rows)), yticklabels=list(rows), xlabel="gradients per effective sample")
        axis.set_title(title)
        axis.margins(x=0.12)
        axis.invert_yaxis()
        figure.legend(loc="outside lower center", ncols=len(names))
    return figure


def cost_with_size(sizes, cost: Mapping[str, Sequence[float]], fits: Mapping[str, tuple[float, float]]) -> Figure:
    r"""Gradients per effective sample against the number of latents, with fitted power laws.

    Args:
        sizes: Latents of every map.
        cost: Curve → gradients per effective sample (worst parameter) at every size.
        fits: Curve → (amplitude, exponent) of $a\,d^{b}$.
    """
    sizes = np.asarray(sizes, float)
    with matplotlib.rc_context(STYLE):
        axis = (figure := _figure(4.2, 3.0)).subplots()
        for color, (name, values) in zip(CYCLE, cost.items(), strict=False):
            axis.plot(sizes, values, "o", ms=5, color=color)
            amplitude, exponent = fits[name]
            text = f"{name}: $\\propto d^{{{exponent:.2f}}}$"
            axis.plot(sizes, amplitude * sizes**exponent, color=color, lw=1, label=text)
        axis.set(xscale="log", yscale="log", xlabel="latents $d$", ylabel="gradients per effective sample")
        axis.legend()
    return figure


def curves(
    rows: Rows | Mapping[str, Rows],
    xlabel: str,
    ylabel: str,
    levels: Mapping[str, float],
    log_y: bool = True,
    log_x: bool = True,
    ticks: Sequence[str] = (),
    width: float = 4.2,
    colors: Mapping[str, str] | None = None,
) -> Figure:
    """Points with error bars, joined within each curve, and named horizontal lines.

    Args:
        rows: (curve, x, y, standard error of y), of one panel or of each by its title; panels have the same y axis.
        levels: Name → height of a line across.
        log_y, log_x: Whether y and x are logarithmic. Curves with the same x are then moved apart by 3 % of it.
        ticks: Names of x = 0, 1, ...; points are then not joined. The `width` of a panel is in inches.
        colors: Curve → colour; others have those of `CYCLE`.
    """
    panels, scale = rows if isinstance(rows, Mapping) else {"": rows}, ("linear", "log")
    names = list(dict.fromkeys(name for part in panels.values() for name, *_ in part))
    with matplotlib.rc_context(STYLE):
        figure = _figure(width * len(panels), 3.2)
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, part) in zip(axes, panels.items(), strict=True):
            places = list(range(len(ticks))) or sorted({row[1] for row in part})
            apart = 1.03 if log_x and len(places) < len(part) else 1.0
            for i, name in enumerate(names):
                x, y, error = np.array(sorted(row[1:] for row in part if row[0] == name)).reshape(-1, 3).T
                x = x * apart ** (i - (len(names) - 1) / 2)
                style = dict(ms=4, lw=1, capsize=2, color=(colors or {}).get(name, CYCLE[i % len(CYCLE)]), label=name)
                axis.errorbar(x, y, error, fmt="os^"[i // len(CYCLE) % 3] + "-" * (not ticks), **style)
            for k, (name, level) in enumerate(levels.items()):
                axis.axhline(level, color="0.4", lw=0.8, ls=("--", ":", "-.")[k % 3], label=name)
            axis.set(xscale=scale[log_x], yscale=scale[log_y], xlabel=xlabel, title=title)
            near = any(b <= 1.1 * a for a, b in zip(places, places[1:], strict=False))
            if ticks or (log_x and len(places) < 10 and not near):
                axis.set_xticks(places, ticks or [f"{x:g}" for x in places])
                axis.set_xticks([], minor=True)
        axes[0].set(ylabel=ylabel)
        if log_y:
            locate = LogLocator(subs=(1, 2, 5))
            axes[0].yaxis.set(major_locator=locate, major_formatter="{x:g}", minor_formatter=NullFormatter())
        if ticks or len([*names, *levels]) > 6 or len(panels) > 1:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3 + (len(panels) > 1))
        else:
            axes[0].legend()
    return figure


def spectra(
    ell,
    measured,
    theory,
    scatter,
    noise,
    pairs,
    *,
    measured_label="map",
    theory_label="theory + noise",
    residuals=False,
) -> Figure:
    r"""Band powers against theory, a lower triangle of panels; with `residuals`, an upper one of their ratio minus one.

    Args:
        ell: Multipole of every band, `(n_bands,)`.
        measured: $C_\ell$ of the maps, `(n_pairs, n_bands)`.
        theory: Expected $C_\ell$, same shape.
        scatter: One standard deviation of `measured`, same shape.
        noise: Noise power of each bin, `(n_bins,)`.
        pairs: The two bins of each row, `(n_pairs, 2)`.
    """
    n, unit = len(noise), 1e9
    with matplotlib.rc_context(STYLE):
        figure = _figure(1.75 * (n + residuals) + 0.8, 1.45 * n + 0.6)
        axes = figure.subplots(n, n + residuals, sharex=True, squeeze=False)
        for axis in axes.flat:
            axis.set(xscale="log", visible=False)
        low, high = 0.3 * unit * min(np.abs(theory).min(), np.min(noise)), 3 * unit * np.max(theory)
        for k, (i, j) in enumerate(np.sort(pairs, axis=1)):
            axis = axes[j, i]
            axis.fill_between(ell, unit * (theory[k] - scatter[k]), unit * (theory[k] + scatter[k]), color=_BAND, lw=0)
            axis.plot(ell, unit * theory[k], color=CYCLE[0])
            axis.plot(ell, unit * measured[k], "o", ms=2.6, color="#222222")
            if i == j:
                axis.axhline(unit * noise[i], color="#888888", lw=0.8, ls=":")
            axis.set(yscale="log", ylim=(low, high), visible=True)
            axis.tick_params(labelleft=i == 0)
            axis.text(0.95, 0.92, f"{i + 1} × {j + 1}", transform=axis.transAxes, ha="right", va="top")
            if residuals:
                _residual(
                    axes[i, j + 1], ell, measured[k] / theory[k] - 1, scatter[k] / theory[k], f"{i + 1} × {j + 1}"
                )
        for i in range(n):
            axes[-1, i].set_xlabel(r"multipole $\ell$")
            axes[i, 0].set_ylabel(r"$10^9\,C_\ell$")
        handles = [
            Line2D([], [], marker="o", ms=3, ls="", color="#222222", label=measured_label),
            Line2D([], [], color=CYCLE[0], label=f"{theory_label}, ±1σ"),
            Line2D([], [], color="#888888", lw=0.8, ls=":", label="noise"),
        ]
        if residuals:
            figure.legend(handles=handles, loc="outside upper left", ncols=3)
            axes[0, 1].set_ylabel("residual, %")
            axes[-1, -1].set_xlabel(r"multipole $\ell$")
        else:
            figure.legend(handles=handles, loc="upper right", bbox_to_anchor=(0.97, 0.97))
    return figure


def _residual(axis, ell, ratio, error, title: str) -> None:
    axis.axhline(0, color=CYCLE[0], lw=0.9)
    axis.errorbar(ell, 100 * ratio, 100 * error, fmt="o", ms=2.4, lw=0.8, color="#222222")
    limit = 100 * np.max(np.abs(ratio) + error)
    axis.set(visible=True, ylim=(-1.1 * limit, 1.3 * limit))
    axis.text(0.95, 0.92, title, transform=axis.transAxes, ha="right", va="top")


def training_curves(
    histories: Mapping[str, Sequence[Mapping]], titles: Mapping[str, str] | None = None, labels=("epoch", "loss")
) -> Figure:
    """Training and validation of every member of every fit (every `every`-th epoch), and the one that was kept."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(3.4 * len(histories), 2.5)
        axes = figure.subplots(1, len(histories), squeeze=False)[0]
        for axis, (name, members) in zip(axes, histories.items(), strict=True):
            color = COLORS.get(name, CYCLE[0])
            for m, history in enumerate(members):
                epochs = history.get("every", 1) * np.arange(len(history["train"]) + 1)
                names = ("training", "validation", "kept") if m == 0 else (None, None, None)
                axis.plot(epochs[1:], history["train"], color=color, alpha=0.35, label=names[0])
                axis.plot(epochs[1:], history["validation"], color=color, label=names[1])
                axis.axvline(epochs[history["best_epoch"]], color="#888888", lw=0.8, ls=":", label=names[2])
            values = np.concatenate([np.r_[h["train"], h["validation"]] for h in members])
            values = values[np.isfinite(values)]
            if len(values):
                low, margin = values.min(), np.percentile(values, 97) - values.min()
                axis.set_ylim(low - 0.08 * margin, low + 1.1 * margin)
            axis.set(xlabel=labels[0], ylabel=labels[1], title=(titles or {}).get(name, name))
            axis.legend()
    return figure


def contours(
    samples: Mapping[str, np.ndarray],
    names: Sequence[str],
    *,
    truth: Mapping[str, float] | None = None,
    titles: Mapping[str, str] | None = None,
    bounds: Mapping[str, tuple[float | None, float | None]] | None = None,
    width: float = 7.5,
    colors: Mapping[str, str] | None = None,
) -> Figure:
    """68 % and 95 % contours of several posteriors (GetDist).

    Args:
        samples: Method → draws `(n, p)`; the first one is filled, the others are lines.
        names: The p parameters.
        truth: Values to be marked.
        titles: Method → legend entry.
        bounds: Parameter → hard limits of its prior (None for an open side).
        width: In inches.
        colors: Method → colour, before those of `COLORS`.
    """
    import getdist
    from getdist import plots

    getdist.chains.print_load_details = False
    labels = [LABELS.get(name, name.replace("_", r"\_")) for name in names]
    settings = {"ignore_rows": 0, "smooth_scale_1D": 0.35, "smooth_scale_2D": 0.4}
    ranges = {name: list(limits) for name, limits in (bounds or {}).items()}
    same = dict(names=list(names), labels=labels, ranges=ranges, settings=settings)
    chains = [
        getdist.MCSamples(samples=np.asarray(draws, float), label=(titles or {}).get(method, method), **same)
        for method, draws in samples.items()
    ]
    plotter = plots.get_subplot_plotter(width_inch=width)
    plotter.settings.figure_legend_frame = False
    plotter.settings.alpha_filled_add = 0.5
    plotter.settings.axes_fontsize, plotter.settings.lab_fontsize, plotter.settings.legend_fontsize = 8, 11, 10
    known = COLORS | dict(colors or {})
    chosen = [known.get(method, CYCLE[i % len(CYCLE)]) for i, method in enumerate(samples)]
    lines = {"contour_colors": chosen, "contour_lws": 1.2, "filled": [i == 0 for i in range(len(chains))]}
    marker = {"lw": 0.8, "color": "#666666"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=matplotlib.MatplotlibDeprecationWarning)
        plotter.triangle_plot(chains, list(names), markers=dict(truth or {}), marker_args=marker, **lines)
    return plotter.fig


def two_moons(
    extent: float | Sequence[float], densities: Mapping[str, np.ndarray], scores: Mapping[str, np.ndarray], cut: Mapping
) -> Figure:
    """Densities on a grid, and one component of their scores along a line through them.

    Args:
        extent: (x0, x1, y0, y1) of the grid.
        densities: Title → log-density on the grid `(n, n)`, rows along y.
        scores: Title → score component along the line, `(m,)`.
        cut: `"x"`, the positions `(m,)`, and `"y"`, the line's height.
    """
    with matplotlib.rc_context(STYLE):
        figure = _figure(2.5 * len(densities), 4.9)
        grid = figure.add_gridspec(2, len(densities), height_ratios=(1.25, 1))
        top = max(np.max(v) for v in densities.values())
        for i, (title, log_density) in enumerate(densities.items()):
            axis = figure.add_subplot(grid[0, i])
            image = axis.imshow(log_density, origin="lower", extent=extent, cmap="viridis", vmin=top - 10, vmax=top)
            axis.axhline(cut["y"], color="white", lw=0.8, ls=":")
            axis.set(title=title, xlabel=r"$\theta_1$", ylabel=r"$\theta_2$" if i == 0 else None)
        figure.colorbar(image, ax=figure.axes, shrink=0.6, pad=0.01, extend="min").set_label("log density")
        axis = figure.add_subplot(grid[1, :])
        for i, (title, score) in enumerate(scores.items()):
            exact = title.lower().startswith("exact")
            color = "#222222" if exact else CYCLE[i % len(CYCLE)]
            axis.plot(cut["x"], score, color=color, lw=2.2 if exact else 1.0, alpha=0.5 if exact else 1, label=title)
        limit = 1.6 * np.nanpercentile(np.abs(next(iter(scores.values()))), 99)
        line = rf"$\theta_1$ along $\theta_2 = {cut['y']:g}$"
        axis.set(xlabel=line, ylabel=r"$\partial_1 \log p$", ylim=(-limit, limit))
        axis.legend(ncols=len(scores))
    return figure


def _figure(width: float, height: float) -> Figure:
    """A figure outside pyplot: nothing global, nothing to close."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
