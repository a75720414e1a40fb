"""Runs tutorials as notebooks and writes them down with all that they print and draw: `python tutorials/render.py`.

    python tutorials/render.py                        # all of them, into tutorials/rendered
    python tutorials/render.py 01_one_pair_by_hand    # this one
    python tutorials/render.py --notebooks            # only makes NAME.ipynb of each here, to open in Jupyter

Needs `pip install -e '.[tutorials]'`.
"""

import argparse
import os
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

HERE = Path(__file__).resolve().parent
NAMES = [path.stem for path in sorted(HERE.glob("0*.py"))]


def read(name: str) -> nbformat.NotebookNode:
    """A tutorial as a notebook of its cells, not run yet."""
    notebook = jupytext.read(HERE / f"{name}.py", fmt="py:percent")
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return notebook


def execute(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Runs a notebook in a kernel of its own, cell by cell, in folder. Progress bars and warnings are left out."""
    os.environ["PYTHONPATH"] = str(HERE.parent)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        shown = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
        cell.update({"outputs": shown} if cell.cell_type == "code" else {})
    return notebook


def write_markdown(notebook: nbformat.NotebookNode, name: str, folder: Path) -> None:
    """NAME.md, and its pictures in NAME_files."""
    text, resources = MarkdownExporter().from_notebook_node(
        notebook, resources={"unique_key": name, "output_files_dir": f"{name}_files"}
    )
    (folder / f"{name}_files").mkdir(parents=True, exist_ok=True)
    for old in (folder / f"{name}_files").iterdir():
        old.unlink()
    for file, content in resources["outputs"].items():
        (folder / file).write_bytes(content)
    note = f"*Made from [{name}.py](../{name}.py), with what it prints and draws, by `python tutorials/render.py`.*\n\n"
    text = "\n".join(line.rstrip() for line in (note + text).splitlines())
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help="by default all")
    parser.add_argument("--notebooks", action="store_true", help="make notebooks, run nothing")
    args = parser.parse_args()
    for name in args.names:
        name = Path(name).stem
        if args.notebooks:
            nbformat.write(read(name), f"{name}.ipynb")
        else:
            print(f"running {name} ...", flush=True)
            write_markdown(execute(read(name), Path.cwd()), name, HERE / "rendered")


if __name__ == "__main__":
    main()
