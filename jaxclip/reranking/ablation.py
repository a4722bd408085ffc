"""Ablation over feature subsets: trains a re-ranker on each subset and compares the results."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxclip.config import Config, fingerprint
from jaxclip.evaluation import protocols, results
from jaxclip.ranking import significance
from jaxclip.reranking.run import train_reranker
from jaxclip.runtime import files
from jaxclip.training.setup import Say

FILENAME = "ablation.json"
COMPARED = ("hit@1", "hit@5", "hit@10", "mrr")
Values = dict[str, np.ndarray]
"""Name of a metric -> its value for each query, (Q,)."""


def run(
    config: Config,
    workdir: Path,
    *,
    say: Say,
) -> tuple[int | None, dict[str, Any] | None]:
    """Trains and evaluates a re-ranker for every subset in `rerank.ablation` with each of `rerank.seeds` seeds.

    Each re-ranker has its own folder in the workdir. Re-rankers that were evaluated with the same configuration are
    skipped, and an interrupted one is resumed. They are evaluated on the validation split, by which features are
    chosen, instead of the test split, if there is one.

    Returns:
      (signal, None) if a signal stopped the ablation, else (None, content of ablation.json). The content has, for each
      subset, the text-to-image metrics in COMPARED averaged over seeds, with intervals over queries, and p-values of
      paired bootstraps against the first stage and, except for the first subset, against the first subset.

    Raises:
      UserError: see `train_reranker`.
    """
    runs: dict[str, list[dict[str, Values]]] = {}
    split = config.data.split
    if split == "test" and config.data.validation:
        split = "validation"
    elif split == "test":
        say("there is no validation split: features that are chosen by this ablation are chosen on the split test")
    for name, own in _runs(replace(config, data=replace(config.data, split=split))):
        folder = workdir / f"{name}-seed-{own.seed}"
        evaluation = folder / "eval" / own.data.split
        if not _is_done(evaluation, fingerprint(own)):
            say(f"{folder.name}: {own.rerank.features}")
            outcome = train_reranker(own, folder, say=say)
            if outcome.signal is not None:
                return outcome.signal, None
        stages = {"first stage": _values(evaluation / results.FIRST_STAGE), "re-ranked": _values(evaluation)}
        runs.setdefault(name, []).append(stages)
    result = {"seeds": config.rerank.seeds, "split": split, **_compare(runs, dict(config.rerank.ablation))}
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(workdir / FILENAME, result)
    return None, result


def _runs(config: Config) -> Iterator[tuple[str, Config]]:
    """Yields (name of the subset, configuration of the run) for every subset and seed."""
    for name, features in config.rerank.ablation:
        for seed in range(config.seed, config.seed + config.rerank.seeds):
            yield (
                name,
                replace(config, seed=seed, rerank=replace(config.rerank, features=features, ablation=(), seeds=1)),
            )


def _is_done(folder: Path, fingerprint: str) -> bool:
    """Returns whether the folder has results of the configuration with this fingerprint."""
    path = folder / "metrics.json"
    return path.exists() and json.loads(path.read_text())["config_fingerprint"] == fingerprint


def _values(folder: Path) -> Values:
    """Returns the text-to-image values of an evaluation's queries, for those metrics in COMPARED that it has."""
    values = results.read_queries(folder).values["text_to_image"]
    return {name: values[name].astype(np.float64) for name in COMPARED if name in values}


def _compare(runs: Mapping[str, list[dict[str, Values]]], features: Mapping[str, str]) -> dict[str, Any]:
    """Returns the first stage's metrics, and each subset's metrics and p-values.

    A subset's p-values compare it with the first stage and with the first subset, the reference. The values of a query
    are first averaged over the seeds.
    """
    means = {
        name: {metric: np.mean([run["re-ranked"][metric] for run in seeds], axis=0) for metric in seeds[0]["re-ranked"]}
        for name, seeds in runs.items()
    }
    first, reference = next(iter(runs.values()))[0]["first stage"], next(iter(means))
    rows = {
        name: {
            "features": features[name],
            **protocols.means(values, 0),
            "p": {
                "first stage": _p_values(values, first),
                **({reference: _p_values(values, means[reference])} if name != reference else {}),
            },
        }
        for name, values in means.items()
    }
    return {"first_stage": protocols.means(first, 0), "reference": reference, "subsets": rows}


def _p_values(values: Values, others: Values) -> dict[str, float]:
    """Returns metric -> p-value of the difference of the means of `values` and `others`, by paired bootstrap."""
    ps = significance.paired_bootstrap(*(np.stack([of[name] for name in values]) for of in (values, others)))
    return dict(zip(values, map(float, ps), strict=True))


def table(result: Mapping[str, Any]) -> str:
    """Returns a table for the terminal: metrics of each subset, and p-values of hit@1 as in `run`."""
    others = [name for name in COMPARED[1:] if name in result["first_stage"]]
    reference = result["reference"]
    width = max(map(len, ["first stage", *result["subsets"]])) + 2
    head = f"{'':{width}}{'hit@1':>22}" + "".join(f"{name:>9}" for name in others)
    lines = [f"{head}{'p to first stage':>18}{f'p to {reference}':>{len(reference) + 8}}"]
    for name, row in {"first stage": result["first_stage"], **result["subsets"]}.items():
        hit = row["hit@1"]
        line = f"{name:{width}}{hit['value']:>7.3f} [{hit['low']:.3f}, {hit['high']:.3f}]"
        line += "".join(f"{row[other]['value']:>9.3f}" for other in others)
        p = row.get("p", {})
        line += f"{p['first stage']['hit@1']:>18.4f}" if p else ""
        line += f"{p[reference]['hit@1']:>{len(reference) + 8}.4f}" if reference in p else ""
        lines.append(line)
    lines.append(
        f"split {result['split']}, means over {result['seeds']} seed(s), 95% bootstrap intervals over queries, p of "
        "the difference in hit@1 by paired bootstrap"
    )
    return "\n".join(lines)
