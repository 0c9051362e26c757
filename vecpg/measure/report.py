"""What is shown of results: a table, a picture, and the tables that the repository keeps."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vecpg.machine import folder_name
from vecpg.measure import results as results_file
from vecpg.measure.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEADINGS = {
    "stepping": "Stepping with random actions: steps per second",
    "collect": "Collecting whole episodes: counted environment steps per second",
    "returns": "Returns: rewards per second",
    "update": "Update, one gradient step: environment steps per second",
    "train": "Training, whole iterations without logging: counted environment steps per second",
}
_AXES = {
    "stepping": ("stepping", "steps / s"),
    "collect": ("collecting", "environment steps / s"),
    "returns": ("returns", "rewards / s"),
    "update": ("update", "environment steps / s"),
    "train": ("training, whole iterations", "environment steps / s"),
}
_NAMES = {"cpu": "CPU", "cuda": "CUDA"}

# Okabe and Ito (2008), "Color universal design".
_COLOURS = {
    "sync": "#0072B2",
    "async": "#D55E00",
    "vector_entry_point": "#009E73",
    "tensor": "#CC79A7",
    None: "#000000",
}
_MARKERS = {"cpu": "o", "cuda": "s"}

_BEGIN, _END = "<!-- figures: scripts/benchmark.py --record writes them -->", "<!-- figures end -->"


def table(results: Results) -> str:
    """Every figure, in Markdown that can be read as it is.

    A figure is the median speed of the rounds, with the 5th and the 95th percentile; "of limit" is
    its part of what is named beside it, measured in turn with it.
    """
    machine = results["machine"]
    load = machine["load_average"]
    busy = "" if load is None else f", {load} processes at work when it began"
    parts = [
        f"vecpg {machine['vecpg']} at {results['commit'] or 'no commit'}"
        f"{' with changes' if results['dirty'] else ''}, {results['date']}: {machine['cpu']},"
        f" {machine['kernel_threads']} cores, {machine['gpu'] or 'no GPU'}, torch"
        f" {machine['torch']}, CartPole-v1, policy 4-64-64-2 with tanh{busy}",
        "A speed is the median of the rounds (5th to 95th percentile), beside the limit that was"
        " measured in turn with it; noisy: the quartiles are more than"
        f" {results_file.NOISY:.0%} apart",
    ]
    for thing, heading in _HEADINGS.items():
        cells = [cell for cell in results["cells"] if cell["thing"] == thing]
        if cells:
            parts.append(f"{heading}\n\n{_aligned(_rows(cells))}")
            notes = [_limits(cells), *_crossovers(cells)]
            parts.append("\n".join(f"* {line}" for line in notes if line))
    reasons = left_out(results)
    if reasons:
        parts.append("\n".join(f"* {line}" for line in reasons))
    return "\n\n".join(parts)


def left_out(results: Results) -> list[str]:
    """A line for each device that is not there, and for cells that have no figure.

    It looks at "devices" and "not_run".
    """
    missing = [f"{device}: {why}" for device, why in results["devices"].items() if why]
    not_run = [
        f"{'FAILED' if one['failed'] else 'not run'}: {_where(one)}: {one['reason']}"
        for one in _together(results["not_run"])
    ]
    return missing + not_run


def crossover(cells: Sequence[dict[str, Any]]) -> int | None:
    """The number of environments from which on CUDA is faster at every one measured on both.

    Args:
        cells: of one thing and vectorization.

    Example:
        >>> cells = [dict(device=d, num_envs=n, median=m)
        ...          for d, n, m in (("cpu", 1, 2.0), ("cuda", 1, 1.0), ("cpu", 8, 2.0),
        ...                          ("cuda", 8, 3.0))]
        >>> crossover(cells)
        8
    """
    ratios = _ratios(cells)
    slower = [number for number, ratio in ratios.items() if ratio <= 1]
    faster = [number for number in ratios if number > max(slower, default=0)]
    return min(faster, default=None)


def _ratios(cells: Sequence[dict[str, Any]]) -> dict[int, float]:
    """CUDA's speed over the CPU's at each number of environments measured on both."""
    speeds = {(cell["device"], cell["num_envs"]): cell["median"] for cell in cells}
    return {
        number: speeds["cuda", number] / speeds["cpu", number]
        for number in sorted({number for _, number in speeds})
        if ("cpu", number) in speeds and ("cuda", number) in speeds
    }


def _crossovers(cells: list[dict[str, Any]]) -> list[str]:
    lines = []
    for vectorization in dict.fromkeys(cell["vectorization"] for cell in cells):
        same = [cell for cell in cells if cell["vectorization"] == vectorization]
        if not _ratios(same):
            continue
        number = crossover(same)
        where = f"from {number} environments on"
        where = "at no measured number of environments" if number is None else where
        lines.append(f"{vectorization + ': ' if vectorization else ''}CUDA is faster {where}")
    return lines


def _limits(cells: list[dict[str, Any]]) -> str:
    """Which limit is whose."""
    kinds: dict[str, dict[str | None, None]] = {}
    for cell in cells:
        kinds.setdefault(cell["limit_is"] or "", {})[cell["vectorization"]] = None
    words = []
    for limit, whose in kinds.items():
        names = ", ".join(kind for kind in whose if kind)
        if limit:
            words.append(f"{limit} ({names})" if names else limit)
    return f"limit: {'; '.join(words)}" if words else ""


def _rows(cells: list[dict[str, Any]]) -> list[list[str]]:
    """The table of one thing: a heading, and a row for each vectorization and number."""
    devices = [name for name in _NAMES if any(cell["device"] == name for cell in cells)]
    has_kinds = cells[0]["vectorization"] is not None
    has_counted = cells[0]["counted"] is not None
    phases = list(cells[0]["shares"])
    heading = ["vectorization"] * has_kinds + ["num_envs", "num_steps"]
    heading += ["counted"] * has_counted
    for device in devices:
        heading += [f"{_NAMES[device]} (p5 to p95)", "of limit"]
        heading += [f"% {', '.join(phases)}"] * bool(phases)
    heading += ["CUDA / CPU"] * (len(devices) == 2)
    rows = [heading]
    order = list(_COLOURS)
    places = {(order.index(cell["vectorization"]), cell["num_envs"]) for cell in cells}
    for kind, number in sorted(places):
        same = {
            cell["device"]: cell
            for cell in cells
            if (cell["vectorization"], cell["num_envs"]) == (order[kind], number)
        }
        some = next(iter(same.values()))
        row = [str(some["vectorization"])] * has_kinds + [str(number), str(some["num_steps"])]
        row += [f"{some['counted']:.0%}"] if has_counted else []
        for device in devices:
            cell = same.get(device)
            row += [_figure(cell), _of_limit(cell)]
            row += [_shares(cell)] * bool(phases)
        if len(devices) == 2:
            ratio = _ratios(list(same.values())).get(number)
            row.append("" if ratio is None else f"{ratio:.2f}")
        rows.append(row)
    return rows


def _figure(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    words = f"{short(cell['median'])} ({short(cell['p5'])} to {short(cell['p95'])})"
    return words + (" noisy" if cell["noisy"] else "")


def _of_limit(cell: dict[str, Any] | None) -> str:
    if cell is None or cell["limit"] is None:
        return ""
    share = cell["of_limit"]
    return f"{share:.{0 if share >= 0.1 else 1}%} of {short(cell['limit'])}"


def _shares(cell: dict[str, Any] | None) -> str:
    shares = {} if cell is None else cell["shares"]
    return ", ".join(f"{100 * share:.0f}" for share in shares.values())


def short(number: float) -> str:
    """Three digits, with k, M, G or T.

    Example:
        >>> short(1234567.0), short(999.6), short(45.0)
        ('1.23M', '1k', '45')
    """
    for unit in ("", "k", "M", "G", "T"):
        shown = f"{number:.3g}"
        if float(shown) < 1000:
            return shown + unit
        number /= 1000
    return f"{number:.3g}P"


def _together(not_run: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was left out for one reason at one place, in one entry."""
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in not_run:
        key = one["device"], one["vectorization"], one["num_envs"], one["reason"]
        entry = entries.setdefault(key, one | {"thing": ""})
        entry["thing"] += f"{', ' if entry['thing'] else ''}{one['thing']}"
    return list(entries.values())


def _where(one: dict[str, Any]) -> str:
    kind = f"{one['vectorization']} " if one["vectorization"] else ""
    return f"{one['device']}, {kind}x {one['num_envs']} ({one['thing']})"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True))
        + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def picture(results: Results) -> "Figure":
    """Throughput over the number of environments: a panel for each thing, limits dashed."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    things = [t for t in _AXES if any(cell["thing"] == t for cell in results["cells"])]
    figure = Figure(figsize=(15, 9), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    for each, thing in zip(axes, things, strict=False):
        _draw(each, [cell for cell in results["cells"] if cell["thing"] == thing], thing)
    for each in axes[len(things) :]:
        each.axis("off")
    drawn = {(cell["vectorization"], cell["device"]) for cell in results["cells"]}
    lines = [
        Line2D(
            [],
            [],
            color=_COLOURS[kind],
            marker=_MARKERS[device],
            linestyle="-" if device == "cpu" else "-.",
            label=f"{kind or 'returns, update'} on {_NAMES[device]}",
        )
        for device in _NAMES
        for kind in _COLOURS
        if (kind, device) in drawn
    ]
    limit = Line2D([], [], color="#555555", linestyle=(0, (4, 3)), linewidth=1.2)
    limit.set_label("limit, in the colour of what it limits:\nbare stepping, copy, matrix product")
    whiskers = Line2D([], [], color="#555555", marker="|", linestyle="", markersize=14)
    whiskers.set_label("5th to 95th percentile of the rounds")
    axes[-1].legend(handles=[*lines, limit, whiskers], loc="center", frameon=False, fontsize=12)
    machine = results["machine"]
    figure.suptitle(
        f"CartPole-v1, policy 4-64-64-2: {machine['cpu']}, {machine['kernel_threads']} cores,"
        f" {machine['gpu'] or 'no GPU'}; vecpg at {results['commit'] or 'no commit'}",
        fontsize=13,
    )
    return figure


def _draw(axes: "Axes", cells: list[dict[str, Any]], thing: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogFormatter, NullLocator

    class Short(LogFormatter):
        """Labels where this one has room for them: on few decades minor ticks have some too."""

        def __call__(self, number: float, pos: int | None = None) -> str:
            return short(number) if super().__call__(number, pos) else ""

    for kind, device in dict.fromkeys((cell["vectorization"], cell["device"]) for cell in cells):
        line = [c for c in cells if (c["vectorization"], c["device"]) == (kind, device)]
        numbers = [cell["num_envs"] for cell in line]
        medians = [cell["median"] for cell in line]
        below = [cell["median"] - cell["p5"] for cell in line]
        above = [cell["p95"] - cell["median"] for cell in line]
        axes.errorbar(
            numbers,
            medians,
            yerr=[below, above],
            color=_COLOURS[kind],
            marker=_MARKERS[device],
            markersize=5,
            linestyle="-" if device == "cpu" else "-.",
            linewidth=1.8,
            elinewidth=1.0,
            capsize=2,
        )
        limited = [(cell["num_envs"], cell["limit"]) for cell in line if cell["limit"]]
        if limited:
            axes.plot(
                *zip(*limited, strict=True),
                color=_COLOURS[kind],
                marker="_",
                linestyle=(0, (4, 3)),
                linewidth=1.2,
                alpha=0.8,
            )
    title, unit = _AXES[thing]
    axes.set_title(title, fontsize=13)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({cell["num_envs"] for cell in cells})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: short(number)))
    axes.yaxis.set_minor_formatter(Short())
    axes.set_xlabel("environments, num_envs", fontsize=11)
    axes.set_ylabel(unit, fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def save_picture(results: Results, path: Path) -> None:
    """Draw into a PNG.

    Raises:
        OSError: it cannot be written.
    """
    picture(results).savefig(path, format="png", dpi=110)


def record(results: Results, root: Path) -> list[Path]:
    """Keep the small form of results in a repository, and make its tables and pictures anew.

    Args:
        results: whole ones, of a commit without changes.
        root: of the repository.

    Returns:
        the files that were written.

    Raises:
        ValueError: results of a quick look, or of no commit; or a kept file of another schema.
        OSError: a file cannot be written.
    """
    check_recordable(results)
    folder = root / "benchmarks" / "results"
    own = folder / folder_name(results["machine"])
    own.mkdir(parents=True, exist_ok=True)
    path = own / f"{results_file.file_name(results)}.json"
    results_file.write(path, results_file.small(results))
    newest = results_file.newest_of_each_machine(folder)
    for latest in newest:
        if folder_name(latest["machine"]) == own.name:
            save_picture(latest, own / "benchmark.png")
    readme, speeds = root / "benchmarks" / "README.md", root / "vecpg" / "speeds.json"
    readme.write_text(with_figures(readme.read_text(encoding="utf-8"), newest), encoding="utf-8")
    everywhere = results_file.of_every_machine(folder)
    speeds.write_text(speeds_of(everywhere), encoding="utf-8")
    return [path, own / "benchmark.png", readme, speeds]


def check_recordable(results: Results) -> None:
    """Refuse what is not to be kept: it looks at "quick", "commit" and "dirty".

    Raises:
        ValueError: results of a quick look, or of no commit.
    """
    if results["quick"]:
        raise ValueError("--record keeps whole rounds only: measure without --quick")
    if results["commit"] is None or results["dirty"]:
        raise ValueError("--record: these figures belong to no commit; commit, then measure again")


def with_figures(text: str, newest: Sequence[Results]) -> str:
    """A README whose part between the two marks shows these results.

    Raises:
        ValueError: there are no marks.
    """
    shown = []
    for results in newest:
        name = folder_name(results["machine"])
        shown.append(
            f"### {name}\n\n![throughput](results/{name}/benchmark.png)\n\n{table(results)}"
        )
    return between_marks(text, _BEGIN, _END, shown)


def between_marks(text: str, begin: str, end: str, parts: Sequence[str]) -> str:
    r"""A README with these parts between two marks, instead of what is there.

    Raises:
        ValueError: there are no marks.

    Example:
        >>> between_marks("a <b> old <e> c", "<b>", "<e>", ["new"])
        'a <b>\n\nnew\n\n<e> c'
    """
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"expected the lines {begin} and {end} in benchmarks/README.md")
    return before + "\n\n".join([begin, *parts, end]) + after


def speeds_of(newest: Sequence[Results]) -> str:
    """The table that `--device auto` reads, as JSON: training on machines that have a GPU."""
    kept = ("vectorization", "num_envs", "device", "p5", "median", "p95")
    rows = [
        {"gpu": results["machine"]["gpu"], "commit": results["commit"]}
        | {name: cell[name] for name in kept}
        for results in newest
        for cell in results["cells"]
        if cell["thing"] == "train" and results["machine"]["gpu"] is not None
    ]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    return '{\n "rows": [' + (f"\n{lines}\n " if rows else "") + "]\n}\n"
