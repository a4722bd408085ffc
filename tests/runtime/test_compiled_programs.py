"""Commands cache compiled programs by kind of CPU, and reuse them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import jax, jax.numpy as jnp
from jaxclip.runtime import startup

startup.cache_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
step = jax.jit(lambda state, x: (state + x @ x.T, x.sum()), donate_argnums=0).lower(jnp.ones((4, 4)), jnp.ones((4, 4)))
state, total = step.compile()(jnp.ones((4, 4)), jnp.arange(16.0).reshape(4, 4))
print(jax.config.jax_compilation_cache_dir, any(hits), float(state.sum()), float(total))
"""


@pytest.fixture
def compile_in(tmp_path):
    """A function that compiles a small program as a command does.

    It returns the cache folder, whether the program was in the cache, and the program's results.
    """

    def compile(**environment):
        variables = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
        variables |= {"JAXCLIP_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
        done = subprocess.run([sys.executable, "-c", CODE], env=variables, capture_output=True, text=True, check=True)
        folder, cached, *results = done.stdout.split()
        return Path(folder), cached == "True", results

    return compile


def test_a_program_is_compiled_once_for_two_runs(compile_in, tmp_path):
    folder, cached, results = compile_in()
    assert folder.parent == tmp_path / "compiled" and not cached and any(folder.iterdir())
    assert compile_in() == (folder, True, results)


def test_a_compilation_cache_set_by_the_user_is_used(compile_in, tmp_path):
    assert compile_in(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))[0] == tmp_path / "mine"
    assert not (tmp_path / "compiled").exists()
