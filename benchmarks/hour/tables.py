"""What a part found, in Markdown. What others need than the standard library is imported late."""


def table(content):
    """A part's heading, its table, what was wrong, and what there was no time for."""
    lines = [f"({content['part']}) {content['title']}: {where(content)}"]
    rows = content["rows"]
    if content["miniature"]:
        lines.append(
            "1 case ran and was right"
            if len(rows) == 1
            else f"{len(rows)} cases ran and were right"
        )
    elif rows:
        lines.append(_TABLES[content["part"]](rows))
    lines += [f"* FAILED: {one['what']}: {one['problem']}" for one in content["problems"]]
    if content["not_reached"]:
        lines.append(f"* no time for: {'; '.join(content['not_reached'])}")
    return "\n\n".join(lines)


def where(content):
    """The machine, the versions and the commit."""
    machine = content["machine"]
    if content["miniature"]:
        return "in miniature, no figure"
    return (
        f"{machine['gpu']}, {machine['cpu']} with {machine['cores']} cores, torch"
        f" {machine['torch']}, triton {machine['triton']}, vecpg at"
        f" {content['commit'] or 'no commit'}{' with changes' if content['dirty'] else ''},"
        f" {content['date']}"
    )


def _correctness(rows):
    lines = []
    for kernel, dtype in dict.fromkeys((row["kernel"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["kernel"], row["dtype"]) == (kernel, dtype)]
        worst = max(row["error"] for row in own)
        lines.append([kernel, dtype, str(len(own)), f"{worst:.2g}", f"{own[0]['tolerance']:.2g}"])
    return aligned([["kernel", "numbers", "cases", "largest error", "of at most"], *lines])


def _returns(rows):
    heading = ["", "T x N", "layout", "on the device, us", "of a copy", "a call, us", "the CPU, us"]
    lines = [
        [
            row["name"],
            f"{row['length']} x {row['num_envs']}",
            row["layout"],
            f"{row['device_us']:.1f}",
            f"{row['of_copy']:.2f}",
            f"{row['call_us']:.0f}",
            "" if row["cpu_us"] is None else f"{row['cpu_us']:.0f}",
        ]
        for row in rows
    ]
    return aligned([heading, *lines])


def _parity(rows):
    drifted = [row for row in rows if "parameters_apart" in row]
    played = [row for row in rows if "parameters_apart" not in row]
    return "\n\n".join([_played(played)] * bool(played) + [_drifted(drifted)] * bool(drifted))


def _played(rows):
    heading = ["", "way", "copies x rows", "same bits", "observations", "rewards", "actions"]
    heading += ["drawn on a boundary", "ends"]
    lines = [
        [
            row["env_id"],
            row["way"],
            f"{row['copies']} x {row['rows']}",
            f"{row['bit_equal']:.1%}",
            f"{row['obs_apart']:.1g}",
            f"{row['rewards_apart']:.1g}",
            "" if row["actions_apart"] is None else f"{row['actions_apart']:.1g}",
            str(row["actions_on_a_boundary"]),
            str(row["ends_apart"]),
        ]
        for row in rows
    ]
    return aligned([heading, *lines])


def _drifted(rows):
    """Whole iterations beside the CPU's: parameters in parts of the way that they have come."""
    heading = ["", "copies", "iterations alike", "parameters apart, first to last", "then"]
    lines = []
    for row in rows:
        first, apart = row["first_draw"], row["parameters_apart"]
        then = "not looked further"
        if first is not None:
            then = (
                f"another action in iteration {first['iteration']}, row {first['row']}, copy"
                f" {first['copy']}: drawn {first['from_a_boundary']:.1g} from a boundary"
            )
        ends = f"{apart[0]:.1g} to {apart[-1]:.1g}" if apart else ""
        lines.append([row["env_id"], str(row["copies"]), str(row["iterations"]), ends, then])
    return aligned([heading, *lines])


def _ladder(rows):
    from vecpg.measure.report import short

    ways = list(dict.fromkeys(row["way"] for row in rows))
    places = dict.fromkeys((row["thing"], row["copies"], row["num_steps"]) for row in rows)
    lines = []
    for place in places:
        own = {r["way"]: r for r in rows if (r["thing"], r["copies"], r["num_steps"]) == place}
        cells = [short(own[way]["median"]) if way in own else "" for way in ways]
        ready = ", ".join(f"{own[way]['ready_seconds']:.1f}" for way in ways if way in own)
        lines.append([*map(str, place), *cells, ready])
    heading = ["steps per second", "copies", "window", *ways, "seconds to prepare"]
    shares = [
        f"* {row['thing']}, {row['copies']} copies, {row['way']}: "
        + ", ".join(f"{name} {share:.0%}" for name, share in row["phases"].items())
        for row in rows
        if "phases" in row
    ]
    return "\n".join([aligned([heading, *lines]), *([""] if shares else []), *shares])


def _solving(rows):
    from vecpg.measure.report import short

    lines = []
    for copies, device in dict.fromkeys((row["copies"], row["device"]) for row in rows):
        own = [r for r in rows if (r["copies"], r["device"]) == (copies, device)]
        runs = [row for row in own if not row["warm_up"]]
        solved = [row for row in runs if row["solved"]]
        lines.append(
            [
                str(copies),
                device,
                f"{len(solved)} of {len(runs)}",
                ", ".join(f"{row['wall_seconds']:.3f}" for row in solved),
                ", ".join(f"{row['solved_seconds']:.2f}" for row in solved),
                ", ".join(short(row["solved_env_steps"]) for row in solved),
                f"{sum(row['compile_seconds'] for row in own):.1f}",
            ]
        )
    heading = ["copies", "device", "solved", "seconds of iterations", "with confirming it"]
    heading += ["environment steps", "s to compile, once"]
    ways = dict.fromkeys(f"{row['device']}: {row['way']}" for row in rows if row["way"])
    return "\n".join(
        [aligned([heading, *lines]), *([""] if ways else []), *map("* {}".format, ways)]
    )


def _devices(rows):
    from vecpg.measure.report import short

    cells = [cell for row in rows for cell in row["results"]["cells"]]
    keys = dict.fromkeys((c["thing"], c["vectorization"], c["num_envs"]) for c in cells)
    lines = []
    for key in keys:
        own = {
            cell["device"]: cell
            for cell in cells
            if (cell["thing"], cell["vectorization"], cell["num_envs"]) == key
        }
        line = [key[0], key[1] or "", str(key[2])]
        for device in ("cpu", "cuda"):
            cell = own.get(device)
            line.append("" if cell is None else short(cell["median"]))
            share = None if cell is None else cell["of_limit"]
            line.append("" if share is None else f"{share:.2g} of {cell['limit_is']}")
        lines.append(line)
    heading = ["a second", "", "num_envs", "CPU", "of its limit", "CUDA", "of its limit"]
    return aligned([heading, *lines])


def _tiles(rows):
    lines = []
    for place in dict.fromkeys((r["layout"], r["length"], r["num_envs"]) for r in rows):
        own = [r for r in rows if (r["layout"], r["length"], r["num_envs"]) == place]
        own.sort(key=lambda row: row["device_us"])
        others = ", ".join(f"{row['tile']} {row['of_copy']:.2f}" for row in own[1:])
        lines.append(
            [
                place[0],
                f"{place[1]} x {place[2]}",
                own[0]["tile"],
                f"{own[0]['of_copy']:.2f}",
                others,
            ]
        )
    return aligned([["layout", "T x N", "fastest", "of a copy", "others"], *lines])


def aligned(rows):
    """Rows of words as a table, the first of them its heading.

    Example:
        >>> print(aligned([["a", "b"], ["one", "2"]]))
        | a   | b |
        |-----|---|
        | one | 2 |
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True))
        + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


_TABLES = {
    "a": _correctness,
    "b": _parity,
    "c": _ladder,
    "d": _returns,
    "e": _solving,
    "f": _devices,
    "t": _tiles,
}
