"""What `--record` makes of the parts' files: tables in benchmarks/README.md, and two of vecpg's.

Those are vecpg/speeds.json, from which `--device auto` decides, and vecpg/returns/cuda.json, from
which the returns kernel takes its tiles.
"""

from hour import tiles
from hour.job import read, write
from hour.parts import PARTS, USUAL
from hour.tables import table

BEGIN = "<!-- first hour: benchmarks/first_hour.py --record writes it -->"
END = "<!-- first hour end -->"


def record(root, folder):
    """Keep the files of a folder, if one is given, and make the repository's tables anew.

    Args:
        root: of the repository.
        folder: with first-hour-*.json, or None: those that are kept are read again.

    Returns:
        the files that were written.

    Raises:
        ValueError: there are no files, or of no commit, or in miniature.
    """
    from vecpg.machine import folder_name
    from vecpg.measure import report, results

    kept = root / "benchmarks" / "results"
    written = []
    given = sorted(folder.glob("first-hour-?.json")) if folder is not None else []
    if not given and (folder is not None or not machines(kept)):
        where = "benchmarks/results/<machine>" if folder is None else folder
        raise ValueError(f"expected first-hour-<part>.json in {where}, got none; measure first")
    for path in given:
        content = read(path)
        check(path, content)
        own = kept / folder_name(content["machine"])
        own.mkdir(parents=True, exist_ok=True)
        written.append(own / path.name)
        write(written[-1], content)
    readme, speeds = root / "benchmarks" / "README.md", root / "vecpg" / "speeds.json"
    text = with_tables(readme.read_text(encoding="utf-8"), machines(kept))
    readme.write_text(text, encoding="utf-8")
    speeds.write_text(report.speeds_of(results.of_every_machine(kept)), encoding="utf-8")
    chosen = root / "vecpg" / "returns" / "cuda.json"
    for own in machines(kept).values():
        if "t" in own:
            measured = own["t"]["machine"]["gpu"], own["t"]["rows"]
            text = tiles.recorded(chosen.read_text(encoding="utf-8"), *measured)
            chosen.write_text(text, encoding="utf-8")
            written.append(chosen)
    return [*written, readme, speeds]


def check(path, content):
    if content["miniature"]:
        raise ValueError(f"{path.name}: expected figures of a GPU, got a run in miniature")
    if content["commit"] is None or content["dirty"]:
        raise ValueError(
            f"{path.name}: these figures belong to no commit; commit, then measure again, or"
            " measure with --commit where the files lie in no repository"
        )


def machines(kept):
    """The parts of each machine that has any: {folder: {letter: content}}.

    Raises:
        ValueError: files of no commit, or in miniature.
    """
    found = {}
    for path in sorted(kept.glob("*/first-hour-?.json")):
        content = read(path)
        check(path, content)
        found.setdefault(path.parent.name, {})[content["part"]] = content
    return found


def with_tables(text, found):
    """A README whose part between the two marks shows what was found.

    Raises:
        ValueError: there are no marks.
    """
    from vecpg.measure.report import between_marks

    parts = [
        f"### {name}\n\n" + "\n\n".join(_shown(letter, own) for letter in USUAL)
        for name, own in found.items()
    ] or ["\n".join(_shown(letter, {}) for letter in USUAL)]
    return between_marks(text, BEGIN, END, parts)


def _shown(letter, own):
    if letter in own:
        return table(own[letter])
    return f"* ({letter}) {PARTS[letter].title}: unmeasured"
