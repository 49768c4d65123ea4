"""Sentences about the language model experiment, each made from its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

SAME = 0.95  # Jaccard index from which two criteria prune nearly the same weights
ELSE = 0.90  # Jaccard index under which a criterion is something else
FLAT = 0.02  # change of the loss, nats per byte, over the last tenth of the run
_ERRORS = 2  # standard errors that a difference must exceed to count
_LEAST = 0.01  # nats per byte that it must exceed, too


def conclude(
    results: Mapping[str, Any],
    magnitude: str,
    chapter: str,
    random: str,
    at: float,
    recovered_at: float,
) -> list[str]:
    """What the numbers say, in sentences that stay true if the numbers change.

    Args:
      results: all numbers.
      magnitude: name of the criterion that all others are compared with.
      chapter: name of the running average with decay 0.9.
      random: name of the criterion that knows nothing.
      at: sparsity, among those tabulated, at which criteria are told apart.
      recovered_at: sparsity, among those tabulated, of the models that train on.
    """
    others = [name for name in results["agreement"] if name != random]
    different = [n for n in others if _jaccard(results, n, at) < ELSE]
    return [
        _short(results, chapter, different, at, recovered_at),
        _trained(results),
        _chapter(results, chapter, at),
        _half_lives(results, at),
        _something_else(results, different, at),
        _where(results, different or others, at),
        _one_shot(results, different),
        _best(results, magnitude, random),
        _recovered(results, magnitude, different),
        _gradual(results, magnitude),
        *_rates(results),
        "One model, one text, one seed: differences are called measurable if they "
        f"exceed {_ERRORS} standard errors over the validation excerpts and {_LEAST} "
        "nats, which says nothing about other seeds.",
    ]


def _short(
    results: Mapping[str, Any],
    chapter: str,
    different: Sequence[str],
    at: float,
    recovered_at: float,
) -> str:
    recovered, level = results["recovery"], f"{recovered_at:g}"
    tried = [n for n in different if n in recovered]
    once = [n for n in different if _below(results["difference"][n][level])]
    after = [n for n in tried if _below(recovered[n]["after_difference"])]
    become = _names(different) or "nothing that was tried"
    return (
        f"In short: the chapter's score is {_verdict(results, chapter)}. What becomes "
        f"something else (Jaccard index with magnitude under {ELSE} at {at:.0%}): "
        f"{become}. Does it help at {recovered_at:.0%}? Measurably better than "
        f"magnitude one-shot: {_names(once) or 'none of them'}. After training on, "
        f"tried with {_names(tried) or 'none of them'}: {_names(after) or 'none'}."
    )


def _verdict(results: Mapping[str, Any], chapter: str) -> str:
    levels = results["agreement"][chapter].values()
    lowest = min(cell["total"]["jaccard"] for cell in levels)
    if lowest >= SAME:
        return "nearly magnitude itself"
    return "close to magnitude" if lowest >= ELSE else "something else than magnitude"


def _trained(results: Mapping[str, Any]) -> str:
    curve, counting = results["curve"], results["counting"]
    last, change = curve[-1][2], curve[-1][2] - curve[-2][2]
    state = "has" if abs(change) < FLAT else "has not"
    against = "below" if last < counting["bigram"] else "not below"
    return (
        f"The dense model reaches {last:.3f} nats per byte on files it never saw, "
        f"{against} the {counting['bigram']:.3f} of counting byte pairs; over the last "
        f"tenth of the run it changed by {change:+.3f}: it {state} converged "
        f"(to {FLAT}), as far as a learning rate that ends at 0 goes."
    )


def _chapter(results: Mapping[str, Any], chapter: str, at: float) -> str:
    levels = results["agreement"][chapter]
    indices = [cell["total"]["jaccard"] for cell in levels.values()]
    total = levels[f"{at:g}"]["total"]
    dropped = total["both"] + total["only_a"]
    cells = results["difference"][chapter].values()
    largest = max(cells, key=lambda cell: abs(cell["mean"]))
    moving = ", ".join(
        f"{health['jaccard']:.3f} in {name}"
        for name, health in list(results["health"].items())[1:]
    )
    return (
        f"The chapter's score ({chapter}) is {_verdict(results, chapter)}: the Jaccard "
        f"index of what the two prune is {_range(indices)} over all sparsities. At "
        f"{at:.0%}, {total['only_a']:,} of {dropped:,} pruned weights differ. The "
        f"largest difference in one-shot loss is {largest['mean']:+.4f} ± "
        f"{largest['error']:.4f} nats. In the runs that stopped early, where "
        f"weights still moved, the Jaccard index at {at:.0%} is {moving}."
    )


def _half_lives(results: Mapping[str, Any], at: float) -> str:
    names = [n for n in results["agreement"] if n.startswith("EMA half-life")]
    chance = results["agreement"][names[0]][f"{at:g}"]["total"]["chance"]
    listed = ", ".join(
        f"{_jaccard(results, n, at):.3f} with a {n.removeprefix('EMA ')}" for n in names
    )
    first = next((n for n in names if _jaccard(results, n, at) < ELSE), None)
    verdict = (
        f"The {first.removeprefix('EMA ')} is the shortest tried that falls under "
        f"{ELSE}"
        if first
        else f"None of these falls under {ELSE}"
    )
    return (
        f"A longer memory, in per cent of the run, moves the average away from "
        f"magnitude: at {at:.0%} the "
        f"Jaccard index is {listed} (chance: {chance:.3f}). {verdict}."
        if _falling([_jaccard(results, n, at) for n in names])
        else f"With the half-life the Jaccard index at {at:.0%} goes {listed} (chance: "
        f"{chance:.3f}). {verdict}."
    )


def _something_else(
    results: Mapping[str, Any], different: Sequence[str], at: float
) -> str:
    if not different:
        return f"No criterion tried has a Jaccard index under {ELSE} at {at:.0%}."
    listed = ", ".join(f"{n} ({_jaccard(results, n, at):.3f})" for n in different)
    return (
        f"Something else than magnitude, with a Jaccard index under {ELSE} at "
        f"{at:.0%}: {listed}."
    )


def _where(results: Mapping[str, Any], names: Sequence[str], at: float) -> str:
    parts = []
    for name in names:
        tensors = results["agreement"][name][f"{at:g}"]["tensors"]
        most, least = tensors[0], tensors[-1]
        parts.append(
            f"{name} in `{most['name']}` ({most['jaccard']:.3f}; least in "
            f"`{least['name']}`, {least['jaccard']:.3f})"
        )
    return f"They disagree with magnitude most at {at:.0%}: " + "; ".join(parts) + "."


def _one_shot(results: Mapping[str, Any], different: Sequence[str]) -> str:
    if not different:
        return "So there is none to ask whether being something else helps one-shot."
    alike: dict[tuple[str, str], list[str]] = {}
    for name in different:
        cells = results["difference"][name]
        better = _levels([level for level, cell in cells.items() if _below(cell)])
        worse = _levels([level for level, cell in cells.items() if _above(cell)])
        alike.setdefault((better, worse), []).append(name)
    parts = [
        f"{_names(names)} measurably better at {better or 'no sparsity'}, worse at "
        f"{worse or 'none'}"
        for (better, worse), names in alike.items()
    ]
    return "Does that help? One-shot, against magnitude: " + "; ".join(parts) + "."


def _best(results: Mapping[str, Any], magnitude: str, random: str) -> str:
    loss = results["loss"]
    parts = []
    for level in loss[magnitude]:
        if float(level) == 0:
            continue
        best = min(loss, key=lambda name: loss[name][level]["mean"])
        cell = results["difference"].get(best, {}).get(level)
        if cell is None or not _below(cell):
            shown = f"{magnitude} ({loss[magnitude][level]['mean']:.3f})"
        else:
            shown = (
                f"{best} ({loss[best][level]['mean']:.3f}, {-cell['mean']:.3f} ± "
                f"{cell['error']:.3f} below magnitude)"
            )
        parts.append(f"{_percent(level)} {shown}")
    lost = [
        f"{name} at {_levels(levels)}"
        for name, row in loss.items()
        if name != random
        and (
            levels := [
                level
                for level in row
                if float(level) > 0
                and row[level]["mean"] >= loss[random][level]["mean"]
            ]
        )
    ]
    worse = f" No better than random: {'; '.join(lost)}." if lost else ""
    return (
        "Lowest one-shot loss (magnitude unless another is measurably lower): "
        f"{'; '.join(parts)}.{worse}"
    )


def _recovered(
    results: Mapping[str, Any], magnitude: str, different: Sequence[str]
) -> str:
    rows = results["recovery"]
    pruned = {n: r for n, r in rows.items() if r["sparsity"] > 0}
    best = min(pruned, key=lambda n: pruned[n]["after"]["mean"])
    dense = next(r for r in rows.values() if r["sparsity"] == 0)
    listed = ", ".join(
        f"{n} {r['before']['mean']:.3f} → {r['after']['mean']:.3f}"
        for n, r in pruned.items()
    )
    beat = [
        n for n, r in pruned.items() if n != magnitude and _below(r["after_difference"])
    ]
    known = [n for n in different if n in pruned]
    measured = _names(beat) if beat else "no criterion"
    tested = (
        f" Of those that are something else, {_names(known)} took part."
        if known
        else ""
    )
    return (
        f"Trained on for {results['setting']['recovery']} steps: {listed}. "
        f"Lowest after it is {best}; measurably below magnitude: {measured}. Without "
        f"pruning the same steps lead to {dense['after']['mean']:.3f}.{tested}"
    )


def _gradual(results: Mapping[str, Any], magnitude: str) -> str:
    rows = results["gradual"]
    name = next(n for n in rows if n != magnitude)
    ours, theirs = rows[name]["after"]["mean"], rows[magnitude]["after"]["mean"]
    once = results["recovery"][name]["after"]["mean"]
    once_magnitude = results["recovery"][magnitude]["after"]["mean"]
    cell = rows[name]["after_difference"]
    compare = "is not measurably different from"
    if _below(cell):
        compare = "is better than"
    elif _above(cell):
        compare = "is worse than"
    return (
        f"Pruned gradually, as in the paper, {name} ends at {ours:.3f} (one-shot and "
        f"recovered: {once:.3f}) and {compare} gradual {magnitude} at {theirs:.3f} "
        f"(one-shot and recovered: {once_magnitude:.3f}). The paper's case is another "
        "one: fine-tuning on a new task, over many more steps."
    )


def _rates(results: Mapping[str, Any]) -> list[str]:
    sentences = []
    for name, health in results["health"].items():
        warnings = [f for f in health["findings"] if f["level"] == "warning"]
        found = " ".join(f["message"] for f in warnings)
        sentences.append(
            f"Health, {name}: {found}" if warnings else f"Health, {name}: no warning."
        )
    return sentences


def _jaccard(results: Mapping[str, Any], name: str, at: float) -> float:
    return results["agreement"][name][f"{at:g}"]["total"]["jaccard"]


def _below(cell: Mapping[str, float]) -> bool:
    return cell["mean"] < -max(_ERRORS * cell["error"], _LEAST)


def _above(cell: Mapping[str, float]) -> bool:
    return cell["mean"] > max(_ERRORS * cell["error"], _LEAST)


def _falling(values: Sequence[float]) -> bool:
    return all(b < a for a, b in zip(values, values[1:]))


def _range(values: Sequence[float]) -> str:
    if f"{min(values):.3f}" == f"{max(values):.3f}":
        return f"{min(values):.3f}"
    return f"{min(values):.3f} to {max(values):.3f}"


def _percent(level: str) -> str:
    return f"{float(level):.0%}"


def _levels(levels: Sequence[str]) -> str:
    return _names([_percent(level) for level in levels])


def _names(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
