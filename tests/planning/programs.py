"""Small programs whose FLOPs, memory traffic and network traffic are counted by hand in `test_cost`.

`python tests/planning/programs.py tpu FOLDER` (or gpu) compiles them for absent devices and writes their HLO texts.
The folder `programs` holds those of JAX 0.10.2, libtpu 0.0.52 and jax-cuda13-plugin 0.10.2.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

TOPOLOGIES = {"tpu": "v5e:4x4", "gpu": "h200:16"}
CUBLAS = {"tpu": {}, "gpu": {"xla_gpu_enable_triton_gemm": False}}  # so that a product is a call of cuBLAS
LAYERS, ROWS, WIDTH, COLUMNS = 24, 1024, 512, 256


def programs(mesh) -> dict[str, tuple[Callable, tuple]]:
    """Returns name -> (function, its arguments), on a mesh of 16 devices, data 2 x fsdp 8."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxclip.models import tpu
    from jaxclip.runtime import compiler

    everywhere, rows, fsdp = PartitionSpec(), PartitionSpec(("data", "fsdp")), PartitionSpec("fsdp")
    neighbours = [(i, (i + 1) % 16) for i in range(16)]

    def array(shape, dtype, spec=everywhere):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def product(x, w):
        return x @ w

    def highest(x, w):
        return jnp.matmul(x, w, precision="highest")

    def scan(x, layers):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]

    def gather(x):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, everywhere))

    def ring(x):
        def rotate(_, x):
            return jax.lax.ppermute(x, ("data", "fsdp"), neighbours) * 2

        body = jax.shard_map(lambda x: jax.lax.fori_loop(0, 16, rotate, x), mesh=mesh, in_specs=rows, out_specs=rows)
        return body(x)

    def padded(x):
        return x + 1

    x, w = array((ROWS, WIDTH), jnp.bfloat16), array((WIDTH, COLUMNS), jnp.bfloat16)
    found = {
        "product": (product, (x, w)),
        "highest": (highest, (array(x.shape, jnp.float32), array(w.shape, jnp.float32))),
        "scan": (scan, (x, array((LAYERS, WIDTH, WIDTH), jnp.bfloat16))),
        "gather": (gather, (array((ROWS, WIDTH), jnp.bfloat16, fsdp),)),
        "ring": (ring, (array((16 * 64, WIDTH), jnp.float32, rows),)),
    }

    def kernel(qkv):
        with compiler.compiling_for("tpu"):
            return tpu.self_attention(qkv, heads=12, causal=False, lengths=None)

    if mesh.devices.flat[0].platform == "tpu":
        qkv = array((16 * 2, 198, 3 * 12 * 64), jnp.bfloat16, rows)
        return found | {"padded": (padded, (array((64, 257, 257), jnp.float32),)), "kernel": (kernel, (qkv,))}

    def attention(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    def attention_gradient(q, k, v, g):
        return jax.vjp(attention, q, k, v)[1](g)

    q = array((16 * 2, 198, 12, 64), jnp.bfloat16, rows)
    return found | {"attention": (attention, (q, q, q)), "attention_gradient": (attention_gradient, (q, q, q, q))}


def main(kind: str, folder: Path) -> None:
    import jax

    from jaxclip.planning.topologies import open_topology
    from jaxclip.runtime.mesh import mesh_of

    topology = open_topology(TOPOLOGIES[kind])
    mesh = mesh_of({"data": 2, "fsdp": 8}, topology.devices)
    for name, (function, arguments) in programs(mesh).items():
        with jax.set_mesh(mesh):
            lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(topology.platform,))
        text = lowered.compile(compiler_options={**topology.options, **CUBLAS[kind]}).as_text()
        text = re.sub(r'"body":"[^"]*"', '"body":""', text)  # the code of a Pallas kernel
        lines = [re.sub(r", metadata=\{[^}]*\}", "", line) for line in text.splitlines()]
        kept = [line for line in lines if not re.match(r"\d+ |[A-Z]\w+s$|$", line)]
        (folder / f"{kind}_{name}.hlo").write_text("\n".join(kept) + "\n")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(sys.argv[1], Path(sys.argv[2]))
