"""Commands cache compiled programs, per kind of CPU, and reuse them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import jax, jax.numpy as jnp
from jaxclip.runtime import startup

startup.keep_compiled()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
step = jax.jit(lambda state, x: (state + x @ x.T, x.sum()), donate_argnums=0).lower(jnp.ones((4, 4)), jnp.ones((4, 4)))
state, total = step.compile()(jnp.ones((4, 4)), jnp.arange(16.0).reshape(4, 4))
print(jax.config.jax_compilation_cache_dir, any(hits), float(state.sum()), float(total))
"""


@pytest.fixture
def compile_in(tmp_path):
    """Compiles a small program as a command does; returns the cache folder, whether it was cached, and its results."""

    def compile(**environment):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
        kept |= {"JAXCLIP_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
        done = subprocess.run([sys.executable, "-c", CODE], env=kept, capture_output=True, text=True, check=True)
        folder, found, *results = done.stdout.split()
        return Path(folder), found == "True", results

    return compile


def test_a_program_is_compiled_once_for_two_runs(compile_in, tmp_path):
    folder, found, results = compile_in()
    assert folder.parent == tmp_path / "compiled" and not found and any(folder.iterdir())
    assert compile_in() == (folder, True, results)


def test_the_users_own_compilation_cache_is_respected(compile_in, tmp_path):
    assert compile_in(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))[0] == tmp_path / "mine"
    assert not (tmp_path / "compiled").exists()
