"""Search as one would write it with faiss, PyTorch and transformers, without batches of several requests."""

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

ON = "cuda" if torch.cuda.is_available() else "cpu"


def serve(workdir: str, folder: str) -> dict[str, Callable[[], str]]:
    """Returns the one call of a server that runs beside it: its address.

    The folder holds the text tower, vectors.npy and products.json, which is [ids, captions]; the workdir tokenizer and
    preprocessing. Each request goes through the tower alone, in one of the threads that FastAPI keeps for such
    functions, and through an IndexFlatIP over all vectors.
    """
    preprocess = Preprocess.load(Path(workdir))
    tokenizer = text.load_tokenizer(Path(workdir) / "tokenizer")
    tower = CLIPTextModelWithProjection.from_pretrained(folder, local_files_only=True).eval().to(ON)
    ids, captions = json.loads((Path(folder) / "products.json").read_text())
    vectors = np.load(Path(folder) / "vectors.npy")
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    app = FastAPI()

    @app.get("/v1/search")
    def search(q: str, k: int) -> dict:
        tokens = text.encode(tokenizer, [text.caption(q, {}, preprocess)], preprocess.context_length)
        with torch.inference_mode():
            query = tower(input_ids=torch.from_numpy(tokens).long().to(ON)).text_embeds
        query = torch.nn.functional.normalize(query, dim=-1).float().cpu().numpy()
        scores, numbers = index.search(query, k)
        found = zip(numbers[0].tolist(), scores[0].tolist(), strict=True)
        results = [
            {
                "id": ids[number],
                "score": score,
                "caption": captions[number],
                "image": f"/v1/images/{quote(ids[number])}",
            }
            for number, score in found
            if number >= 0
        ]
        return {"results": results}

    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    threading.Thread(target=server.run, args=([listening],), daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return {"address": lambda: f"http://127.0.0.1:{listening.getsockname()[1]}"}
