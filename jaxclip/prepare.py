"""Prepare a catalogue: python -m jaxclip.prepare --config.data.reader=table --config.data.path=PATH [--config=...]

Checks every picture, detects and crops the product, measures its colours and texture, finds products that are the same,
splits by group, mines incorrect pairs, and writes a TFDS dataset with a data card. Training prepares by itself on first
use. Run again with another --config.incorrect_pairs.variant it only mines again: the dataset stays as it is.
"""

from absl import flags

from jaxclip import cli, config
from jaxclip.runtime import startup

RUNNER = flags.DEFINE_string("runner", "", "prepare on this runner of Apache Beam, such as DataflowRunner")
BEAM_OPTION = flags.DEFINE_multi_string("beam_option", [], "option of the runner, NAME=VALUE; may be repeated")


def main(overrides: dict[str, str]) -> None:
    """Prepares as the flags say."""
    given = flags.FLAGS["config"].value
    wanted = config.build(config.read_file(given) if given else {"steps": 1}, overrides)
    with startup.quiet_imports():  # they take seconds; bad flags are reported before
        from jaxclip.catalog import library
        from jaxclip.catalog.builder import CARD
        from jaxclip.pipeline import prepared_data
        from jaxclip.preparation import card_sections, mining

    prepared = prepared_data.prepared_dataset(
        wanted,
        whole=wanted.data.split == "all",
        say=cli.say,
        runner=RUNNER.value,
        beam_options=BEAM_OPTION.value,
    )
    pairs = card_sections.complete(wanted, prepared, say=cli.say)
    print(library.summary(prepared))
    print(f"{'dataset':16}{prepared}")
    print(f"{'data card':16}{prepared / CARD}")
    if pairs is not None:
        print(f"{'incorrect pairs':16}{mining.table(prepared, mining.settings(wanted, prepared))}")


if __name__ == "__main__":
    cli.define_config_file()
    cli.run(main, __doc__)
