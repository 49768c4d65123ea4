"""The examples run, and what they write is true."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROOT = pathlib.Path(__file__).parent.parent
SPARSITIES = ("0.5", "0.7", "0.8", "0.9", "0.95")

pytestmark = pytest.mark.slow


def run(out, *arguments, devices=1, script="transformer_lm.py"):
    devices = f"--xla_force_host_platform_device_count={devices}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices}",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, ROOT / "examples" / script, "--out", out, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    done = run(out, "--preset", "tiny")
    assert done.returncode == 0, done.stderr[-4000:]
    return out, json.loads((out / "results.json").read_text()), done


def test_transformer_lm_writes_report_pictures_numbers_and_checkpoint(tiny):
    out, results, done = tiny
    report = (out / "report.md").read_text()
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert len(pictures) >= 8
    for name in pictures:
        assert f"({name})" in report
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    for sentence in results["conclusions"]:
        assert sentence in report
    assert any((out / "checkpoint").rglob("*"))
    assert results["checkpoint"]["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert "Total time" in done.stdout
    assert "Warning" not in done.stderr


def test_transformer_lm_learns_more_than_single_bytes(tiny):
    _, results, _ = tiny
    loss = results["curve"][-1][2]
    assert loss < results["counting"]["unigram"] < math.log(256)
    assert results["loss"]["magnitude"]["0"]["mean"] == pytest.approx(loss, abs=1e-5)


def test_transformer_lm_prunes_every_criterion_to_every_sparsity(tiny):
    _, results, _ = tiny
    assert len(results["loss"]) == 10
    for row in results["loss"].values():
        assert tuple(row) == ("0", *SPARSITIES)
        assert all(math.isfinite(cell["mean"]) for cell in row.values())
    for row in results["agreement"].values():
        for level in SPARSITIES:
            total = row[level]["total"]
            pruned = total["both"] + total["only_a"]
            assert pruned / total["size"] == pytest.approx(float(level), abs=1e-3)
    recovered = dict(results["recovery"])
    assert recovered.pop("nothing pruned")["sparsity"] == 0
    for row in (*recovered.values(), *results["gradual"].values()):
        assert row["sparsity"] == pytest.approx(0.9, abs=1e-3)


def test_transformer_lm_finds_the_chapter_close_to_magnitude_and_noise_at_chance(tiny):
    _, results, _ = tiny
    for level in SPARSITIES:
        total = results["agreement"]["EMA 0.9"][level]["total"]
        assert total["jaccard"] > 0.95 > total["chance"]
        total = results["agreement"]["random"][level]["total"]
        assert total["jaccard"] == pytest.approx(total["chance"], abs=0.02)
    assert "nearly magnitude itself" in results["conclusions"][0]


def test_transformer_lm_shows_both_failures_and_none_at_the_end(tiny):
    _, results, _ = tiny
    warnings = {
        name: {f["name"] for f in health["findings"] if f["level"] == "warning"}
        for name, health in results["health"].items()
    }
    assert warnings["this run at its end"] == set()
    assert "noise" in warnings["learning rate × 10"]
    assert "movement" in warnings["learning rate ÷ 100"]


@pytest.mark.nightly
def test_transformer_lm_shards_its_large_preset_over_eight_devices(tmp_path):
    small = "--width 64 --layers 1 --length 16 --batch 8 --steps 20 --recovery 4"
    done = run(tmp_path, "--preset", "tpu", *small.split(), devices=8)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["setting"]["devices"].startswith("8 × ")
    assert results["sharded"] > 0.9
    assert (tmp_path / "report.md").exists()


def test_shrink_transformer_cuts_what_it_says_and_draws_it(tmp_path):
    done = run(tmp_path, "--tiny", script="shrink_transformer.py")
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("masked 50%", "shrunk 75%", "shrunk 90%", "shrunk equals masked"):
        assert name in done.stdout
    # One head of four is left, and 13 of 128 hidden units.
    for cells in (["4", "1"], ["128", "13"]):
        assert [x for x in done.stdout.splitlines() if x.split()[1:] == cells]
    assert (tmp_path / "shrink.png").read_bytes().startswith(b"\x89PNG")
