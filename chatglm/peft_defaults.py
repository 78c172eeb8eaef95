"""The modules that peft's methods train where their configuration names none.

peft knows ChatGLM for LoRA and what follows it; imported right after peft.utils.constants, this
adds the others.
"""

from peft.utils import constants

TYPE = "chatglm"
ATTENTION = "query_key_value"
FEED_FORWARD = "mlp.dense_4h_to_h"
NORMS = ["input_layernorm", "post_attention_layernorm", "final_layernorm"]

DEFAULTS = {
    "ADALORA_TARGET": [ATTENTION],
    "VBLORA_TARGET": [ATTENTION],
    "IA3_TARGET": [ATTENTION, FEED_FORWARD],
    "IA3_FEEDFORWARD": [FEED_FORWARD],
    "LNTUNING_TARGET": NORMS,
}
for _name, _modules in DEFAULTS.items():
    # another version of peft may lack a method, or know ChatGLM for it
    _mapping = getattr(constants, f"TRANSFORMERS_MODELS_TO_{_name}_MODULES_MAPPING", {})
    _mapping.setdefault(TYPE, _modules)
