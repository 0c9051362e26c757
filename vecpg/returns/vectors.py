"""Vectors in machine code that is built instruction by instruction: filled, picked from, turned."""

from llvmlite import ir


def spread(builder, number, size):
    """A vector of so many times the number."""
    undefined = ir.Constant(ir.VectorType(number.type, size), ir.Undefined)
    one = builder.insert_element(undefined, number, ir.IntType(32)(0))
    return pick(builder, one, one, [0] * size)


def pick(builder, one, other, places):
    """The elements of two vectors, one behind the other, at some places."""
    chosen = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), list(places))
    return builder.shuffle_vector(one, other, chosen)


def turned_halves(builder, rows):
    """Both 4 x 4 halves of four vectors of eight, rows and columns exchanged."""
    low, high = (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)
    even, odd = (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)
    pairs = [
        [pick(builder, rows[i], rows[i + 1], places) for i in (0, 2)] for places in (low, high)
    ]
    return [pick(builder, *pair, places) for pair in pairs for places in (even, odd)]
