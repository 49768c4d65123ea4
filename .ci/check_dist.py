"""Checks what the wheel and the source distribution contain."""

import pathlib
import sys
import tarfile
import zipfile

folder = pathlib.Path(sys.argv[1])
(wheel,) = folder.glob("*.whl")
(sdist,) = folder.glob("*.tar.gz")

shipped = zipfile.ZipFile(wheel)
names = shipped.namelist()
info = next(n.split("/")[0] for n in names if ".dist-info/" in n)
metadata = shipped.read(f"{info}/METADATA").decode()
package = {
    p.as_posix()
    for p in pathlib.Path("movement_jax").rglob("*")
    if p.is_file() and p.suffix != ".pyc"
}
assert {n for n in names if not n.startswith(f"{info}/")} == package, names
assert "movement_jax/py.typed" in names
assert f"{info}/licenses/LICENSE" in names
assert "License-Expression: Apache-2.0" in metadata
assert "Requires-Python: >=3.11" in metadata
for extra in ("plot", "examples", "test", "dev", "tpu-aot"):
    assert f"Provides-Extra: {extra}" in metadata, extra

sources = {n.split("/", 1)[1] for n in tarfile.open(sdist).getnames() if "/" in n}
for name in ("LICENSE", "README.md", "pyproject.toml", "movement_jax/py.typed"):
    assert name in sources, name
assert any(n.startswith("tests/test_") for n in sources)
strays = [n for n in sources if n.endswith(".pyc") or n.startswith((".ci", "runs"))]
assert not strays, strays

print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size} bytes")
print(f"{sdist.name}: {len(sources)} files, {sdist.stat().st_size} bytes")
