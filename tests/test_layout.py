import ast
import importlib
import os
import re
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

import vecpg

PACKAGE = ROOT / "vecpg"
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(PACKAGE.rglob("*.py"))

# Who may import whom at run time. A module that is not named here may import anything but `train`.
ALLOWED = {
    "vecpg.adam": set(),
    "vecpg.config": set(),
    "vecpg.images": set(),
    "vecpg.memory": {"vecpg.config", "vecpg.images", "vecpg.torchrun"},
    "vecpg.recipes": {"vecpg.config"},
    "vecpg.kernels": {"vecpg.kernels"},
    "vecpg.returns": {"vecpg.kernels", "vecpg.returns"},
    "vecpg.advantage": {"vecpg.advantage", "vecpg.kernels", "vecpg.returns"},
    "vecpg.named": set(),
    "vecpg.noise": set(),
    "vecpg.device": {"vecpg.torchrun"},
    "vecpg.torchrun": set(),
    "vecpg.shell": set(),
    "vecpg.machine": {"vecpg"},
    "vecpg.envs": {"vecpg.envs", "vecpg.kernels", "vecpg.named", "vecpg.noise"},
    "vecpg.policy": {
        "vecpg.images",
        "vecpg.kernels",
        "vecpg.named",
        "vecpg.noise",
        "vecpg.policy",
    },
    "vecpg.rollout": {
        "vecpg.envs",
        "vecpg.kernels",
        "vecpg.memory",
        "vecpg.noise",
        "vecpg.policy",
        "vecpg.rollout",
    },
    "vecpg.value": {
        "vecpg.adam",
        "vecpg.kernels",
        "vecpg.policy",
        "vecpg.returns",
        "vecpg.rollout",
    },
    "vecpg.update": {
        "vecpg.adam",
        "vecpg.kernels",
        "vecpg.noise",
        "vecpg.policy",
        "vecpg.rollout",
    },
    "vecpg.evaluate": {
        "vecpg.envs",
        "vecpg.kernels",
        "vecpg.noise",
        "vecpg.policy",
        "vecpg.rollout",
    },
    "vecpg.fused": {
        "vecpg.adam",
        "vecpg.advantage",
        "vecpg.config",
        "vecpg.envs",
        "vecpg.fused",
        "vecpg.kernels",
        "vecpg.memory",
        "vecpg.noise",
        "vecpg.policy",
        "vecpg.rollout",
    },
    "vecpg.run": {
        "vecpg.adam",
        "vecpg.config",
        "vecpg.evaluate",
        "vecpg.kernels",
        "vecpg.machine",
        "vecpg.policy",
        "vecpg.rollout",
        "vecpg.run",
        "vecpg.shell",
        "vecpg.signals",
        "vecpg.value",
    },
    "vecpg.look": {"vecpg.config", "vecpg.envs", "vecpg.look", "vecpg.noise", "vecpg.recipes"},
    "vecpg.measure": {
        "vecpg.adam",
        "vecpg.advantage",
        "vecpg.cli",
        "vecpg.config",
        "vecpg.envs",
        "vecpg.kernels",
        "vecpg.machine",
        "vecpg.measure",
        "vecpg.noise",
        "vecpg.policy",
        "vecpg.returns",
        "vecpg.rollout",
        "vecpg.run",
        "vecpg.update",
    },
    "vecpg.tune": {
        "vecpg.cli",
        "vecpg.config",
        "vecpg.envs",
        "vecpg.look",
        "vecpg.population",
        "vecpg.recipes",
        "vecpg.run",
        "vecpg.shell",
        "vecpg.tune",
    },
    "vecpg.signals": set(),
    "vecpg.streams": set(),
    "vecpg.__main__": {"vecpg.cli", "vecpg.signals", "vecpg.streams"},
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run_time_imports(tree):
    """Imported modules, without those that only type checkers see."""
    skipped = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    hidden = {id(inner) for node in skipped for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            # `from vecpg.run import checkpoint` imports a module too.
            yield from (
                f"vecpg.{alias.name}"
                for alias in node.names
                if node.module == "vecpg"
                and ((PACKAGE / alias.name).is_dir() or (PACKAGE / f"{alias.name}.py").exists())
            )


def owner(name):
    """The module of a name, with everything in a package counted as the package."""
    return ".".join(name.split(".")[:2])


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_one_way(path):
    name = owner(module_name(path))
    imported = {
        owner(one)
        for one in run_time_imports(ast.parse(path.read_text()))
        if one.startswith("vecpg.")
    }
    if name not in ("vecpg.cli", "vecpg.population"):
        assert "vecpg.train" not in imported
    if name in ALLOWED:
        assert imported <= ALLOWED[name]


def test_the_import_rule_sees_modules_and_packages_however_they_are_imported():
    tree = ast.parse(
        "import vecpg.train\n"
        "from vecpg import Config, returns, value\n"
        "from vecpg.run import checkpoint\n"
        "if TYPE_CHECKING:\n"
        "    import vecpg.update\n"
        "def late():\n"
        "    import vecpg.device\n"
    )
    assert {one for one in run_time_imports(tree) if one != "vecpg"} == {
        "vecpg.train",
        "vecpg.returns",
        "vecpg.value",
        "vecpg.run",
        "vecpg.device",
    }


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_module_has_its_tests(path):
    _, *parts = module_name(path).split(".")
    # A package's own file has the tests of what is small in it; the command's are those of `cli`.
    names = ["_".join(parts), parts[0]] if parts else ["layout"]
    names = ["cli"] if parts == ["__main__"] else names
    assert any((ROOT / "tests" / f"test_{name}.py").exists() for name in names)


def test_public_names_are_there_and_are_no_modules():
    assert sorted(vecpg._HOMES) == sorted(vecpg.__all__)
    for name in vecpg.__all__:
        assert getattr(vecpg, name) is getattr(importlib.import_module(vecpg._HOMES[name]), name)
        assert not (PACKAGE / f"{name}.py").exists()
        assert not (PACKAGE / name).exists()
        assert getattr(vecpg, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vecpg.nothing  # noqa: B018


def tree_in_readme():
    """Folders drawn in the README's file tree: two spaces of indent are one level."""
    block = re.search(r"## Files\n.*?```\n(.*?)```", README, re.DOTALL)
    folders, parents = [], []
    for line in block[1].splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        entry, what = line.split(maxsplit=1)
        assert entry.endswith("/"), line
        assert what, line
        parents = [*parents[:indent], entry.rstrip("/")]
        folders.append("/".join(parents))
    return folders


def test_the_readmes_file_tree_is_what_exists():
    drawn = tree_in_readme()
    assert len(set(drawn)) == len(drawn)
    kept = {
        path.parent
        for folder in ("vecpg", "scripts", "benchmarks", "tests", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".json")
    }
    # Below results there is a folder for each machine.
    results = ROOT / "benchmarks" / "results"
    kept = {results if results in path.parents else path for path in kept}
    assert {str(path.relative_to(ROOT)) for path in kept} == set(drawn)


def test_the_readme_is_short():
    assert len(README.splitlines()) < 200


def test_the_readmes_set_up_lines_are_those_that_ci_runs():
    script = (ROOT / ".ci" / "run").read_text()
    assert "pip install -c constraints.txt -e '.[test]'" in README
    assert "-c constraints.txt -e '.[test]'" in script
    assert "python -m pytest\n" in README
    assert "python -m pytest || failed=1\n" in script


def test_the_workflow_runs_what_ci_runs():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r"^ *(?:- )?run: (.*)$", workflow, re.M) == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    # The oldest that is served.
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert wanted == ">=" + re.search(r'python-version: "(.*)"', workflow)[1]


def test_what_is_to_be_cited_is_this_version():
    citation = dict(
        line.split(": ", 1)
        for line in (ROOT / "CITATION.cff").read_text().splitlines()
        if re.match(r"[a-z-]+: ", line)
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == vecpg.__version__
    assert citation["title"] == project["name"]
    assert citation["abstract"] == project["description"]
    assert citation["license"] == project["license"]


@pytest.mark.parametrize("document", ["semantics", "reliability"])
def test_every_promise_names_a_test_that_exists(document):
    text = (ROOT / "docs" / f"{document}.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 60
    assert text.count("::test_") == len(named)
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), (file, test)


def test_every_case_of_reliability_has_a_test_or_says_why_not():
    rows = re.findall(
        r"^\| (\w\d+) \|.*\| (.*) \|(.*)\|$", (ROOT / "docs" / "reliability.md").read_text(), re.M
    )
    counts = {"C": 20, "S": 8, "P": 4, "E": 14, "N": 5, "I": 7, "L": 5, "H": 1, "D": 5}
    expected = [f"{kind}{number}" for kind, many in counts.items() for number in range(1, many + 1)]
    assert [case for case, _, _ in rows] == expected
    for case, happens, tests in rows:
        assert tests.count("::test_") or "not tested: " in happens or "not tested, " in happens, (
            case
        )


def test_every_requirement_is_pinned_without_local_tags():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(one for extra in extras for one in extra)]
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert not any("+" in version for version in pins.values())
    for requirement in wanted:
        assert re.match(r"[A-Za-z0-9-]+", requirement)[0].lower() in pins
        assert "<" not in requirement


def test_the_command_that_is_installed_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert list(project["scripts"]) == ["vecpg"]
    module, _, function = project["scripts"]["vecpg"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_no_file_is_a_drawer():
    names = {path.name for path in Path(PACKAGE).rglob("*.py")}
    assert not names & {"utils.py", "common.py", "helpers.py", "misc.py"}
