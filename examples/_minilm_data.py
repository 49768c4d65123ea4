"""Labelled sentences: from files, or made of the standard library's docstrings."""

import ast
import csv
import dataclasses
import gzip
import inspect
import itertools
import pathlib
import re
import shlex
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import _lm
import numpy as np
from _minilm import pad

EMBEDDED = "word order"
_WINDOW = 64  # batches whose sentences are sorted by length together


@dataclasses.dataclass(frozen=True)
class Split:
    """Sentences and their labels.

    Attributes:
      tokens: of every sentence, without padding.
      labels: shape ``(sentences,)``, int32.
    """

    tokens: Sequence[Sequence[int]]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
      name: of the task.
      classes: names of the labels.
      train: to train on.
      dev: to try settings on.
      test: to report.
      options: of the command line that read it.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    dev: Split
    test: Split
    options: str = ""

    def fingerprint(self) -> int:
        """Tells it from tasks of other sentences, labels or tokens."""
        crc = zlib.crc32(repr(self.classes).encode())
        for split in (self.train, self.dev, self.test):
            for row, label in zip(split.tokens, split.labels.tolist()):
                crc = zlib.crc32(
                    np.array([len(row), *row, label], "<i4").tobytes(), crc
                )
        return crc


Pairs = list[tuple[str, str]]
Tokenize = Callable[[Sequence[str]], list[list[int]]]


def read_task(
    tokenize: Tokenize,
    name: str | None = None,
    train: pathlib.Path | None = None,
    dev: pathlib.Path | None = None,
    test: pathlib.Path | None = None,
) -> Task:
    """Reads files, or makes the embedded task if none is given.

    Without ``dev`` an eighth of the training sentences is held out; without ``test``
    the sentences to try on are those to test on.
    """
    if train is None:
        if dev or test:
            raise SystemExit("Give `--train`, or no file.")
        parts = dict(zip(("train", "dev", "test"), word_order()))
        name, options = name or EMBEDDED, ""
    else:
        pairs = read_sentences(train)
        held = [dev is None and _eighth(sentence) == 0 for sentence, _ in pairs]
        parts = {
            "train": [pair for pair, out in zip(pairs, held) if not out],
            "dev": read_sentences(dev)
            if dev
            else list(itertools.compress(pairs, held)),
        }
        parts["test"] = read_sentences(test) if test else parts["dev"]
        name = name or train.resolve().parent.name
        files = {"train": train, "dev": dev, "test": test}
        words = [f"--{key} {path.name}" for key, path in files.items() if path]
        options = " ".join([*words, f"--task {shlex.quote(name)}"])
    classes = tuple(sorted({label for _, label in parts["train"]}))
    number = {label: i for i, label in enumerate(classes)}

    def split(pairs: Pairs) -> Split:
        unknown = {label for _, label in pairs} - set(classes)
        if unknown:
            raise SystemExit(f"Labels that are not trained on: {sorted(unknown)[:5]}.")
        labels = np.array([number[label] for _, label in pairs], np.int32)
        return Split(tokenize([sentence for sentence, _ in pairs]), labels)

    if len(classes) < 2:
        raise SystemExit(f"There must be two labels or more, got {list(classes)}.")
    empty = [part for part, pairs in parts.items() if not pairs]
    if empty:
        raise SystemExit(f"There are no sentences in {' and '.join(empty)}.")
    splits = {part: split(pairs) for part, pairs in parts.items()}
    return Task(name, classes, **splits, options=options)


def read_sentences(path: pathlib.Path) -> Pairs:
    """Reads sentences and labels under one header line: ``.csv``, else TSV; ``.gz``."""
    opener = gzip.open if path.suffix == ".gz" else open
    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    if ".csv" in path.suffixes:
        form = {"strict": True}
    pairs = []
    with opener(path, "rt", encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines, **form)
        next(rows, None)
        for row in rows:
            if row and len(row) != 2:
                raise SystemExit(
                    f"{path}, line {rows.line_num}: wanted a sentence and a label, "
                    f"got {row}."
                )
            if row:
                pairs.append((" ".join(row[0].split()), row[1]))
    return pairs


def word_order(seed: int = 0) -> tuple[Pairs, Pairs, Pairs]:
    """Is this sentence as it was written, or did two neighbouring words change places?

    Every sentence of the standard library's docstrings occurs once as it is and once
    changed, so that the words alone say nothing: what is learned is in the encoder.

    Returns:
      Labelled sentences to train, to try and to test on; both forms of a sentence are
      in the same part.
    """
    text = _lm.read_standard_library()
    rng = np.random.default_rng(seed)

    def both(sentences: Sequence[str]) -> Pairs:
        pairs = []
        for sentence in sentences:
            words = sentence.split(" ")
            # The last word ends with a full stop, which would tell.
            places = [
                i
                for i in range(len(words) - 2)
                if words[i].lower() != words[i + 1].lower()
            ]
            i = int(rng.choice(places))
            words[i : i + 2] = words[i + 1], words[i]
            pairs += [(sentence, "written"), (" ".join(words), "changed")]
        return pairs

    parts: tuple[list[str], ...] = ([], [], [])
    for sentence in _sentences(np.concatenate([text.train, text.validation])):
        parts[{0: 1, 1: 2}.get(_eighth(sentence), 0)].append(sentence)
    train, dev, test = map(both, parts)
    return train, dev, test


def _eighth(sentence: str) -> int:
    """One of 8 parts, by its letters, so that adding a sentence moves no other."""
    return zlib.crc32(sentence.encode()) % 8


def _sentences(source: np.ndarray) -> list[str]:
    """Plain sentences of 6 to 24 words from the docstrings of files, each once."""
    found: dict[str, None] = {}
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in source.tobytes().split(b"\n\x00"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old escapes in strings
                nodes = ast.walk(ast.parse(file))
        except (SyntaxError, ValueError):
            continue
        for node in nodes:
            docstring = isinstance(node, kinds) and ast.get_docstring(node)
            for paragraph in (docstring or "").split("\n\n"):
                flat = re.sub(r"\s+", " ", inspect.cleandoc(paragraph)).strip()
                for sentence in re.findall(r"(?:^|(?<=\. ))[A-Z][^.]*\.(?= |$)", flat):
                    plain = re.fullmatch(r"[A-Za-z ,;'()-]+\.", sentence)
                    if plain and 6 <= sentence.count(" ") + 1 <= 24:
                        found[sentence] = None
    return list(found)


def steps_per_epoch(split: Split, batch: int) -> int:
    """Batches of one pass; what is left over waits for another shuffle."""
    return len(split) // batch


def batches(
    split: Split, batch: int, seed: int, first: int, steps: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches for the steps from ``first`` on, each of sentences of like length.

    What a step is given depends on the seed and on its number alone, so that a run
    that was killed goes on with what it would have seen.

    Yields:
      Indices ``(batch,)`` and padded tokens ``(batch, length)``.
    """
    per_epoch = steps_per_epoch(split, batch)
    if not per_epoch:
        raise SystemExit(f"`--batch` is {batch}, of {len(split)} training sentences.")
    lengths = np.array([len(row) for row in split.tokens])
    order, epoch = np.empty(0), -1
    for step in range(first, steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = _shuffled(lengths, batch, np.random.default_rng([seed, epoch]))
        chosen = order[step % per_epoch]
        yield chosen, pad([split.tokens[i] for i in chosen])


def _shuffled(lengths: np.ndarray, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Batches of indices. Shape ``(batches, batch)``."""
    order = rng.permutation(len(lengths))
    for start in range(0, len(order), _WINDOW * batch):
        window = order[start : start + _WINDOW * batch]
        window[:] = window[np.argsort(lengths[window], kind="stable")]
    order = order[: len(order) // batch * batch].reshape(-1, batch)
    return rng.permutation(order)


def in_order(split: Split, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All sentences by length; of the last batch some come again.

    Yields:
      Indices ``(batch,)`` and padded tokens ``(batch, length)``.
    """
    order = np.argsort([len(row) for row in split.tokens], kind="stable")
    order = np.resize(order, -(-len(order) // batch) * batch)
    for chosen in order.reshape(-1, batch):
        yield chosen, pad([split.tokens[i] for i in chosen])
