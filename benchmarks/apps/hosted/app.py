"""One text in, its vector out; and a model that returns at once."""

from fastapi import FastAPI
from models import echo, embedder
from pydantic import BaseModel

app = FastAPI()


class Text(BaseModel):
    text: str


@app.post("/embed")
async def embed(text: Text) -> list[float]:
    vector = await embedder.aencode(text.text)
    return vector.tolist()


@app.post("/echo")
async def answer(text: Text) -> str:
    return await echo.arun(text.text)
