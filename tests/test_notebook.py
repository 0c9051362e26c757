import pytest

CELLS = [
    "import tempfile\n"
    "from vecpg import Config\n"
    "from vecpg.train import train\n"
    "short = {'total_iterations': 20, 'eval_episodes': 3, 'out_dir': tempfile.mkdtemp()}\n"
    "train(Config(num_envs=8, log_every=0.01, **short)).summary['iterations']",
    "train(Config(num_envs=2, vectorization='async', **short)).summary['iterations']",
    "heard = []\n"
    "def hear(row, policy):\n"
    "    heard.append(row['iteration'])\n"
    "    return row['iteration'] < 4\n"
    "train(Config(num_envs=8, progress=False, **short), hear).summary['iterations']",
]


def shown(text):
    """The lines that are seen: a carriage return goes back to the first column."""
    lines = []
    for line in text.split("\n"):
        seen = ""
        for part in line.split("\r"):
            seen = part + seen[len(part) :]
        lines.append(seen.rstrip())
    return [line for line in lines if line]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::jupyter_client", "ignore:::zmq", "ignore:::nbclient")
def test_a_notebook_shows_one_line_for_each_run(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    for cell, iterations, unit in zip(notebook.cells, (20, 20, 4), ("|", "|", "iter"), strict=True):
        *streams, result = cell.outputs
        assert result["data"]["text/plain"] == str(iterations)
        assert {stream["name"] for stream in streams} == {"stderr"}
        lines = shown("".join(stream["text"] for stream in streams))
        lines = [line for line in lines if not line.startswith("every episode has returned")]
        assert len(lines) == (1 if unit == "|" else 2)
        assert all(unit in line and "steps/s" in line for line in lines)
        if unit == "|":
            assert lines[0].startswith("100% |")
