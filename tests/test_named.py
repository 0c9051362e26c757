import sys

import pytest

from vecpg.named import load

SOURCE = """
class Outer:
    class Inner:
        pass

    def method(self):
        pass

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module that can be imported by that name while the test runs."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        names.append(name)

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_what_is_named_is_found_in_its_module_or_in_a_class_of_it(module):
    module("named_outer", SOURCE)
    outer = load("named_outer:Outer", "--network")
    assert outer is sys.modules["named_outer"].Outer
    assert load("named_outer:Outer.Inner", "--network") is outer.Inner
    assert load("named_outer:Outer.method", "--network") is outer.method
    assert load("os.path:join", "--network") is __import__("os").path.join


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("named_outer", "expected module:callable, got 'named_outer'"),
        (":Outer", "expected module:callable, got ':Outer'"),
        ("named_outer:", "expected module:callable, got 'named_outer:'"),
        ("named_outer:Other", "expected Other in the module named_outer, found none"),
        ("named_outer:Outer.Other", "expected Outer.Other in the module named_outer, found none"),
        ("named_outer:number", "expected something that can be called, got int"),
        ("named_nowhere:Outer", "ModuleNotFoundError: No module named 'named_nowhere'"),
        ("named_outer.inner:Outer", "ModuleNotFoundError: No module named 'named_outer.inner'"),
        ("named_raises:f", "ZeroDivisionError: one two"),
        ("named_leaves:f", "SystemExit: 3"),
        ("named_broken:f", "SyntaxError: "),
    ],
)
def test_a_wrong_name_is_refused_in_one_line_with_the_setting(module, name, words):
    module("named_outer", SOURCE)
    module("named_raises", "raise ZeroDivisionError('one\\n  two')")
    module("named_leaves", "raise SystemExit(3)")
    module("named_broken", "def f(:\n")
    with pytest.raises(ValueError) as caught:
        load(name, "--wrappers")
    message = str(caught.value)
    assert message.startswith(f"--wrappers {name}: expected ")
    assert words in message
    assert "\n" not in message
