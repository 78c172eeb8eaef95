"""Let a model call functions of this program: ChatGLM3, GLM-4, Qwen, Llama 3.1.

python examples/tools.py [http://127.0.0.1:8000/v1]
"""

import json
import os
import sys

import openai

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
client = openai.OpenAI(base_url=url, api_key=os.environ.get("GLM_API_KEY", "-"))
model = client.models.list().data[0].id

WEATHER = {"Beijing": "rain, 12 degrees", "Shanghai": "sun, 20 degrees"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": list(WEATHER)}},
                "required": ["city"],
            },
        },
    }
]

messages = [{"role": "user", "content": "What is the weather in Beijing?"}]
# "required" forces a call by a grammar; "auto", the default, lets the model decide.
asked = client.chat.completions.create(
    model=model, messages=messages, tools=TOOLS, tool_choice="required", max_tokens=256
)
message = asked.choices[0].message
messages.append(message.model_dump(exclude_none=True))
for call in message.tool_calls or []:
    arguments = json.loads(call.function.arguments)
    print("call:", call.function.name, arguments)
    result = WEATHER[arguments["city"]]
    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})

answer = client.chat.completions.create(
    model=model, messages=messages, tools=TOOLS, tool_choice="none", max_tokens=64
)
print("answer:", answer.choices[0].message.content)
