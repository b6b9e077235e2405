"""Runs notebooks and keeps what they show, small enough for the repository.

    python scripts/run_notebooks.py docs/notebooks/*.ipynb

Pictures are reduced to 128 colours and 720 pixels; what goes to stderr is left out, and so is what
changes from run to run (execution counts and times). A notebook that fails is left as it was.
"""

import argparse
import base64
import io
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

WIDTH = 720


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook of a file with its outputs, run in a folder that is removed.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}})
        client.execute()
    return notebook


def smaller(png: str) -> str:
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.LANCZOS)
    packed = io.BytesIO()
    # the method that keeps the colours of thin lines apart
    image.quantize(128, Image.Quantize.FASTOCTREE).save(packed, "PNG", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


def tidy(notebook: nbformat.NotebookNode) -> None:
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            if "execution_count" in output:
                output.execution_count = None
            if "metadata" in output:
                output.metadata = {}
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="+", type=Path)
    for path in parser.parse_args().notebooks:
        try:
            ran = run(path)
        except (OSError, nbformat.reader.NotJSONError) as error:
            parser.error(f"{path} cannot be read as a notebook: {error}")
        tidy(ran)
        nbformat.write(ran, path)


if __name__ == "__main__":
    main()
