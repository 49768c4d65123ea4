"""Fine-pruning: recipes, the jitted step, and runs that go on after a kill."""

import dataclasses
import datetime
import json
import pathlib
import re
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import _minilm_data as data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _minilm import MiniLM
from _report import versions, write_whole
from flax.training.train_state import TrainState
from tqdm import tqdm

import movement_jax as mj

DENSE = "dense"
KERNELS = "^encoder/.*kernel"  # no embeddings, norms, biases, nor the head
TEMPERATURE = 2.0  # of distillation
_EVALUATED = 128  # sentences at once


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run. Equal settings give equal bits.

    Attributes:
      criterion: a name of :data:`CRITERIA`, or ``"dense"`` to prune nothing.
      sparsity: fraction of the encoder's kernels to drop.
      seed: of the head and of the order of the sentences.
      steps: of training, pruning included.
      batch: sentences a step.
      learning_rate: of the weights, at its peak.
      score_rate: of the scores, for criteria that train them.
      from_magnitude: how much of the magnitudes those scores start with.
      regrow: whether pruned weights keep their value and may return.
      allocation: ``"uniform"`` or ``"global"``.
      begin: of pruning, as a fraction of the steps.
      end: of pruning, as a fraction of the steps.
      distill: weight of the dense model's answers in the loss, in [0, 1].
      layers: of the encoder that are used.
      length: sentences are cut after so many tokens.
      task: what is learned.
      data: fingerprint of the tokens, the labels and the pretrained weights.
    """

    criterion: str
    sparsity: float
    seed: int
    steps: int
    batch: int
    learning_rate: float
    score_rate: float
    from_magnitude: float
    regrow: bool
    allocation: str
    begin: float
    end: float
    distill: float
    layers: int
    length: int
    task: str
    data: str

    @property
    def name(self) -> str:
        """Short, and another one for any other setting."""
        told = dataclasses.asdict(self)
        first = [told[key] for key in ("task", "criterion", "sparsity", "seed")]
        rest = zlib.crc32(json.dumps(told, sort_keys=True).encode())
        words = "-".join(f"{x:g}" if isinstance(x, float) else str(x) for x in first)
        return f"{re.sub('[^a-z0-9.]+', '-', words.lower())}-{rest:08x}"

    def command(self, options: str) -> str:
        """What runs it again, given the options that read the task."""
        told = dataclasses.asdict(self)
        del told["data"], told["task"]
        told |= {"criteria": told.pop("criterion"), "seeds": told.pop("seed")}
        if not told["regrow"]:
            told["no_regrow"] = not told.pop("regrow")
        words = ["python examples/finetune_minilm.py", *filter(None, [options])]
        for key, value in told.items():
            flag = "--" + key.replace("_", "-")
            words.append(flag if value is True else f"{flag} {value}")
        return " ".join(words)

    def schedule(self) -> Any:
        """Sparsity over the steps."""
        return mj.cubic(
            self.sparsity,
            begin=round(self.begin * self.steps),
            end=round(self.end * self.steps),
            every=max(1, self.steps // 200),
        )


# What a weight is worth, by the name that the table has for it.
CRITERIA: dict[str, Callable[[Setting], mj.Criterion]] = {
    "magnitude": lambda s: mj.Magnitude(),
    "ema": lambda s: mj.EmaMagnitude(half_life=0.1 * s.steps),
    "movement": lambda s: mj.Movement(
        learning_rate=s.score_rate, from_magnitude=s.from_magnitude
    ),
    "soft": lambda s: mj.SoftMovement(
        target_sparsity=s.schedule(),
        learning_rate=s.score_rate,
        from_magnitude=s.from_magnitude,
    ),
    "sensitivity": lambda s: mj.Sensitivity(),
    "fisher": lambda s: mj.Fisher(),
    "taylor": lambda s: mj.Taylor(),
    "random": lambda s: mj.Random(s.seed),
}
TRAINED = ("movement", "soft")  # those whose scores an optimizer trains


def optimizer_of(setting: Setting) -> optax.GradientTransformation:
    """AdamW with warm-up and linear decay, and pruning around it."""
    n = setting.steps
    rate = optax.warmup_constant_schedule(0.0, setting.learning_rate, max(1, n // 20))
    fall = optax.linear_schedule(1.0, 0.0, n)
    inner = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(lambda step: rate(step) * fall(step), weight_decay=0.01),
    )
    if setting.criterion == DENSE:
        return inner
    soft = setting.criterion == "soft"  # which decides by itself how much to drop
    allocations = {"uniform": mj.Uniform(), "global": mj.Global(min_keep=0.002)}
    return mj.movement_pruning(
        None if soft else setting.schedule(),
        CRITERIA[setting.criterion](setting),
        allocation=allocations[setting.allocation],
        prunable=KERNELS,
        regrow=setting.regrow,
        inner=inner,
        check_finite=False,
    )


class Trainer:
    """One model, one task, one setting, and the jitted functions on them."""

    def __init__(self, model: MiniLM, task: data.Task, setting: Setting) -> None:
        self.model, self.task, self.setting = model, task, setting
        self.initial = model.init(len(task.classes), setting.seed)
        self._logits = jax.jit(model.logits)

    def start(self) -> TrainState:
        """The state at step 0, in buffers of its own."""
        state = TrainState.create(
            apply_fn=self.model.logits,
            params=jax.tree.map(jnp.copy, self.initial),
            tx=optimizer_of(self.setting),
        )
        return state.replace(step=jnp.zeros([], jnp.int32))

    def make_step(self) -> Callable[..., tuple[TrainState, jax.Array]]:
        """The train step; it donates the state.

        In two parts: what depends on the length of the sentences is compiled for each
        of them, the optimizer, which has most to compile, only once.
        """
        share, pruned = self.setting.distill, self.setting.criterion != DENSE

        def loss(
            params: Any, frozen: Any, tokens: Any, labels: Any, taught: Any
        ) -> jax.Array:
            logits = self.model.logits(params, frozen, tokens)
            own = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            if not share:
                return own.mean()
            wanted = jax.nn.softmax(taught / TEMPERATURE)
            soft = optax.softmax_cross_entropy(logits / TEMPERATURE, wanted)
            return ((1 - share) * own + share * TEMPERATURE**2 * soft).mean()

        @jax.jit
        def gradient(params: Any, opt_state: Any, *batch: Any) -> tuple[Any, Any]:
            # Only with `regrow=True` do these differ from `params`.
            if pruned:
                params = mj.effective_params(params, opt_state)
            return jax.value_and_grad(loss)(params, *batch)

        update = jax.jit(
            lambda state, grads: state.apply_gradients(grads=grads), donate_argnums=0
        )

        def step(state: TrainState, *batch: Any) -> tuple[TrainState, jax.Array]:
            value, grads = gradient(state.params, state.opt_state, *batch)
            return update(state, grads), value

        return step

    def predict(self, params: Any, split: data.Split) -> np.ndarray:
        """Scores of the classes. Shape ``(sentences, classes)``, float32."""
        found = np.zeros((len(split), len(self.task.classes)), np.float32)
        for chosen, tokens in data.in_order(split, _EVALUATED):
            found[chosen] = self._logits(params, self.model.frozen, tokens)
        return found

    def accuracy(self, params: Any, split: data.Split) -> float:
        """Fraction of the sentences that are told right."""
        return float((self.predict(params, split).argmax(1) == split.labels).mean())


def run(
    model: MiniLM,
    task: data.Task,
    setting: Setting,
    folder: pathlib.Path,
    save_every: int,
    teacher: np.ndarray | None = None,
) -> dict[str, Any]:
    """Trains, or goes on where a killed run left off, and writes the result.

    Args:
      model: the pretrained model.
      task: what to learn.
      setting: how.
      folder: for checkpoints and, when all is done, ``result.json`` and ``model``.
      save_every: steps between checkpoints.
      teacher: scores of the classes for all training sentences, to distil from.
    """
    trainer = Trainer(model, task, setting)
    saved = folder / "checkpoint"
    state, seconds = trainer.start(), 0.0
    if saved.exists() and mj.checkpoint.steps(saved):
        like = {"state": state, "seconds": jnp.float32(0)}
        found = mj.checkpoint.restore(saved, like=like)
        state, seconds = found["state"], float(found["seconds"])
        tqdm.write(f"{setting.name}: resumed at step {int(state.step)}")
    step, clock = trainer.make_step(), _clock()
    first, losses = int(state.step), []
    if teacher is None:
        teacher = np.zeros((len(task.train), 1), np.float32)
    title = f"{setting.criterion} {setting.sparsity:.0%} seed {setting.seed}"
    began = clock()
    with tqdm(
        total=setting.steps,
        initial=first,
        desc=f"{title:<26.26}",
        unit="step",
        ncols=88,
        mininterval=1,
    ) as bar:
        of = (setting.batch, setting.seed, first, setting.steps)
        for i, (chosen, tokens) in enumerate(data.batches(task.train, *of), first + 1):
            state, loss = step(
                *(state, model.frozen, tokens),
                *(task.train.labels[chosen], teacher[chosen]),
            )
            losses.append(loss)
            bar.update()
            if i % 20 == 0:
                # Reading a loss waits for its step, which keeps the bar honest.
                recent = np.mean(jax.device_get(losses[-20:]))
                bar.set_postfix_str(f"loss {recent:.3f}", refresh=False)
            if i % save_every == 0 and i < setting.steps:
                now = jnp.float32(seconds + clock() - began)
                _save_last(saved, i, {"state": state, "seconds": now})
        jax.block_until_ready(state)
    seconds += clock() - began
    result = {"setting": dataclasses.asdict(setting), **_measure(trainer, state)}
    result |= {
        "classes": len(task.classes),
        "sentences": [len(s) for s in (task.train, task.dev, task.test)],
        "seconds": round(seconds, 1),
        "command": setting.command(task.options),
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
    }
    shutil.rmtree(folder / "model", ignore_errors=True)
    params = _finished(setting, state).params
    mj.checkpoint.save(folder / "model", setting.steps, params)
    # A run that has this file is done; until then it can go on from its checkpoint.
    write_whole(folder / "result.json", json.dumps(result, indent=1).encode())
    shutil.rmtree(saved, ignore_errors=True)
    return result


def _finished(setting: Setting, state: TrainState) -> TrainState:
    return state if setting.criterion == DENSE else mj.finalize(state)


def _measure(trainer: Trainer, state: TrainState) -> dict[str, Any]:
    """What came of it."""
    params = _finished(trainer.setting, state).params
    found: dict[str, Any] = {
        "dev": trainer.accuracy(params, trainer.task.dev),
        "test": trainer.accuracy(params, trainer.task.test),
        "fingerprint": mj.fingerprint(params),
    }
    if trainer.setting.criterion == DENSE:
        return found
    # The masks that magnitude would give the pretrained weights, one-shot.
    tx = mj.movement_pruning(criterion=mj.Magnitude(), prunable=KERNELS)
    start = trainer.initial, tx.init(trainer.initial)
    masks = mj.find_state(state.opt_state).masks
    total = mj.agreement(start, masks).total
    rows = mj.summary(state).tensors
    return found | {
        "sparsity": float(mj.sparsity_of(state)),
        "jaccard": total.jaccard,
        "chance": total.chance,
        "kept": {row.name: row.kept / row.size for row in rows},
    }


def _clock() -> Callable[[], float]:
    """Seconds of this process where it computes itself: others may share its cores."""
    return time.process_time if jax.default_backend() == "cpu" else time.perf_counter


def _save_last(folder: pathlib.Path, step: int, state: Mapping[str, Any]) -> None:
    """Saves, then removes what came before."""
    earlier = mj.checkpoint.steps(folder) if folder.exists() else []
    mj.checkpoint.save(folder, step, state)
    for old in earlier:
        shutil.rmtree(folder / str(old))
