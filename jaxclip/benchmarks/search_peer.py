"""A plain search server with faiss, PyTorch and transformers, which encodes each request separately."""

import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from transformers import CLIPTextModelWithProjection

from jaxclip.pipeline import text
from jaxclip.pipeline.preprocess import Preprocess

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def serve(workdir: str, folder: str) -> dict[str, Callable[[], str]]:
    """Starts the server in a thread and returns the only call of this worker, "address", which returns its URL.

    A request is encoded in one of FastAPI's worker threads, and searched in an IndexFlatIP over all vectors.

    Args:
      workdir: folder of the run, with the tokenizer and the preprocessing.
      folder: folder with the text tower, the file "pooling", vectors.npy, and gallery.json with the products' "ids"
        and "captions".
    """
    preprocess = Preprocess.load(Path(workdir))
    tokenizer = text.load_tokenizer(Path(workdir) / "tokenizer")
    tower = CLIPTextModelWithProjection.from_pretrained(folder, local_files_only=True).eval().to(DEVICE)
    gallery = json.loads((Path(folder) / "gallery.json").read_text())
    ids, captions, pooling = gallery["ids"], gallery["captions"], (Path(folder) / "pooling").read_text()
    vectors = np.load(Path(folder) / "vectors.npy")
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    app = FastAPI()

    @app.get("/v1/search")
    def search(q: str, k: int) -> dict:
        tokens = text.encode(tokenizer, [text.caption(q, {}, preprocess)], preprocess.context_length)
        with torch.inference_mode():
            query = embeddings(tower, torch.from_numpy(tokens).long().to(DEVICE), pooling)
        query = torch.nn.functional.normalize(query, dim=-1).float().cpu().numpy()
        scores, numbers = index.search(query, k)
        nearest = zip(numbers[0].tolist(), scores[0].tolist(), strict=True)
        results = [
            {
                "id": ids[number],
                "score": score,
                "caption": captions[number],
                "image": f"/v1/images/{ids[number]}",
            }
            for number, score in nearest
            if number >= 0
        ]
        return {"results": results}

    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    threading.Thread(target=server.run, args=([listening],), daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return {"address": lambda: f"http://127.0.0.1:{listening.getsockname()[1]}"}


def embeddings(tower: CLIPTextModelWithProjection, ids: torch.Tensor, pooling: str) -> torch.Tensor:
    """Returns the embeddings, (B, D), of the `ids` of B sentences of T tokens each.

    The outputs are pooled at the end token ("end") or averaged ("mean"). With "mean" the tokens attend to each other
    in both directions, as in `models.clip.TextTower`.
    """
    if pooling == "end":
        return tower(input_ids=ids).text_embeds
    model = tower.text_model
    end = (ids == tower.config.eos_token_id).int().argmax(dim=1, keepdim=True)
    inside = torch.arange(ids.shape[1], device=ids.device) <= end  # (B, T)
    hidden = model.encoder(inputs_embeds=model.embeddings(input_ids=ids), attention_mask=inside[:, None, None])
    states = model.final_layer_norm(hidden.last_hidden_state) * inside[..., None]
    return tower.text_projection(states.sum(dim=1) / inside.sum(dim=1, keepdim=True))
