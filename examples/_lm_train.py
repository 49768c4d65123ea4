"""Training the language model: sizes, sharding, and the jitted steps."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import _lm
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

import movement_jax as mj
from movement_jax import tree
from movement_jax.masking import masks_from
from movement_jax.schedules import Target
from movement_jax.state import replace_state


@dataclasses.dataclass(frozen=True)
class Preset:
    """How large the experiment is.

    Attributes:
      width: of the model.
      layers: number of blocks.
      head_size: width of one attention head.
      length: context, in bytes.
      batch: excerpts a step.
      steps: of the training run.
      recovery: steps that every pruned model goes on to train.
      learning_rate: at its peak.
      excerpts: validation excerpts, the same for every number.
      accelerator: compute in bfloat16, recompute activations.
    """

    width: int
    layers: int
    head_size: int
    length: int
    batch: int
    steps: int
    recovery: int
    learning_rate: float
    excerpts: int
    accelerator: bool = False

    def model(self) -> _lm.Transformer:
        """The model of this size."""
        return _lm.Transformer(
            width=self.width,
            layers=self.layers,
            heads=max(1, self.width // self.head_size),
            length=self.length,
            dtype=jnp.bfloat16 if self.accelerator else jnp.float32,
            remat=self.accelerator,
        )


LARGE = Preset(768, 12, 64, 512, 64, 3000, 200, 6e-4, 256, accelerator=True)
PRESETS = {
    "tiny": Preset(32, 1, 16, 32, 16, 400, 30, 5e-3, 64),
    "cpu": Preset(128, 4, 32, 128, 16, 800, 40, 3e-3, 96),
    "gpu": LARGE,
    "tpu": LARGE,
}


class LMState(TrainState):
    """Flax's train state, and the scores of criteria that watch the same run.

    Attributes:
      watched: name of a criterion -> its state.
    """

    watched: Mapping[str, Any]


class Trainer:
    """One model, one text and the jitted functions on them.

    Args:
      preset: the sizes.
      text: to train and validate on.
      seed: of the initial weights and of the order of the excerpts.
    """

    def __init__(self, preset: Preset, text: _lm.Text, seed: int) -> None:
        self.preset, self.seed = preset, seed
        self.model = preset.model()
        # One axis: excerpts are spread over it, and so are the weights (FSDP).
        self.mesh = jax.make_mesh(
            (jax.device_count(),), ("data",), axis_types=(AxisType.Auto,)
        )
        if preset.batch % self.mesh.size:
            raise ValueError(
                f"`--batch` must be a multiple of the {self.mesh.size} devices, got "
                f"{preset.batch}."
            )
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        self.text = jax.device_put(text.train, everywhere)
        n = -(-preset.excerpts // preset.batch) * preset.batch
        excerpts = _lm.windows(text.validation, n, preset.length, 0)
        self.validation = jax.device_put(
            excerpts.reshape(-1, preset.batch, preset.length + 1), everywhere
        )
        self._evaluate = jax.jit(self._losses)
        self._prune = jax.jit(_prune_by)

    def init_params(self) -> Any:
        """Initial weights, each device holding its shard."""

        def init() -> Any:
            tokens = jnp.zeros((1, self.preset.length), jnp.int32)
            return self.model.init(jax.random.key(self.seed), tokens)["params"]

        return jax.jit(init, out_shardings=self._shardings(init))()

    def start(
        self,
        tx: optax.GradientTransformation,
        params: Any,
        watching: Mapping[str, mj.Criterion] | None = None,
    ) -> LMState:
        """A train state for ``tx``, at step 0."""
        watching = watching or {}

        def create(params: Any) -> LMState:
            weights = tree.select(params)
            state = LMState.create(
                apply_fn=self.model.apply,
                params=params,
                tx=tx,
                watched={name: c.init(weights) for name, c in watching.items()},
            )
            return state.replace(step=jnp.zeros([], jnp.int32))

        return jax.jit(create, out_shardings=self._shardings(create, params))(params)

    def make_step(
        self, state: LMState, watching: Mapping[str, mj.Criterion] | None = None
    ) -> Any:
        """The jitted train step: ``state -> state, loss``."""
        watching = watching or {}

        def step(state: LMState, text: jax.Array) -> tuple[LMState, jax.Array]:
            # Only with `regrow=True` do these differ from `state.params`.
            params = mj.effective_params(state.params, state.opt_state)
            batch = self._excerpts(text, state.step)
            loss, grads = jax.value_and_grad(
                lambda params: self._loss(params, batch).mean()
            )(params)
            new = state.apply_gradients(grads=grads)
            # `movement_pruning` steps its own criterion. A criterion is three pure
            # functions, so any number of others can watch the same run.
            seen = {
                "params": tree.select(params),
                "grads": tree.select(grads),
                "new_params": tree.select(new.params),
            }
            watched = {
                name: criterion.update(state.watched[name], **seen)
                for name, criterion in watching.items()
            }
            return new.replace(watched=watched), loss

        layout = jax.tree.map(lambda x: x.sharding, state)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))
        return lambda state: jitted(state, self.text)

    def fit(
        self,
        step: Any,
        state: LMState,
        steps: int,
        title: str,
        looks: Mapping[int, Callable[[LMState, float], None]] | None = None,
    ) -> LMState:
        """Trains for some steps under a progress bar; donates ``state``.

        Args:
          step: as made by :meth:`make_step`.
          state: to start from.
          steps: to train.
          title: of the progress bar.
          looks: after how many steps to call what, with the state and the mean
            training loss since the last look.
        """
        losses, looks = [], looks or {}
        with tqdm(
            total=steps, desc=f"{title:<28.28}", unit="step", ncols=88, mininterval=0.5
        ) as bar:
            for i in range(1, steps + 1):
                state, loss = step(state)
                losses.append(loss)
                bar.update()
                if i % 10 == 0 or i == steps:
                    # Reading a loss waits for its step, which keeps the bar honest.
                    bar.set_postfix_str(f"loss {float(loss):.2f}", refresh=False)
                if i in looks:
                    looks[i](state, float(np.mean(jax.device_get(losses))))
                    losses.clear()
        return state

    def evaluate(self, params: Any) -> np.ndarray:
        """Validation loss of every excerpt, nats per byte. Shape ``(excerpts,)``."""
        return np.asarray(self._evaluate(params, self.validation))

    def prune_by(self, state: LMState, scores: Any, sparsity: float) -> LMState:
        """Prunes ``state`` by any scores, as ``mj.prune`` does by its own."""
        return self._prune(state, scores, jnp.float32(sparsity))

    def _loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Mean loss of every excerpt. Shape ``(batch,)``."""
        logits = self.model.apply({"params": params}, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean(axis=-1)

    def _losses(self, params: Any, batches: jax.Array) -> jax.Array:
        return jax.lax.map(
            lambda batch: self._loss(params, self._spread(batch)), batches
        ).reshape(-1)

    def _excerpts(self, text: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        length = self.preset.length + 1
        starts = jax.random.randint(key, (self.preset.batch,), 0, len(text) - length)
        tokens = text[starts[:, None] + jnp.arange(length)].astype(jnp.int32)
        return self._spread(tokens)

    def _spread(self, batch: jax.Array) -> jax.Array:
        spec = NamedSharding(self.mesh, PartitionSpec("data"))
        return jax.lax.with_sharding_constraint(batch, spec)

    def _shardings(self, function: Any, *args: Any) -> Any:
        """Every array on its longest axis that the devices divide, else everywhere.

        Scores, masks and Adam's moments have the shapes of the weights, so that they
        come to lie with them.
        """

        def spec(leaf: Any) -> NamedSharding:
            axes: list[str | None] = [None] * leaf.ndim
            fits = [i for i in range(leaf.ndim) if leaf.shape[i] % self.mesh.size == 0]
            if leaf.ndim >= 2 and fits:
                axes[max(fits, key=lambda i: leaf.shape[i])] = "data"
            return NamedSharding(self.mesh, PartitionSpec(*axes))

        return jax.tree.map(spec, jax.eval_shape(function, *args))


def sharded(state: LMState) -> float:
    """Fraction of the numbers in a training state of which no device holds all."""
    leaves = jax.tree.leaves(state)
    split = sum(x.size for x in leaves if not x.sharding.is_fully_replicated)
    return split / sum(x.size for x in leaves)


def difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Mean difference on the same excerpts, with its standard error."""
    paired = ours - theirs
    error = paired.std(ddof=1) / np.sqrt(paired.size)
    return {"mean": float(paired.mean()), "error": float(error)}


def _prune_by(state: LMState, scores: Any, sparsity: jax.Array) -> LMState:
    found = mj.find_state(state.opt_state)
    masks, _ = masks_from(scores, found, Target(sparsity))
    pruned = found._replace(masks=masks, sparsity=sparsity)
    return state.replace(
        params=mj.apply_masks(state.params, masks),
        opt_state=replace_state(state.opt_state, pruned),
    )


def as_if(
    state: LMState, scores: Any, criterion: mj.Criterion | None = None
) -> LMState:
    """The same train state, had the criterion in its optimizer come to other scores.

    What is written for ``movement_pruning``'s own criterion (``mj.agreement``,
    pictures) then works for one that only watched.

    Args:
      state: as trained.
      scores: one number per weight, or the state of ``criterion``.
      criterion: to be named in reports. By default the optimizer's own stays, whose
        state is its scores, and nothing is compiled again.
    """
    found = mj.find_state(state.opt_state)
    config = found.config
    if criterion is not None:
        config = dataclasses.replace(config, criterion=criterion)
    new = found._replace(scores=scores, config=config)
    return state.replace(opt_state=replace_state(state.opt_state, new))
