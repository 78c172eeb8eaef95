"""Three rows of each format that finetune/rows/formats.py reads, written by hand for this project;
prepare_sample_data.py puts them into data/formats/.
"""

import json
from typing import Any

WEATHER = {
    "name": "get_weather",
    "description": "查询一个城市的天气",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "城市名"}},
        "required": ["city"],
    },
}
PUMP = ("水泵漏油怎么办？", "先检查油封，老化的油封要更换。")
SEAL = ("油封多久换一次？", "一般六万公里检查一次，渗油就换。")
LIGHT = (
    "How do I change a headlight bulb?",
    "Switch the light off, open the cover behind it, turn the socket and replace the bulb.",
)
TAGS = ("部件#水泵*材质#铸铁*特点#耐用", "铸铁水泵，结实耐用，安静地陪您跑完每一公里。")
HUMAN, GPT = ("from", "human"), ("from", "gpt")


def said(role: tuple[str, str], text: str) -> dict[str, str]:
    """A turn of ShareGPT's format."""
    return dict([role, ("value", text)])


def message(role: str, content: str | list[dict] | None, **more: Any) -> dict[str, Any]:
    """A turn of OpenAI's format."""
    return {"role": role, "content": content, **more}


def ask_as(prompt: str, answer: str, layout: str = "{}") -> list[dict[str, str]]:
    """The three questions and answers under these keys, the questions in `layout`."""
    pairs = (PUMP, SEAL, LIGHT)
    return [{prompt: layout.format(question), answer: text} for question, text in pairs]


CALL = {"name": "get_weather", "arguments": {"city": "青岛"}}
SEEN = {"weather": "小雨", "temperature": 12}
REPORT = "青岛现在小雨，十二度，出门请带伞。"
ASK = "青岛天气怎么样？"

SAMPLES: dict[str, list[dict]] = {
    "instruction": [
        {"instruction": "抽取部件：", "input": "水泵漏油。", "output": "水泵"},
        {"instruction": "抽取部件：", "input": "今天天气好。", "output": ""},
        {"instruction": LIGHT[0], "output": LIGHT[1]},
    ],
    "text": ask_as("text", "answer"),
    "alpaca": [
        {"system": "你是一位修车师傅。", "instruction": PUMP[0], "input": "", "output": PUMP[1]},
        {
            "instruction": SEAL[0],
            "input": "车是柴油车。",
            "output": SEAL[1],
            "history": [list(PUMP)],
        },
        {"instruction": LIGHT[0], "input": "", "output": LIGHT[1], "history": []},
    ],
    "prompt": [
        {"prompt": PUMP[0], "response": PUMP[1], "history": []},
        {"prompt": SEAL[0], "response": SEAL[1], "history": [list(PUMP)]},
        {"prompt": LIGHT[0], "response": LIGHT[1], "history": [list(PUMP), list(SEAL)]},
    ],
    "question": ask_as("question", "answer"),
    "advertisegen": [
        {"content": TAGS[0], "summary": TAGS[1]},
        {"content": "部件#轮胎*特点#静音", "summary": "静音轮胎，把路噪留在车外。"},
        {"content": "部件#灯泡*颜色#暖白", "summary": "暖白灯光，照亮回家的路。"},
    ],
    "belle": ask_as("input", "target", "{} "),
    "context": ask_as("context", "target", "Instruction: {}\nAnswer: "),
    "scored": [
        {
            "prompt": PUMP[0],
            "answers": [{"answer": "不知道。", "score": 0}, {"answer": PUMP[1], "score": 1}],
            "prefix": "",
        },
        {
            "prompt": f"问题：{SEAL[0]}",
            "answers": [{"answer": SEAL[1], "score": 2}, {"answer": "每年。", "score": 2}],
            "prefix": "答：",
        },
        {
            "prompt": LIGHT[0],
            "answers": [{"answer": LIGHT[1], "score": 1}],
            "prefix": "",
            "data_type": "human_generated",
        },
    ],
    "document": [
        {"text": "水泵漏油时，先检查油封，老化的油封要更换。"},
        {"text": "油封一般六万公里检查一次。\n渗油就换。", "source": "手册"},
        {"text": "To change a headlight bulb, switch the light off first."},
    ],
    "sharegpt": [
        {
            "conversations": [
                said(HUMAN, PUMP[0]),
                said(GPT, PUMP[1]),
                said(HUMAN, SEAL[0]),
                said(GPT, SEAL[1]),
            ]
        },
        {
            "system": "你是一位修车师傅。",
            "conversations": [said(HUMAN, LIGHT[0]), said(GPT, LIGHT[1]), said(HUMAN, "谢谢！")],
        },
        {
            "conversations": [
                said(HUMAN, ASK),
                said(("from", "function_call"), json.dumps(CALL, ensure_ascii=False)),
                said(("from", "observation"), json.dumps(SEEN, ensure_ascii=False)),
                said(GPT, REPORT),
            ],
            "tools": json.dumps([WEATHER], ensure_ascii=False),
        },
    ],
    "openai": [
        {
            "messages": [
                message("system", "你是一位修车师傅。"),
                message("user", PUMP[0]),
                message("assistant", PUMP[1]),
                message("user", SEAL[0]),
                message("assistant", SEAL[1]),
            ]
        },
        {
            "messages": [
                message("user", [{"type": "text", "text": LIGHT[0]}]),
                message("assistant", LIGHT[1]),
            ]
        },
        {
            "messages": [
                message("user", ASK),
                message(
                    "assistant",
                    None,
                    tool_calls=[
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {
                                "name": CALL["name"],
                                "arguments": json.dumps(CALL["arguments"], ensure_ascii=False),
                            },
                        }
                    ],
                ),
                message("tool", json.dumps(SEEN, ensure_ascii=False), tool_call_id="call_1"),
                message("assistant", REPORT),
            ],
            "tools": [{"type": "function", "function": WEATHER}],
        },
    ],
    "chatglm3": [
        {
            "conversations": [
                message("system", "你是一位修车师傅。"),
                message("user", PUMP[0]),
                message("assistant", PUMP[1]),
                message("user", SEAL[0]),
                message("assistant", SEAL[1]),
            ]
        },
        {
            "conversations": [
                message("user", PUMP[0]),
                message("assistant", "不知道。", loss=False),
                message("user", LIGHT[0]),
                message("assistant", LIGHT[1]),
            ]
        },
        {
            "tools": [WEATHER],
            "conversations": [
                message("user", ASK),
                message("assistant", "我来查一下。"),
                {
                    "role": "tool",
                    "name": CALL["name"],
                    "parameters": CALL["arguments"],
                    "observation": SEEN,
                },
                message("assistant", REPORT),
            ],
        },
    ],
}


def render_samples() -> dict[str, bytes]:
    """{file name: content}: JSON lines; Belle's are Python literals, as its own files."""
    made = {}
    for name, rows in SAMPLES.items():
        text = ""
        for row in rows:
            text += repr(row) if name == "belle" else json.dumps(row, ensure_ascii=False)
            text += "\n"
        made[f"formats/{name}.jsonl"] = text.encode("utf-8")
    return made
