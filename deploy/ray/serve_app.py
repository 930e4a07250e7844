"""A Ray Serve application: replicas of ``vllm serve``, each with its GPUs on one node, behind one endpoint.

Each replica runs vLLM's own server as a process beside it and passes requests on, so that clients see exactly vLLM's
API. (``ray.serve.llm`` reaches into vLLM's modules: Ray 2.56 asks for vLLM 0.22 and does not import with 0.32.)

    serve run serve_app:build arguments='["Qwen/Qwen3-8B", "--attention-backend", "rc_topk"]'
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence

import httpx
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from ray import serve

app = FastAPI()
OWN_CONNECTION = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}
"""Headers that are about a connection, not about what goes over it."""


class Settings(BaseModel):
    """The application's ``args``.

    Attributes:
        arguments: of ``vllm serve``.
        replicas: how many; more than one node has GPUs for are spread over several.
        gpus: per replica, as many as ``--tensor-parallel-size`` times ``--pipeline-parallel-size``.
        start_limit: seconds until a replica must be healthy.
    """

    arguments: Sequence[str]
    replicas: int = 1
    gpus: float = 1
    start_limit: float = 1200


@serve.deployment
@serve.ingress(app)
class Replica:
    """One ``vllm serve`` on a loopback port."""

    async def __init__(self, settings: Settings) -> None:
        """Ends when the server is healthy: until then Ray Serve sends nothing here and keeps what runs already.

        Raises:
            RuntimeError: the server ended.
            TimeoutError: it took longer than ``start_limit``.
        """
        self.settings = settings
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        # No limit on time or connections: vLLM queues, and answers may be long.
        limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=None, limits=limits)
        command = ["serve", *self.settings.arguments, "--host", "127.0.0.1", "--port", str(self.port)]
        self.process = await asyncio.create_subprocess_exec("vllm", *command)
        try:
            async with asyncio.timeout(settings.start_limit):
                while self.process.returncode is None:
                    if await self.healthy():
                        return
                    await asyncio.sleep(1)
        except TimeoutError:
            self.process.kill()
            raise
        raise RuntimeError(f"vllm ended with exit status {self.process.returncode}")

    async def healthy(self) -> bool:
        """What the server's own health check says."""
        try:
            return (await self.http.get("/health", timeout=20)).status_code == 200
        except httpx.TransportError:
            return False

    async def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        if not await self.healthy():
            raise RuntimeError("the server of this replica is not healthy")

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def forward(self, path: str, request: Request) -> Response:
        """Pass a request on, and the answer back as it comes."""
        if path == "metrics":
            # Of one replica now and of another at the next scrape, which would look like counters that start anew.
            raise HTTPException(404, "each replica counts for itself; its log has what rc_topk reads")
        headers = {k: v for k, v in request.headers.items() if k not in OWN_CONNECTION}
        url = httpx.URL(path=f"/{path}", query=request.url.query.encode())
        onward = self.http.build_request(request.method, url, headers=headers, content=await request.body())
        answer = await self.http.send(onward, stream=True)

        async def body() -> AsyncIterator[bytes]:
            # Closed when the client hangs up, too: vLLM then aborts the request.
            try:
                async for chunk in answer.aiter_raw():
                    yield chunk
            finally:
                await answer.aclose()

        kept = {k: v for k, v in answer.headers.items() if k not in OWN_CONNECTION}
        return StreamingResponse(body(), answer.status_code, kept)

    async def __del__(self) -> None:
        if hasattr(self, "process") and self.process.returncode is None:
            self.process.terminate()
            await self.process.wait()


def build(settings: Settings) -> serve.Application:
    """The application that ``import_path: serve_app:build`` names."""
    return Replica.options(
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": settings.gpus},
        max_ongoing_requests=1024,  # vLLM's scheduler decides what waits, not Ray Serve
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=120,
    ).bind(settings)
