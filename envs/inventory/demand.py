"""Demand of the stores: Poisson, (correlated) normal, or recorded series of weeks."""

from __future__ import annotations

import csv
import datetime
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Demand", "Normal", "Poisson", "Recorded", "days_from_christmas", "load_series", "synthetic_series"]


@dataclass(frozen=True)
class Poisson:
    """Independent Poisson demand of mean ``mean`` per store.

    Raises:
        ValueError: a mean that is not positive.
    """

    mean: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(0.0 < mean < math.inf for mean in self.mean):
            raise ValueError(f"demand: expected positive means, got {self.mean}")

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation per store."""
        return tuple(mean**0.5 for mean in self.mean)

    def draw(self, count: int, periods: int, generator: torch.Generator) -> Tensor:
        """``[count, periods, K]`` float32."""
        rate = torch.tensor(self.mean).expand(count, periods, len(self.mean))
        return torch.poisson(rate.contiguous(), generator=generator)


@dataclass(frozen=True)
class Normal:
    """Normal demand, every pair of stores correlated by ``correlation``, independent over periods; ``clip`` cuts it at
    zero (``mean`` and ``std`` are those before).

    Raises:
        ValueError: a correlation outside [0, 1], a negative deviation, means that are not finite, or unequal numbers of
            means and deviations.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    correlation: float = 0.0
    clip: bool = True

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not 0.0 <= self.correlation <= 1.0:
            raise ValueError(
                f"demand: expected one std per mean and a correlation in [0, 1], got {len(self.mean)} means, "
                f"{len(self.std)} stds and correlation={self.correlation}"
            )
        if not all(0.0 <= std < math.inf for std in self.std) or not all(map(math.isfinite, self.mean)):
            raise ValueError(
                f"demand: expected finite means and stds that are not negative, got {self.mean} and {self.std}"
            )

    def draw(self, count: int, periods: int, generator: torch.Generator) -> Tensor:
        """``[count, periods, K]`` float32: one shared and ``K`` own factors."""
        own = torch.randn(count, periods, len(self.mean), generator=generator) * (1.0 - self.correlation) ** 0.5
        if self.correlation:
            own = own + torch.randn(count, periods, 1, generator=generator) * self.correlation**0.5
        demand: Tensor = torch.tensor(self.mean) + torch.tensor(self.std) * own
        return demand.clamp_min(0.0) if self.clip else demand


@dataclass(frozen=True, eq=False)
class Recorded:
    """Recorded demand, one scenario per series. A period is a week, or a day (``step_days=1``).

    Args:
        series: ``[S, W, K]`` demand of ``S`` series in ``W`` periods at ``K`` stores, finite and not negative.
        source: where it comes from, in words; shown wherever the data is named.
        first_day: first day of period 0 (calendar features are counted from it).
        history: periods that policies see, and that precede the first simulated period of every split.
        step_days: days of a period, 7 or 1.
        products: names of the series; ``()``: numbers.
        locations: names of the stores; ``()``: numbers.
        features: ``[S, W', K, F]``, ``W' >= W``: what is known ahead of each period, such as planned promotions.
            Periods beyond the last one given repeat :attr:`beyond`.
        feature_names: names of the ``F`` features.
        feature_units: ``[S, K, F]``, what the features of a file are measured by: the largest number of a promotion (0
            where there is none), the usual price.

    Raises:
        ValueError: another shape, nothing in it, values that are negative or not finite, names that do not fit.
    """

    series: Tensor
    source: str
    first_day: datetime.date = datetime.date(2013, 1, 1)
    history: int = 16
    step_days: int = 7
    products: tuple[str, ...] = ()
    locations: tuple[str, ...] = ()
    features: Tensor | None = None
    feature_names: tuple[str, ...] = ()
    feature_units: Tensor | None = None

    def __post_init__(self) -> None:
        bad = int((~(self.series.isfinite() & (self.series >= 0))).sum())
        if self.series.dim() != 3 or not self.series.numel() or bad:
            raise ValueError(
                f"{self.source}: expected demand [series, weeks, stores], finite and not negative, got shape "
                f"{tuple(self.series.shape)} with {bad} other values; set returned goods to 0"
            )
        count, periods, stores = self.series.shape
        if (len(self.products) or count, len(self.locations) or stores) != (count, stores) or self.step_days not in (
            1,
            7,
        ):
            raise ValueError(
                f"{self.source}: expected {count} products, {stores} locations and periods of 1 or 7 days, got "
                f"{len(self.products)}, {len(self.locations)} and {self.step_days}"
            )
        if self.features is not None:
            shape = tuple(self.features.shape)
            if (
                len(shape) != 4
                or shape[0] != count
                or shape[1] < periods
                or shape[2:]
                != (
                    stores,
                    len(self.feature_names),
                )
            ):
                raise ValueError(
                    f"{self.source}: expected features [{count}, {periods} or more, {stores}, "
                    f"{len(self.feature_names)}], one of them per name, got {shape}"
                )
            if not self.features.isfinite().all():
                raise ValueError(f"{self.source}: expected finite features, got NaN or infinity among them")

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean over series and weeks, per store."""
        return tuple(self.series.mean((0, 1)).tolist())

    def product(self, index: int) -> str:
        """The name of a series."""
        return self.products[index] if self.products else str(index)

    def location(self, index: int) -> str:
        """The name of a store."""
        return self.locations[index] if self.locations else f"store {index + 1}"

    @property
    def beyond(self) -> Tensor:
        """``[S, 1, K, F]``: features of the periods that no plan covers. Promotions are taken to be over (0), anything
        else stays as it is in the last period."""
        assert self.features is not None
        last = self.features[:, -1:].clone()
        for index, name in enumerate(self.feature_names):
            if name == "promotion" or name.startswith("promotion:"):
                last[..., index] = 0.0
        return last


Demand = Poisson | Normal | Recorded


def seasons(first_day: datetime.date, periods: int, step_days: int = 7) -> Tensor:
    """``[periods, 4]`` float32: sine and cosine of the year (of its days, at the first day of each period) and of the
    week (0 where a period is a week)."""
    days = [first_day + datetime.timedelta(days=step_days * period) for period in range(periods)]
    year = torch.tensor([day.timetuple().tm_yday for day in days]) * (2 * math.pi / 365.25)
    week = torch.tensor([day.weekday() for day in days]) * (2 * math.pi / 7)
    shown = float(step_days == 1)
    return torch.stack((year.sin(), year.cos(), shown * week.sin(), shown * week.cos()), 1).float()


def days_from_christmas(first_day: datetime.date, weeks: int, step_days: int = 7) -> Tensor:
    """``[weeks]`` float32: signed days from the nearest Christmas day to the first day of each week (or other period of
    ``step_days``)."""
    days = [first_day + datetime.timedelta(days=step_days * week) for week in range(weeks)]
    near = [min(((day - datetime.date(y, 12, 25)).days for y in (day.year - 1, day.year)), key=abs) for day in days]
    return torch.tensor(near, dtype=torch.float32)


def load_series(path: str | Path) -> Recorded:
    """Your own weekly demand.

    * ``.npz``: an array ``demand`` ``[S, W]`` or ``[S, W, K]``, optionally ``first_day`` (``"2013-01-01"``).
    * ``.csv`` with a header and the columns ``series, week, demand`` and optionally ``store``, in any order: one row
      per observation. Weeks are whole numbers or days (``2013-01-01``); rows that are missing count as zero demand.
      Series and stores are numbered in the order in which they appear.

    Series without dates are taken to begin on 2013-01-01, with a warning: policies see the days from Christmas.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, missing columns or arrays, demand that is no number or negative, weeks that are
            neither numbers nor days seven days apart, an observation given twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"series: expected a file, got {str(path)!r}, which there is not"
            + ("" if path.is_absolute() else f" in {Path.cwd()}; a relative path counts from the working folder")
        )
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            if "demand" not in arrays:
                raise ValueError(
                    f"{path.name}: expected an array 'demand' [series, weeks(, stores)], got {arrays.files}"
                )
            demand = torch.from_numpy(np.asarray(arrays["demand"], dtype=np.float32))
            if "first_day" not in arrays:
                _without_dates(path.name, "an array 'first_day' (\"2023-01-02\")")
            first = str(arrays["first_day"]) if "first_day" in arrays else "2013-01-01"
        demand = demand[..., None] if demand.dim() == 2 else demand
        return Recorded(demand, path.name, datetime.date.fromisoformat(first))
    if path.suffix != ".csv":
        raise ValueError(f"series: expected a .npz or .csv file, got {path.name}")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # spreadsheets begin their files with a mark
        rows = csv.DictReader(io.StringIO(text, newline=""))
        columns = set(rows.fieldnames or ())
        if not {"series", "week", "demand"} <= columns:
            raise ValueError(f"{path.name}: expected columns series, week, demand(, store), got {sorted(columns)}")
        table = [(row["series"], row.get("store") or "", row["week"], row["demand"]) for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path.name}: expected a table as CSV in UTF-8, got a file that is none: {error}") from error
    return _from_table(table, path.name)


def _from_table(table: list[tuple[str, str, str, str]], name: str) -> Recorded:
    if not table:
        raise ValueError(f"{name}: expected at least one row, got none")
    first = datetime.date(2013, 1, 1)
    numbers = [_number(text) for *_, text in table]
    if None in numbers:
        line = numbers.index(None)
        raise ValueError(f"{name}: expected a number as demand, got {table[line][3]!r} in row {line + 1}")
    texts = sorted({row[2] or "" for row in table})
    if all(text.isdigit() for text in texts):
        _without_dates(name, "days as weeks (2023-01-02)")
        origin = min(int(text) for text in texts)
        week_of = {text: int(text) - origin for text in texts}
    else:
        try:
            days = {text: datetime.date.fromisoformat(text) for text in texts}
        except ValueError as error:
            raise ValueError(f"{name}: expected weeks as whole numbers or days (2013-01-01); {error}") from None
        first = min(days.values())
        if any((day - first).days % 7 for day in days.values()):
            raise ValueError(f"{name}: expected weeks that start seven days apart, got {texts[:3]} ...")
        week_of = {text: (day - first).days // 7 for text, day in days.items()}
    series = {key: i for i, key in enumerate(dict.fromkeys(row[0] for row in table))}
    stores = {key: i for i, key in enumerate(dict.fromkeys(row[1] for row in table))}
    index = np.array([(series[s], week_of[w], stores[k]) for s, k, w, _ in table])
    if len(np.unique(index, axis=0)) != len(index):
        raise ValueError(f"{name}: expected one row per series, store and week, got {len(index)} rows with repetitions")
    demand = np.zeros((len(series), max(week_of.values()) + 1, len(stores)), dtype=np.float32)
    demand[tuple(index.T)] = numbers
    return Recorded(torch.from_numpy(demand), name, first)


def _without_dates(name: str, fix: str) -> None:
    warnings.warn(
        f"{name}: the series have no dates: week 0 is taken to begin on 2013-01-01, which policies that read the "
        f"calendar (days from Christmas) see; give {fix}",
        stacklevel=4,
    )


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def synthetic_series(count: int, stores: int = 1, weeks: int = 171, seed: int = 0) -> Recorded:
    """A stand-in for recorded sales, which are not distributed with this package: made-up weekly counts with a level
    per series and store, a yearly and a monthly cycle, a December peak, a slow trend, over-dispersion and empty weeks.
    Its ``source`` says that it is synthetic."""
    rng = np.random.default_rng(seed)
    first = datetime.date(2013, 1, 1)
    distance = days_from_christmas(first, weeks).numpy()
    week = np.arange(weeks)

    def per_series(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (count, 1, 1))

    level = np.exp(rng.normal(1.8, 0.8, (count, 1, 1))) * np.exp(rng.normal(0.0, 0.4, (count, 1, stores)))
    cycle = 1.0 + per_series(0.0, 0.3) * np.sin(2 * np.pi * (week / 52.18 + per_series(0, 1).squeeze(-1)))[..., None]
    payday = 1.0 + per_series(0.0, 0.15) * np.cos(2 * np.pi * week / (52.18 / 12))[:, None]
    peak = 1.0 + per_series(0.2, 1.5) * np.exp(-0.5 * ((distance + 8.0) / 9.0) ** 2)[:, None]
    trend = np.exp(per_series(-0.25, 0.35) * week[:, None] / weeks)
    rate = level * cycle * payday * peak * trend
    counts = rng.poisson(rate * rng.gamma(5.0, 0.2, rate.shape)) * (rng.random(rate.shape) > per_series(0.0, 0.15))
    text = f"synthetic stand-in ({count} series, {weeks} weeks, {stores} stores, seed {seed}), not recorded sales"
    return Recorded(torch.from_numpy(counts.astype(np.float32)), text, first)
