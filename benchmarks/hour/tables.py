"""What a part found, in Markdown. Only the standard library is imported here."""


def table(content):
    """A part's heading, its table, what was wrong, and what there was no time for."""
    lines = [f"({content['part']}) {content['title']}: {where(content)}"]
    rows = content["rows"]
    if rows:
        lines.append(_TABLES[content["part"]](rows, content["miniature"]))
    lines += [f"* WRONG: {one['what']}: {one['problem']}" for one in content["problems"]]
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


def _correctness(rows, miniature):
    worst = max(rows, key=lambda row: row["error"])
    return (
        f"{len(rows)} cases are right; the largest error is {worst['error']:.2g} of the largest"
        f" number ({worst['what']})"
    )


def _returns(rows, miniature):
    if miniature:
        return _correctness(rows, miniature)
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
        "| " + " | ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


_TABLES = {"a": _correctness, "d": _returns}
