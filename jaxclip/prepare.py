"""Prepare a catalogue: python -m jaxclip.prepare --config.data.reader=table --config.data.path=PATH [--config=...]

Checks every picture, detects and crops the product, measures its colours and texture, finds duplicate products,
splits by group, writes a TFDS dataset with a data card, and mines incorrect pairs of the training split. Training
prepares a catalogue itself on first use. Run again with another --config.incorrect_pairs.variant to mine other pairs;
the dataset is not changed.
"""

from absl import flags

from jaxclip import cli, config
from jaxclip.runtime import startup

RUNNER = flags.DEFINE_string(
    "runner", "", "Apache Beam runner to prepare on, such as DataflowRunner; default: this machine"
)
BEAM_OPTION = flags.DEFINE_multi_string("beam_option", [], "option of the Beam runner, NAME=VALUE; may be repeated")


def main(overrides: dict[str, str]) -> None:
    """Prepares a catalogue according to the flags."""
    path = flags.FLAGS["config"].value
    configuration = config.build(config.read_file(path) if path else {"steps": 1}, overrides)
    with startup.quiet_imports():  # these imports take seconds, so the flags are checked first
        from jaxclip.catalog import library
        from jaxclip.catalog.builder import CARD
        from jaxclip.pipeline import prepared_data
        from jaxclip.preparation import card_sections, mining

    prepared = prepared_data.prepared_dataset(
        configuration,
        whole=configuration.data.split == "all",
        say=cli.say,
        runner=RUNNER.value,
        beam_options=BEAM_OPTION.value,
    )
    pairs = card_sections.complete(configuration, prepared, say=cli.say)
    print(library.summary(prepared))
    print(f"{'dataset':16}{prepared}")
    print(f"{'data card':16}{prepared / CARD}")
    if pairs is not None:
        print(f"{'incorrect pairs':16}{mining.table(prepared, mining.settings(configuration, prepared))}")


if __name__ == "__main__":
    cli.define_config_file()
    cli.run(main, __doc__)
