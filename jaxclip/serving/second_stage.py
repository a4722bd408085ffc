"""Opens a trained re-ranker as the second stage of a search."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.pipeline import text
from jaxclip.reranking import data as reranking_data
from jaxclip.reranking.first_stage import FirstStage, Split
from jaxclip.reranking.networks import Gated
from jaxclip.reranking.reranker import Tables, look_up, make_reranker
from jaxclip.runtime import mesh as meshes
from jaxclip.serving.reordering import Scored, SecondStage
from jaxclip.towers.checkpoints import Checkpoints, resolve_step
from jaxclip.towers.encoders import Encoders
from jaxclip.towers.params import Params, replicated


def find_first_stage(config: Config, workdir: Path, towers_config: Config, towers: Path, step: str) -> FirstStage:
    """Returns the towers of a workdir at the step that a re-ranker was trained on.

    Args:
      config: configuration of the re-ranker.
      workdir: workdir of the re-ranker.
      towers_config: configuration of the towers.
      towers: workdir of the towers.
      step: "latest" for the step that the re-ranker was trained on; any other value must name that step.

    Raises:
      UserError: the workdir holds no re-ranker, or its re-ranker was trained on other towers or at another step.
    """
    if config.task != "rerank":
        raise UserError(
            f"--rerank={workdir} is not a re-ranker: it was trained with task = {config.task}; "
            "give the workdir of a re-ranker"
        )
    try:
        stage = reranking_data.find_first_stage(
            replace(config, first_stage=str(towers), mesh=towers_config.mesh), workdir, towers_config
        )
    except UserError as error:
        raise UserError(f"--rerank={workdir}: {error}") from None
    if step != "latest" and resolve_step(step, Checkpoints(towers, read_only=True)) != stage.step:
        raise UserError(
            f"--step={step}: --rerank={workdir} re-orders the results of step {stage.step}; leave --step out"
        )
    return stage


def open_second_stage(
    config: Config, workdir: Path, stage: FirstStage, gallery: Split, encoders: Encoders
) -> SecondStage:
    """Returns the second stage of a gallery: a re-ranker's newest checkpoint, with the features on every device.

    Args:
      config: configuration of the re-ranker.
      workdir: workdir of the re-ranker.
      stage: the towers.
      gallery: the products, embedded by the towers (`first_stage.embed_gallery`).
      encoders: the compiled encoders of the towers.

    Raises:
      UserError: there is no checkpoint.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    step, towers = resolve_step("latest", checkpoints), stage.towers
    reads_tokens, tower_params = needs_tokens(config), cache(lambda: towers.cast_kernels(stage.params))

    def tokens(sentences: Sequence[str]) -> jax.Array:
        captions = [text.caption(sentence, {}, towers.preprocess) for sentence in sentences]
        context = towers.preprocess.context_length
        encoded = encoders.text_tokens(tower_params(), text.encode(towers.tokenizer, captions, context))
        return jnp.pad(encoded, ((0, 0), (0, (config.rerank.segments - 1) * context), (0, 0)))

    multiple = meshes.batch_multiple(towers.mesh)
    with jax.set_mesh(towers.mesh):
        if reads_tokens:
            gallery = replace(gallery, query_tokens=np.asarray(tokens([""] * multiple))[:0])
        bank = reranking_data.find_querybank(config, stage, workdir)
        vocabulary = reranking_data.find_vocabulary(gallery, workdir)
        gallery = reranking_data.with_features(gallery, stage, bank, vocabulary)
        model = make_reranker(config, gallery, mesh=towers.mesh, logit_scale=stage.logit_scale)
        params = checkpoints.restore_params(model.shapes, step)
        tables = {
            "features": {name: gallery.features[name] for name in model.features},
            "present": {name: gallery.present[name] for name in model.features},
        }
        tables = jax.device_put(tables, replicated(model.mesh))
    gated = issubclass(model.model, Gated)

    @jax.jit
    def score(params: Params, tables: Tables, query, items, first_scores, valid):
        features, present = look_up(tables, items)
        present = {name: has_feature & valid for name, has_feature in present.items()}
        network = nnx.merge(model.graph, params)
        if gated:
            gates, added = network.added(query, features, present)
            return first_scores + added.sum(axis=1), gates, added
        nothing = jnp.zeros((len(items), 0, items.shape[1]))
        return network(query, first_scores, features, present), nothing[..., 0], nothing

    def judge(sentences, vectors, items, first_scores, valid) -> Scored:
        padding = -len(items) % multiple

        def pad(rows: np.ndarray) -> np.ndarray:
            return np.concatenate([rows, np.repeat(rows[-1:], padding, axis=0)])

        with jax.set_mesh(towers.mesh):
            query = tokens([*sentences, *sentences[-1:] * padding]) if reads_tokens else pad(vectors)
            scored = score(params, tables, query, pad(items), pad(first_scores), pad(valid))
        return Scored(*(np.asarray(part)[: len(items)] for part in scored))

    explained = model.features if gated else ()
    return SecondStage(workdir.name, min(config.rerank.candidates, len(gallery.groups)), explained, judge)


def needs_tokens(config: Config) -> bool:
    """Returns whether a re-ranker reads token sequences of queries and pictures instead of their embeddings."""
    return config.rerank.preset == "cross_attention"
