"""The README's Python blocks run, in order, as a reader would paste them."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_every_python_block_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict = {}
    for number, block in enumerate(blocks, 1):
        source = compile(block, f"README.md, block {number}", "exec")
        exec(source, namespace)
    assert "Jaccard" in capsys.readouterr().out
    assert 0.79 < float(namespace["mj"].sparsity_of(namespace["state"])) < 0.81
