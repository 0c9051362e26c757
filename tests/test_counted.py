"""What kernels cost by their machine code: read, followed, and calculated."""

import runpy
import sys
from collections import Counter

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from counting import model, sass, traffic


def written(*lines):
    """Machine code as it is printed: (text, stall, sets, frees, waits) or the text alone."""
    text = ["\tcode for sm_90a", "\t\tFunction : kernel"]
    for i, line in enumerate(lines):
        what, stall, sets, frees, waits = line if isinstance(line, tuple) else (line, 1, 7, 7, 0)
        control = stall | sets << 5 | frees << 8 | waits << 11
        text.append(f"        /*{16 * i:04x}*/      {what} ;      /* 0x{i:016x} */")
        text.append(f"{'':40}/* 0x{control << 41 | 5:016x} */")
    return "\n".join(text)


# A loop, with a loop within, something that may be left out, a slow division, and a way out.
LOOPING = written(
    "MOV R1, R2",
    "FADD R1, R1, R2",  # 1: the loop
    "@!P0 BRA 0x50",
    "MUFU.RCP R3, R4",
    "LDS.128 R4, [R5]",
    "@P1 EXIT",  # 5
    "FFMA R4, R4, R5, R6",  # the loop within
    "BRA P2, 0x60",
    "@!P5 BRA 0xa0",
    "CALL.REL.NOINC 0xc0",
    "@P4 BRA 0x10",  # 10
    "EXIT",
    "DFMA R2, R2, R2, R2",
    "RET.REL.NODEC R2 0x0",
    "BRA 0x10",
)


def test_instructions_are_read_with_what_the_scheduler_is_told():
    (first, second) = sass.instructions(
        written(("@!UP0 LDG.E.128 R4, [R2.64+0x10]", 12, 2, 7, 0b100001), "BAR.SYNC 0x0")
    )
    assert first[:5] == (0, True, "LDG", ".E.128", "R4, [R2.64+0x10]")
    assert first[5:] == (12, 2, None, (0, 5))
    assert second == (16, False, "BAR", ".SYNC", "0x0", 1, None, None, ())


def test_what_cannot_be_followed_is_refused():
    with pytest.raises(ValueError, match="got BRX"):
        sass.instructions(written("BRX R2"))
    with pytest.raises(ValueError, match="got no instruction"):
        sass.instructions("nothing")


def test_loops_are_what_turns():
    code = sass.instructions(LOOPING)
    outer, inner = sass.loops(code)
    assert (outer.first, sorted(outer.body)) == (1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    assert (inner.first, sorted(inner.body)) == (6, [6, 7])


def test_a_turn_has_all_that_can_happen_in_one_and_no_call():
    code = sass.instructions(LOOPING)
    outer, inner = sass.loops(code)
    assert [each.address // 16 for each in sass.longest(code, outer)] == [*range(1, 9), 10]
    assert [each.address // 16 for each in sass.longest(code, inner)] == [6, 7]
    # Of two ways the longer; what leads out of the loop is none.
    code = sass.instructions(
        written(
            "@P0 BRA 0x40",
            "FADD R1, R1, R2",
            "FADD R1, R1, R2",
            "BRA 0x60",
            "@P2 BRA 0x80",
            "FMUL R1, R1, R2",
            "@P1 BRA 0x0",
            "EXIT",
            *["FADD R1, R1, R2"] * 9,
            "EXIT",
        )
    )
    (loop,) = sass.loops(code)
    assert [each.address // 16 for each in sass.longest(code, loop)] == [0, 1, 2, 3, 6]


def test_each_instruction_belongs_to_the_unit_that_does_it():
    names = ["FFMA", "FSETP", "IMAD", "MUFU", "HGMMA", "HMMA", "LDS", "SHFL", "LDG", "STL", "BAR"]
    kinds = [model.kind_of(one) for one in sass.instructions(written(*(f"{n} R1" for n in names)))]
    assert kinds == [
        *["float", "integer", "integer", "special", "matrix", "matrix"],
        *["shared", "shuffle", "memory", "spilled", "waiting"],
    ]
    assert set(kinds) <= {*model.KINDS}


@pytest.mark.parametrize(
    ("text", "cycles"),
    [
        ("FFMA R1, R2, R3, R4", 1),
        ("LOP3.LUT R1, R2, R3, R4", 2),
        ("MUFU.EX2 R1, R2", 8),
        ("LDS R1, [R2]", 4),  # 128 of 128 bytes a cycle, four schedulers
        ("STS.128 [R2], R4", 16),
        ("HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4], R24", 32),  # 32768 products, 1024 a cycle
        ("HMMA.1688.F32.TF32 R4, R4, R8, R4", 4),  # 1024 products, 256 a cycle
    ],
)
def test_a_unit_is_occupied_for_as_long_as_nvidia_says(text, cycles):
    assert model.occupied(*sass.instructions(written(text))) == cycles


def test_a_warp_alone_waits_for_what_it_needs():
    chain = written(
        ("LDS R1, [R2]", 1, 0, 7, 0), ("FADD R1, R1, R1", 4, 7, 7, 1), "FADD R1, R1, R1"
    )
    assert model.alone(sass.instructions(chain)) == 4 + model.LATENCY["shared"] + 4 + 1
    apart = written(
        ("LDS R1, [R2]", 1, 0, 7, 0), ("FADD R3, R4, R4", 4, 7, 7, 0), "FADD R3, R3, R3"
    )
    assert model.alone(sass.instructions(apart)) == 1 + 4 + 1
    loads = sass.instructions(chain.replace("LDS", "LDG"))
    assert model.alone(loads) - model.alone(loads, again=True) == 500 - 40
    # A number that is read may not be written before, and a barrier takes a while.
    kept = written(("STG [R2], R3", 1, 7, 1, 0), ("MOV R3, R1", 1, 7, 7, 2))
    assert model.alone(sass.instructions(kept)) == 1 + 20 + 1
    assert model.alone(sass.instructions(written("BAR.SYNC 0x0"))) == 20 + 1
    products = written("HGMMA.64x64x8.F32.TF32 R24, R4", "WARPGROUP.DEPBAR.LE gsb0, 0x0")
    assert model.alone(sass.instructions(products)) == 32 + model.LATENCY["matrix"] + 1
    # The unit is occupied.
    assert model.alone(sass.instructions(written(*["MUFU.EX2 R1, R2"] * 3))) == 8 + 8 + 1


def turn(*lines, rows=64, warps=4, registers=255, shared=0, moved=10, asked=11):
    path = tuple(sass.instructions(written(*lines)))
    return model.Kernel(rows, path, warps, registers, shared, moved, asked)


def test_bounds_by_hand():
    kernel = turn(*["LOP3.LUT R1, R2, R3, R4"] * 16, *["FFMA R1, R2, R3, R4"] * 16)
    assert kernel.counts == dict.fromkeys(model.KINDS, 0.0) | {"integer": 1.0, "float": 1.0}
    assert kernel.busy == {"integer": 2.0, "float": 1.0, "issue": 2.0}
    found = kernel.bounds(programs=1024)
    assert found["integer"] == pytest.approx(132 * 4 * 1.98e9 / 2)
    assert (found["memory, H200"], found["cache"]) == (4.8e11, 5e11)
    # Two on each of 132 at a time: four rounds of 64 rows.
    cycles = model.alone(kernel.path)
    assert found["latency"] == pytest.approx(1024 * 64 * 1.98e9 / (4 * cycles))
    assert kernel.bounds(programs=4)["latency"] == pytest.approx(4 * 64 * 1.98e9 / cycles)
    assert kernel.bounds(programs=4)["integer"] == pytest.approx(4 * 4 * 1.98e9 / 2)


@pytest.mark.parametrize(
    ("takes", "programs"),
    [
        ({"registers": 255}, 2),
        ({"registers": 128}, 4),
        ({"registers": 32, "shared": 49664}, 4),
        ({"registers": 32}, 16),
        ({"registers": 16, "warps": 1}, 32),
        ({"registers": 16, "warps": 16}, 4),
    ],
)
def test_a_processor_holds_as_many_programs_as_fit(takes, programs):
    assert turn("FFMA R1, R2, R3, R4", **takes).at_once == programs


TEXT = """\
  tt.func public @play(%obs: !tt.ptr<f32> {tt.divisibility = 16 : i32}) {
    %w = tt.load %p : tensor<64x64x!tt.ptr<f32>, #blocked>
    %x:2 = scf.while (%a = %b) : (i32) -> i32 {
      scf.condition(%c) %a : i32
    } do {
    ^bb0(%a: i32):
      %n = tt.load %q : !tt.ptr<i64>
      %h = tt.dot %l, %r, %z {inputPrecision = 0 : i32} : tensor<64x16xf32, #a> * tensor<16x64xf32>
      tt.store %o, %v, %m : tensor<64x!tt.ptr<f32>, #blocked>
      %y = scf.if %k -> (i32) {
        tt.store %o, %v, %m : tensor<64x!tt.ptr<i8>, #blocked>
        scf.yield %a : i32
      } else {
        scf.yield %b : i32
      }
      scf.yield %y : i32
    } loc(#loc1)
    scf.for %t = %z to %r step %o  : i32 {
      tt.store %o, %v : tensor<8x!tt.ptr<f64>, #blocked>
      scf.for %u = %z to %r step %o  : i32 {
        %f = tt.load %q, %m, %o : tensor<8x4x32x!tt.ptr<bf16>, #blocked1>
      }
    } loc(#loc2)
    tt.return
  }
"""


def test_bytes_of_a_turn_are_those_of_its_tensors():
    assert traffic.loops(TEXT) == [
        {"load": 8, "store": 4 * 64 + 64, "products": 1},
        {"load": 2 * 8 * 4 * 32, "store": 0, "products": 0},
    ]


@pytest.mark.slow
def test_a_kernel_of_ours_is_counted(monkeypatch):
    pytest.importorskip("triton", reason="needs triton, which is for Linux")
    monkeypatch.setattr(sys, "path", [*sys.path])
    import counted

    for kernel in ("play", "sum_gradient"):
        found = counted.counted(counted.Case(kernel, "CartPole-v1", 65536), 90)
        own = found.turns[kernel]
        kinds = Counter(map(model.kind_of, own.path))
        # The products of three layers, each by three of TF32, and their slopes.
        assert own.rows == 64
        assert kinds["matrix"] > 30
        assert own.asked >= own.moved == 22
        assert own.at_once >= 1
        assert min(own.bounds(programs=1024).values()) > 1e8


def test_without_triton_one_line_says_what_adds_it(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "triton", None)
    expected = r"^error: triton not installed; .*pip install -c \S*constraints\.txt triton$"
    with pytest.raises(SystemExit, match=expected):
        runpy.run_path(str(ROOT / "benchmarks" / "counted.py"))
