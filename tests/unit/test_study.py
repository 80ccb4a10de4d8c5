"""Study files: what is valid, and which trials they mean. No ray is needed for any of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmtrain.config.schema import RUN_NAME_PATTERN
from mmtrain.errors import ConfigError
from ray_tune.study import SearchKey, Study, load_study
from ray_tune.trials import check_trials, columns_of, draw, expand, keyed_fraction
from tests.tiny import REPOSITORY

BASE: dict[str, Any] = {
    "model": {"family": "llava", "preset": "tiny"},
    "components": {"llm": {"mode": "peft", "method": "lora", "r": 4, "alpha": 8}},
    "data": {"task": "digits", "train": "shards/train", "val": "shards/val"},
    "optim": {"lr": 1e-3, "global_batch": 8, "micro_batch": 4},
}


def study(**changes: Any) -> Study:
    data = {
        "name": "s",
        "base": BASE,
        "search": {
            "components.llm.r": {"grid": [2, 4]},
            "optim.lr": {"grid": [1e-3, 2e-3]},
            "seed": {"grid": [1, 2]},
        },
        **changes,
    }
    return Study.model_validate(data)


def random_study(num_samples: int, **changes: Any) -> Study:
    search = {
        "optim.lr": {"loguniform": [1e-5, 1e-2]},
        "components.llm.dropout": {"uniform": [0.0, 0.2]},
        "components.llm.r": {"choice": [2, 4, 8]},
        "optim.max_steps": {"randint": [3, 5]},
        "seed": {"grid": [1, 2]},
    }
    return study(**{"algorithm": "random", "num_samples": num_samples, "search": search, **changes})


def write(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def test_a_grid_is_every_combination_in_the_files_order() -> None:
    params = [trial.params for trial in expand(study())]
    expected = [
        {"components.llm.r": r, "optim.lr": lr, "seed": seed}
        for r in (2, 4)
        for lr in (1e-3, 2e-3)
        for seed in (1, 2)
    ]
    assert params == expected


def test_a_trial_is_the_base_run_with_its_values_name_and_folder() -> None:
    trial = expand(study())[5]
    assert trial.run["components"]["llm"] == {**BASE["components"]["llm"], "r": 4}
    assert trial.run["optim"] == {**BASE["optim"], "lr": 1e-3}
    assert trial.run["seed"] == 2
    assert trial.run["name"] == trial.name
    assert trial.run["output_dir"] == f"studies/s/trials/{trial.name}"
    assert trial.run["tracking"]["tags"] == {"study": "s"}
    assert BASE["components"]["llm"]["r"] == 4, "the base itself is left alone"
    assert "seed" not in BASE


def test_names_are_readable_valid_and_depend_on_content_only() -> None:
    trials = expand(study())
    assert [trial.name.rsplit("-", 1)[0] for trial in trials[:2]] == [
        "r2-lr0.001-seed1",
        "r2-lr0.001-seed2",
    ]
    assert len({trial.name for trial in trials}) == 8
    assert all(re.match(RUN_NAME_PATTERN, trial.name) for trial in trials)
    smaller = study(search={"optim.lr": {"grid": [2e-3]}, "components.llm.r": {"grid": [2]}})
    same = study(
        search={**{key: {"grid": [value]} for key, value in trials[2].params.items()}},
        name="other",
        output_dir="elsewhere",
    )
    assert expand(same)[0].id == trials[2].id
    assert expand(smaller)[0].id not in {trial.id for trial in trials}, "its seed is another"
    changed = study(base={**BASE, "optim": {**BASE["optim"], "weight_decay": 0.1}})
    assert not {trial.id for trial in expand(changed)} & {trial.id for trial in trials}


def test_names_of_long_and_odd_values_stay_valid() -> None:
    values = ["/data/a b/träin set", "x" * 300, "../..", ["attn", "mlp"], {"a": None}, None]
    odd = study(search={"data.train": {"grid": values}, "optim.betas": {"grid": [[0.9, 0.99]]}})
    trials = expand(odd)
    assert len({trial.name for trial in trials}) == len(values)
    assert all(re.match(RUN_NAME_PATTERN, trial.name) for trial in trials)


def test_names_of_large_and_small_numbers_are_readable_valid_and_one_for_each_trial() -> None:
    rates = [1e6, 1e-7, 1.0000001, 1.0000002, 2.5e21, -3e20]
    trials = expand(study(search={"optim.lr": {"grid": rates}}))
    assert [trial.name.rsplit("-", 1)[0] for trial in trials] == [
        f"lr{text}" for text in ("1e6", "1e-07", "1", "1", "2.5e21", "-3e20")
    ]
    assert len({trial.name for trial in trials}) == len(rates)
    assert all(re.match(RUN_NAME_PATTERN, trial.name) for trial in trials)


@pytest.mark.parametrize("tracking", [float("inf"), 3, "mlflow", ["a"], {"tags": float("nan")}])
def test_tracking_of_a_wrong_shape_is_one_line_of_the_report(tracking: Any) -> None:
    wrong = study(base={**BASE, "tracking": tracking})
    with pytest.raises(ConfigError) as caught:
        check_trials(wrong, expand(wrong), "study.yaml")
    (problem,) = caught.value.problems
    assert problem.startswith("tracking") and "; give " in problem


def test_keys_with_the_same_ending_are_told_apart() -> None:
    both = study(search={"optim.lr": {"grid": [1e-3]}, "components.llm.lr": {"grid": [2e-3]}})
    assert expand(both)[0].name.startswith("optim_lr0.001-llm_lr0.002-")


def test_random_draws_are_keyed_by_the_studys_seed_and_sample_number() -> None:
    few, many = expand(random_study(3)), expand(random_study(6))
    assert [trial.id for trial in few] == [trial.id for trial in many[:6]]
    assert len(many) == 12, "every draw is crossed with the grid of seeds"
    assert {trial.params["optim.lr"] for trial in many[::2]} == {
        trial.params["optim.lr"] for trial in many[1::2]
    }
    other = expand(random_study(3, seed=1))
    assert not {trial.params["optim.lr"] for trial in other} & {
        trial.params["optim.lr"] for trial in few
    }
    for trial in many:
        assert 1e-5 <= trial.params["optim.lr"] <= 1e-2
        assert trial.params["optim.max_steps"] in (3, 4, 5)


def test_draws_cover_their_range_and_nothing_else() -> None:
    top = 1 - 2**-48
    assert draw(SearchKey(randint=(3, 5)), 0.0) == 3
    assert draw(SearchKey(randint=(3, 5)), top) == 5
    assert draw(SearchKey(choice=["a", "b"]), top) == "b"
    assert draw(SearchKey(loguniform=(1e-4, 1e-2)), 0.5) == pytest.approx(1e-3)
    assert draw(SearchKey(uniform=(-1.0, 1.0)), 0.5) == 0.0
    fractions = [keyed_fraction(0, sample, "k") for sample in range(2000)]
    assert all(0 <= fraction < 1 for fraction in fractions)
    assert sum(fractions) / len(fractions) == pytest.approx(0.5, abs=0.02)


def test_a_point_drawn_twice_is_one_trial() -> None:
    drawn = study(
        algorithm="random", num_samples=20, search={"components.llm.r": {"choice": [2, 4]}}
    )
    assert sorted(trial.params["components.llm.r"] for trial in expand(drawn)) == [2, 4]


def test_every_problem_of_a_study_file_is_reported_at_once(tmp_path: Path) -> None:
    data = {
        "name": "../x",
        "base": BASE,
        "serch": {},
        "search": {
            "optim.lr": {"grid": [1e-3], "choice": [1e-3]},
            "seed": {"randint": [5, 1]},
            "optim.betas": {"loguniform": [0, 1]},
        },
        "mode": "maximum",
        "ranks_per_trial": 0,
        "scheduler": {"type": "asha", "grace": 5, "max": 2},
    }
    with pytest.raises(ConfigError) as caught:
        load_study(write(tmp_path, data))
    text = str(caught.value)
    for part in (
        "name: ",
        "serch: unknown key; did you mean 'search'?",
        "search.optim.lr: give exactly one of grid, choice, uniform, loguniform, randint",
        "search.seed: the lower bound 5 is not below the upper 1",
        "search.optim.betas: loguniform needs a lower bound above 0",
        "mode: ",
        "ranks_per_trial: got 0",
        "scheduler: 'max' (2) is below 'grace' (5)",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"search": {"seed": {"choice": [1, 2]}}}, "grid search takes only grid keys, not seed"),
        ({"algorithm": "random", "num_samples": 3}, "random search needs a key with choice"),
        ({"num_samples": 3}, "give 'num_samples' with algorithm random, and only there"),
        (
            {"algorithm": "random", "num_samples": 10**9, "search": {"seed": {"randint": [0, 9]}}},
            "these are more than 10,000 trials; lower num_samples or shorten the grids",
        ),
        (
            {"search": {f"data.{key}": {"grid": list(range(101))} for key in "ab"}},
            "these are more than 10,000 trials; lower num_samples or shorten the grids",
        ),
        ({"by": ["optim.rl"]}, "by: 'optim.rl' is not searched; did you mean 'optim.lr'?"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=re.escape(fault)):
        study(**changes)


def test_seeds_are_averaged_over_unless_asked_for() -> None:
    assert study().group_by == ["components.llm.r", "optim.lr"]
    assert study(by=["seed"]).group_by == ["seed"]


def test_problems_of_the_runs_name_a_trial_and_come_together() -> None:
    wrong = study(
        search={
            "optim.rl": {"grid": [1, 2]},
            "components.llm.r": {"grid": [4, -1]},
        },
        ranks_per_trial=3,
    )
    with pytest.raises(ConfigError) as caught:
        check_trials(wrong, expand(wrong), "study.yaml")
    text = str(caught.value)
    assert text.count("optim.rl: unknown key") == 1
    assert "components.llm.r: got -1" in text
    assert "x 3 ranks" in text, "the batch must be dealt out to the ranks of a trial"
    assert "(trial " in text


def test_a_search_key_inside_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed is 1, not a section"):
        expand(study(base={**BASE, "seed": 1}, search={"seed.lr": {"grid": [1]}}))


def test_the_base_may_be_a_file_and_overrides_reach_into_it(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE))
    data = {"name": "s", "base": "run.yaml", "search": {"seed": {"grid": [1]}}}
    path = write(tmp_path, data)
    loaded = load_study(
        path,
        ["base.optim.lr=5e-4", "search.optim.weight_decay.grid=[0.0,0.1]", "ranks_per_trial=2"],
    )
    assert loaded.base["optim"] == {**BASE["optim"], "lr": 5e-4}
    assert loaded.ranks_per_trial == 2
    assert [trial.params["optim.weight_decay"] for trial in expand(loaded)] == [0.0, 0.1]
    with pytest.raises(ConfigError, match="search.KEY.grid"):
        load_study(path, ["search.grid"])


def test_a_missing_base_file_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, {"name": "s", "base": "no.yaml", "search": {"seed": {"grid": [1]}}})
    with pytest.raises(ConfigError, match="there is no file 'no.yaml'"):
        load_study(path)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ray_tune" / "studies").rglob("*.yaml")))
def test_every_study_in_the_package_is_valid(path: Path) -> None:
    for part in columns_of(load_study(path)).values():
        trials = expand(part)
        assert len(trials) > 1
        check_trials(part, trials, str(path))


def test_there_are_studies_in_the_package() -> None:
    assert list((REPOSITORY / "ray_tune" / "studies").rglob("*.yaml"))


def test_a_dry_run_lists_the_trials_and_loads_no_ray(tmp_path: Path) -> None:
    path = write(tmp_path, {"name": "s", "base": BASE, "search": {"seed": {"grid": [1, 2]}}})
    code = (
        "import sys; from mmtrain.__main__ import main;"
        f"code = main(['tune', {str(path)!r}, '--dry-run']);"
        "assert not {'ray', 'mlflow'} & set(sys.modules), 'slow imports';"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 trials" in done.stdout and "seed2-" in done.stdout
