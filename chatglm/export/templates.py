"""Chat templates (Jinja) of ChatGLM2, ChatGLM3 and GLM-4 with tools, for programs without us.

They render text whose ids by the exported tokenizer are those of `Family.encode_chat`. Two things
cannot be told apart in text: a control token that a message spells is read as one, and the line
ends that a GLM-4 message begins with join its header's, as in the published template.
"""

import json

from ..glm4 import BUILT_IN_TOOLS, CALL_FORM, GREETING, TOOLS_HEADER
from ..histories import ROLES, TOOL_PREAMBLE

TEXT = """\
{%- macro text(content) -%}
{%- if content is string -%}{{- content -}}
{%- elif content -%}{%- for part in content -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
CHECK_ROLE = """\
{%- set role = 'observation' if m['role'] == 'tool' else m['role'] -%}
{%- if role not in ROLES -%}
{{- raise_exception('role is one of ROLE_NAMES, got ' ~ role) -}}
{%- endif -%}
"""
GLM2 = """\
{{- '[gMASK]<sop>' -}}
{%- if tools -%}{{- raise_exception('ChatGLM2-6B knows no tools') -}}{%- endif -%}
{%- set ns = namespace(round=0, system='', said=false) -%}
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}
{%- if m['content'] -%}{%- set ns.system = ns.system ~ text(m['content']) ~ '\\n' -%}{%- endif -%}
{%- elif m['role'] == 'user' -%}
{%- if ns.round -%}{{- '\\n\\n' -}}{%- endif -%}
{%- set ns.round = ns.round + 1 -%}
{{- '[Round ' ~ ns.round ~ ']\\n\\n问：' ~ ns.system ~ text(m['content']) -}}
{%- set ns.system = '' -%}
{%- set ns.said = false -%}
{%- if not loop.last or add_generation_prompt -%}{{- '\\n\\n答：' -}}{%- endif -%}
{%- elif m['role'] == 'assistant' and not m['tool_calls'] -%}
{%- if not ns.round -%}
{%- set ns.round = 1 -%}{{- '[Round 1]\\n\\n问：\\n\\n答：' -}}
{%- endif -%}
{%- if m['content'] -%}
{{- ('\\n' if ns.said else '') ~ text(m['content']) -}}{%- set ns.said = true -%}
{%- endif -%}
{%- else -%}
{{- raise_exception('ChatGLM2-6B knows system, user and assistant, and no tools') -}}
{%- endif -%}
{%- endfor -%}
"""
# The space is what SentencePiece writes before a text of its own.
GLM3 = """\
{%- macro said(role, metadata, content) -%}
{{- '<|' ~ role ~ '|>' ~ metadata ~ '\\n' ~ (' ' ~ content if content else '') -}}
{%- endmacro -%}
{%- macro with_tools(content, tools) -%}
{{- said('system', '', (content or PREAMBLE) ~ '\\n' ~ tools | tojson(indent=4)) -}}
{%- endmacro -%}
{{- '[gMASK]<sop>' -}}
{%- if tools and messages[0]['role'] != 'system' -%}{{- with_tools('', tools) -}}{%- endif -%}
{%- for m in messages -%}
CHECK_ROLE
{%- set content = text(m['content']) -%}
{%- set given = tools if tools and loop.first else m['tools'] -%}
{%- if role == 'system' and given is defined and given is not none -%}
{{- with_tools(content, given) -}}
{%- elif m['content'] is string or content -%}
{%- if content or not m['tool_calls'] -%}
{{- said(role, m['metadata'] or '', content) -}}
{%- endif -%}
{%- endif -%}
{%- for call in m['tool_calls'] or [] -%}
{%- set function = call['function'] or call -%}
{%- set arguments = function['arguments'] or {} -%}
{%- if arguments is string -%}
{{- raise_exception('the arguments of a call are an object here, not text') -}}
{%- endif -%}
{%- set ns = namespace(values='') -%}
{%- for name in arguments -%}
{%- set value = '%r' | format(arguments[name]) -%}
{%- set ns.values = ns.values ~ (', ' if not loop.first else '') ~ name ~ '=' ~ value -%}
{%- endfor -%}
{%- set written = '```python\\ntool_call(' ~ ns.values ~ ')\\n```' -%}
{{- said('assistant', function['name'], written) -}}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
GLM4 = """\
{%- macro said(role, metadata, content) -%}
{%- if content -%}{{- '<|' ~ role ~ '|>' ~ metadata ~ '\\n' ~ content -}}{%- endif -%}
{%- endmacro -%}
{%- set built_in = BUILT_IN -%}
{%- macro with_tools(tools) -%}
{{- '<|system|>\\n' ~ GREETING ~ HEADER -}}
{%- for tool in tools -%}
{%- set kind = tool['type'] or 'function' -%}
{%- if kind in built_in -%}
{{- '\\n## ' ~ kind ~ '\\n\\n' ~ built_in[kind] -}}
{%- else -%}
{%- set function = tool['function'] or tool -%}
{{- '\\n## ' ~ function['name'] ~ '\\n\\n' ~ function | tojson(indent=4) ~ '\\n' ~ CALL_FORM -}}
{%- endif -%}
{%- endfor -%}
{%- endmacro -%}
{{- '[gMASK]<sop>' -}}
{%- if tools and messages[0]['role'] != 'system' -%}{{- with_tools(tools) -}}{%- endif -%}
{%- for m in messages -%}
CHECK_ROLE
{%- set content = text(m['content']) -%}
{%- set given = tools if tools and loop.first else m['tools'] -%}
{%- if role == 'system' -%}
{%- if given is defined and given is not none -%}{{- with_tools(given) -}}{%- endif -%}
{{- said(role, '', content) -}}
{%- else -%}
{{- said(role, m['metadata'] or '', content) -}}
{%- endif -%}
{%- for call in m['tool_calls'] or [] -%}
{%- set function = call['function'] or call -%}
{%- set arguments = function['arguments'] or {} -%}
{%- set written = arguments if arguments is string else arguments | tojson -%}
{{- said('assistant', function['name'], written) -}}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def jinja_text(value: object) -> str:
    """A Jinja literal of text, or of a table of texts."""
    return json.dumps(value, ensure_ascii=False)


def exported_template(family: str, assistant_name: str) -> str:
    """The chat template of a family, a key of FAMILIES.

    Args:
        assistant_name: what GLM-4's prompt with tools calls the assistant.
    """
    check = CHECK_ROLE.replace("ROLES", jinja_text(ROLES)).replace("ROLE_NAMES", ", ".join(ROLES))
    if family == "glm2":
        return TEXT + GLM2
    if family == "glm3":
        written = GLM3.replace("PREAMBLE", jinja_text(TOOL_PREAMBLE))
        return TEXT + written.replace("CHECK_ROLE\n", check)
    written = GLM4.replace("BUILT_IN", jinja_text(BUILT_IN_TOOLS))
    written = written.replace("GREETING", jinja_text(GREETING.format(name=assistant_name)))
    written = written.replace("HEADER", jinja_text(TOOLS_HEADER))
    written = written.replace("CALL_FORM", jinja_text(CALL_FORM))
    return TEXT + written.replace("CHECK_ROLE\n", check)
