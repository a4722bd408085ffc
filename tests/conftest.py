"""Fixtures shared by all tests: eight CPU devices, a separate cache, drawn catalogues, commands as real processes."""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

ROOT = Path(__file__).parents[1]
CONFIG = """
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.batch_size, config.steps, config.log_every = 16, 12, 1
    config.data = ConfigDict(
        {"drawn_products": 150, "image_size": 32, "context_length": 12, "vocab_size": 300, "test": 0.2}
    )
    config.model = ConfigDict({"preset": "tiny", "dropout": 0.1, "stochastic_depth": 0.1})
    config.augmentation = ConfigDict({"flip": True, "keep_attributes": 0.7, "keep_words": 0.9})
    config.optimizer = ConfigDict({"warmup_steps": 3})
    config.checkpoint = ConfigDict({"every": 2, "keep": 2})
    config.evaluation = ConfigDict({"every": 5, "batch_size": 32})
    return config
"""


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """The folder that replaces ~/.cache/jaxclip in this process and in the processes it starts."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["JAXCLIP_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def environment(cache, tmp_path_factory) -> dict[str, str]:
    """The environment of the commands: one device, quick compilation, and one compilation cache for all processes.

    A command restarts itself unless GLIBC_TUNABLES is set; it is set so that tests can signal the process by its id.
    """
    return {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "PYTHONPATH": str(ROOT),
        "JAXCLIP_CACHE": str(cache),
        "GLIBC_TUNABLES": "glibc.malloc.top_pad=131072",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(scope="session")
def run_for_tpus() -> Callable[[str], str]:
    """Runs a Python program with libtpu, which needs no TPU to compile for one, and returns what it prints.

    It is a process of its own, because a loaded libtpu breaks the profiler of this one.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may be compiling for TPUs too
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }

    def run(program: str) -> str:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def config_file(tmp_path_factory) -> Path:
    """A configuration with dropout, stochastic depth and augmentation that trains in seconds."""
    path = tmp_path_factory.mktemp("configs") / "tiny_run.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def continued_file(config_file) -> Path:
    """`config_file` without the fields that a checkpoint determines, for runs that start from a checkpoint."""
    path = config_file.with_name("tiny_continued.py")
    settings = CONFIG.replace('"image_size": 32, "context_length": 12, "vocab_size": 300, ', "")
    path.write_text(settings.replace('"preset": "tiny", ', ""))
    return path


def finish(process: subprocess.Popen, *, seconds: float = 1800) -> tuple[str, str]:
    """Waits for a process and returns its stdout and stderr; kills it at the timeout, so none outlives its test."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


@pytest.fixture(scope="session")
def start(environment) -> Callable[..., subprocess.Popen]:
    """A function that starts `python -m jaxclip.COMMAND ARGUMENTS` and returns its Popen in text mode."""

    def start(command: str, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", f"jaxclip.{command}", *map(str, arguments)],
            env=environment,
            cwd=environment["JAXCLIP_CACHE"],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


@pytest.fixture(scope="session")
def run(start) -> Callable[..., subprocess.CompletedProcess]:
    """A function that runs `python -m jaxclip.COMMAND ARGUMENTS` until it exits."""

    def run(command: str, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        process = start(command, *arguments, prefix=prefix)
        stdout, stderr = finish(process)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run


@pytest.fixture(scope="session")
def trained(run, config_file, tmp_path_factory) -> Path:
    """The workdir of an uninterrupted run of `config_file`; tests copy it and must not change it."""
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    done = run("train", f"--config={config_file}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir


@contextlib.contextmanager
def without_optimizations():
    """Turns XLA's optimisations off: tiny programs take longer to compile than to run."""
    import jax

    previous = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", previous)


@pytest.fixture(scope="module")
def quick_compilation():
    """Turns XLA's optimisations off while the tests of a module run."""
    with without_optimizations():
        yield


@pytest.fixture(scope="session")
def catalogue(trained) -> Path:
    """The raw drawn catalogue that `trained` was trained on, in the cache."""
    from jaxclip import config
    from jaxclip.catalog.library import drawn_path

    data = config.load_config(trained).data
    path = drawn_path(data.drawn_products, data.drawn_seed)
    assert path.is_dir()
    return path


@pytest.fixture(scope="session")
def shop(tmp_path_factory) -> Path:
    """A raw catalogue of 60 drawn products; the names of the first two contain HTML markup."""
    from jaxclip.catalog.drawn import draw_catalogue

    folder = tmp_path_factory.mktemp("shops") / "shop"
    draw_catalogue(folder, 60, 5)
    header, first, second, *rest = (folder / "styles.csv").read_text().splitlines()
    renamed = [
        first.rpartition(",")[0] + ",<img src=x onerror=alert(1)> & <b>bold</b> shoes",
        second.rpartition(",")[0] + ",</title><script>alert(2)</script> dress",
    ]
    (folder / "styles.csv").write_text("\n".join([header, *renamed, *rest]) + "\n")
    return folder


@pytest.fixture(scope="session")
def inshop(tmp_path_factory) -> Path:
    """60 drawn articles in the layout of DeepFashion In-shop; article n has 1 + n % 4 photos, which all differ."""
    from PIL import Image, ImageOps

    from jaxclip.catalog.drawn import draw_catalogue

    drawn, folder = tmp_path_factory.mktemp("drawn"), tmp_path_factory.mktemp("inshop") / "inshop"
    draw_catalogue(drawn, 60, 7)
    rows = list(csv.DictReader((drawn / "styles.csv").read_text().splitlines()))
    articles, photos = [], [str(len(rows)), "image_name item_id evaluation_status"]
    for number, row in enumerate(rows):
        item, kind = f"id_{number:08}", ("Dresses", "Tees_Tanks")[number % 2]
        lines = [f"{row['productDisplayName']} {number}", "100% cotton"]
        articles.append({"item": item, "color": row["baseColour"], "description": lines})
        with Image.open(drawn / "images" / f"{row['id']}.jpg") as image:
            views = image, ImageOps.mirror(image), image.rotate(90), ImageOps.flip(image)
            for index, view in enumerate(views[: 1 + number % 4]):
                name = f"img/WOMEN/{kind}/{item}/0{index + 1}_{index + 1}_front.jpg"
                (folder / "Img" / name).parent.mkdir(parents=True, exist_ok=True)
                view.save(folder / "Img" / name, quality=90)
                role = ("gallery" if index else "query") if number % 3 == 0 else "train"
                photos.append(f"{name} {item} {role}")
    for file, content in (
        ("Anno/list_description_inshop.json", json.dumps(articles)),
        ("Eval/list_eval_partition.txt", "\n".join(photos)),
    ):
        (folder / file).parent.mkdir()
        (folder / file).write_text(content)
    return folder


@pytest.fixture(scope="session")
def searcher(trained, shop, tmp_path_factory):
    """A warmed-up searcher with the towers of `trained` and the products of `shop`."""
    import jaxclip

    workdir = tmp_path_factory.mktemp("searched") / "run"
    shutil.copytree(trained, workdir)
    with without_optimizations():
        loaded = jaxclip.load(workdir, shop)
        loaded.warm_up()
    return loaded


RERANKER = """
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.task, config.first_stage = "rerank", "{towers}"
    config.batch_size, config.steps = 8, 10
    config.data = ConfigDict({{"reader": "fashion_product_images", "path": "{catalogue}", "test": 0.2}})
    config.rerank = ConfigDict({{"candidates": 20, "wordings": 1, "preset": "{preset}", "hidden": 64}})
    if config.rerank.preset == "cross_attention":
        config.rerank.layers = 1
    config.optimizer = ConfigDict({{"warmup_steps": 1, "learning_rate": 0.01}})
    return config
"""


@pytest.fixture(scope="session")
def train_reranker(run, trained, tmp_path_factory) -> Callable[[str], Path]:
    """A function that trains a re-ranker on top of `trained`, with another catalogue, and returns its workdir."""
    from jaxclip.catalog.drawn import draw_catalogue

    catalogue = tmp_path_factory.mktemp("others") / "others"
    draw_catalogue(catalogue, 90, 8)

    def train(preset: str) -> Path:
        folder = tmp_path_factory.mktemp(preset)
        (folder / "config.py").write_text(RERANKER.format(towers=trained, catalogue=catalogue, preset=preset))
        done = run("train", f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}")
        assert done.returncode == 0, done.stderr
        return folder / "run"

    return train


@pytest.fixture(scope="session")
def reranker(train_reranker) -> Path:
    """The workdir of a gated re-ranker on top of `trained`."""
    return train_reranker("gated")


@pytest.fixture(scope="session")
def reranking_searcher(trained, reranker, shop, tmp_path_factory):
    """A warmed-up searcher like `searcher`, with `reranker` as its second stage."""
    import jaxclip

    workdir = tmp_path_factory.mktemp("reranked") / "run"
    shutil.copytree(trained, workdir)
    with without_optimizations():
        loaded = jaxclip.load(workdir, shop, rerank=reranker)
        loaded.warm_up()
    return loaded


@pytest.fixture(scope="session")
def read_params() -> Callable[[Path, int], dict[str, np.ndarray]]:
    """A function that reads a checkpoint's parameters as NumPy arrays by name, whatever their sharding was."""

    def read(workdir: Path, step: int) -> dict[str, np.ndarray]:
        import jax
        import orbax.checkpoint as ocp

        folder = (workdir / "checkpoints" / str(step) / "params").resolve()
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            params = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        leaves, _ = jax.tree_util.tree_flatten_with_path(params)
        return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

    return read


@pytest.fixture(scope="session")
def read_rows() -> Callable[[Path], list[dict[str, float]]]:
    """A function that reads a workdir's metrics.jsonl and leaves out the metrics that depend on the machine's speed."""
    timing = {"pairs_per_second", "step_seconds", "data_wait", "device_hours", "mfu"}

    def read(workdir: Path) -> list[dict[str, float]]:
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in row.items() if name not in timing} for row in rows]

    return read


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; while Playwright drives it, no other event loop can run in this thread."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is installed: one of {', '.join(BROWSERS)}")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


# Lazy pictures load only when they scroll into view, so they are made eager before they are checked.
BROKEN_PICTURES = """async () => {
  const broken = [];
  for (const image of document.images) {
    image.loading = "eager";
    await image.decode().catch(() => broken.push(image.src));
  }
  return broken;
}"""


@pytest.fixture
def open_page(browser):
    """A function that opens a file in an offline Chromium; console messages and broken pictures fail the test."""
    contexts = []

    def open_page(path: Path, width: int = 1280, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page, messages = context.new_page(), []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(path.as_uri())
        assert not messages
        broken = page.evaluate(BROKEN_PICTURES)
        assert not broken, f"{len(broken)} pictures do not load; the first is {broken[0][:80]}"
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
            f"the page is wider than {width} px"
        )
        return page

    yield open_page
    for context in contexts:
        context.close()
