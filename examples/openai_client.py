"""Ask a server with the openai client: a chat, a stream, a form, embeddings.

python examples/openai_client.py [http://127.0.0.1:8000/v1]
"""

import json
import os
import sys

import openai

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
client = openai.OpenAI(base_url=url, api_key=os.environ.get("GLM_API_KEY", "-"))
model = client.models.list().data[0].id
messages = [{"role": "user", "content": "What is a water pump?"}]

# slo_s and priority are this server's own fields: see docs/server.md.
answer = client.chat.completions.create(
    model=model, messages=messages, max_tokens=64, extra_body={"slo_s": 30}
)
print("chat:", answer.choices[0].message.content)
print("lengths and deadline:", answer.glm_foundry)

print("stream:", end=" ", flush=True)
for chunk in client.chat.completions.create(
    model=model, messages=messages, max_tokens=64, stream=True
):
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

schema = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "useful": {"type": "boolean"}},
    "required": ["name", "useful"],
    "additionalProperties": False,
}
form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
answer = client.chat.completions.create(
    model=model, messages=messages, max_tokens=512, response_format=form
)
print("form:", json.loads(answer.choices[0].message.content))

vectors = client.embeddings.create(model=model, input=["pump", "valve"])
print("embeddings:", [len(entry.embedding) for entry in vectors.data])
