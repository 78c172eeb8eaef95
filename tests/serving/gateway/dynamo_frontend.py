"""NVIDIA Dynamo's frontend with its KV router, before an engine that records what it is given.

python dynamo_frontend.py MODEL PORT FILE: run in an environment that has ai-dynamo-runtime. Each
request that reaches the engine is a line of FILE, {"routing"}; it takes ENGINE_S, and the router
holds the others until its first token.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvloop
from dynamo.llm import (
    EngineType,
    EntrypointArgs,
    KvRouterConfig,
    ModelInput,
    ModelRuntimeConfig,
    ModelType,
    RouterConfig,
    RouterMode,
    WorkerType,
    make_engine,
    register_model,
    run_input,
)
from dynamo.runtime import DistributedRuntime

ENGINE_S = 0.4
BLOCK = 16


async def serve(model: str, port: int, file: str) -> None:
    runtime = DistributedRuntime(asyncio.get_running_loop(), "mem", "tcp")
    endpoint = runtime.endpoint("dynamo.backend.generate")

    async def generate(request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        with open(file, "a") as out:
            out.write(json.dumps({"routing": request["routing"]}) + "\n")
        await asyncio.sleep(ENGINE_S)
        yield {"token_ids": [40, 41], "index": 0}
        yield {"token_ids": [42], "finish_reason": "stop", "index": 0}

    kv = KvRouterConfig(
        use_kv_events=False, router_track_output_blocks=True, router_queue_threshold=0.01
    )
    frontend = EntrypointArgs(
        EngineType.Dynamic,
        http_host="127.0.0.1",
        http_port=port,
        router_config=RouterConfig(RouterMode.KV, kv),
        kv_cache_block_size=BLOCK,
    )
    engine = await make_engine(runtime, frontend)
    sizes = ModelRuntimeConfig()
    sizes.max_num_batched_tokens, sizes.total_kv_blocks, sizes.max_num_seqs = 100, 1000, 8
    serving = asyncio.ensure_future(endpoint.serve_endpoint(generate))
    await register_model(
        ModelInput.Tokens,
        ModelType.Chat | ModelType.Completions,
        endpoint,
        model,
        "m",
        worker_type=WorkerType.Aggregated,
        kv_cache_block_size=BLOCK,
        runtime_config=sizes,
        ignore_weights=True,
    )
    await run_input(runtime, "http", engine)
    serving.cancel()


uvloop.run(serve(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
