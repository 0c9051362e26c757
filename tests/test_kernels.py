"""What kernels are made with: once-only log lines, matrix products, columns as tuples."""

import logging

import numpy as np
import pytest
from numba.core.errors import TypingError

from vecpg.kernels.announce import anew, once
from vecpg.kernels.columns import reader, writer
from vecpg.kernels.jit import jit
from vecpg.kernels.matrix import (
    NONE,
    add_product,
    dots,
    row_stride,
    sum_of,
    turn_slopes,
    whole_tiles,
)
from vecpg.kernels.vectors import TILE

LOG = logging.getLogger("vecpg.test")


def test_a_line_is_said_once_in_a_run_and_again_in_the_next(caplog):
    with caplog.at_level(logging.DEBUG, "vecpg"):
        with anew():
            once(LOG, "a choice")
            once(LOG, "a choice")
            once(LOG, "another", logging.DEBUG)
            with anew():
                once(LOG, "a choice")
            once(LOG, "a choice")
        with anew():
            once(LOG, "a choice")
    assert [record.message for record in caplog.records] == [
        "a choice",
        "another",
        "a choice",
        "a choice",
    ]
    assert caplog.records[1].levelno == logging.DEBUG


@jit
def _product(a, a_row, a_column, b, b_tile, b_row, c, c_row, rows, inner, columns):
    add_product(
        a, a_row, a_column, b, b_tile, b_row, c, c_row, c, c_row, rows + NONE, inner, columns
    )


@pytest.mark.parametrize("rows", [1, 3, 4, 15])
@pytest.mark.parametrize("inner", [0, 1, 5])
@pytest.mark.parametrize("turned", [False, True])
def test_a_product_is_added_and_nothing_beside_it_is_touched(rows, inner, turned):
    rng = np.random.default_rng(rows * 10 + inner)
    columns = 7 * TILE
    a, b = rng.normal(size=(rows, inner)), rng.normal(size=(inner, columns))
    c = np.full((rows + 2, columns + 3), 7.0, np.float32)
    steps = (1, rows) if turned else (inner, 1)
    flat = np.ascontiguousarray(a.T if turned else a, np.float32).reshape(-1)
    right = np.ascontiguousarray(b, np.float32).reshape(-1)
    place = c.reshape(-1)
    _product(
        np.append(flat, np.float32(np.nan)),
        *steps,
        np.append(right, np.float32(np.nan)),
        TILE,
        columns,
        place,
        columns + 3,
        rows,
        inner,
        columns,
    )
    np.testing.assert_allclose(c[:rows, :columns], 7.0 + a @ b, rtol=1e-5, atol=1e-5)
    assert (c[rows:] == 7.0).all()
    assert (c[:, columns:] == 7.0).all()


def test_a_product_may_begin_with_a_row_that_stands_for_all():
    a, b, start = (np.arange(n, dtype=np.float32) for n in (6, 2 * TILE, TILE))
    c = np.full(3 * TILE, np.nan, np.float32)
    add_product(a, 2, 1, b, 2 * TILE, TILE, start, NONE, c, TILE, 3 + NONE, 2, TILE)
    np.testing.assert_array_equal(c.reshape(3, TILE), start + a.reshape(3, 2) @ b.reshape(2, TILE))


def test_dots_are_those_of_whole_eights_of_rows():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(16, 2 * TILE)), rng.normal(size=(3, 2 * TILE))
    start, c = rng.normal(size=3).astype(np.float32), np.full((3, 17), np.nan, np.float32)
    flat = [each.astype(np.float32).reshape(-1) for each in (a, b)]
    dots(flat[0], 2 * TILE, flat[1], 2 * TILE, start, c.reshape(-1), 17, 9, 2 * TILE, 3)
    np.testing.assert_allclose(c[:, :16], start[:, None] + b @ a.T, rtol=1e-5, atol=1e-5)
    assert np.isnan(c[:, 16]).all()


@pytest.mark.parametrize("relu", [False, True])
def test_slopes_are_turned_and_summed_by_column(relu):
    rng = np.random.default_rng(0)
    columns, stride = 5 * TILE, 5 * TILE + 1
    slopes, active = rng.normal(size=(2, 3, stride)).astype(np.float32)
    after, total = slopes.copy(), np.ones(columns, np.float32)
    turn_slopes(after.reshape(-1), active.reshape(-1), stride, 2, columns, relu, total)
    exact = slopes * ((active > 0) if relu else 1 - active.astype(np.float64) ** 2)
    np.testing.assert_allclose(after[:2, :-1], exact[:2, :-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, 1 + exact[:2, :-1].sum(0), rtol=1e-5, atol=1e-6)
    assert (after[2] == slopes[2]).all()
    assert (after[:, -1] == slopes[:, -1]).all()


@pytest.mark.parametrize("count", [0, 1, 16, 37])
def test_numbers_are_summed_in_float64(count):
    numbers = np.zeros(64, np.float32)
    numbers[:count] = np.random.default_rng(count).normal(size=count)
    numbers[48:] = np.nan
    assert abs(sum_of(numbers, count) - numbers[:count].astype(np.float64).sum()) < 1e-14


def test_rows_have_room_for_whole_tiles():
    assert [whole_tiles(width) for width in (1, TILE, TILE + 1)] == [TILE, TILE, 2 * TILE]
    # Long rows are kept from competing for the same places of the cache.
    assert row_stride(64) == 64
    assert row_stride(128) == 128 + TILE


@pytest.mark.parametrize(("count", "stride"), [(1, 1), (3, 5), (7, 64)])
def test_a_column_is_read_and_written_and_nothing_beside_it(count, stride):
    read, write = reader(count, stride), writer(count, stride)

    @jit(as_written=True)
    def turn(one, other, number):
        for i in range(number):
            write(other, i, read(one, i)[::-1])

    here = np.arange(count * stride, dtype=np.float32)
    there = np.full(count * stride, np.nan, np.float32)
    number = max(1, stride - 2)
    turn(here, there, number)
    found, expected = there.reshape(count, stride), here.reshape(count, stride)[::-1]
    assert np.array_equal(found[:, :number], expected[:, :number])
    assert np.isnan(found[:, number:]).all()


def test_only_so_many_numbers_of_float32_are_written_to_a_column():
    write, values = writer(2, 4), np.zeros(8, np.float32)

    @jit
    def double(vector):
        write(vector, 0, (1.0, 2.0))

    @jit
    def three(vector):
        write(vector, 0, (np.float32(1.0), np.float32(2.0), np.float32(3.0)))

    for function in (double, three):
        with pytest.raises(TypingError, match=r"expected UniTuple\(float32 x 2\), got"):
            function(values)
