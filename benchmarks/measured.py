"""One number of a benchmark: its runs, its target, its line in a table."""

import statistics
from dataclasses import dataclass


@dataclass
class Result:
    """What was measured of one thing, once for each run."""

    title: str
    unit: str
    values: list[float]
    target: tuple[str, float] | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        side, limit = self.target
        return self.median < limit if side == "<" else self.median > limit

    def as_dict(self) -> dict:
        target = None if self.target is None else " ".join(map(str, self.target))
        values = [float(f"{value:.4g}") for value in self.values]
        return {**vars(self), "values": values, "median": float(f"{self.median:.4g}"), "target": target,
                "met": self.met}  # fmt: skip


def table_line(result: dict) -> str:
    """Of a result `as_dict`: title, median and spread, unit, target, whether it is met."""
    values, target = result["values"], result["target"] or ""
    spread = f" ({_number(min(values))} – {_number(max(values))})" if len(values) > 1 else ""
    if target:
        side, limit = target.split()
        target = f"{side} {_number(float(limit))}"
    met = {None: "", True: "met", False: "missed"}[result["met"]]
    return f"| {result['title']} | {_number(result['median'])}{spread} | {result['unit']} | {target} | {met} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
