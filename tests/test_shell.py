import os
import sys

from vecpg.shell import how_to_call


def test_a_hint_can_be_called_from_where_the_user_is(tmp_path, monkeypatch):
    folder = tmp_path / "some where" / "bin"
    folder.mkdir(parents=True)
    (tmp_path / "vecpg").touch(mode=0o755)  # another environment's, first on the path
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))

    def hint(at):
        monkeypatch.chdir(at)
        return how_to_call("vecpg", "vecpg")

    # Without the command, the module.
    assert hint(tmp_path) == "'some where/bin/python' -m vecpg"
    assert hint(folder) == f"'{folder}/python' -m vecpg"
    (folder / "vecpg").touch(mode=0o755)
    assert hint(tmp_path) == "'some where/bin/vecpg'"
    (tmp_path / "elsewhere").mkdir()
    assert hint(tmp_path / "elsewhere") == hint(folder) == f"'{folder}/vecpg'"
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{tmp_path}")
    assert hint(tmp_path) == "vecpg"
