"""The study file: which runs to make from one base run, how they are searched and compared.

No ray and no torch here: reading a study must be instant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mmtrain.config import yaml_text
from mmtrain.config.load import read_data, with_overrides
from mmtrain.config.problems import checked, shown
from mmtrain.config.schema import RUN_NAME_PATTERN, AnyPath, Section
from mmtrain.errors import ConfigError, nearest

# Where and under which name a run is kept does not change what it computes.
BOOKKEEPING = ("name", "output_dir", "tracking")
# Each is expanded and checked before the first one starts, in some milliseconds.
MAX_TRIALS = 10_000

Scalar = bool | int | float | str | None
Value = Scalar | list[Any] | dict[str, Any]


_KINDS = ("grid", "choice", "uniform", "loguniform", "randint")


class SearchKey(Section):
    """What one run key may be: exactly one of the five, and where it is searched at all."""

    grid: list[Value] | None = Field(None, min_length=1, description="every value is tried")
    choice: list[Value] | None = Field(None, min_length=1, description="one of these, drawn")
    uniform: tuple[float, float] | None = Field(None, description="[low, high], drawn evenly")
    loguniform: tuple[float, float] | None = Field(
        None, description="[low, high], drawn evenly on a logarithmic scale"
    )
    randint: tuple[int, int] | None = Field(None, description="[low, high], both included")
    when: dict[str, list[Value] | Value] = Field(
        default_factory=dict,
        description="axis or search key: value, or values, of the trials that have this key",
    )

    @property
    def kind(self) -> str:
        """Which of the five is given."""
        return next(name for name in _KINDS if getattr(self, name) is not None)

    def holds_in(self, point: Mapping[str, object]) -> bool:
        """Whether trials at this point have the key."""
        return all(
            point.get(key) in (wanted if isinstance(wanted, list) else [wanted])
            for key, wanted in self.when.items()
        )

    @model_validator(mode="after")
    def _exactly_one(self) -> SearchKey:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            kinds = ", ".join(_KINDS)
            raise ValueError(f"give exactly one of {kinds}; got {', '.join(given) or 'none'}")
        bounds = self.uniform or self.loguniform or self.randint
        if bounds and bounds[0] >= bounds[1]:
            raise ValueError(f"the lower bound {bounds[0]:g} is not below the upper {bounds[1]:g}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs a lower bound above 0")
        return self


class SchedulerConfig(Section):
    """Whether poor trials are stopped early. All times count validations of a trial."""

    type: Literal["none", "asha", "median"] = Field(
        "none",
        description="none: every trial runs to its end; median: one stops whose best is worse than"
        " the median of the others' running means",
    )
    grace: int = Field(1, ge=1, description="never stop a trial before this many validations")
    reduction_factor: float = Field(
        3.0, gt=1, description="about one trial in this many passes each rung"
    )
    max: int = Field(100, ge=1, description="no rungs beyond this many validations")
    least_trials: int = Field(3, ge=1, description="median: none stops before so many were seen")

    @model_validator(mode="after")
    def _ordered(self) -> SchedulerConfig:
        if self.max < self.grace:
            raise ValueError(f"'max' ({self.max}) is below 'grace' ({self.grace}); raise it")
        return self


class RankResources(Section):
    """What one rank of a trial occupies."""

    cpu: float = Field(
        1.0,
        gt=0,
        description="CPU cores per rank; also its threads, unless parallel.threads is set",
    )
    gpu: float | None = Field(
        None, ge=0, description="GPUs per rank; default: 1 where the machines have any, else 0"
    )


class StudyTracking(Section):
    """Where the study is logged; default: where the base run says."""

    uri: str | None = Field(None, description="MLflow tracking URI, or 'none'")
    experiment: str | None = Field(None, description="MLflow experiment of the whole study")


class Column(Section):
    """One column of a table: a study of its own, whose trials compare with each other alone."""

    metric: str | None = Field(None, description="what ranks its trials; default: the study's")
    run: dict[str, Value] = Field(default_factory=dict, description="run key: value")
    times: float | None = Field(
        None, gt=0, description="factor on its values in the table; default: 100 for shares, else 1"
    )


class Study(Section):
    """One study file."""

    name: str = Field(pattern=RUN_NAME_PATTERN, description="name of the study and its folder")
    base: dict[str, object] = Field(
        description="the run that all trials share: a path, or a mapping"
    )
    axes: dict[str, dict[str, dict[str, Value]]] = Field(
        default_factory=dict,
        description="axis: {option: {run key: value, …}}; every combination of options is tried",
    )
    search: dict[str, SearchKey] = Field(
        default_factory=dict, description="run key: what it may be"
    )
    columns: dict[str, Column] = Field(
        default_factory=dict, description="of a table: data sets, say; rows are the axes"
    )
    printed: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="values that a paper prints: row (options of the axes, with ' / ' between):"
        " {column: value}",
    )
    notes: list[str] = Field(default_factory=list, description="below the table")
    algorithm: Literal["grid", "random"] = Field(
        "grid", description="random draws num_samples points and crosses them with the grid keys"
    )
    num_samples: int | None = Field(None, ge=1, description="random: points drawn")
    seed: int = Field(0, ge=0, description="keys what random search draws")
    metric: str = Field("val/loss", description="validation metric that ranks the trials")
    mode: Literal["max", "min"] | None = Field(
        None, description="whether more or less of it is better, as the task declares it"
    )
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    ranks_per_trial: int = Field(1, ge=1, description="processes per trial")
    resources_per_rank: RankResources = Field(default_factory=RankResources)
    max_concurrent: int | None = Field(
        None, ge=1, description="trials at a time; default: as many as fit"
    )
    by: list[str] | None = Field(
        None, description="search keys to group by; default: all but seeds"
    )
    output_dir: AnyPath | None = Field(None, description="study folder; default studies/<name>")
    tracking: StudyTracking = Field(default_factory=StudyTracking)
    baseline: float | str | None = Field(
        None, description="metric of the unadapted base: a number, or an evaluation's metrics.json"
    )
    keep_checkpoints: Literal["best", "all", "none"] = Field(
        "best", description="of finished trials, whose optimizer checkpoints stay; adapters stay"
    )

    @property
    def study_dir(self) -> str:
        """The study's folder."""
        return self.output_dir or f"studies/{self.name}"

    @property
    def group_by(self) -> list[str]:
        """The keys that the comparison groups by: repetitions over seeds fall together."""
        if self.by is not None:
            return self.by
        return [key for key in self.varied if key.rsplit(".", 1)[-1] != "seed"]

    @property
    def varied(self) -> list[str]:
        """Axes, then search keys."""
        return [*self.axes, *self.search]

    @model_validator(mode="after")
    def _search_changes_results(self) -> Study:
        options = [option for axis in self.axes.values() for option in axis.values()]
        options += [column.run for column in self.columns.values()]
        for key in (*self.search, *(key for option in options for key in option)):
            if key.split(".")[0] in BOOKKEEPING:
                fault = f"search: '{key}' does not change what a run computes"
                raise ValueError(f"{fault}; set {key} in the base run, or leave it out")
        return self

    @model_validator(mode="after")
    def _names_what_it_has(self) -> Study:
        if not self.varied:
            raise ValueError("give 'search', 'axes' or both: nothing varies")
        for name, options in self.axes.items():
            if not options or name in self.search:
                fault = "is a search key, too" if options else "has no options"
                raise ValueError(f"axes: '{name}' {fault}; rename it, or leave it out")
        known = [*self.varied]
        for key, entry in self.search.items():
            for other in entry.when:
                if other not in known or other == key:
                    hint = nearest(other, set(known) - {key})
                    raise ValueError(f"search: {key}: when: '{other}' is not varied; {hint}")
        return self

    @model_validator(mode="after")
    def _printed_has_a_place(self) -> Study:
        if self.columns and not self.axes:
            raise ValueError("columns: a table needs rows; give 'axes'")
        rows = {" / ".join(row) for row in itertools.product(*self.axes.values())}
        for row, values in self.printed.items():
            if row not in rows:
                raise ValueError(f"printed: there is no row '{row}'; {nearest(row, rows)}")
            for name in values:
                if name not in self.columns:
                    hint = nearest(name, self.columns)
                    raise ValueError(f"printed: {row}: there is no column '{name}'; {hint}")
        return self

    @model_validator(mode="after")
    def _search_fits_algorithm(self) -> Study:
        drawn = [key for key, entry in self.search.items() if entry.kind != "grid"]
        if self.algorithm == "grid" and drawn:
            listed = ", ".join(f"{key} ({self.search[key].kind})" for key in drawn)
            raise ValueError(f"grid search takes only grid keys, not {listed}; algorithm: random")
        if self.algorithm == "random" and not drawn:
            raise ValueError("random search needs a key with choice, uniform, loguniform, randint")
        if (self.num_samples is None) == (self.algorithm == "random"):
            raise ValueError("give 'num_samples' with algorithm random, and only there")
        for key in self.by or []:
            if key not in self.varied:
                raise ValueError(f"by: '{key}' is not searched; {nearest(key, self.varied)}")
        return self

    @model_validator(mode="after")
    def _search_has_an_end(self) -> Study:
        grids = [len(entry.grid) for entry in self.search.values() if entry.grid is not None]
        grids += map(len, self.axes.values())
        if (self.num_samples or 1) * math.prod(grids) > MAX_TRIALS:
            ways = "lower num_samples or shorten the grids"
            raise ValueError(f"these are more than {MAX_TRIALS:,} trials; {ways}")
        return self


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """The study file with `a.b=c` overrides applied; every problem is reported at once.

    `base.optim.lr=1e-3` changes the base run, `search.optim.lr.grid=[1e-3]` a search key.
    """
    data, problems = _read(Path(path))
    data, more = _with_base(data, Path(path).parent)
    problems += more
    searched = [text for text in overrides if text.startswith("search.")]
    data, more = with_overrides(data, [text for text in overrides if text not in searched])
    problems += more + _override_search(data, searched)
    study, more = checked(Study, data)
    problems += more
    if study is None or problems:
        raise ConfigError(problems, str(path))
    return study


def _read(path: Path) -> tuple[dict[str, object], list[str]]:
    data, problems = yaml_text.parse(yaml_text.read_text(path, "give the path of a study file"))
    if not isinstance(data, dict):
        fault = f"the file holds {shown(data)}; a study file is a mapping with 'base' and 'search'"
        raise ConfigError(problems or [fault], str(path))
    return data, problems


def _with_base(data: Mapping[str, object], folder: Path) -> tuple[dict[str, object], list[str]]:
    """The study with the base run file's content in place of its path."""
    base = data.get("base")
    if not isinstance(base, str):
        return dict(data), []
    found = next((place for place in (folder / base, Path(base)) if place.is_file()), None)
    if found is None:
        fault = f"base: there is no file '{base}', neither beside the study nor in {Path.cwd()}"
        return {**data, "base": {}}, [fault]
    run, problems = read_data(found)
    return {**data, "base": run}, [f"base {found}: {problem}" for problem in problems]


def _override_search(data: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set `search.<run key>.<kind>=value`, where the run key itself has dots."""
    problems: list[str] = []
    search = dict(data["search"]) if isinstance(data.get("search"), dict) else {}
    for override in overrides:
        place, equals, text = override.partition("=")
        key, _, kind = place.removeprefix("search.").rpartition(".")
        value, faults = yaml_text.parse(text)
        if not equals or not key or faults:
            problems.append(f"override {shown(override)}: write it as search.KEY.grid=[value, …]")
        else:
            search[key] = {kind: value}
    data["search"] = search
    return problems
