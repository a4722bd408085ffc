"""Export a checkpoint: python -m jaxclip.export --workdir=W --output=DIR [--step=N] [--layouts=LAYOUT,...]

By default, DIR can then be loaded by transformers (CLIPModel or SiglipModel, AutoProcessor) and by open_clip
("local-dir:DIR"). With --layouts=stablehlo it contains load_towers.py, which runs the towers in JAX without jaxclip.
"""

from pathlib import Path

from absl import flags

from jaxclip import cli, config
from jaxclip.errors import UserError
from jaxclip.runtime import startup

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
OUTPUT = flags.DEFINE_string("output", None, "new or empty folder to write")
STEP = flags.DEFINE_string(
    "step", "latest", "the checkpoint: latest, best (highest hit@1 on validation) or the number of a step"
)
LAYOUTS = flags.DEFINE_list(
    "layouts",
    ["transformers", "open_clip"],
    "layouts to write: transformers, open_clip, stablehlo (for towers of any shape)",
)
MERGE = flags.DEFINE_bool(
    "merge",
    True,
    "merge adapters into the towers; --nomerge writes only the adapters, in the layout of PEFT",
)


def main(overrides: dict[str, str]) -> None:
    """Exports a checkpoint according to the flags."""
    for flag in (WORKDIR, OUTPUT):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing: give the {flags.FLAGS[flag.name].help}")
    configuration = config.of_run(Path(WORKDIR.value), overrides)
    with startup.quiet_imports():  # these imports take seconds, so the flags are checked first
        from jaxclip.towers import export

    if not LAYOUTS.value:
        raise UserError(f"--layouts is empty: give one or more of {', '.join(export.LAYOUTS)}")
    if unknown := [repr(layout) for layout in LAYOUTS.value if layout not in export.LAYOUTS]:
        problem = f"{unknown[0]} is not a layout" if len(unknown) == 1 else f"{', '.join(unknown)} are not layouts"
        raise UserError(f"--layouts: {problem}; give one or more of {', '.join(export.LAYOUTS)}")
    if not MERGE.value and flags.FLAGS["layouts"].present:
        raise UserError("--nomerge writes only adapters, in the layout of PEFT: leave --layouts out")
    step, written = export.export_checkpoint(
        configuration, Path(WORKDIR.value), STEP.value, Path(OUTPUT.value), LAYOUTS.value, merge=MERGE.value
    )
    print(f"checkpoint of step {step}, in the layout of {', '.join(LAYOUTS.value) if MERGE.value else 'PEFT'}")
    for path in written:
        size = path.stat().st_size / 2**20
        print(f"{size:10.1f} MiB  {path}")


if __name__ == "__main__":
    cli.run(main, __doc__)
