"""A mixture of experts in two tiers of memory behind the API of OpenAI.

    pip install "haq[serve]"
    python examples/serve_openai.py mixtral-int8 --gpu-memory 16GiB --statistics routing.npz
    curl localhost:8000/v1/completions --json '{"prompt": "Once upon", "max_tokens": 20}'

It shows how to put haq into a program, and is no product: it answers one request after the other,
to anybody who asks, and what it does not know it refuses. Without a GPU, --device cpu tries it.
"""

import argparse
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, TextIteratorStreamer

import haq


class Asked(BaseModel):
    """What completions and chats have in common, with the defaults of OpenAI."""

    model_config = ConfigDict(extra="forbid")  # Nothing is left out silently.
    model: str | None = None
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: str | list[str] = []
    seed: int | None = None
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] = {}

    def sampling(self) -> dict[str, Any]:
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


class Completion(Asked):
    prompt: str


class Chat(Asked):
    messages: list[dict[Literal["role", "content"], str]]
    max_completion_tokens: int | None = Field(None, ge=1)


class Answer(StoppingCriteria):
    """One answer: a thread writes it, the server reads it piece by piece, and may stop it."""

    def __init__(self, server: "Server", ids: torch.Tensor, asked: Asked, limit: int) -> None:
        self.server, self.ids, self.asked, self.limit = server, ids, asked, limit
        self.stops = [s for s in ([asked.stop] if isinstance(asked.stop, str) else asked.stop) if s]
        self.streamer = TextIteratorStreamer(server.tokenizer, True, skip_special_tokens=True)
        self.stopped = threading.Event()
        self.tokens, self.finish_reason = 0, "length"

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """What `generate` asks after every token: is it to stop?"""
        self.tokens = input_ids.shape[1] - self.ids.shape[1]
        return torch.full((len(input_ids),), self.stopped.is_set(), device=input_ids.device)

    def write(self) -> None:
        """In a thread, when it is its turn."""
        try:
            if self.stopped.is_set():  # The client went away while others had their turn.
                return
            if self.asked.seed is not None:
                torch.manual_seed(self.asked.seed)
            model = self.server.offloader.model
            written = model.generate(
                self.ids.to(model.device),
                attention_mask=torch.ones_like(self.ids, device=model.device),
                max_new_tokens=self.limit,
                streamer=self.streamer,
                stopping_criteria=[self],
                **self.asked.sampling(),
            )
            ends = model.generation_config.eos_token_id
            if int(written[0, -1]) in (ends if isinstance(ends, list) else [ends]):
                self.finish_reason = "stop"
        finally:
            self.streamer.end()

    def pieces(self) -> Iterator[str]:
        """The text as it comes, without the string that it stops at and what is behind it."""
        writing = self.server.turns.submit(self.write)
        text, sent = "", 0
        for piece in self.streamer:
            text += piece
            ends = [at for at in map(text.find, self.stops) if at >= 0]
            if ends:
                self.stopped.set()
                writing.result()
                self.finish_reason = "stop"
                yield text[sent : min(ends)]
                return
            # What may be the beginning of such a string waits for what comes next.
            begun = (n for s in self.stops for n in range(1, len(s)) if text.endswith(s[:n]))
            known = len(text) - max(begun, default=0)
            yield text[sent:known]
            sent = known
        writing.result()  # Raises what the thread did.
        yield text[sent:]

    async def arriving(self) -> AsyncIterator[str]:
        """The same for a server that has other things to do; if it loses interest, that is it."""
        pieces = filter(None, self.pieces())
        try:
            while (piece := await run_in_threadpool(next, pieces, None)) is not None:
                yield piece
        finally:
            self.stopped.set()

    def usage(self) -> dict[str, int]:
        given, new = self.ids.shape[1], self.tokens
        return {"prompt_tokens": given, "completion_tokens": new, "total_tokens": given + new}


class Server:
    """An app around a model that an offloader is attached to."""

    def __init__(self, name: str, offloader: haq.ExpertOffloader, tokenizer: Any) -> None:
        self.name, self.offloader, self.tokenizer = name, offloader, tokenizer
        self.turns = ThreadPoolExecutor(1)  # One answer at a time; the others wait for their turn.
        longest = offloader.config.max_length
        self.longest = min(longest, offloader.model.config.max_position_embeddings)

    def app(self) -> FastAPI:
        app = FastAPI(title="haq")
        app.get("/v1/models")(self.models)
        app.post("/v1/completions")(self.complete)
        app.post("/v1/chat/completions")(self.chat)
        app.get("/report")(lambda: self.offloader.report().to_dict())
        for kind in (RequestValidationError, HTTPException, Exception):
            app.add_exception_handler(kind, refused)
        return app

    def models(self) -> dict[str, Any]:
        data = {"id": self.name, "object": "model", "created": 0, "owned_by": "haq"}
        return {"object": "list", "data": [data]}

    async def complete(self, asked: Completion, request: Request) -> Response:
        ids = self.tokenizer(asked.prompt, return_tensors="pt")["input_ids"]
        return await self.reply(False, ids, asked, asked.max_tokens, request)

    async def chat(self, asked: Chat, request: Request) -> Response:
        if self.tokenizer.chat_template is None:
            raise HTTPException(400, f"{self.name} has no chat template. Use /v1/completions.")
        ids = self.tokenizer.apply_chat_template(
            asked.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        limit = asked.max_completion_tokens or asked.max_tokens
        return await self.reply(True, ids, asked, limit, request)

    async def reply(
        self, chat: bool, ids: torch.Tensor, asked: Asked, limit: int, request: Request
    ) -> Response:
        if asked.model not in (None, self.name):
            raise HTTPException(404, f"There is {self.name} here, and no {asked.model}.")
        if not ids.numel() or ids.shape[1] + limit > self.longest:
            what = f"1 to {self.longest} tokens, got {ids.numel()} and {limit}"
            raise HTTPException(400, f"Prompt and answer must be {what}.")
        answer = Answer(self, ids, asked, limit)
        about = {"id": uuid.uuid4().hex, "created": int(time.time()), "model": self.name}
        if asked.stream:
            events = self.events(chat, answer, about)
            return StreamingResponse(events, media_type="text/event-stream")
        text = ""
        async for piece in answer.arriving():
            text += piece
            if await request.is_disconnected():
                answer.stopped.set()
        says = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choice = {"index": 0, "logprobs": None, "finish_reason": answer.finish_reason} | says
        kind = "chat.completion" if chat else "text_completion"
        return JSONResponse(about | {"object": kind, "choices": [choice], "usage": answer.usage()})

    async def events(self, chat: bool, answer: Answer, about: dict[str, Any]) -> AsyncIterator[str]:
        kind = "chat.completion.chunk" if chat else "text_completion"

        def event(*says: dict[str, Any], reason: str | None = None, **more: Any) -> str:
            choices = [{"index": 0, "logprobs": None, "finish_reason": reason} | s for s in says]
            values = about | {"object": kind, "choices": choices} | more
            return f"data: {json.dumps(values)}\n\n"

        if chat:
            yield event({"delta": {"role": "assistant", "content": ""}})
        async for piece in answer.arriving():
            yield event({"delta": {"content": piece}} if chat else {"text": piece})
        yield event({"delta": {}} if chat else {"text": ""}, reason=answer.finish_reason)
        if answer.asked.stream_options.get("include_usage"):
            yield event(usage=answer.usage())
        yield "data: [DONE]\n\n"


def refused(request: Request, why: Exception) -> Response:
    """What went wrong, in the form of OpenAI."""
    status, message, param = 500, f"{type(why).__name__}: {why}", None
    if isinstance(why, RequestValidationError):
        first = why.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        status, message = 400, f"`{param}`: {first['msg']}"
    elif isinstance(why, HTTPException):
        status, message = why.status_code, why.detail
    kind = "server_error" if status >= 500 else "invalid_request_error"
    content = {"message": message, "type": kind, "param": param, "code": None}
    return JSONResponse({"error": content}, status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="directory of an int8 or float model, or a hub name")
    parser.add_argument("--gpu-memory", help='what it may use of the GPU: "16GiB"')
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--statistics", type=Path, help="what `haq profile` wrote")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens, prompt and answer")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    int8 = (Path(given.model) / "haq.json").is_file()
    load = haq.from_pretrained if int8 else AutoModelForCausalLM.from_pretrained
    with haq.ExpertOffloader(
        load(given.model),
        device=given.device,
        gpu_memory=given.gpu_memory,
        statistics=given.statistics and haq.RoutingStatistics.load(given.statistics),
        config=haq.OffloadConfig(max_length=given.max_length),
    ) as offloader:
        print(offloader.placement)
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        uvicorn.run(Server(Path(given.model).name, offloader, tokenizer).app(), port=given.port)


if __name__ == "__main__":
    main()
