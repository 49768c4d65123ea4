"""Tables and axes that the reports of the examples share."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import flax
import jax
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table, to be shown by rich or written as Markdown.

    Attributes:
      title: what it is.
      head: names of the columns.
      rows: cells; the first of each row is its name.
      note: one sentence on how to read it.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __rich__(self) -> Table:
        table = Table(
            title=self.title,
            caption=self.note or None,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
        )
        for i, name in enumerate(self.head):
            table.add_column(name, justify="right" if i else "left", no_wrap=not i)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The same as Markdown."""
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join(filter(None, (f"**{self.title}**", table, self.note)))


def versions() -> str:
    """Of what the numbers depend on."""
    return f"jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}"


def new_axes() -> Axes:
    """One empty plot."""
    return Figure(figsize=(7.6, 4.2), dpi=150, layout="constrained").add_subplot()


def finish(ax: Axes, x: str, y: str, title: str) -> None:
    """Labels, a legend beside the plot, and no frame."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, fontsize="medium")
    ax.grid(lw=0.5, alpha=0.4)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)
