"""Prepare a catalogue: python -m jaxclip.prepare --config.data.reader=table --config.data.path=PATH [--config=...]

Checks every picture, finds products that are the same, splits by group and writes a TFDS dataset with a data card.
Training does the same by itself on first use.
"""

from absl import flags

from jaxclip import command_line, config

RUNNER = flags.DEFINE_string("runner", "", "prepare on this runner of Apache Beam, such as DataflowRunner")
BEAM_OPTION = flags.DEFINE_multi_string("beam_option", [], "option of the runner, NAME=VALUE; may be repeated")


def main(overrides: dict[str, str]) -> None:
    """Prepares as the flags say."""
    given = flags.FLAGS["config"].value
    wanted = config.build(given if given is not None else {"steps": 1}, overrides)
    with command_line.quiet_imports():  # they take seconds: bad flags are told before
        from jaxclip.catalog import library
        from jaxclip.training.setup import prepared_dataset

    prepared = prepared_dataset(
        wanted,
        whole=wanted.data.split == "all",
        say=command_line.say,
        runner=RUNNER.value,
        beam_options=BEAM_OPTION.value,
    )
    print(library.summary(prepared))
    print(f"{'dataset':10}{prepared}")
    print(f"{'data card':10}{prepared / 'card.html'}")


if __name__ == "__main__":
    command_line.define_config_file()
    command_line.run(main, __doc__)
