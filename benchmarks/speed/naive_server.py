"""The server that one writes first: a route that encodes the text of its request.

python -m benchmarks.speed.naive_server MODEL PORT
"""

from __future__ import annotations

import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

import sempa_st


class Body(BaseModel):
    """Body of ``POST /v1/embeddings``."""

    input: str


def main() -> None:
    """Serve until the process is ended."""
    model = sempa_st.load(sys.argv[1], dtype="float32", device="cpu")
    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/embeddings")
    def embeddings(body: Body) -> dict[str, list[dict[str, list[float]]]]:
        return {"data": [{"embedding": model.encode(body.input, show_progress_bar=False).tolist()}]}

    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error")


if __name__ == "__main__":
    main()
