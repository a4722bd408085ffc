"""Which groups of products a run was trained on, so that no catalogue calls their products unseen."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt64

from jaxclip.catalog import builder
from jaxclip.config import Config
from jaxclip.config.saved import TRAINED_GROUPS as FILENAME
from jaxclip.errors import UserError
from jaxclip.pipeline.preprocess import FILENAME as PREPROCESS
from jaxclip.pipeline.records import Records
from jaxclip.runtime import files

CHOSEN_ON = "checkpoints and settings are chosen on the split validation, so figures on it are too good"
"""What must be said with figures on a validation split."""
UNSEEN = ("validation", "test")
"""Splits whose products must not have been trained on."""
Keys = UInt64[np.ndarray, " K"]


def keys_of(prepared: Path, records: Records) -> Keys:
    """Returns the keys (see `catalog.groups.Groups`) of all groups of some records of a prepared dataset, ascending."""
    found = builder.group_keys(prepared)
    groups = found.of_split(records.split) if records.whole else records.groups()
    return np.unique(found.keys[np.isin(found.groups, groups)])


def write(workdir: Path, keys: Keys) -> None:
    """Writes the keys of the groups that a run is trained on into its workdir."""
    with files.atomically(workdir / FILENAME) as temporary, temporary.open("wb") as file:
        np.save(file, keys)


def read(workdir: Path) -> Keys | None:
    """Returns the keys of the groups that a workdir's run was trained on; None if an earlier version trained it."""
    path = workdir / FILENAME
    return np.load(path, allow_pickle=False) if path.exists() else None


def of_runs(workdirs: Sequence[Path], say: Callable[[str], None]) -> Keys:
    """Returns the keys of the groups that any of these runs was trained on; says which runs do not know them."""
    known = {workdir: read(workdir) for workdir in workdirs}
    for workdir in [workdir for workdir, keys in known.items() if keys is None]:
        say(f"{workdir} has no {FILENAME}: products that it was trained on cannot be recognised in other catalogues")
    return np.unique(np.concatenate([np.empty(0, np.uint64), *(keys for keys in known.values() if keys is not None)]))


def of_checkpoint(name: str, say: Callable[[str], None]) -> Keys:
    """Returns the keys of the groups that the checkpoint `name` (as in model.init_from) was trained on.

    It may be a workdir, whose keys are said to be unknown if it has none, or an export, which has a copy of them. A
    published checkpoint has none.
    """
    folder = Path(name).expanduser()
    keys = read(folder) if name and folder.is_dir() else None
    if keys is None and name and (folder / PREPROCESS).exists():
        return of_runs([folder], say)
    return np.empty(0, np.uint64) if keys is None else keys


def copy(workdir: Path, folder: Path) -> Path | None:
    """Copies the keys of a workdir's run into a folder, and returns the file; None if the run does not know them."""
    keys = read(workdir)
    if keys is None:
        return None
    write(folder, keys)
    return folder / FILENAME


def is_trained_on(prepared: Path, records: Records, keys: Keys) -> Bool[np.ndarray, " N"]:
    """Returns whether each of the N records belongs to a group that has one of the keys."""
    found = builder.group_keys(prepared)
    trained = np.unique(found.groups[np.isin(found.keys, keys)])
    if records.whole and not np.isin(found.of_split(records.split), trained).any():
        return np.zeros(len(records), bool)  # without reading the records
    return np.isin(records.groups(), trained)


def unseen_records(prepared: Path, split: str, keys: Keys, say: Callable[[str], None]) -> tuple[Records, list[str]]:
    """Returns the records of a split, and sentences that a figure on them must carry.

    Of the splits in UNSEEN, products whose group was trained on are left out; in other splits they are counted.

    Args:
      prepared: folder of the prepared dataset.
      split: name of the split, or "all".
      keys: keys of the groups that were trained on.
      say: receives the sentences.

    Raises:
      UserError: no product of the split is left.
    """
    records, notes = Records(prepared, split), []
    trained = is_trained_on(prepared, records, keys)
    if count := int(trained.sum()):
        which = f"{count:,} of {len(records):,} products of the split {split}"
        if split in UNSEEN and count == len(records):
            remedy = (
                "choose others with --config.data.split_seed, or set --config.data.validation=0"
                if split == "validation"
                else "evaluate other products, or rank the whole catalogue with --config.data.split=all"
            )
            raise UserError(
                f"all {count:,} products of the split {split} of {prepared} are in groups that were trained on: "
                + remedy
            )
        left_out = split in UNSEEN
        notes.append(f"{which} are in groups that were trained on" + (" and are left out" if left_out else ""))
        records = records.take(np.flatnonzero(~trained)) if left_out else records
    if split == "validation":
        notes.append(CHOSEN_ON)
    for note in notes:
        say(note)
    return records, notes


def evaluated_records(
    config: Config, prepared: Path, trained: Keys, say: Callable[[str], None]
) -> tuple[Records, list[str], Records | None]:
    """Returns what a run that trains on groups with the keys `trained` evaluates.

    That is: the records of the final evaluation, what must be said with figures on them, and the records by which the
    best checkpoint is chosen, None if there is no validation split.
    """
    test, notes = unseen_records(prepared, config.data.split, trained, say)
    if config.data.split == "validation":
        return test, notes, test
    if Records.has(prepared, "validation"):
        validation, found = unseen_records(prepared, "validation", trained, lambda line: None)
        for note in found:
            if note != CHOSEN_ON:  # it is not reported
                say(note)
        return test, notes, validation
    if config.evaluation.every:
        say(f"there is no validation split: the split {config.data.split} is ranked, and no checkpoint is the best")
    return test, notes, None


def known_groups(config: Config, workdir: Path, prepared: Path, records: Records, say: Callable[[str], None]) -> Keys:
    """Returns the keys of the groups of the training records, and of those that model.init_from was trained on.

    Keys that the workdir already has stay: a resumed run may no longer have the folder that it began from. If an
    earlier version began the run, perhaps on other records of the training split, all of the split count as trained on.
    """
    saved = read(workdir)
    if saved is None and any((workdir / "checkpoints").glob("[0-9]*")):
        records = Records(prepared, "train")
    parts = [keys_of(prepared, records), of_checkpoint(config.model.init_from, say)]
    return np.unique(np.concatenate(parts if saved is None else [*parts, saved]))
