"""Runs the trials that are left of a study through Ray Tune, one Train v2 group per trial."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from ray_tune.cluster import (
    driver_resources,
    in_words,
    private_folder,
    rank_resources,
    ray_session,
    trials_at_a_time,
    wanted_resources,
)
from ray_tune.journal import Journal
from ray_tune.progress import View
from ray_tune.study import Study
from ray_tune.trials import Trial


def run_trials(
    study: Study,
    trials: Sequence[Trial],
    journal: Journal,
    view: View,
    address: str | None,
    lock: IO[str],
) -> None:
    """Run what the journal does not know to be settled; results are in the journal."""
    left = {record.name for record in journal.unsettled()}
    runs = {trial.name: trial.run for trial in trials if trial.name in left}
    with ray_session(address, len(runs), lock) as folder:
        import ray

        totals = ray.cluster_resources()
        at_a_time = trials_at_a_time(study, totals)
        view.at_a_time = at_a_time
        # Ranks on other hosts see the study's folder, as they see the runs in it, but not /tmp.
        place = folder if address is None else journal.folder.absolute()
        storage = private_folder(place / ".ray")
        try:
            _fit(study, runs, journal, view, totals, at_a_time, storage)
        finally:
            shutil.rmtree(storage, ignore_errors=True)


def _fit(
    study: Study,
    runs: dict[str, Any],
    journal: Journal,
    view: View,
    totals: dict[str, float],
    at_a_time: int,
    storage: Path,
) -> None:
    import ray
    from ray import tune

    from ray_tune.events import StudyCallback
    from ray_tune.scheduler import StudyScheduler
    from ray_tune.worker import Plan, drive_trial

    plan = Plan(
        runs=runs,
        ranks=study.ranks_per_trial,
        resources_per_rank=rank_resources(study, totals),
        cwd=os.getcwd(),
        results_dir=str((journal.folder / "results").absolute()),
        storage=str(storage),
    )

    def driver(config: dict[str, Any]) -> None:
        drive_trial(plan, config["trial"])

    def availability() -> str:
        wanted = wanted_resources(study, totals)
        free = in_words(ray.available_resources(), wanted)
        return f"it wants {in_words(wanted)}; free are {free} of {in_words(totals, wanted)}"

    tuner = tune.Tuner(
        tune.with_resources(driver, driver_resources(totals)),
        param_space={"trial": tune.grid_search(list(runs))},
        tune_config=tune.TuneConfig(
            scheduler=StudyScheduler(study, journal),
            max_concurrent_trials=at_a_time,
            # A driver's process serves one trial after another.
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=plan.storage,
            callbacks=[StudyCallback(study, journal, view, availability)],
            verbose=0,
        ),
    )
    tuner.fit()
