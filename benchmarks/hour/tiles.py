"""(t) Every tile of the returns kernel at a grid of shapes, and the table of the fastest.

The table is that of vecpg/returns/cuda.json: of a GPU, by its name, rows of which the first that
fits a shape names its tile. Nothing but the standard library is imported at first.
"""

import functools
import json
import math

LENGTHS = (128, 512, 32, 8, 2048)
NUM_ENVS = (4096, 64, 16384, 32768, 131072, 1024)
# Larger ones would be as these are, and take their time.
_MOST_ELEMENTS = 2**26


def measure(job):
    from vecpg.returns import cuda

    cases = [
        (length, num_envs, layout, tile)
        for length in LENGTHS
        for num_envs in NUM_ENVS
        for layout in ("time", "batch")
        for tile in cuda.TILES[layout]
        if length * num_envs <= _MOST_ELEMENTS
    ]
    job.run(
        [
            (f"{length} x {num_envs}, {layout}, {tile}", functools.partial(timed, *case))
            for case in cases
            for length, num_envs, layout, tile in [case]
        ]
    )


def timed(length, num_envs, layout, tile):
    """A line of `hour.returns`, of a tile that was not chosen."""
    from hour import returns
    from vecpg.returns import cuda

    chosen = cuda._shapes
    cuda._shapes = lambda device: [{"layout": layout, "tile": tile}]
    try:
        return returns.on_device("returns", length, num_envs, layout) | {"tile": tile}
    finally:
        cuda._shapes = chosen


def recorded(text, gpu, rows):
    """The content of cuda.json, with the rows of one GPU made of its measurements."""
    table = json.loads(text) | {gpu: rules(rows)}
    parts = (
        f" {json.dumps(name)}: [\n  " + ",\n  ".join(map(json.dumps, own)) + "\n ]"
        for name, own in table.items()
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def rules(rows):
    """The rows of the table that give every measured shape its fastest tile.

    Between two measured sizes the one that is nearer, by their ratio, decides.

    Args:
        rows: "layout", "length", "num_envs", "tile" and "device_us" of each measurement.

    Example:
        >>> rules([dict(layout="time", length=8, num_envs=n, tile=t, device_us=us)
        ...        for n, t, us in ((10, "a", 1), (10, "b", 2), (1000, "a", 9), (1000, "b", 8))])
        [{'layout': 'time', 'min_envs': 101, 'tile': 'b'}, {'layout': 'time', 'tile': 'a'}]
    """
    found = []
    for layout in dict.fromkeys(row["layout"] for row in rows):
        best = {}
        for row in rows:
            place = row["length"], row["num_envs"]
            if row["layout"] == layout:
                best[place] = min(best.get(place, row), row, key=lambda one: one["device_us"])
        lengths = sorted({length for length, _ in best})
        for length, longer in zip(lengths, [*lengths[1:], None], strict=True):
            rows_at = {"layout": layout}
            if longer is not None:
                rows_at["max_rows"] = _between(length, longer)
            # The widest first.
            widths = sorted((num_envs for at, num_envs in best if at == length), reverse=True)
            own = []
            for num_envs, narrower in zip(widths, [*widths[1:], None], strict=True):
                tile = best[length, num_envs]["tile"]
                if own and own[-1]["tile"] == tile:
                    own.pop()  # what is narrower says it for both
                least = {} if narrower is None else {"min_envs": _between(narrower, num_envs) + 1}
                own.append({**rows_at, **least, "tile": tile})
            found += own
    return found


def _between(less, more):
    return math.isqrt(less * more)
